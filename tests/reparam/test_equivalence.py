"""The deploy form of every variant computes what the training form computes."""

from __future__ import annotations

import copy
import re
from collections import Counter

import pytest
import timm.models
import torch
from damping import damp
from randomized import randomize
from tiers import (
    by_size,
    families_by_default,
    families_in_manifest,
    parameters_of,
    representatives,
    shallow,
    smallest_size,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import backbones
from backbones import merge
from backbones.registry import registry

TOLERANCE = 1e-10
BATCH_NORM = nn.modules.batchnorm._BatchNorm
# Batch norms between two operators that cannot take them, of the families in the manifest.
LEFT_NORMS = {
    "lsnet": r"\.mixer\.norm$",
    "moganet": r"^stages\.[123]\.downsample\.0$",
    "rednet": r"^stem\.2$|blocks\.\d+\.norm$",
}


def make(name: str, **arguments: object) -> nn.Module:
    model = randomize(backbones.create_model(name, dtype=torch.float64, **arguments)).eval()
    return damp(model, name)  # what is no number equals nothing


@torch.no_grad()
def outputs(model: nn.Module, height: int, width: int) -> list[torch.Tensor]:
    x = torch.randn(
        1, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    last, maps = model.forward_intermediates(x)
    return [*maps, model.forward_head(last)]


def assert_close(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


def arguments_of(name: str) -> dict[str, object]:
    """What a variant is built with here.

    The largest are 5 GB of float64 each; where blocks repeat, two of them show the same.
    """
    return {"num_classes": 7, **(shallow(name) if parameters_of(name) > 100e6 else {})}


@pytest.fixture(scope="module", params=by_size())
def pair(request):
    """A variant's training form and what `reparameterize` makes of it."""
    model = make(request.param, **arguments_of(request.param))
    return request.param, model, backbones.reparameterize(model, verify=False)


def test_the_smallest_and_an_odd_size_give_the_same(pair):
    _, model, merged = pair
    side = smallest_size(model)
    for size in ((side, side), (side + 5, side + 11)):
        assert_close(outputs(model, *size), outputs(merged, *size))


def test_entries_disappear_and_the_form_is_known(pair):
    _, model, merged = pair
    assert not model.deployed and merged.deployed
    assert len(merged.state_dict()) < len(model.state_dict())


def test_merging_twice_changes_nothing(pair):
    _, _, merged = pair
    before = {key: value.clone() for key, value in merged.state_dict().items()}
    with merge.recorded() as merges:
        again = backbones.reparameterize(merged, verify=False)
    assert not merges
    assert again.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())


class Uses(TorchFunctionMode):
    """Counts how many operations take each tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.alive: list[Tensor] = []  # so that no later tensor gets the id of one counted

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) or type(result) in (tuple, list):
            taken = [value for value in args if isinstance(value, Tensor)]
            self.counts.update(map(id, taken))
            self.alive += taken
        return result


@torch.no_grad()
def test_no_batch_norm_is_left_beside_a_linear_layer_that_can_take_it(pair):
    name, _, merged = pair
    made_by: dict[int, nn.Module] = {}
    alive: list[Tensor] = []
    pairs = []

    def after(module, inputs, output):
        for value in inputs:
            source = made_by.get(id(value))
            if isinstance(module, BATCH_NORM) and merge.is_linear_layer(source):
                pairs.append((source, module, value))
            if merge.is_unpadded(module) and isinstance(source, BATCH_NORM):
                pairs.append((source, module, value))
        if isinstance(output, torch.Tensor) and not isinstance(module, nn.Identity):
            made_by[id(output)] = module
            alive.append(output)  # so that no later tensor gets its id

    leaves = [module for module in merged.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(after) for module in leaves]
    with Uses() as uses:
        outputs(merged, smallest_size(merged), smallest_size(merged))
    for hook in hooks:
        hook.remove()
    # What goes elsewhere too, as to the identity of a residual block, must not be changed.
    assert not [pair for *pair, value in pairs if uses.counts[id(value)] == 1]
    left = [n for n, module in merged.named_modules() if isinstance(module, BATCH_NORM)]
    family = registry.variants[name].family
    expected = LEFT_NORMS.get(family)
    assert family not in families_in_manifest() or all(
        expected and re.search(expected, n) for n in left
    ), left


def test_the_meta_device_gives_the_same_names_and_shapes(pair):
    name, _, merged = pair
    meta = backbones.create_model(name, **arguments_of(name), device="meta", deploy=True)
    shapes = {key: value.shape for key, value in meta.state_dict().items()}
    assert shapes == {key: value.shape for key, value in merged.state_dict().items()}


@pytest.mark.parametrize("name", families_by_default())
def test_timm_walks_to_the_same(name):
    model = make(name, **shallow(name), num_classes=3)
    theirs = timm.models.reparameterize_model(model)
    ours = backbones.reparameterize(model, verify=False)
    assert theirs.deployed
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("name", representatives())
def test_the_native_size_gives_the_same(name):
    model = make(name, num_classes=7)
    merged = backbones.reparameterize(model, verify=False)
    assert_close(outputs(model, 224, 224), outputs(merged, 224, 224))


@pytest.mark.parametrize("name", families_by_default())
def test_parts_of_models_and_other_types_and_layouts(name):
    """features_only, pruned, inside another module, in float32 and channels_last, all at once."""
    model = make(name, **shallow(name), features_only=True, out_indices=(1, 2))
    merged = backbones.reparameterize(nn.Sequential(nn.Identity(), model), inplace=True)
    assert merged[1] is model  # in place
    twin = make(name, **shallow(name), features_only=True, out_indices=(1, 2))
    twin = twin.to(memory_format=torch.channels_last).float()
    side = 2 * smallest_size(backbones.create_model(name, device="meta"))
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        expected = merged(x)
        laid_out = backbones.reparameterize(twin)
        found = laid_out(x.float().contiguous(memory_format=torch.channels_last))
    for a, b in zip(expected, found, strict=True):
        assert b.dtype == torch.float32
        assert (a - b).abs().max() <= 1e-4 * a.abs().max()


@pytest.mark.parametrize("name", families_by_default())
def test_half_types_keep_their_type(name):
    model = backbones.create_model(
        name, **shallow(name), num_classes=3, dtype=torch.bfloat16
    ).eval()
    merged = backbones.reparameterize(model)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    side = smallest_size(model)
    with torch.no_grad():
        assert merged(torch.randn(1, 3, side, side, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("name", families_by_default())
@pytest.mark.parametrize("way", ["compile", pytest.param("export", marks=pytest.mark.slow)])
@torch.no_grad()
def test_the_deploy_form_compiles_and_exports(name, way):
    """Exported by default as well, on the way to ONNX (tests/smoke)."""
    model = backbones.create_model(name, **shallow(name, blocks=1), num_classes=3, deploy=True)
    side = smallest_size(model)
    x = torch.randn(3, 3, side, side)
    if way == "export":
        dimensions = ({0: torch.export.Dim("batch", min=1, max=64)},)
        traced = torch.export.export(model, (x[:2],), dynamic_shapes=dimensions).module()
    else:
        torch.compiler.reset()
        traced = torch.compile(model, fullgraph=True, backend="eager")
    expected = model(x)
    assert (traced(x) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["convnext_atto", "inception_next_atto"])
def test_dilated_models_keep_the_norms_in_front_of_padding(name):
    model = make(name, num_classes=7, output_stride=8)
    merged = backbones.reparameterize(model)
    assert_close(outputs(model, 40, 56), outputs(merged, 40, 56))
    left = [n for n, _ in merged.named_parameters() if re.search(r"downsample\.0\.bias$", n)]
    assert left == [f"stages.{i}.downsample.0.bias" for i in (2, 3)]


def test_a_backbone_inside_a_segmentation_model():
    smp = pytest.importorskip("segmentation_models_pytorch")
    whole = randomize(smp.Unet("tu-unireplknet_a", encoder_weights=None).double()).eval()
    merged = backbones.reparameterize(whole)
    assert len(merged.encoder.state_dict()) < len(whole.encoder.state_dict())
    decoder = [key for key in whole.state_dict() if not key.startswith("encoder.")]
    assert all(torch.equal(whole.state_dict()[k], merged.state_dict()[k]) for k in decoder)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert_close([whole(x)], [merged(x)])


def test_the_original_stays_as_it_was():
    model = make("convnext_atto", num_classes=3)
    before = copy.deepcopy(model.state_dict())
    backbones.reparameterize(model)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
