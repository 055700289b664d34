"""Re-parameterization of any model: ours, timm's instances of our models, others of timm."""

from collections.abc import Callable

from torch import nn

from backbones.errors import UnsupportedError
from backbones.reparameterization.own_models import (
    TOLERANCE,
    ReparamReport,
    backbones_in,
    merge_backbones,
    relative_difference,
    smallest_input,
)
from backbones.reparameterization.timm_models import merge_timm_model
from backbones.skeleton import StagedBackbone
from backbones.wrappers import unwrapped

__all__ = [
    "TOLERANCE",
    "ReparamReport",
    "backbones_in",
    "rebuild_with",
    "relative_difference",
    "reparameterize",
    "reparameterize_with_report",
    "smallest_input",
]

Rebuild = Callable[[nn.Module], "StagedBackbone | None"]
_rebuilds: list[Rebuild] = []


def rebuild_with(function: Rebuild) -> Rebuild:
    """Let `function` make one of our models of someone else's instance of it, or None.

    The rooms below know which models of timm are ours too; this one knows how to merge.
    """
    _rebuilds.append(function)
    return function


def reparameterize(model: nn.Module, *, inplace: bool = False, verify: bool = True) -> nn.Module:
    """Merge everything in a model that can be merged exactly.

    The model may be one of this package, alone or anywhere inside another module, of any type and
    memory layout, pruned or with `features_only`; or timm's own instance of a model that this
    package has too, which is rebuilt as ours; or any other model of timm, which goes through
    timm's own hooks and whose pairs of convolution and batch norm are folded where the outputs
    stay equal. Doing it twice changes nothing.

    Args:
        model: in evaluation mode; of a wrapper (compiled, data parallel, averaged) the model that
            it holds.
        inplace: change `model` itself instead of a copy.
        verify: compare outputs before and after in float64, on a copy.

    Returns:
        The re-parameterized model.

    Raises:
        UnsupportedError: the model is in training mode or of unknown input, or timm's own instance
            or what a wrapper holds is to be changed in place.
        EquivalenceError: the two forms differ; `model` is unchanged. The message names the first
            module that differs.
    """
    return _reparameterize(model, inplace, verify, count_operations=False)[0]


def reparameterize_with_report(
    model: nn.Module, *, inplace: bool = False, verify: bool = True
) -> tuple[nn.Module, ReparamReport]:
    """As :func:`reparameterize`, and also return what was done."""
    return _reparameterize(model, inplace, verify, count_operations=True)


def _reparameterize(
    model: nn.Module, inplace: bool, verify: bool, count_operations: bool
) -> tuple[nn.Module, ReparamReport]:
    wrapper, model = model, unwrapped(model)
    if inplace and model is not wrapper:
        raise UnsupportedError(
            f"{type(wrapper).__name__} relies on the layers of the model in it, which cannot be"
            " merged in place; use the model that reparameterize(model) returns"
        )
    if not any(backbones_in(model)):
        rebuilt = next((ours for make in _rebuilds if (ours := make(model)) is not None), None)
        if rebuilt is None:
            return merge_timm_model(model, inplace=inplace, verify=verify)
        if inplace:
            raise UnsupportedError(
                f"{type(model).__name__} is timm's own and is rebuilt as ours, which cannot happen"
                " in place; use the model that reparameterize(model) returns"
            )
        model, inplace = rebuilt, True
    return merge_backbones(model, inplace=inplace, verify=verify, count_operations=count_operations)
