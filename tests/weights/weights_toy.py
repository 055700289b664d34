"""A small model with everything the weights code looks at, and files made of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, dim: int, scale: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 1)
        self.bn = nn.BatchNorm2d(dim)
        if scale:
            self.gamma = nn.Parameter(torch.rand(1, dim, 1, 1))


class Head(nn.Module):
    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc = nn.Linear(dim, num_classes) if num_classes else nn.Identity()


class Toy(nn.Module):
    """Two stages, a head, an optional auxiliary head; two layouts of others beside its own."""

    classifier_names = ("head.fc",)
    first_conv = "stem.0"
    derived_keys = (r"\.idxs$",)
    auxiliary_keys = (r"^aux_head\.",)

    @staticmethod
    def _flat(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """A layout of dashes, given as a function."""
        if "stem-0-weight" not in tensors:
            raise KeyError("stem-0-weight")
        return {key.replace("-", "."): value for key, value in tensors.items()}

    layouts = {
        "authors": (
            (r"^teacher\.", None),
            (r"^patch\.", "stem."),
            (r"^layers(\d)_(\d)\.", r"stages.\1.\2."),
            (r"^norm\.", "head.norm."),
            (r"^head\.(weight|bias)$", r"head.fc.\1"),
        ),
        "flat": _flat.__func__,
    }

    def __init__(
        self,
        dim: int = 4,
        num_classes: int = 5,
        in_chans: int = 3,
        aux_head: bool = False,
        stages: int = 2,
    ) -> None:
        super().__init__()
        self._whole = (dim, num_classes, in_chans, aux_head, 2)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dim, 2, 2))
        self.stages = nn.Sequential(
            *(nn.Sequential(*(Block(dim, scale=j == 0) for j in range(2))) for _ in range(stages))
        )
        self.head = Head(dim, num_classes)
        if aux_head:
            self.aux_head = nn.Linear(dim, num_classes)
        self.config = {"name": "toy_t", "arguments": {"dim": dim}}

    def expected_shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {key: value.shape for key, value in Toy(*self._whole).state_dict().items()}


class Getter(nn.ModuleDict):
    """What timm's feature getter looks like from outside: the pruned model under `model`."""

    def __init__(self, model: Toy) -> None:
        super().__init__()
        del model.stages[1]
        model.head = nn.Identity()
        self.model = model
        self.out_indices = (0,)


TO_AUTHORS = (("stem.", "patch."), ("head.norm.", "norm."), ("head.fc.", "head."))


def authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our keys to the toy's authors' layout, with the shapes they are fond of."""
    result = {}
    for key, value in state.items():
        new = key
        for ours, theirs in TO_AUTHORS:
            if key.startswith(ours):
                new = theirs + key.removeprefix(ours)
        if key.startswith("stages."):
            _, i, j, rest = key.split(".", 3)
            new = f"layers{i}_{j}.{rest}"
        result[new] = value.flatten() if key.endswith("gamma") else value
    return result


def flat(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our keys to the toy's layout of dashes."""
    return {key.replace(".", "-"): value for key, value in state.items()}


def filled(seed: int = 1, **arguments: int) -> dict[str, Tensor]:
    """A state dict of the toy with values that differ from a fresh model's."""
    torch.manual_seed(seed)
    model = Toy(**arguments)
    return {
        key: torch.randn_like(value) if value.is_floating_point() else value + 7
        for key, value in model.state_dict().items()
    }


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Bit for bit the same state."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    for key, value in now.items():
        assert value.dtype == before[key].dtype
        assert value.numpy().tobytes() == before[key].numpy().tobytes(), key
