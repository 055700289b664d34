"""What is particular to TransNeXt: positions and pooling of any size, and what no weight shows."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import FOLDER, Golden, assert_feature, fill
from randomized import randomize
from torch.utils._python_dispatch import TorchDispatchMode

import backbones
from backbones import ops
from backbones.errors import CheckpointError, ConfigError
from backbones.families.transnext.positions import PositionBias, tables_of

PARAMETERS = {
    "micro": 12809304,
    "micro_aaaa": 13114008,
    "tiny": 28258960,
    "small": 49741564,
    "base": 89721496,
}
SMALL = {"depths": [1, 1, 1, 1], "dims": [24, 24, 48, 48], "num_classes": 5}
# (height, width, ratio): of multiples of the ratio, of others, and smaller than it
MAPS = [(8, 12, 4), (13, 19, 2), (9, 7, 4), (3, 5, 8), (1, 1, 2), (6, 5, 1)]


def small(name="transnext_micro", seed=0, **arguments):
    model = backbones.create_model(name, dtype=torch.float64, **{**SMALL, **arguments})
    return randomize(model, seed).eval()


def golden_model(name, variant, **arguments):
    golden = Golden(FOLDER / f"{name}.json.gz")
    model = backbones.create_model(variant, dtype=torch.float64, **arguments).eval()
    backbones.load_checkpoint(model, golden.checkpoint())
    return golden, model


def test_parameter_counts():
    names = {f"transnext_{name}" for name in PARAMETERS}
    assert names == set(backbones.list_models(family="transnext"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(f"transnext_{name}", device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name
        assert model.pretrain_size == (256 if name == "micro_aaaa" else 224), name


def test_bad_arguments_are_refused():
    for wrong, message in (
        ({"dims": [24, 48, 64, 96]}, "multiples of 24"),
        ({"sr_ratios": [8, 4, 2]}, "4 integers from 1"),
        ({"sr_ratios": [8, 4, 2, 0]}, "4 integers from 1"),
        ({"pretrain_size": 32}, "multiple of 32 from 64"),
        ({"pretrain_size": 230}, "multiple of 32 from 64"),
    ):
        with pytest.raises(ConfigError, match=message):
            backbones.create_model("transnext_micro", device="meta", **wrong)


@torch.no_grad()
def test_initial_values():
    model = backbones.create_model("transnext_tiny", depths=[1, 1, 1, 1])
    attn = model.stages[0].blocks[0].attn
    assert torch.allclose(F.softplus(attn.temperature), torch.tensor(1 / 0.24))
    assert attn.learnable_bias.abs().max() == 0
    assert attn.learnable_tokens.std().item() == pytest.approx(0.02, rel=0.2)
    assert attn.relative_pos_bias_local.std().item() == pytest.approx(0.0004, rel=0.5)
    assert attn.sr.weight.std().item() == pytest.approx(math.sqrt(2 / 72), rel=0.1)
    spared = model.no_weight_decay()
    assert any(name.endswith("cpb.fc1.weight") for name in spared)
    assert not any("learnable" in name for name in spared)


# Positions.


@pytest.mark.parametrize(("height", "width", "ratio"), MAPS)
def test_biases_are_those_of_each_pair(height, width, ratio):
    """Against the network called on the distance of every position from every pooled window."""
    pretrain = 7
    network = randomize(PositionBias(3).double())
    x = torch.zeros(1, height, width, 24, dtype=torch.float64)
    found = network(tables_of(x, ratio, pretrain))
    pooled = [max(1, n // ratio) for n in (height, width)]
    centers = []
    for n, p in zip((height, width), pooled):
        places = torch.arange(n, dtype=torch.float64).view(1, 1, n)
        weights = torch.eye(n, dtype=torch.float64).view(1, n, n)
        means = F.adaptive_avg_pool1d(places, p).flatten()
        inside = F.adaptive_avg_pool1d(weights, p)[0] > 0  # (n, p)
        centers.append(means)
        assert inside.any(0).all()
    assert found.shape == (3, math.prod(pooled), height * width)
    pairs = itertools.product(*(range(n) for n in (*pooled, height, width)))
    for k, m, i, j in pairs:
        apart = torch.stack((i - centers[0][k], j - centers[1][m])) * 8 / (pretrain - 1)
        place = apart.sign() * (1 + apart.abs()).log2() / 3
        expected = network.fc2(network.fc1(place).relu())
        actual = found[:, k * pooled[1] + m, i * width + j]
        assert torch.allclose(actual, expected, rtol=0, atol=1e-12), (k, m, i, j)


@pytest.mark.parametrize(("height", "width", "ratio"), MAPS)
def test_pooling_windows_and_lengths(height, width, ratio):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    tables = tables_of(x.permute(0, 2, 3, 1), ratio, 7)
    pooled = [max(1, n // ratio) for n in (height, width)]
    found = tables.pool_rows @ x @ tables.pool_columns.mT
    assert torch.allclose(found, F.adaptive_avg_pool2d(x, pooled), rtol=0, atol=1e-13)
    inside = F.unfold(torch.ones(1, 1, height, width), 3, padding=1)[0] > 0
    assert torch.equal(tables.outside == 0, inside)
    assert torch.equal(tables.outside == -torch.inf, ~inside)
    lengths = (inside.sum(0) + math.prod(pooled)).double().log()
    assert torch.allclose(tables.lengths, lengths, rtol=0, atol=1e-13)


def test_tables_are_of_the_type_of_the_map_but_never_narrower_than_float32():
    for dtype, expected in ((torch.float64,) * 2, (torch.bfloat16, torch.float32)):
        tables = tables_of(torch.zeros(1, 4, 4, 24, dtype=dtype), 2, 7)
        assert {t.dtype for t in tables if t.is_floating_point()} == {expected}


@torch.no_grad()
@pytest.mark.parametrize("name", ["transnext_micro", "transnext_micro_aaaa"])
def test_no_size_leaves_anything_behind(name):
    """Sizes with as many positions as each other, and back to the first."""
    sizes = [(64, 64), (32, 128), (128, 32), (32, 32), (45, 90), (64, 64)]
    images = {size: torch.randn(2, 3, *size, dtype=torch.float64) for size in sizes}
    used = small(name)
    for size in sizes:
        assert torch.equal(used(images[size]), small(name)(images[size])), size


@torch.no_grad()
def test_transposed_images_differ_by_more_than_a_transposition_of_the_size():
    """Heights and widths are not mixed up: with transposed weights, images may be transposed."""
    model, other = small(), small()
    for key, tensor in other.state_dict().items():
        if tensor.ndim == 4:
            tensor.copy_(tensor.clone().mT)
        elif key.endswith("cpb.fc1.weight"):
            tensor.copy_(tensor.clone().flip(1))
        elif key.endswith(("relative_pos_bias_local", "learnable_tokens", "learnable_bias")):
            tensor.copy_(tensor.clone().unflatten(-1, (3, 3)).mT.flatten(-2))
    x = torch.randn(1, 3, 45, 90, dtype=torch.float64)
    expected = model(x)
    assert torch.allclose(other(x.mT), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(model(x.mT), expected, rtol=0, atol=1e-3)


@torch.no_grad()
def test_the_authors_dense_maps_are_the_normed_stages():
    """Also of stages whose norm, here, is the first part of the next one."""
    golden, model = golden_model("transnext_micro@192x256", "transnext_micro")
    maps = model.forward_intermediates(golden.input_tensor(), intermediates_only=True)
    norms = [*(stage.downsample[0] for stage in list(model.stages)[1:]), model.head.norm]
    expected = {f["name"]: f for f in golden.features}
    for i, (map_, norm) in enumerate(zip(maps, norms, strict=True)):
        assert_feature(norm(map_), expected[f"dense.{i}"], f"dense.{i}")


def test_checkpoints_of_dense_models_load_into_features_only():
    """They hold everything but the classifier, under a prefix."""
    golden = Golden(FOLDER / "transnext_micro.json.gz")
    file = {f"backbone.{k}": t for k, t in golden.checkpoint().items() if not k.startswith("head.")}
    model = backbones.create_model("transnext_micro", features_only=True)
    report = backbones.load_checkpoint(model, file)
    assert (report.layout, report.prefix, report.missing) == ("authors", "backbone.", ())


# What no weight shows.


@torch.no_grad()
def test_a_wrong_pretrain_size_shows_in_the_logits_alone():
    model, other = small(), small(pretrain_size=384)
    assert other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    assert (other(x) - model(x)).abs().max() > 1e-3 * model(x).abs().max()


def test_files_tell_what_no_weight_shows(tmp_path):
    model = small()
    path = backbones.save_checkpoint(model, tmp_path / "m.safetensors")
    assert backbones.load_checkpoint(small(seed=1), path).assumed == ()
    with pytest.raises(CheckpointError, match="pretrain_size=224"):
        backbones.load_checkpoint(small(pretrain_size=256), path)
    with pytest.raises(CheckpointError, match=r"sr_ratios=\[8, 4, 2, 1\]"):
        backbones.load_checkpoint(small(sr_ratios=[4, 4, 2, 1]), path)


@pytest.mark.parametrize(
    ("file", "size"),
    [
        ("transnext_micro_224_1k.pth", 224),
        ("transnext_base_384_1k_ft_1k.pth", 224),
        ("transnext_micro_AAAA_256_1k.pth", 256),
    ],
)
def test_names_of_the_authors_files_tell_it(file, size, tmp_path):
    variant = "transnext_micro_aaaa" if size == 256 else "transnext_micro"
    model = small(variant)
    torch.save(model.state_dict(), tmp_path / file)
    assert backbones.load_checkpoint(model, tmp_path / file).assumed == ()
    other = small(variant, pretrain_size=480 - size)
    with pytest.raises(CheckpointError, match=f"pretrain_size={size}"):
        backbones.load_checkpoint(other, tmp_path / file)
    torch.save(model.state_dict(), tmp_path / "mine.pth")
    assert len(backbones.load_checkpoint(model, tmp_path / "mine.pth").assumed) == 2


def test_aggregated_attention_everywhere_is_another_model():
    with pytest.raises(CheckpointError, match="missing"):
        backbones.load_checkpoint(small("transnext_micro_aaaa"), small().state_dict())


# How it is computed.


class LargestTensor(TorchDispatchMode):
    """Notes how many bytes the largest result of an operator has."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@torch.no_grad()
def test_no_windows_are_gathered():
    model = small(dims=[48, 48, 48, 48], mlp_ratios=1).float()
    windows = 9 * 48 * 64 * 64 * 4  # bytes of the first stage's
    with LargestTensor() as largest:
        model(torch.randn(1, 3, 256, 256))
    assert largest.bytes < windows / 2
    with ops.use_reference(), LargestTensor() as largest:
        model(torch.randn(1, 3, 256, 256))
    assert largest.bytes >= windows


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_of_length_zero_stay_finite_in_half_types(dtype):
    model = small()
    for block in model.stages[0].blocks:
        for layer in (block.attn.q, block.attn.kv):
            layer.weight.zero_()
            layer.bias.zero_()
    assert model.to(dtype)(torch.randn(1, 3, 64, 64, dtype=dtype)).isfinite().all()


@torch.no_grad()
def test_autocast_computes_positions_and_logits_in_float32():
    model = small().float()
    x = fill("input", (1, 3, 64, 96)).float()
    seen = set()
    for module in model.modules():
        if isinstance(module, PositionBias):
            module.register_forward_hook(lambda _, inputs, output: seen.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
    assert seen == {torch.float32}
    expected = model(x)
    assert (logits.float() - expected).abs().max() < 0.1 * expected.abs().max()


@torch.no_grad()
def test_position_biases_are_constants_of_an_exported_file(tmp_path):
    """ONNX Runtime computes them once, when it opens the file."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = tmp_path / "m.onnx"
    backbones.export(small().float(), path, input_size=(3, 64, 64))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(path), options)
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    constants = {tensor.name: np.prod(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        assert not all(name in constants for name in node.input if name), node.op_type
    # 4 maps of 16, 8, 4 and 2 positions a side, pooled to 2 or (the last) not at all
    shapes = [list(tensor.dims) for tensor in graph.initializer]
    for heads, keys, positions in ((1, 4, 256), (1, 4, 64), (2, 4, 16), (2, 4, 4)):
        assert [heads, keys, positions] in shapes
