"""Depthwise kernels are widened only where that is faster, and compute the same."""

import numpy as np
import pytest
import torch
from torch import nn

from backbones.engines.openvino import OpenVinoRunner
from backbones.engines.openvino import passes as widening
from backbones.engines.openvino import runner as running
from backbones.engines.openvino.passes import WIDE, milliseconds, widen_depthwise

ov = pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")

OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}


@pytest.fixture(params=["faster", "slower"])
def wide_is(request, monkeypatch):
    """Decide the measurement, which depends on the processor."""
    times = {WIDE: 1.0 if request.param == "faster" else 3.0}
    monkeypatch.setattr(
        widening,
        "milliseconds",
        lambda shape, kernels, options: [times.get(kernel, 2.0) for kernel in kernels],
    )
    return request.param


def depthwise(kernel, **given):
    arguments = {"groups": 16, **given}
    arguments.setdefault("padding", 0 if isinstance(kernel, tuple) else kernel // 2)
    return nn.Conv2d(16, 16, kernel, **arguments)


def converted(module, folder, shape=(1, 16, 20, 18)):
    """The model that OpenVINO reads from ONNX, built node by node: PyTorch's exporter is slow."""
    nodes, constants, last = [], [], "input"
    for i, layer in enumerate(module if isinstance(module, nn.Sequential) else [module]):
        given = [last]
        last = f"output{i}"
        if isinstance(layer, nn.ReLU):
            nodes.append(onnx.helper.make_node("Relu", given, [last]))
            continue
        for name, value in layer.named_parameters():
            constants.append(onnx.numpy_helper.from_array(value.detach().numpy(), f"{i}.{name}"))
            given.append(f"{i}.{name}")
        settings = {
            "group": layer.groups,
            "pads": [*layer.padding, *layer.padding],
            "strides": layer.stride,
            "dilations": layer.dilation,
        }
        nodes.append(onnx.helper.make_node("Conv", given, [last], **settings))
    ends = [
        onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, shape),
        onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None),
    ]
    graph = onnx.helper.make_graph(nodes, "m", ends[:1], ends[1:], constants)
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset]), folder / "m.onnx")
    known = [size if isinstance(size, int) else 1 for size in shape]
    x = torch.randn(known, generator=torch.Generator().manual_seed(0))
    return ov.Core().read_model(str(folder / "m.onnx")), x


def kernels(model):
    return [
        node.input_value(1).get_shape()[-1]
        for node in model.get_ordered_ops()
        if node.get_type_name() == "GroupConvolution"
    ]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [9, 11, 13])
def test_widened_kernels_compute_the_same(kernel, bias, wide_is, tmp_path):
    module = nn.Sequential(depthwise(kernel, bias=bias), nn.ReLU(), depthwise(kernel, bias=bias))
    model, x = converted(module, tmp_path)
    widened = widen_depthwise(model, OPTIONS)
    assert widened == ([(16, 20, 18, kernel)] if wide_is == "faster" else [])
    assert kernels(model) == [WIDE if wide_is == "faster" else kernel] * 2
    found = ov.Core().compile_model(model, "CPU", OPTIONS)(x.numpy())[0]
    with torch.no_grad():
        np.testing.assert_allclose(found, module(x).numpy(), atol=1e-5)


@pytest.mark.parametrize("wide_is", ["faster"], indirect=True)
@pytest.mark.parametrize(
    "module",
    [
        depthwise(7),
        depthwise(13, stride=2),
        depthwise(11, padding=3),
        depthwise(9, dilation=2, padding=4),
        depthwise((1, 11), padding=(0, 5)),
        nn.Conv2d(16, 16, 13, padding=6, groups=4),
    ],
    ids=["small", "strided", "padded otherwise", "dilated", "a row", "grouped"],
)
def test_other_convolutions_are_left_alone(module, wide_is, tmp_path):
    model, _ = converted(module, tmp_path)
    before = kernels(model)
    assert widen_depthwise(model, OPTIONS) == []
    assert kernels(model) == before


def test_the_measurement_measures():
    times = milliseconds((16, 20, 18, 13), (13, WIDE), OPTIONS)
    assert len(times) == 2 and all(0 < time < 1000 for time in times)


@pytest.mark.parametrize("batch_size, widened", [(1, 1), (None, 0)])
def test_only_models_of_known_shapes_are_fitted(batch_size, widened, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        running, "widen_depthwise", lambda *given: calls.append(widen_depthwise(*given))
    )
    module = depthwise(13)
    model, x = converted(module, tmp_path, ("batch", 16, 20, 18))
    ov.save_model(model, tmp_path / "m.xml", compress_to_fp16=False)
    runner = OpenVinoRunner(tmp_path / "m.xml", threads=2, batch_size=batch_size)
    assert len(calls) == widened
    for images in (x, x.repeat(3, 1, 1, 1)):
        with torch.no_grad():
            torch.testing.assert_close(runner(images), module(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_images_are_handed_over_as_convolutions_read_them(channels, tmp_path):
    module = nn.Conv2d(channels, 16, 3, stride=2)
    model, x = converted(module, tmp_path, (2, channels, 20, 18))
    ov.save_model(model, tmp_path / "m.xml", compress_to_fp16=False)
    runner = OpenVinoRunner(tmp_path / "m.xml", threads=2)
    for images in (x, x + 1, x.to(memory_format=torch.channels_last)):
        with torch.no_grad():
            torch.testing.assert_close(runner(images), module(images), atol=1e-5, rtol=1e-5)
    compiled = runner._compiled[None]
    assert list(compiled.input(0).get_shape()) == [2, 20, 18, channels]
