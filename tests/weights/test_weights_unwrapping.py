"""Finding the state dict: every wrapper, every order, and what is no state dict."""

from __future__ import annotations

import itertools

import pytest
import torch

from backbones.errors import CheckpointError
from backbones.weights import unwrap
from backbones.weights.untrusted.state_dicts import unwrap_all

WRAPPERS = ["state_dict_ema", "model_ema", "ema", "state_dict", "model", "module"]


def state(value: float) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2,), value)}


def value(tensors) -> float:
    return float(tensors["a.weight"][0])


def test_bare():
    tensors, wrapper = unwrap({**state(1), "epoch": 3, "args": None})
    assert list(tensors) == ["a.weight"]
    assert wrapper is None


@pytest.mark.parametrize("name", WRAPPERS)
def test_each_wrapper(name):
    tensors, wrapper = unwrap({"epoch": 3, name: state(1), "optimizer": {"state": state(9)}})
    assert (value(tensors), wrapper) == (1, name)


@pytest.mark.parametrize(("first", "second"), itertools.combinations(WRAPPERS, 2))
def test_preference(first, second):
    """The documented one, whatever the order in the file; None and empty ones do not count."""
    for checkpoint in ({first: state(1), second: state(2)}, {second: state(2), first: state(1)}):
        tensors, wrapper = unwrap(checkpoint)
        assert (value(tensors), wrapper) == (1, first)
    for nothing in (None, {}, {"note": "x"}, "text"):
        tensors, wrapper = unwrap({first: nothing, second: state(2)})
        assert (value(tensors), wrapper) == (2, second)


def test_one_decay_is_opened():
    tensors, wrapper = unwrap({"ema": {0.9998: state(1)}, "model": state(2)})
    assert (value(tensors), wrapper) == (1, "ema[0.9998]")


def test_decays_rank_after_state_dict():
    """CPUBone's evalmodel.pt: the state dict is the average, with BatchNorm re-estimated."""
    for ema in ({0.9998: state(2)}, {0.9998: state(2), 0.999: state(3)}):
        tensors, wrapper = unwrap({"ema": ema, "state_dict": state(1), "model": state(4)})
        assert (value(tensors), wrapper) == (1, "state_dict")


@pytest.mark.parametrize("beside", [{}, {"model": state(4)}])
def test_several_decays_are_ambiguous(beside):
    with pytest.raises(CheckpointError, match=r"several decays \(0.9998, 0.999\).*\['ema'\]"):
        unwrap({"ema": {0.9998: state(1), 0.999: state(2)}, **beside})


def test_wrappers_within_wrappers():
    tensors, wrapper = unwrap({"model": {"module": {"state_dict": state(1)}, "epoch": 1}})
    assert (value(tensors), wrapper) == (1, "model.module.state_dict")


@pytest.mark.timeout(20)
def test_depth_is_bounded():
    circle = state(1)
    circle["model"] = circle
    assert value(unwrap(circle)[0]) == 1
    nested = state(1)
    for _ in range(50):
        nested = {"model": nested}
    with pytest.raises(CheckpointError, match="no tensors"):
        unwrap(nested)


@pytest.mark.timeout(20)
def test_a_maze_of_mappings_is_walked_once():
    """Each holds the next one many times over; the paths are more than can be walked."""
    maze = {}
    for _ in range(8):
        maze = {str(i): maze for i in range(300)}
    with pytest.raises(CheckpointError, match="no tensors"):
        unwrap({"model": maze, "ema": maze, "state_dict": maze})
    assert value(unwrap({"model_ema": maze, "model": state(1)})[0]) == 1


def test_names_are_shown_harmless():
    """Short, and without what a terminal would obey."""
    checkpoint = {"\x1b[31m": 1, "x" * 5000: 2, **state(1)}
    _, _, others = unwrap_all(checkpoint)
    assert others == (repr("\x1b[31m"), "x" * 80)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ({}, "holds no tensors"),
        ({"epoch": 3}, "holds no tensors.*epoch"),
        ([torch.ones(2)], "holds a list"),
        (torch.ones(2), "holds a Tensor"),
        (torch.nn.Linear(2, 2), "holds a Linear"),
        ({"model": torch.nn.Linear(2, 2)}, "whole model object"),
        ({3: torch.ones(2)}, "no name of a parameter"),
        ({"a" * 5000: torch.ones(2)}, "no name of a parameter"),
        ({"a": torch.eye(2).to_sparse()}, "'a' is a sparse"),
        ({"ema": {0.5: torch.ones(2)}}, "holds a Tensor"),
    ],
)
def test_no_state_dict(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        unwrap(checkpoint)


def test_parameters_become_plain_tensors():
    tensors, _ = unwrap({"a": torch.nn.Parameter(torch.ones(2))})
    assert type(tensors["a"]) is torch.Tensor
    assert not tensors["a"].requires_grad
