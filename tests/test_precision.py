"""Float32 is close to float64 and the half types stay finite, with weights of realistic size."""

from __future__ import annotations

import pytest
import torch
from damping import damp
from golden import fill
from tiers import by_size, families_by_default, representatives, smallest_of_each_family

import backbones

EACH = pytest.mark.parametrize("name", by_size())


def filled(name: str) -> torch.nn.Module:
    """The model in float64 with the golden files' values, residual branches damped."""
    model = backbones.create_model(name, dtype=torch.float64).eval()
    state = {
        key: fill(key, tuple(value.shape)) if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return damp(model, name)


@EACH
@torch.no_grad()
def test_float32_is_close_to_float64(name):
    model = filled(name)
    side = 96 if model.feature_info[-1]["reduction"] == 32 else 128
    x = fill("input", (1, 3, side, side))
    expected = model(x)
    error = (model.float()(x.float()).double() - expected).abs().max() / expected.abs().max()
    assert error < 1e-4


def assert_half_types_stay_finite(name, size):
    model = filled(name)
    x = fill("input", (1, *size))
    for dtype in (torch.bfloat16, torch.float16):
        output = model.to(dtype)(x.to(dtype))
        assert output.dtype == dtype
        assert torch.isfinite(output).all(), dtype


@pytest.mark.parametrize("name", representatives())
@torch.no_grad()
def test_half_types_stay_finite(name):
    assert_half_types_stay_finite(name, (3, 96, 96))


@pytest.mark.parametrize("name", families_by_default())
@torch.no_grad()
def test_half_types_stay_finite_at_an_oblong_size(name):
    assert_half_types_stay_finite(name, (3, 384, 128))


@pytest.mark.slow
@pytest.mark.parametrize("name", representatives())
@torch.no_grad()
def test_half_types_stay_finite_at_the_native_size(name):
    assert_half_types_stay_finite(name, backbones.model_info(name).input_size)


@pytest.mark.parametrize("name", smallest_of_each_family())
@torch.no_grad()
def test_autocast_stays_finite(name):
    model = filled(name).float()
    x = fill("input", (1, 3, 96, 96)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model(x)).all()
