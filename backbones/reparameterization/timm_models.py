"""Other models of timm: timm's own hooks, and pairs of linear layer and batch norm."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import timm.models
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from backbones import merge
from backbones.errors import EquivalenceError, UnsupportedError
from backbones.reparameterization.own_models import (
    TOLERANCE,
    ReparamReport,
    relative_difference,
    require_eval,
    sizes_of,
)

__all__ = ["merge_timm_model"]

Pair = tuple[str, str, str]  # a module, and its children: a linear layer and the norm after it


def merge_timm_model(
    model: nn.Module, *, inplace: bool, verify: bool
) -> tuple[nn.Module, ReparamReport]:
    """Call timm's own hooks and fold batch norms into the linear layers before them.

    Which neighbors run one after the other is unknown, so each fold is tried, and undone where it
    changes the outputs. `verify` refuses timm's hooks where they do.
    """
    require_eval(model)
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    size = cfg.get("input_size")
    if size is None:
        raise UnsupportedError(
            f"{type(model).__name__} is no model of this package or of timm, and says nothing of"
            " the input (pretrained_cfg['input_size']) to compare outputs on"
        )
    x = torch.randn(1, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    twin = copy.deepcopy(model).cpu().double()
    before = _outputs(twin, x)
    twin = _through_hooks(twin)
    difference = _difference(before, _outputs(twin, x))
    if verify and not difference <= TOLERANCE:
        raise EquivalenceError(
            f"timm's own re-parameterization changes {type(model).__name__}: outputs differ by"
            f" {difference:.1e} of the largest value. The model is unchanged"
        )
    pairs = _foldable(twin, _pairs(twin), before, x)
    sizes = sizes_of([model])
    if not inplace:
        model = copy.deepcopy(model)
    model = _through_hooks(model)
    with merge.recorded() as merges:
        _fold(model, pairs)
    _fold(twin, pairs)
    parameters, entries = zip(sizes, sizes_of([model]))
    largest = _difference(before, _outputs(twin, x)) if verify else None
    return model, ReparamReport(dict(merges), parameters, entries, None, largest)


def _through_hooks(model: nn.Module) -> nn.Module:
    """Call timm's hooks, in place. Some of them make new layers of PyTorch's default type."""
    dtype, default = next(model.parameters()).dtype, torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        return timm.models.reparameterize_model(model, inplace=True)
    finally:
        torch.set_default_dtype(default)


def _pairs(model: nn.Module) -> list[Pair]:
    """Neighboring children that look like a linear layer and its norm."""
    found = []
    for name, module in model.named_modules():
        children = list(module.named_children())
        for (first, linear), (second, norm) in pairwise(children):
            kinds = (nn.BatchNorm1d, nn.BatchNorm2d, BatchNormAct2d)
            width = getattr(linear, "out_channels", getattr(linear, "out_features", None))
            if merge.is_linear_layer(linear) and type(norm) in kinds and norm.num_features == width:
                found.append((name, first, second))
    return found


def _foldable(model: nn.Module, pairs: list[Pair], expected: list[Tensor], x: Tensor) -> list[Pair]:
    """Return the pairs whose folding leaves the outputs equal, halving where it does not."""
    if not pairs:
        return []
    trial = copy.deepcopy(model)
    _fold(trial, pairs)
    if _difference(expected, _outputs(trial, x)) <= TOLERANCE:
        return pairs
    if len(pairs) == 1:
        return []
    middle = len(pairs) // 2
    return [
        pair
        for half in (pairs[:middle], pairs[middle:])
        for pair in _foldable(model, half, expected, x)
    ]


def _fold(model: nn.Module, pairs: list[Pair]) -> None:
    for name, first, second in pairs:
        parent = model.get_submodule(name)
        norm: Any = parent.get_submodule(second)
        act: nn.Module = nn.Identity()
        if isinstance(norm, BatchNormAct2d):
            act, norm.act = nn.Sequential(norm.drop, norm.act), nn.Identity()
        fresh = merge.norm_into_previous(parent.get_submodule(first), norm)
        if isinstance(fresh, nn.Identity):
            fresh = act
        setattr(parent, second, fresh.eval())


def _outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        outputs = model(x)
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _difference(old: list[Tensor], new: list[Tensor]) -> float:
    return max(relative_difference(a, b) for a, b in zip(old, new, strict=True))
