"""Re-parameterization of any model: ours, timm's instances of our models, others of timm."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import timm.models
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from backbones import merge, reparam
from backbones.errors import EquivalenceError, UnsupportedError
from backbones.registry import build, registry
from backbones.reparam import (
    TOLERANCE,
    ReparamReport,
    relative_difference,
    require_eval,
    smallest_input,
)
from backbones.skeleton import StagedBackbone

__all__ = ["as_ours", "reparameterize", "reparameterize_with_report"]

Pair = tuple[str, str, str]  # a module, and its children: a map and the batch norm after it


def reparameterize(model: nn.Module, *, inplace: bool = False, verify: bool = True) -> nn.Module:
    """Merge everything in a model that can be merged exactly.

    The model may be one of this package, alone or anywhere inside another module, of any type and
    memory layout, pruned or with `features_only`; or timm's own instance of a model that this
    package has too, which is rebuilt as ours; or any other model of timm, which goes through
    timm's own hooks and whose pairs of convolution and batch norm are folded where the outputs
    stay equal. Doing it twice changes nothing.

    Args:
        model: in evaluation mode.
        inplace: change `model` itself instead of a copy.
        verify: compare outputs before and after in float64, on a copy.

    Returns:
        The model in deploy form.

    Raises:
        UnsupportedError: the model is in training mode or of unknown input, or timm's own instance
            is to be changed in place.
        EquivalenceError: the two forms differ; `model` is unchanged. The message names the first
            module that differs.
    """
    return _reparameterize(model, inplace, verify, count=False)[0]


def reparameterize_with_report(
    model: nn.Module, *, inplace: bool = False, verify: bool = True
) -> tuple[nn.Module, ReparamReport]:
    """As :func:`reparameterize`, and also return what was done."""
    return _reparameterize(model, inplace, verify, count=True)


def _reparameterize(
    model: nn.Module, inplace: bool, verify: bool, count: bool
) -> tuple[nn.Module, ReparamReport]:
    options = {"verify": verify, "count_operations": count}
    if any(reparam.backbones_in(model)):
        return reparam.reparameterize(model, inplace=inplace, **options)
    ours = as_ours(model)
    if ours is None:
        return _reparameterize_foreign(model, inplace, verify)
    if inplace:
        raise UnsupportedError(
            f"{type(model).__name__} is timm's own and is rebuilt as ours, which cannot happen in"
            " place; use the model that reparameterize(model) returns"
        )
    return reparam.reparameterize(ours, inplace=True, **options)


def as_ours(model: nn.Module) -> StagedBackbone | None:
    """Rebuild timm's own instance of a model that this package has too, weights included.

    Returns:
        Our model, in the same mode and of the same type; None where `model` is none of these.

    Raises:
        UnsupportedError: the instance was created with arguments that ours does not have.
        EquivalenceError: the two compute different logits.
    """
    cfg: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or ""
    variant = registry.find(name)
    if variant is None or not type(model).__module__.startswith("timm.models."):
        return None
    first = model.get_parameter(f"{registry.model_class(variant.family).first_conv}.weight")
    arguments: dict[str, Any] = {"in_chans": first.shape[1]}
    head: Any = getattr(model, "head", None)
    pool = getattr(getattr(head, "global_pool", None), "pool_type", None)
    info: Any = getattr(model, "feature_info", None)
    if pool is not None:
        arguments["global_pool"] = pool
    if info and info[-1]["reduction"] < 32:
        arguments["output_stride"] = info[-1]["reduction"]
    classes = getattr(model, "num_classes", 1000)
    ours: Any = build(variant, num_classes=classes, **arguments)
    ours = ours.to(first.device, first.dtype).train(model.training)
    try:
        ours.load_state_dict(model.state_dict())
    except RuntimeError as error:
        raise UnsupportedError(
            f"timm's {name} was created with arguments that ours does not have; create it with"
            f" backbones.create_model({variant.name!r}, ...): {error}"
        ) from error
    one: Any = copy.deepcopy(model).cpu().double().eval()
    other = copy.deepcopy(ours).cpu().double().eval()
    x = smallest_input(other, "cpu", torch.float64)
    with torch.no_grad():
        difference = relative_difference(one(x), other(x))
    if not difference <= TOLERANCE:
        raise EquivalenceError(
            f"timm's {name} and ours differ by {difference:.1e} of the largest logit; was it"
            f" changed after it was created? Create it with backbones.create_model({name!r})"
        )
    ours.pretrained_cfg = ours.default_cfg = dict(cfg)
    return ours


def _reparameterize_foreign(
    model: nn.Module, inplace: bool, verify: bool
) -> tuple[nn.Module, ReparamReport]:
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
    sizes = [_sizes(model)]
    if not inplace:
        model = copy.deepcopy(model)
    model = _through_hooks(model)
    with merge.recorded() as merges:
        _fold(model, pairs)
    _fold(twin, pairs)
    sizes.append(_sizes(model))
    parameters, entries = ((sizes[0][i], sizes[1][i]) for i in range(2))
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
    """Neighboring children that look like a map and its norm; whether they run so is unknown."""
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


def _sizes(model: nn.Module) -> tuple[int, int]:
    return sum(p.numel() for p in model.parameters()), len(model.state_dict())
