"""Memory layouts chosen by measurement change no number."""

import pytest
import torch
from small_models import small
from torch import nn

from backbones.engines.pytorch import layouts
from backbones.engines.pytorch.layouts import InOtherLayout, choose_layout

LAST = torch.channels_last


def example():
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def slow_in(monkeypatch, slow):
    """Make measurements say that depthwise convolutions are slow in a layout, the rest in NCHW."""

    def seconds(function, x):
        if isinstance(function, InOtherLayout):
            return 10.0 if function.inner == slow else 1.0
        if isinstance(function, nn.Conv2d):
            return 10.0 if x.is_contiguous(memory_format=slow) else 1.0
        weight = function.get_classifier()
        assert weight is not None
        stem = next(function.parameters())
        last = stem.is_contiguous(memory_format=LAST)
        others = any(isinstance(m, InOtherLayout) for m in function.modules())
        return (1.0 if last else 2.0) - (0.5 if others else 0.0)

    monkeypatch.setattr(layouts, "_milliseconds", seconds)


def test_the_result_is_the_same(monkeypatch):
    model = small()
    x = example()
    with torch.no_grad():
        expected = model(x)
        laid_out, name = choose_layout(model, x)
        found = laid_out(x.contiguous(memory_format=LAST))
    assert name.split(",")[0] in ("nchw", "channels_last")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_shapes_that_are_faster_the_other_way_run_that_way(monkeypatch):
    slow_in(monkeypatch, LAST)
    model, x = small(), example()
    with torch.no_grad():
        expected = model(x)
    model, name = choose_layout(model, x)
    assert name == "channels_last, mixed"
    found = [m for m in model.modules() if isinstance(m, InOtherLayout)]
    depthwise = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(found) == len(depthwise) == 4
    seen = []
    for conv in found:
        conv.register_forward_hook(lambda m, i, o: seen.append(o.is_contiguous(memory_format=LAST)))
    with torch.no_grad():
        result = model(x.contiguous(memory_format=LAST))
    assert seen == [True] * 4
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_nothing_is_changed_where_nothing_is_gained(monkeypatch):
    slow_in(monkeypatch, torch.contiguous_format)
    model, name = choose_layout(small(), example())
    assert name == "channels_last"
    assert not any(isinstance(m, InOtherLayout) for m in model.modules())


@pytest.mark.parametrize("outer", [torch.contiguous_format, LAST])
def test_a_convolution_in_the_other_layout_keeps_its_values(outer):
    conv = nn.Conv2d(8, 8, 5, padding=4, dilation=2, groups=8).eval()
    twin = InOtherLayout.of(conv, outer)
    assert twin.inner != outer
    x = torch.randn(2, 8, 12, 10).contiguous(memory_format=outer)
    with torch.no_grad():
        result = twin(x)
        torch.testing.assert_close(result, conv(x))
    assert result.is_contiguous(memory_format=outer)
