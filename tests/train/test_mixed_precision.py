"""Gradients in mixed precision are those of float32, but for rounding."""

import pytest
import torch
from torch import nn

from backbones.train.mixed_precision import autocast

LAST = torch.channels_last


def dirty_memory():
    """Leave memory behind in which gradients that nobody wrote would not be numbers."""
    kept = [
        torch.full((size,), float("nan"), dtype=torch.bfloat16) for size in range(300, 2100, 30)
    ]
    del kept


def gradients(conv, x, context=None):
    conv.zero_grad()
    dirty_memory()
    with context or torch.autocast("cpu", enabled=False):
        y = conv(x)
    y.float().mul(torch.linspace(-1, 1, y.shape[-1])).sum().backward()
    return y.detach(), conv.weight.grad.clone()


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("options", [{"dilation": 2}, {"dilation": 3, "stride": 2}, {}])
@pytest.mark.parametrize("channels, groups", [(12, 12), (32, 4), (32, 1)])
def test_weight_gradients_in_bf16(channels, groups, options, layout):
    conv = nn.Conv2d(channels, channels, 5, padding=4, groups=groups, **options)
    conv.to(memory_format=layout)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, channels, 40, 40, generator=generator).contiguous(memory_format=layout)
        expected = gradients(conv, x)
        found = gradients(conv, x.bfloat16(), autocast("cpu", torch.bfloat16))
        assert found[0].dtype == torch.bfloat16
        for one, other in zip(expected, found):
            torch.testing.assert_close(
                other.float(), one, rtol=0, atol=0.02 * float(one.abs().max())
            )


def test_a_convolution_by_keywords_too():
    x, weight = torch.randn(2, 8, 16, 16), torch.randn(8, 1, 3, 3)
    with autocast("cpu", torch.bfloat16):
        found = nn.functional.conv2d(input=x, weight=weight, groups=8, dilation=2)
    assert found.dtype == torch.bfloat16
    expected = nn.functional.conv2d(x, weight, groups=8, dilation=2)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)


def test_compiled_models_train_so_too():
    class Dilated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)

        def forward(self, x):
            return self.conv(x)

    x = torch.randn(2, 8, 16, 16)
    model = Dilated()
    with autocast("cpu", torch.bfloat16):
        expected = model(x)
        found = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
