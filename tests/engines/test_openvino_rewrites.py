"""Norms and scales are rewritten only where that is the same, and compute the same."""

import numpy as np
import pytest
import torch

from backbones import create_model, export
from backbones.engines.openvino import OpenVinoRunner
from backbones.engines.openvino.passes import (
    LEAST_CHANNELS,
    norms_on_rows,
    scales_into_weights,
    single_outputs_by_lanes,
)

ov = pytest.importorskip("openvino")
ops = pytest.importorskip("openvino.opset8")

OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
RNG = np.random.default_rng(0)


def values(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def conv(x, weights, stride=1):
    return ops.convolution(x, weights, [stride, stride], [0, 0], [0, 0], [1, 1])


def outputs(model, x):
    return ov.Core().compile_model(model, "CPU", OPTIONS)(x)[0]


def kinds(model):
    compiled = ov.Core().compile_model(model, "CPU", OPTIONS)
    return [
        node.get_rt_info()["layerType"].value for node in compiled.get_runtime_model().get_ops()
    ]


def norm(y, channels, mean="reduced", power=2.0, eps=1e-3, one=1.0, of=None):
    of = y if of is None else of
    square = ops.power(of, np.float32(power))
    if mean == "convolved":
        square = conv(square, np.full((1, channels, 1, 1), 1 / channels, np.float32))
    elif mean == "weighted":
        square = conv(square, np.abs(values(1, channels, 1, 1)))
    elif mean == "over positions":
        square = ops.reduce_mean(square, [2, 3], True)
    else:
        square = ops.reduce_mean(square, [1], True)
    root = ops.sqrt(ops.add(square, np.float32(eps)))
    return ops.multiply(y, ops.divide(np.float32(one), root))


def normalized(channels=24, **given):
    """A norm between convolutions, as in every model, and an image."""
    x = ops.parameter([2, 3, 9, 7], np.float32)
    y = conv(x, values(channels, 3, 1, 1))
    if given.pop("of", None) == "another":
        given["of"] = conv(x, values(channels, 3, 1, 1))
    y = conv(norm(y, channels, **given), values(5, channels, 1, 1))
    return ov.Model([y], [x]), values(2, 3, 9, 7)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("channels", [1, 20, 64])
@pytest.mark.parametrize("mean", ["reduced", "convolved"])
def test_norms_over_channels_go_by_one_kernel(mean, channels, eps):
    model, x = normalized(channels, mean=mean, eps=eps)
    expected = outputs(model, x)
    assert "RMS" not in kinds(model)
    assert norms_on_rows(model) == 1
    found = kinds(model)
    assert "RMS" in found and "Transpose" not in found
    np.testing.assert_allclose(outputs(model, x), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "given",
    [
        {"mean": "weighted"},
        {"mean": "over positions"},
        {"power": 4.0},
        {"one": 2.0},
        {"of": "another"},
    ],
    ids=str,
)
def test_what_only_looks_like_such_a_norm_is_left_alone(given):
    model, x = normalized(**given)
    expected = outputs(model, x)
    assert norms_on_rows(model) == 0
    np.testing.assert_array_equal(outputs(model, x), expected)


def scaled(batch=1, side=20, out=8, kernel=1, stride=1, scale="of the map", used_twice=False):
    """A map of 16 channels that is scaled and convolved, and an image."""
    x = ops.parameter([batch, 3, side, side], np.float32)
    y = conv(x, values(16, 3, 1, 1))
    factor = {
        "of the map": lambda: ops.reduce_mean(y, [2, 3], True),
        "of positions": lambda: ops.reduce_mean(y, [1], True),
        "constant": lambda: ops.constant(values(1, 16, 1, 1)),
    }[scale]()
    y = ops.multiply(y, factor)
    outs = [conv(y, values(out, 16, kernel, kernel), stride)]
    if used_twice:
        outs.append(y)
    return ov.Model(outs, [x]), values(batch, 3, side, side)


def test_weights_are_scaled_instead_of_large_maps():
    model, x = scaled()
    expected = outputs(model, x)
    assert scales_into_weights(model) == [(1, 16, 20, 20)]
    np.testing.assert_allclose(outputs(model, x), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    "given",
    [
        {"batch": 2},
        {"side": 19},
        {"kernel": 3},
        {"stride": 2},
        {"scale": "of positions"},
        {"scale": "constant"},
        {"used_twice": True},
    ],
    ids=str,
)
def test_other_maps_are_scaled_as_before(given):
    model, x = scaled(**given)
    expected = outputs(model, x)
    assert scales_into_weights(model) == []
    np.testing.assert_array_equal(outputs(model, x), expected)


def contrasted(channels=160, out=1, kernel=1, computed=False):
    """A map of many channels that goes to one, between convolutions, and an image."""
    x = ops.parameter([2, 3, 9, 7], np.float32)
    y = conv(x, values(channels, 3, 1, 1))
    of = values(out, channels, kernel, kernel)
    if computed:
        of = ops.multiply(of, ops.reduce_mean(x, [0, 1, 2, 3], True))
    return ov.Model([conv(conv(y, of), values(5, out, 1, 1))], [x]), values(2, 3, 9, 7)


def test_single_outputs_are_computed_in_all_lanes():
    model, x = contrasted()
    expected = outputs(model, x)
    assert single_outputs_by_lanes(model) == 1
    np.testing.assert_allclose(outputs(model, x), expected, atol=1e-5 * np.abs(expected).max())
    assert "Transpose" not in kinds(model)
    assert kinds(model).count("Convolution") == kinds(contrasted()[0]).count("Convolution") + 1


@pytest.mark.parametrize(
    "given",
    [
        {"channels": LEAST_CHANNELS - 16},
        {"channels": LEAST_CHANNELS + 8},
        {"out": 2},
        {"kernel": 3},
        {"computed": True},
    ],
    ids=str,
)
def test_other_convolutions_are_left_alone(given):
    model, x = contrasted(**given)
    expected = outputs(model, x)
    assert single_outputs_by_lanes(model) == 0
    np.testing.assert_array_equal(outputs(model, x), expected)


@pytest.mark.parametrize("batch_size, norms", [(1, 5), (None, 0)])
def test_models_are_rewritten_where_their_shapes_are_known(batch_size, norms, tmp_path):
    model = create_model("unireplknet_a").eval()
    file = tmp_path / "m.xml"
    export(model, file, input_size=(3, 64, 64), verify=False)
    runner = OpenVinoRunner(file, threads=2, batch_size=batch_size)
    compiled = runner._compiled[batch_size].get_runtime_model()
    found = [node.get_rt_info()["layerType"].value for node in compiled.get_ops()]
    assert found.count("RMS") == norms
    assert "Transpose" not in found
    for batch in (1, 3):
        x = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            torch.testing.assert_close(runner(x), model(x), atol=1e-4, rtol=1e-4)
