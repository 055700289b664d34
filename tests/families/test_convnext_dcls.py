"""ConvNeXt with learned spacings: its kernels, its shared positions and what it caches."""

from __future__ import annotations

import copy
import math
import zlib

import numpy as np
import pytest
import torch
from golden import FOLDER, Golden, assert_feature, assert_logits, fill
from torch import nn

import backbones
from backbones.errors import CheckpointError, ConfigError
from backbones.families.convnext.dcls import kernel_from_points

PARAMETERS = {
    "convnext_dcls_tiny": 28587688,
    "convnext_dcls_small": 50217064,
    "convnext_dcls_base": 88582632,
}
GOLDENS = sorted(FOLDER.glob("convnext_dcls_*.json.gz"))
SMALL = {"depths": [1, 2, 2, 1], "dims": [8, 16, 24, 32], "num_classes": 5}


def filled_state(model):
    return {key: fill(key, tuple(value.shape)) for key, value in model.state_dict().items()}


def small(**arguments):
    """A narrow model with filled weights and widely spread positions."""
    model = backbones.create_model("convnext_dcls_tiny", **{**SMALL, **arguments}).eval()
    state = filled_state(model)
    for key in state:
        if key.endswith(".positions"):
            state[key] = (state[key] * 20).clamp(-8, 8)
    model.load_state_dict(state)
    return model


def authors_layout(model):
    """The state dict as the authors' code saves it: positions repeated in every block."""
    theirs = {}
    for key, value in model.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.")
        for i in (1, 2, 3):
            key = key.replace(f"stages.{i}.downsample.", f"downsample_layers.{i}.")
        key = key.replace(".blocks.", ".").replace(".conv_dw.", ".dwconv.")
        key = key.replace(".mlp.fc", ".pwconv").replace("head.norm.", "norm.")
        key = key.replace("head.fc.", "head.")
        if key.endswith(".positions"):
            stage = key.removesuffix(".positions")
            for j in range(len(model.stages[int(stage[-1])].blocks)):
                theirs[f"{stage}.{j}.dwconv.P"] = value.unsqueeze(2)
        else:
            theirs[key] = value.unsqueeze(1) if key.endswith("dwconv.weight") else value
    return theirs


def wide_positions(golden, key):
    """The positions of the golden's second run, by the rule that stands in it."""
    source = golden.tied[key]
    shape = tuple(golden.state_dict[source]["shape"])
    values = np.random.Generator(np.random.PCG64(zlib.crc32(source.encode()))).standard_normal(
        shape
    )
    values = values.astype(np.float32).astype(np.float64)
    return torch.from_numpy(np.clip(golden.wide["scale"] * values, -8, 8))


def test_parameter_counts():
    assert set(PARAMETERS) == set(backbones.list_models("convnext_dcls_*"))
    for name, count in PARAMETERS.items():
        model = backbones.create_model(name, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count, name


# The kernel.


@pytest.mark.parametrize("size", [3, 17])
def test_kernel_is_the_sum_of_its_points(size):
    reach = size // 2
    special = [0.0, 1.0, -1.0, reach, -reach, reach + 0.25, -reach - 0.25, reach + 3, -0.5, 0.75]
    weight = torch.randn(4, 20, dtype=torch.float64)
    positions = torch.randn(2, 4, 20, dtype=torch.float64) * reach
    positions[0, 0, :10] = positions[1, 1, :10] = torch.tensor(special, dtype=torch.float64)
    expected = torch.zeros(4, 1, size, size, dtype=torch.float64)
    for c in range(4):
        for n in range(20):
            row, column = (positions[:, c, n] + reach).tolist()
            top, left = math.floor(row), math.floor(column)
            for i, by_row in ((top, top + 1 - row), (top + 1, row - top)):
                for j, by_column in ((left, left + 1 - column), (left + 1, column - left)):
                    if 0 <= i < size and 0 <= j < size:
                        expected[c, 0, i, j] += weight[c, n] * by_row * by_column
    torch.testing.assert_close(kernel_from_points(weight, positions, size), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_types_round_only_the_finished_kernel(dtype):
    weight, positions = torch.randn(4, 20).to(dtype), (4 * torch.randn(2, 4, 20)).to(dtype)
    expected = kernel_from_points(weight.float(), positions.float(), 17).to(dtype)
    torch.testing.assert_close(kernel_from_points(weight, positions, 17), expected, rtol=0, atol=0)


def test_kernel_gradients():
    weight = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    positions = torch.empty(2, 2, 5, dtype=torch.float64).uniform_(0.1, 0.9) - 1
    assert torch.autograd.gradcheck(
        lambda w, p: kernel_from_points(w, p, 3), (weight, positions.requires_grad_())
    )


def test_a_point_at_the_border_can_leave_it():
    """Clamped points lie at whole positions, where the derivative must not vanish."""
    positions = torch.full((2, 1, 1), 8.0, requires_grad=True)
    kernel = kernel_from_points(torch.ones(1, 1), positions, 17)
    (gradient,) = torch.autograd.grad(kernel[0, 0, 16, 16], positions)
    assert gradient.flatten().tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
def test_wide_kernels_of_the_authors(path):
    golden = Golden(path)
    for expected in golden.wide["kernels"]:
        block = expected["name"].split(" ")[0]
        key = f"{block}.weight"
        weight = fill(key, tuple(golden.state_dict[key]["shape"])).squeeze(1)
        positions = wide_positions(golden, f"{block}.P").squeeze(2)
        assert_feature(kernel_from_points(weight, positions, 17), expected, expected["name"])


# The model.


@pytest.mark.slow
@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.name.split(".")[0])
@pytest.mark.parametrize("wide", [False, True], ids=["filled", "wide"])
@torch.no_grad()
def test_goldens(path, wide):
    golden = Golden(path)
    model = backbones.create_model(golden.variant, dtype=torch.float64).eval()
    checkpoint = golden.checkpoint()
    if wide:
        golden.content |= golden.wide
        for key in golden.tied:
            checkpoint[key] = wide_positions(golden, key)
    assert not backbones.load_checkpoint(model, checkpoint).missing
    assert sum(p.numel() for p in model.parameters()) == golden.params
    model.to(memory_format=torch.channels_last)  # several times faster on CPUs
    x = golden.input_tensor().to(memory_format=torch.channels_last)
    maps = model.forward_intermediates(x, intermediates_only=True)
    assert_logits(model.forward_head(maps[-1]), golden)
    assert len(golden.stages()) == len(maps)
    for actual, expected in zip(maps, golden.stages()):
        assert_feature(actual.contiguous(), expected, expected["name"])


@pytest.mark.slow
def test_golden_gradients():
    """The gradient of shared positions is the sum over the stage, listed under every block."""
    golden = next(g for g in map(Golden, GOLDENS) if g.content.get("grads"))
    model = backbones.create_model(golden.variant, dtype=torch.float64).eval()
    backbones.load_checkpoint(model, golden.checkpoint())
    model.to(memory_format=torch.channels_last)
    x = golden.input_tensor().to(memory_format=torch.channels_last)
    model(x).square().mean().backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    ours = authors_layout(model)
    assert ours.keys() == golden.grads.keys()
    largest = max(golden.grads.values())
    for key, norm in golden.grads.items():
        assert abs(ours[key].norm().item() - norm) < 1e-9 * norm + 1e-15 * largest, key


@torch.no_grad()
def test_equals_a_plain_convnext_with_the_dense_kernels():
    model = small()
    plain = backbones.create_model("convnext_tiny", kernel_sizes=17, **SMALL).eval()
    state = model.state_dict()
    for stage, module in enumerate(model.stages):
        positions = state.pop(f"stages.{stage}.positions")
        for j in range(len(module.blocks)):
            key = f"stages.{stage}.blocks.{j}.conv_dw.weight"
            state[key] = kernel_from_points(state[key], positions, 17)
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)


def test_positions_are_one_parameter_a_stage():
    model = small()
    names = [name for name, _ in model.named_parameters() if "positions" in name]
    assert names == [f"stages.{i}.positions" for i in range(4)]
    assert set(names) == model.no_weight_decay()
    assert len(list(model.parameters())) == len(model.state_dict())


@torch.no_grad()
def test_authors_layout_and_a_saved_file_load(tmp_path):
    model = small()
    x = torch.randn(1, 3, 64, 64)
    expected = model(x)
    backbones.save_checkpoint(model, tmp_path / "model.safetensors")
    theirs = authors_layout(model)
    assert sum(key.endswith(".P") for key in theirs) == 6
    for source in (theirs, tmp_path / "model.safetensors"):
        fresh = backbones.create_model("convnext_dcls_tiny", **SMALL).eval()
        report = backbones.load_checkpoint(fresh, source)
        assert report.loaded == len(model.state_dict())
        torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0)
        features = backbones.create_model(
            "convnext_dcls_tiny", **SMALL, features_only=True, out_indices=(1,)
        )
        assert not backbones.load_checkpoint(features, source).missing


def test_blocks_with_different_positions_are_refused():
    model = small()
    theirs = authors_layout(model)
    key = "stages.2.1.dwconv.P"
    theirs[key] = theirs[key] + 1
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=r"stages\.2\.blocks\.1\.conv_dw\.P.*share"):
        backbones.load_checkpoint(model, theirs)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_training_moves_points_and_clamping_brings_them_back():
    model = small().train()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    for i, stage in enumerate(model.stages):
        moved = (stage.positions - start[f"stages.{i}.positions"]).abs()
        assert (moved > 0).float().mean() > 0.5
        with torch.no_grad():
            stage.positions[0, 0, 0], stage.positions[1, 0, 0] = 9.5, -11.0
    model.clamp_parameters()
    for stage in model.stages:
        assert stage.positions.abs().max() == 8
        assert stage.positions[:, 0, 0].tolist() == [8, -8]


def test_gradient_checkpointing_reaches_the_positions():
    grads = []
    x = torch.randn(1, 3, 64, 64)
    for enable in (False, True):
        model = small()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        grads.append([stage.positions.grad for stage in model.stages])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "arguments",
    [{"kernel_sizes": 16}, {"conv_ratio": 0.5}, {"points": 0}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ConfigError, match="points="):
        backbones.create_model("convnext_dcls_tiny", device="meta", **arguments)


# The cached kernel.


def load(model):
    model.load_state_dict({key: value * 0.5 for key, value in model.state_dict().items()})


def assign(model):
    state = {key: value * 0.5 for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def load_as_checkpoint(model):
    state = {key: value * 0.5 for key, value in model.state_dict().items()}
    backbones.load_checkpoint(model, state)


def step_in_eval(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.enable_grad():
        model(torch.randn(1, 3, 32, 32)).square().mean().backward()
    optimizer.step()


def replace_parameters(model):
    for stage in model.stages:
        stage.positions = nn.Parameter(stage.positions.flip(0))


def replace_by_a_view(model):
    """New parameters in the old memory, written to as often as the old ones."""
    for stage in model.stages:
        old = stage.positions
        stage.positions = nn.Parameter(old.data)
        for _ in range(old._version):
            stage.positions.mul_(0.5)


def swap_data(model):
    for stage in model.stages:
        stage.positions.data = stage.positions.flip(0)


def to_double_and_back(model):
    model.double().load_state_dict({k: v.double() * 0.5 for k, v in model.state_dict().items()})
    model.float()


CHANGES = [
    load,
    assign,
    load_as_checkpoint,
    step_in_eval,
    replace_parameters,
    replace_by_a_view,
    swap_data,
    to_double_and_back,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_cached_kernels_follow_every_change(change, context):
    model = small()
    x = torch.randn(1, 3, 64, 64)
    with context():
        before = model(x)
    with torch.no_grad():
        change(model)
    with context():
        after = model(x)
        twin = backbones.create_model("convnext_dcls_tiny", **SMALL).eval()
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(after, twin(x), rtol=0, atol=0)
    assert not torch.allclose(after, before)


def test_kernels_are_built_once_and_copies_are_independent():
    model = small()
    conv, positions = model.stages[0].blocks[0].conv_dw, model.stages[0].positions
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        first = conv.kernel(positions)
        assert conv.kernel(positions) is first
    with torch.no_grad():
        assert conv.kernel(positions) is first
        twin = copy.deepcopy(model)
        assert not any(vars(block.conv_dw.cached)["_cached"] for block in twin.stages[0].blocks)
        for parameter in twin.parameters():
            parameter.zero_()
        assert twin(x).abs().max() == 0
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
        assert conv.kernel(positions) is first
    assert conv.kernel(positions) is not first  # gradients flow into the points
    assert conv.kernel(positions).requires_grad


def test_frozen_model_keeps_kernels_and_passes_gradients_to_its_input():
    model = small().requires_grad_(False)
    conv, positions = model.stages[0].blocks[0].conv_dw, model.stages[0].positions
    with torch.inference_mode():
        model(torch.randn(1, 3, 32, 32))
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    model(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert conv.kernel(positions) is conv.kernel(positions)


@torch.no_grad()
def test_autocast_builds_kernels_in_float32():
    model = small()
    x = torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    kernel = model.stages[1].blocks[0].conv_dw.kernel(model.stages[1].positions)
    assert mixed.dtype == torch.bfloat16
    exact = kernel_from_points(
        model.stages[1].blocks[0].conv_dw.weight.double(), model.stages[1].positions.double(), 17
    )
    torch.testing.assert_close(kernel.double(), exact, rtol=1e-5, atol=1e-6)
