"""What a model expects of a checkpoint: the view of a model that the mapping works on."""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import CheckpointError
from backbones.skeleton import Layout
from backbones.weights.untrusted import Checkpoint
from backbones.wrappers import unwrapped

__all__ = ["Layout", "Target", "inner_module"]


class Target:
    """A model as the receiver of a checkpoint.

    Wrappers (`torch.compile`, data parallel, timm's `features_only` getter) are taken off: `module`
    is the backbone whose own names count. Attributes of `StagedBackbone` are used where present;
    any other module is matched by its state dict alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self.module = inner_module(model)
        self.followed: Mapping[str, Any] = {}
        """Arguments of a checkpoint's model, where the module here is its twin with these."""
        self.present: dict[str, Tensor] = dict(self.module.state_dict())
        # Merged weights fit one form only: renames and pruned parts belong to the training form.
        self.deployed = bool(getattr(self.module, "deployed", False))
        layouts = {} if self.deployed else getattr(self.module, "layouts", {})
        self.layouts: Mapping[str, Layout] = layouts
        self._cfg: Mapping[str, Any] = getattr(self.module, "pretrained_cfg", None) or {}
        names = getattr(self.module, "classifier_names", None) or self._cfg.get("classifier") or ()
        self.classifiers: tuple[str, ...] = (names,) if isinstance(names, str) else tuple(names)
        self.is_derived = _any_of(getattr(self.module, "derived_keys", ()))
        """Whether the model computes an entry itself."""
        self._is_auxiliary = _any_of(getattr(self.module, "auxiliary_keys", ()))
        self.is_resizable = _any_of(getattr(self.module, "resizable_keys", ()))
        """Whether the model takes an entry's last dimension from a checkpoint."""

    @property
    def first_convs(self) -> tuple[str, ...]:
        """Names of the weights that see the image's channels, as far as the model says."""
        names = getattr(self.module, "first_conv", None) or self._cfg.get("first_conv") or ()
        return tuple(f"{name}.weight" for name in ((names,) if isinstance(names, str) else names))

    @property
    def name(self) -> str:
        """The model's name for messages."""
        config = getattr(self.module, "config", None)
        name = config.get("name") if isinstance(config, Mapping) else None
        return str(name or self._cfg.get("architecture") or type(self.module).__name__)

    @cached_property
    def pruned(self) -> frozenset[str]:
        """Names that the whole model has and this one no longer, as with `features_only`."""
        shapes: Callable[[], Mapping[str, torch.Size]] | None
        shapes = getattr(self.module, "expected_shapes", None)
        if shapes is None or self.deployed:
            return frozenset()
        return frozenset(shapes()) - self.present.keys()

    def following(self, tensors: Mapping[str, Tensor]) -> "Target":
        """Return the model with the parts that a checkpoint has, as far as a family leaves it open.

        The model itself stays as it is: what is returned is a twin without values.
        """
        shown = self._shown(tensors)
        followed = {k: value for k, value in shown.items() if getattr(self.module, k) != value}
        if not followed:
            return self
        values = [*self.module.parameters(), *self.module.buffers()]
        twin: Any = copy.deepcopy(self.module, {id(one): _without_values(one) for one in values})
        twin.follow(followed)
        target = Target(twin)
        target.followed = followed
        return target

    def _shown(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Any]:
        """Return the arguments that entries show; those of a re-parameterized model show none."""
        hook: Any = getattr(self.module, "shown_arguments", None)
        return {} if hook is None or self.deployed else hook(tensors)

    def require_form(self, checkpoint: Checkpoint) -> None:
        """Refuse a file in deploy form for a model in training form."""
        if checkpoint.deploy and not self.deployed:
            raise CheckpointError(
                f"{checkpoint.source}: holds a re-parameterized model, whose norms and branches are"
                " folded away for good; load it into a model created with deploy=True"
            )

    def require_arguments(self, checkpoint: Checkpoint) -> None:
        """Refuse a file that states another value of an argument that no shape shows."""
        ours = isinstance(checkpoint.description.get("arguments"), Mapping)
        for name, (given, says) in self._stated(checkpoint).items():
            own = getattr(self.module, name)
            if given == own:
                continue
            if ours:
                told = f"was saved from a model with {name}={given}"
                way_out = f"load it into {says!r}"
            else:
                told = f"is, by the name {says!r}, of a model with {name}={given}"
                way_out = "load it into the variant of that name, rename it if the name misleads"
            raise CheckpointError(
                f"{checkpoint.source}: {told}, and {self.name} has {name}={own}; {way_out}, or"
                f" create the model with {name}={given}"
            )

    def assumed_arguments(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        """Return the model's arguments that neither a shape nor what a file says confirms."""
        stated = self._stated(checkpoint)
        names = self._hidden(checkpoint)
        return tuple(f"{one}={getattr(self.module, one)}" for one in names if one not in stated)

    def _hidden(self, checkpoint: Checkpoint) -> list[str]:
        """Return the arguments of which the file's entries say nothing."""
        names = getattr(self.module, "invisible_arguments", ())
        hook: Any = getattr(self.module, "shown_arguments", None)
        shown = hook(checkpoint.tensors) if hook else {}
        return [name for name in names if name not in shown]

    def _stated(self, checkpoint: Checkpoint) -> dict[str, tuple[Any, str]]:
        """Return what a file says of invisible arguments: the value, and by which name of a model.

        What `save_checkpoint` wrote counts; of files of others their names do.
        """
        found: dict[str, tuple[Any, str]] = {}
        hidden = self._hidden(checkpoint)
        saved = checkpoint.description.get("arguments")
        if isinstance(saved, Mapping):
            parameters = inspect.signature(type(self.module)).parameters
            says = str(checkpoint.description.get("name"))
            return {name: (saved.get(name, parameters[name].default), says) for name in hidden}
        for says in (*checkpoint.model_names, Path(checkpoint.source).stem) if hidden else ():
            named: Any = getattr(self.module, "named_arguments", None)
            values = named(says, checkpoint.tensors) if named else {}
            for name, value in values.items():
                found.setdefault(name, (value, says))
        return found

    def is_absent_auxiliary(self, key: str) -> bool:
        """Whether the entry belongs to an auxiliary head that this model was built without."""
        return key not in self.present and self._is_auxiliary(key)

    def is_classifier(self, key: str) -> bool:
        """Whether the entry belongs to a final classifier layer."""
        return any(key.startswith(f"{name}.") for name in self.classifiers)

    def is_absent_part(self, key: str) -> bool:
        """Whether the entry belongs to a part this model has not: pruned, or no classifier."""
        absent = (
            f"{name}."
            for name in self.classifiers
            if not any(own.startswith(f"{name}.") for own in self.present)
        )
        return key not in self.present and (key.startswith(tuple(absent)) or key in self.pruned)

    def complete(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Let the model fill in or convert what its own layout allows to be absent."""
        hook: Any = getattr(self.module, "complete_checkpoint", None)
        return tensors if hook is None or self.deployed else hook(dict(tensors))


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def inner_module(model: nn.Module) -> nn.Module:
    """Take wrappers (`unwrapped`) and timm's feature getter off a model."""
    model = unwrapped(model)
    while isinstance(model, nn.ModuleDict) and "model" in model and hasattr(model, "out_indices"):
        model = unwrapped(model["model"])
    return model


def _any_of(patterns: Iterable[str]) -> Callable[[str], bool]:
    """Return what tells whether a key matches any of some patterns."""
    compiled = [re.compile(pattern) for pattern in patterns]
    return lambda key: any(pattern.search(key) for pattern in compiled)
