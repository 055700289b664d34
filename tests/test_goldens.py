"""Every model reproduces its authors' own code, through the public loading function."""

from __future__ import annotations

import pytest
import torch
from golden import FOLDER, Golden, assert_feature, assert_logits
from tiers import GOLDEN_LIMIT, parameters_of

import backbones
from backbones.registry import registry
from backbones.weights import map_checkpoint

# Forms that the generic comparison does not cover; tests/families/ does.
SPECIAL = ("_dense", "_custom", "convnext_dcls", "_deploy", "_reparam")
# A golden of a weight tag whose architecture is another name's.
RENAMED = {"inception_next_base_384": "inception_next_base"}
# Large depthwise kernels, for which gradients in float64 take minutes, and longer in NCHW.
LARGE_KERNELS = ("smpnet",)
# Parameters that the authors' count has and ours, without auxiliary heads, has not.
AUTHORS_EXTRA = {"overlock": ("aux_head.",), "uniformer": ("norm_cls.", "head_cls.")}

# Which of our feature maps the authors' stages are, where they have fewer.
STAGES = {"patchconvnet": [3]}


def variant_of(golden: Golden) -> str:
    return RENAMED.get(golden.variant, golden.variant)


def collect(with_gradients: bool = False) -> list[object]:
    result = []
    for path in sorted(FOLDER.glob("*.json.gz")):
        golden = Golden(path)
        if any(word in golden.name for word in SPECIAL):
            continue
        # lsnet_t's plain fill saturates the attention; lsnet_t_tame holds its gradients.
        if with_gradients and (not golden.content.get("grads") or golden.name == "lsnet_t"):
            continue
        name = variant_of(golden)
        slow = name not in registry.variants or parameters_of(name) > GOLDEN_LIMIT
        slow |= with_gradients and name.startswith(LARGE_KERNELS)
        result.append(pytest.param(path, id=golden.name, marks=[pytest.mark.slow] if slow else []))
    return result


@pytest.fixture(scope="module", params=collect())
def case(request):
    """The golden, and our model with its weights in float64."""
    golden = Golden(request.param)
    model = backbones.create_model(variant_of(golden), dtype=torch.float64).eval()
    checkpoint = golden.checkpoint()
    report = backbones.load_checkpoint(model, checkpoint)
    assert not report.missing
    return golden, model, checkpoint


def test_logits(case):
    golden, model, _ = case
    with torch.no_grad():
        assert_logits(model(golden.input_tensor()), golden)


def test_parameter_count(case):
    golden, model, _ = case
    prefixes = AUTHORS_EXTRA.get(registry.variants[variant_of(golden)].family, ())
    extra = sum(
        torch.Size(entry["shape"]).numel()
        for key, entry in golden.state_dict.items()
        if key.startswith(prefixes) and "running" not in key and "num_batches" not in key
    )
    assert sum(p.numel() for p in model.parameters()) == golden.params - extra


def test_features_only(case):
    golden, _, checkpoint = case
    model = backbones.create_model(
        variant_of(golden), features_only=True, dtype=torch.float64
    ).eval()
    backbones.load_checkpoint(model, checkpoint)
    with torch.no_grad():
        maps = model(golden.input_tensor())
    expected = golden.stages()
    taken = STAGES.get(registry.variants[variant_of(golden)].family, range(len(maps)))
    for actual, wanted in zip([maps[i] for i in taken], expected, strict=True):
        assert_feature(actual, wanted, f"{golden.name} {wanted['name']}")


@pytest.mark.parametrize("path", collect(with_gradients=True))
def test_gradients(path):
    golden = Golden(path)
    model = backbones.create_model(variant_of(golden), dtype=torch.float64).eval()
    checkpoint = golden.checkpoint()
    backbones.load_checkpoint(model, checkpoint)
    grads, x = golden.grads, golden.input_tensor()
    if golden.variant.startswith(LARGE_KERNELS):
        model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    logits = model(x)
    logits.square().mean().backward()
    mapped = map_checkpoint(checkpoint, model)
    ours = {tensor.data_ptr(): key for key, tensor in mapped.tensors.items()}
    parameters = dict(model.named_parameters())
    largest = max(value for value in grads.values() if value is not None)
    compared = 0
    for key, norm in grads.items():
        if norm is None:
            continue
        parameter = parameters[ours[checkpoint[key].data_ptr()]]
        difference = abs(parameter.grad.norm().item() - norm)
        assert difference < 1e-9 * norm + 1e-15 * largest, key
        compared += 1
    assert compared == sum(value is not None for value in grads.values()) > 0
