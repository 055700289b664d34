"""Files for compilers that want static shapes and names of their own."""

import pytest
import torch
from small_models import small
from tiers import shallow, smallest_of_each_family

import backbones
from backbones.cli import main
from backbones.engines import OnnxConfig, export, open_exported
from backbones.errors import ConfigError
from backbones.weights import save_checkpoint

onnx = pytest.importorskip("onnx")
SIZE = (3, 64, 64)
IMAGES = torch.randn(10, *SIZE, generator=torch.Generator().manual_seed(0))
# Others export in more than a few seconds.
QUICK = {"convnext_atto", "glnet_4g", "uniformer_xxs"}
# What computes integers, by the smallest member of a family, and why.
COMPUTED = {
    "spartan_t": ({"ArgMax"}, "each position's strongest channel is found, and its feature taken"),
    "uniformer_xxs": (
        {"TopK", "Unsqueeze", "Expand"},
        "the tokens that score highest are found, taken out and put back",
    ),
}


def shape_and_names(path):
    graph = onnx.load(path, load_external_data=False).graph
    (taken,) = graph.input
    shape = [d.dim_value or d.dim_param for d in taken.type.tensor_type.shape.dim]
    return shape, taken.name, [output.name for output in graph.output]


def contents(path):
    """Return the types of a file's values, and the operations that compute other than float32."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    constants, computing = {tensor.name for tensor in graph.initializer}, set()
    for node in graph.node:
        outputs = {*node.output} - {""}
        if node.op_type in ("Constant", "Reshape") and constants >= {*node.input}:
            constants |= outputs
        elif {types[output] for output in outputs} != {onnx.TensorProto.FLOAT}:
            computing.add(node.op_type)
    return {*types.values()}, computing


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2", ".pte"])
def test_a_fixed_batch(suffix, tmp_path):
    pytest.importorskip({".xml": "openvino", ".pte": "executorch"}.get(suffix, "onnxruntime"))
    model = small()
    report = export(model, tmp_path / f"m{suffix}", input_size=SIZE, batch_size=4)
    assert report.dynamic == ()
    assert [check.shape for check in report.checks] == [(4, *SIZE)]
    found = open_exported(report.path)(IMAGES[:4])
    with torch.no_grad():
        assert (found - model(IMAGES[:4])).abs().max() < 1e-4
    if suffix == ".onnx":
        assert shape_and_names(report.path)[0] == [4, *SIZE]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in smallest_of_each_family()
    ],
)
def test_files_hold_no_truth_values_and_compute_no_integers(name, tmp_path):
    """At a size whose maps are no multiples of the grids that families pool them to."""
    model = backbones.create_model(name, num_classes=7, **shallow(name, blocks=1)).eval()
    path = tmp_path / "m.onnx"
    export(model, path, input_size=(3, 224, 160), batch_size=1, verify=False)
    types, computing = contents(path)
    assert onnx.TensorProto.BOOL not in types
    assert computing == COMPUTED.get(name, (set(), ""))[0]


def test_maps_are_pooled_without_integers_where_the_batch_is_free(tmp_path):
    export(small(), tmp_path / "m.onnx", input_size=SIZE)
    assert contents(tmp_path / "m.onnx") == (
        {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64},
        set(),
    )


def test_a_fixed_batch_beside_free_sizes(tmp_path):
    free = ("batch", "height", "width")
    model = small()
    report = export(model, tmp_path / "m.onnx", input_size=SIZE, batch_size=2, dynamic=free)
    assert report.dynamic == ("height", "width")
    assert [check.shape for check in report.checks] == [(2, *SIZE), (2, 3, 96, 128)]
    assert shape_and_names(report.path)[0] == [2, 3, "height", "width"]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_names_of_ones_own(precision, tmp_path):
    model = small()
    config = OnnxConfig(input_name="images", output_names=["scores"])
    path = tmp_path / "m.onnx"
    options = {"input_size": SIZE, "precision": precision, "calibration": IMAGES, "batch_size": 4}
    report = export(model, path, format=config, **options)  # 10 images are two batches and a rest
    assert shape_and_names(path) == ([4, *SIZE], "images", ["scores"])
    assert report.checks[-1].real and report.checks[-1].shape == (4, *SIZE)
    runner = open_exported(path)
    assert runner.metadata["outputs"] == ["scores"]
    with torch.no_grad():
        error = (runner(IMAGES[:4]) - model(IMAGES[:4])).abs().max()
    assert error < (1e-4 if precision == "fp32" else 0.5)


def test_the_maps_of_all_stages_have_names(tmp_path):
    names = ["c2", "c3", "c4", "c5"]
    config = OnnxConfig(output_names=names)
    report = export(small(), tmp_path / "m.onnx", format=config, input_size=SIZE, features=True)
    assert shape_and_names(report.path)[2] == names


@pytest.mark.parametrize(
    "config, options, words",
    [
        ({"output_names": ["a", "b"]}, {}, "2 output names for 1: logits"),
        ({}, {"batch_size": 0}, "no batch of 0 images; give 1 or more"),
        ({}, {"batch_size": 2.0}, "no batch of 2.0 images"),
        ({}, {"batch_size": 16, "calibration": IMAGES}, "takes? 16 images at once.* has 10"),
    ],
)
def test_what_does_not_fit_leaves_no_file(config, options, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        export(
            small(), tmp_path / "m.onnx", format=OnnxConfig(**config), input_size=SIZE, **options
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("names", [{"input_name": ""}, {"output_names": ["input"]}])
def test_names_differ(names):
    with pytest.raises(ConfigError, match="must differ and not be empty"):
        OnnxConfig(**names)


def test_the_command(tmp_path, capsys):
    saved = str(save_checkpoint(small(), tmp_path / "m.safetensors"))
    path = tmp_path / "m.onnx"
    options = ["--batch", "1", "--opset", "17", "--input-name", "x", "--output-names", "y"]
    assert main(["export", saved, str(path), "--img-size", "64", *options]) == 0
    assert shape_and_names(path) == ([1, *SIZE], "x", ["y"])
    assert onnx.load(path).opset_import[0].version == 17
    assert main(["export", saved, str(tmp_path / "m.xml"), "--opset", "17"]) == 2
    assert "--opset: ONNX files alone have it" in capsys.readouterr().err
