"""What every family owes to PyTorch's other tools, in its form for training."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F
from randomized import randomize
from tiers import families_by_default, shallow, smallest_size
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import backbones

FAMILIES = pytest.mark.parametrize("name", families_by_default())


def build(name, **arguments):
    model = backbones.create_model(name, num_classes=5, **shallow(name), **arguments)
    return randomize(model).eval()


def images(model, *shape):
    side = smallest_size(model)
    return torch.randn(*shape, 3, side, side)


def assert_same(found, expected):
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@FAMILIES
def test_vmap_over_images_and_over_models(name):
    model = build(name)
    x = images(model, 2, 1)
    expected = torch.stack([model(x[0]), model(x[1])])
    assert_same(vmap(model)(x), expected)
    with torch.no_grad():
        other = randomize(build(name), seed=1)
        parameters, buffers = stack_module_state([model, other])
        call = lambda p, b: functional_call(model, (p, b), (x[0],))  # noqa: E731
        assert_same(vmap(call)(parameters, buffers), torch.stack([expected[0], other(x[0])]))


@FAMILIES
def test_gradients_of_each_image(name):
    model = build(name)
    x = images(model, 2, 1)
    parameters = dict(model.named_parameters())
    loss = lambda p, x: functional_call(model, p, (x,)).square().sum()  # noqa: E731
    found = vmap(grad(loss), (None, 0))({k: p.detach() for k, p in parameters.items()}, x)
    for i in range(2):
        model.zero_grad()
        model(x[i]).square().sum().backward()
        largest = max(float(p.grad.abs().max()) for p in parameters.values())
        for key, parameter in parameters.items():
            assert (found[key][i] - parameter.grad).abs().max() <= 1e-4 * largest, key


@FAMILIES
@pytest.mark.parametrize("size", [32, 64])
def test_second_derivatives(name, size):
    """Backward through backward agrees with forward through backward."""
    model = build(name)
    size = max(size, model.feature_info[-1]["reduction"])  # a last map of 1 x 1, and a larger one
    x, along = torch.randn(2, 1, 3, size, size)
    x.requires_grad_()
    loss = lambda x: model(x).square().sum()  # noqa: E731
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (found,) = torch.autograd.grad((first * along).sum(), x)
    assert_same(found, jvp(grad(loss), (x.detach(),), (along,))[1])


class WholeWeight(torch.Tensor):
    """A weight that only ``F.linear`` may read, as weight-only quantization makes them."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not F.linear and func.__name__ != "__get__":
            raise NotImplementedError(f"{func.__name__} of a quantized weight")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@FAMILIES
@torch.no_grad()
def test_quantized_weights_of_linear_layers_are_taken_whole(name):
    model = build(name)
    x = images(model, 1)
    expected = model(x)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach().as_subclass(WholeWeight)
            del layer.weight
            layer.weight = weight
    assert_same(model(x), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("axes", [None, {"x": {0: "batch"}}], ids=["fixed", "dynamic"])
def test_the_older_onnx_exporter_takes_lsnet(axes):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build("lsnet_t")
    file = io.BytesIO()
    torch.onnx.export(
        model, (images(model, 2),), file, dynamo=False, input_names=["x"], dynamic_axes=axes
    )
    session = onnxruntime.InferenceSession(file.getvalue())
    x = images(model, 3 if axes else 2)
    (found,) = session.run(None, {"x": x.numpy()})
    assert_same(torch.from_numpy(found), model(x).detach())
