"""The model inside of what trains, averages or compiles it."""

from pathlib import PurePath
from typing import Any

from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from backbones.errors import UnsupportedError

__all__ = ["unwrapped"]

_HOLDERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    AveragedModel,
    ModelEmaV2,
    ModelEmaV3,
)
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}  # which are imported where they are used only


def unwrapped(model: Any) -> nn.Module:
    """Return the model that `model` holds, itself where it is no wrapper.

    Wrappers are what ``torch.compile``, ``DataParallel``, ``DistributedDataParallel``,
    ``AveragedModel`` and timm's ``ModelEma`` make, in any order. Modules of users are none.

    Raises:
        UnsupportedError: no model, or one whose weights are spread over processes.
    """
    while True:
        if isinstance(model, _HOLDERS):
            model = model.module
        elif isinstance(model, ModelEma):
            model = model.ema
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's
            model = model._orig_mod
        else:
            break
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        way = ""
        if isinstance(model, str | PurePath):
            way = f"; create_model or load_model makes one of {str(model)!r}"
        raise UnsupportedError(f"a model (torch.nn.Module) is needed, got {name}{way}")
    if sharded := _SHARDED & {kind.__name__ for kind in type(model).__mro__}:
        raise UnsupportedError(
            f"{name}: the weights of {sharded.pop()} are spread over processes; gather its state"
            " dict (torch.distributed.checkpoint.state_dict) and load it into a whole model"
        )
    return model
