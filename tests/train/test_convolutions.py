"""Convolutions in training on CPUs: gradients are those of PyTorch in float32, but for rounding."""

import contextlib

import pytest
import torch
from tiers import families_by_default, shallow, smallest_size
from torch import nn

import backbones
from backbones.train import cpu_convolutions

LAST = torch.channels_last


def dirty_memory():
    """Leave memory behind in which gradients that nobody wrote would not be numbers."""
    kept = [
        torch.full((size,), float("nan"), dtype=torch.bfloat16) for size in range(300, 2100, 30)
    ]
    del kept


@contextlib.contextmanager
def in_bf16(model):
    with cpu_convolutions(model), torch.autocast("cpu", torch.bfloat16):
        yield


def gradients(conv, x, context=None):
    conv.zero_grad()
    dirty_memory()
    with context or contextlib.nullcontext():
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
        found = gradients(conv, x.bfloat16(), in_bf16(conv))
        assert found[0].dtype == torch.bfloat16
        for one, other in zip(expected, found):
            torch.testing.assert_close(
                other.float(), one, rtol=0, atol=0.02 * float(one.abs().max())
            )


def test_a_convolution_by_keywords_too():
    x, weight = torch.randn(2, 8, 16, 16), torch.randn(8, 1, 3, 3)
    with in_bf16(nn.Conv2d(8, 8, 3, dilation=2, groups=8)):
        found = nn.functional.conv2d(input=x, weight=weight, groups=8, dilation=2)
    assert found.dtype == torch.bfloat16
    rounded = (one.bfloat16().float() for one in (x, weight))
    expected = nn.functional.conv2d(*rounded, groups=8, dilation=2)
    torch.testing.assert_close(found, expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"dilation": 2}])
def test_float64_stays_so(options):
    conv = nn.Conv2d(8, 8, 5, groups=8, **options).double()
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64)
    with in_bf16(conv):
        found = conv(x)
    torch.testing.assert_close(found, conv(x), rtol=0, atol=0)


def test_compiled_models_train_so_too():
    class Dilated(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8)

        def forward(self, x):
            return self.conv(x)

    x = torch.randn(2, 8, 16, 16)
    model = Dilated()
    with in_bf16(model):
        expected = model(x)
        found = torch.compile(model, backend="aot_eager")(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize("padding, side", [(1, 1), (6, 20)])
def test_what_no_fast_gradient_is_for_stays_right_in_bf16(padding, side):
    conv = nn.Conv2d(16, 16, 3, padding=padding + 1, dilation=2, groups=16).to(memory_format=LAST)
    x = torch.randn(8, 16, side, side).contiguous(memory_format=LAST)
    expected = gradients(conv, x)
    found = gradients(conv, x.bfloat16(), in_bf16(conv))
    with in_bf16(conv):
        assert type(conv(x).grad_fn).__name__ == "_InFloat32Backward"
    for one, other in zip(expected, found):
        torch.testing.assert_close(other.float(), one, rtol=0, atol=0.02 * float(one.abs().max()))


@pytest.mark.parametrize("name", families_by_default())
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_models_are_the_same(name, checkpointing):
    torch.manual_seed(0)
    model = backbones.create_model(name, **shallow(name, blocks=1), num_classes=3).train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0  # statistics stay, so that both steps see the same model
    model.set_grad_checkpointing(checkpointing)
    side = 2 * smallest_size(model)
    x = torch.randn(3, 3, side, side)
    found = []
    for context in (contextlib.nullcontext(), cpu_convolutions(model)):
        torch.manual_seed(1)  # of what is dropped
        with context:
            loss = model(x).square().sum()
            found.append(torch.autograd.grad(loss, [*model.parameters()]))
    scale = max(float(one.abs().max()) for one in found[0])
    for one, other in zip(*found, strict=True):
        atol = 1e-3 * float(one.abs().max()) + 1e-6 * scale
        torch.testing.assert_close(other, one, rtol=1e-3, atol=atol)


@pytest.mark.parametrize("name", ["moganet_xtiny", "spartan_t"])
def test_checkpointing_in_bf16_gives_the_same_gradients(name):
    model = backbones.create_model(name, **shallow(name, blocks=1), num_classes=3).train()
    x, found = torch.randn(2, 3, 96, 96), []
    for checkpointing in (False, True):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        with in_bf16(model):
            loss = model(x).float().square().sum()
        found.append(torch.autograd.grad(loss, [*model.parameters()]))
    for one, other in zip(*found, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(other, one, rtol=0, atol=0.02 * float(one.abs().max()) + 1e-6)


@pytest.mark.parametrize(
    "options, slow",
    [
        ({"kernel_size": 7, "groups": 8}, True),
        ({"kernel_size": 3, "groups": 2, "dilation": 2}, True),
        ({"kernel_size": 7}, False),
        ({"kernel_size": 3, "groups": 8}, False),
        ({"kernel_size": (1, 11), "groups": 8}, False),
    ],
)
def test_other_models_are_left_alone(options, slow):
    model = nn.Sequential(nn.Conv2d(8, 8, **options), nn.MaxPool2d(2))
    assert isinstance(cpu_convolutions(model), contextlib.nullcontext) != slow


def test_kernels_that_are_made_take_the_fast_way_too():
    model = backbones.create_model("smpnet_tiny", **shallow("smpnet_tiny", blocks=1)).train()
    with cpu_convolutions(model):
        nodes, seen = [model(torch.randn(2, 3, 64, 64)).grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [one for one, _ in node.next_functions]
    assert sum(type(node).__name__ == "_DepthwiseBackward" for node in seen) >= 4
