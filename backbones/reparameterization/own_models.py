"""The models of this package: the walk over their blocks, the comparison, the report.

The blocks' own ``reparameterize()`` are written in the algebra of :mod:`backbones.merge`; timm's
``reparameterize_model`` calls the same ones.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm.models
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from backbones import merge
from backbones.errors import EquivalenceError, UnsupportedError
from backbones.skeleton import StagedBackbone

__all__ = [
    "TOLERANCE",
    "ReparamReport",
    "backbones_in",
    "merge_backbones",
    "relative_difference",
    "require_eval",
    "sizes_of",
    "smallest_input",
]

TOLERANCE = 1e-10  # of the largest value, in float64


@dataclass(frozen=True)
class ReparamReport:
    """What a re-parameterization did. Pairs are (before, after)."""

    merges: Mapping[str, int]
    """How often each rule of :mod:`backbones.merge` was applied."""
    parameters: tuple[int, int]
    entries: tuple[int, int]
    """Tensors in the state dict."""
    operations: tuple[int, int] | None
    """Calls of PyTorch's operators in one forward pass; None where they were not counted."""
    largest_difference: float | None
    """Largest difference of logits or a feature map, relative to its largest value, in float64;
    None where it was not verified."""

    def __str__(self) -> str:
        lines = [f"{count:5}  {rule}" for rule, count in sorted(self.merges.items())]
        for what in ("parameters", "entries", "operations"):
            if pair := getattr(self, what):
                lines.append(f"{what}: {pair[0]:,} -> {pair[1]:,}")
        if self.largest_difference is not None:
            lines.append(f"largest difference in float64: {self.largest_difference:.1e}")
        return "\n".join(lines)


def merge_backbones(
    model: nn.Module, *, inplace: bool, verify: bool, count_operations: bool
) -> tuple[nn.Module, ReparamReport]:
    """Merge all that can be merged exactly in the backbones of this package in `model`.

    Merges are computed in float64 and stored in the model's type. `verify` compares logits and
    feature maps in float64 at the smallest valid input size, on a copy; on the meta device there is
    nothing to compare. `count_operations`: also those of a forward pass before and after.
    """
    parts = list(backbones_in(model))
    for name, part in parts:
        require_eval(part, name)
    differences = [_verify(name, part) for name, part in parts if verify and not _on_meta(part)]
    if not inplace:
        model = copy.deepcopy(model)
        parts = list(backbones_in(model))
    backbones = [part for _, part in parts]
    before = sizes_of(backbones)
    operations = _count_operations(backbones) if count_operations else 0
    with merge.recorded() as merges:
        for part in backbones:
            timm.models.reparameterize_model(part, inplace=True).eval()
    parameters, entries = zip(before, sizes_of(backbones))
    counts = (operations, _count_operations(backbones)) if count_operations else None
    largest = max(differences, default=None)
    return model, ReparamReport(dict(merges), parameters, entries, counts, largest)


def require_eval(model: nn.Module, name: str = "") -> None:
    """Refuse a model of which any part is in training mode."""
    for inner, module in model.named_modules():
        if module.training and not isinstance(module, nn.Identity):
            where = ".".join(filter(None, (name, inner))) or type(model).__name__
            raise UnsupportedError(
                f"{where} is in training mode, where merged norms would not compute the same;"
                " call model.eval() first"
            )


def backbones_in(model: nn.Module) -> Iterator[tuple[str, StagedBackbone]]:
    """Yield the backbones of this package in a model, with their names in it."""
    for name, module in model.named_modules():
        if isinstance(module, StagedBackbone):
            yield name, module


def smallest_input(part: StagedBackbone, device: Any, dtype: torch.dtype) -> Tensor:
    """Return two images of the smallest size that a backbone takes, of fixed random values."""
    side = part.feature_info[-1]["reduction"]
    values = torch.randn(
        2, part.in_chans, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype
    )
    return values.to(device)


def sizes_of(parts: Iterable[nn.Module]) -> tuple[int, int]:
    """Return the numbers of parameters and of entries of the state dicts."""
    counts = [(sum(p.numel() for p in one.parameters()), len(one.state_dict())) for one in parts]
    return sum(count for count, _ in counts), sum(count for _, count in counts)


def _verify(name: str, part: StagedBackbone) -> float:
    """Return the largest difference that re-parameterizing makes; raise where it makes one."""
    device = next(part.parameters()).device
    device = torch.device("cpu") if device.type == "mps" else device
    twin = copy.deepcopy(part).to(device, torch.float64)
    x = smallest_input(part, device, torch.float64)
    before = _outputs(twin, x)
    merged = timm.models.reparameterize_model(twin)
    after = _outputs(merged, x)
    worst = 0.0
    for what, old in before.items():
        difference = relative_difference(old, after[what])
        if not difference <= TOLERANCE:
            if not torch.isfinite(old).all():
                raise EquivalenceError(
                    f"{name or type(part).__name__}: {what} of the model itself are not finite;"
                    " nothing can be compared (verify=False skips the comparison)"
                )
            module = _first_that_differs(twin, merged, x)
            raise EquivalenceError(
                f"{name or type(part).__name__}: {what} differ by {difference:.1e} of the largest"
                f" value after re-parameterization; the first module that differs is {module!r}."
                " The model is unchanged. This is a bug; please report it"
            )
        worst = max(worst, difference)
    return worst


def _outputs(part: StagedBackbone, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        last, maps = part.forward_intermediates(x)
        named = {f"feature maps of stage {i}": value for i, value in enumerate(maps)}
        return {**named, "logits": part.forward_head(last)}


def relative_difference(old: Tensor, new: Tensor) -> float:
    """Return the largest difference over the largest value of `old`; infinite for other shapes."""
    if old.shape != new.shape:
        return float("inf")
    if old.numel() == 0:
        return 0.0
    scale = old.abs().max()
    return ((new - old).abs().max() / torch.where(scale > 0, scale, 1)).item()


def _first_that_differs(one: nn.Module, other: nn.Module, x: Tensor) -> str:
    """Name the first module, in the order of execution, whose output differs.

    Only outermost modules that re-parameterize themselves are compared: inside of them outputs may
    differ rightly.
    """
    names: list[str] = []
    for name, module in one.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and hasattr(module, "reparameterize") and not inside:
            names.append(name)
    first, second = (_outputs_of(names, model, x) for model in (one, other))
    for name, value in first.items():
        if name not in second or not relative_difference(value, second[name]) <= TOLERANCE:
            return name
    return "the order of modules"


def _outputs_of(names: list[str], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the outputs of the modules of these names, as far as a model has and runs them."""
    found: dict[str, Tensor] = {}

    def record(name: str, output: Any) -> None:
        if isinstance(output, Tensor):
            found.setdefault(name, output)

    modules = dict(model.named_modules())
    hooks = [
        modules[name].register_forward_hook(lambda _, inputs, output, n=name: record(n, output))
        for name in names
        if name in modules
    ]
    _outputs(model, x)  # type: ignore[arg-type]
    for hook in hooks:
        hook.remove()
    return found


class _Counter(TorchFunctionMode):
    """Counts the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Attributes such as x.shape come by here too; they make no new tensors.
        if isinstance(result, (Tensor, tuple)) and not isinstance(result, torch.Size):
            self.count += 1
        return result


def _count_operations(parts: Iterable[StagedBackbone]) -> int:
    """Return how many operators a forward pass calls."""
    with torch.no_grad(), _Counter() as counter:
        for part in parts:
            twin = copy.deepcopy(part).to("meta")
            twin(smallest_input(part, "meta", next(twin.parameters()).dtype))
    return counter.count


def _on_meta(part: nn.Module) -> bool:
    return any(p.is_meta for p in part.parameters())
