"""What every variant owes when it computes, in the tiers of `tiers.py`."""

from __future__ import annotations

import copy

import pytest
import torch
from tiers import by_size, families_by_default, representatives, shallow, smallest_size

import backbones
from backbones.errors import InputSizeError

EACH = pytest.mark.parametrize("name", by_size())
# Costly tests run on one variant of each structure; widths and depths do not change the answer.
STRUCTURES = pytest.mark.parametrize("name", representatives())
# The costliest run on one variant of each family by default, on the others if slow.
TRACED = pytest.mark.parametrize("name", families_by_default(large=True))


def build(name, **arguments):
    """A model whose residual branches all matter: freshly built layer scales are near zero."""
    model = backbones.create_model(name, **arguments)
    awaken(model)
    return model.eval()


def awaken(model):
    """Give parameters that start at a constant, and norm statistics, values of order one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if key.endswith("radius"):  # of tents; a negative one makes its kernel explode
                continue
            if key.endswith(("running_var", "gamma")) or (value.ndim == 1 and "weight" in key):
                value.uniform_(0.5, 1.0, generator=generator)
            elif value.is_floating_point() and (value.ndim <= 1 or value.abs().max() < 1e-3):
                value.normal_(0, 0.05, generator=generator)
            if ".involution.predict." in key:  # involutions square what comes in, block after block
                value.mul_(0.1)


def image(model, batch=1, height=None, width=None, dtype=torch.float32):
    side = smallest_size(model)
    return torch.randn(batch, 3, height or side, width or side, dtype=dtype)


@EACH
def test_forward_and_backward_reach_every_parameter(name):
    model = build(name, num_classes=10).train()
    # batch norm needs more than one value a channel
    output = model(image(model, 2, 2 * smallest_size(model), 2 * smallest_size(model)))
    assert output.shape == (2, 10)
    output.square().mean().backward()
    assert torch.isfinite(output).all()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@STRUCTURES
@torch.no_grad()
def test_deterministic_in_eval_and_independent_of_the_batch(name):
    model = build(name, **shallow(name))
    x = image(model, 3)
    together = model(x)
    torch.testing.assert_close(model(x), together, rtol=0, atol=0)
    alone = torch.cat([model(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-4 * together.abs().max().item())


@STRUCTURES
@torch.no_grad()
def test_any_size_from_the_total_stride_up(name):
    model = build(name, **shallow(name), num_classes=5)
    least = smallest_size(model)
    sizes = [(side, side) for side in range(least, 97, 8)]
    sizes += [(192, 256), (384, 128), (225, 250), (least, least + 1), (least + 3, least)]
    for batch, (height, width) in zip((1, 3) * len(sizes), sizes):
        output = model(image(model, batch, height, width))
        assert output.shape == (batch, 5)
        assert torch.isfinite(output).all(), (height, width)


@EACH
def test_smaller_input_and_other_channels_are_refused(name):
    model = backbones.create_model(name, device="meta").eval()
    least = smallest_size(model)
    with pytest.raises(InputSizeError, match=f"at least {least}"):
        model(torch.empty(1, 3, least - 1, 2 * least, device="meta"))
    with pytest.raises(InputSizeError, match="in_chans"):
        model(torch.empty(1, 4, least, least, device="meta"))


@EACH
@torch.no_grad()
def test_intermediates_and_pruning_agree_with_the_whole_model(name):
    model = build(name)
    x = image(model, 2)
    final, taps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)
    last = len(taps) - 1
    only = model.forward_intermediates(x, indices=[-1, 0], intermediates_only=True)
    assert [t.shape for t in only] == [taps[0].shape, taps[last].shape]
    whole = copy.deepcopy(model)
    assert whole.prune_intermediate_layers([last], prune_head=False) == [last]
    torch.testing.assert_close(whole(x), model(x), rtol=0, atol=0)
    for i in range(len(taps)):
        early, selected = model.forward_intermediates(x, indices=[i], stop_early=True)
        torch.testing.assert_close(selected[0], taps[i], rtol=0, atol=0)
        torch.testing.assert_close(early, taps[i], rtol=0, atol=0)
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([i]) == [i]
        torch.testing.assert_close(pruned.forward_features(x), taps[i], rtol=0, atol=0)
        assert not [k for k, _ in pruned.named_parameters() if k.startswith("head.")]
        pruned.reset_classifier(3, "avg")
        assert pruned(x).shape == (2, 3)


@STRUCTURES
def test_pruned_models_have_no_unused_parameters(name):
    for index in range(3):
        model = build(name, **shallow(name), features_only=True, out_indices=[index]).train()
        side = 2 * 64
        sum(m.square().mean() for m in model(torch.randn(2, 3, side, side))).backward()
        unused = [key for key, p in model.named_parameters() if p.grad is None]
        assert not unused, (index, unused)


@STRUCTURES
@torch.no_grad()
def test_features_only_by_negative_and_reordered_indices(name):
    model = build(name, **shallow(name))
    x = image(model)
    taps = model.forward_intermediates(x, intermediates_only=True)
    state = model.state_dict()
    for indices in ((-2, -1), (3, 1), (0,)):
        getter = backbones.create_model(
            name, **shallow(name), features_only=True, out_indices=indices
        ).eval()
        backbones.load_checkpoint(getter, state)
        wanted = sorted(i % len(taps) for i in indices)
        maps = getter(x)
        assert len(maps) == len(wanted)
        for map_, i in zip(maps, wanted):
            torch.testing.assert_close(map_, taps[i], rtol=0, atol=0)
    last = len(taps) - 1
    with pytest.raises(IndexError, match=f"out_indices run from -{last + 1} to {last}"):
        backbones.create_model(name, features_only=True, out_indices=(last + 1,), device="meta")


@STRUCTURES
def test_reset_classifier_keeps_device_type_mode_and_pooling(name):
    model = backbones.create_model(name, global_pool="max", device="meta", dtype=torch.float64)
    model.train(False)
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model.head.pool_type == "max"
    for classifier in model.classifier_names:
        weight = model.get_submodule(classifier).weight
        assert weight.is_meta
        assert weight.dtype == torch.float64
        assert weight.shape[0] == 5
    assert not any(module.training for module in model.modules())
    model.reset_classifier(0)
    side = 2 * smallest_size(model)
    x = torch.empty(1, 3, side, side, device="meta", dtype=torch.float64)
    assert model(x).shape == (1, model.head_hidden_size)


@STRUCTURES
def test_gradient_checkpointing_changes_nothing(name):
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = build(name, **shallow(name), num_classes=3)
        # eval: batch statistics would be taken twice, which changes the running ones only
        model.set_grad_checkpointing(enable)
        output = model(image(model, 2))
        output.square().mean().backward()
        results.append((output, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


@STRUCTURES
def test_gradient_checkpointing_recomputes(name):
    """Fewer saved tensors with it than without: the switch is wired to the blocks."""
    counts = []
    for enable in (False, True):
        model = build(name, num_classes=3)
        model.set_grad_checkpointing(enable)
        counts.append(0)

        def count(tensor):
            counts[-1] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            model(image(model))
    assert counts[1] < 0.6 * counts[0]


@STRUCTURES
@torch.no_grad()
def test_layer_groups_follow_the_order_of_execution(name):
    import timm

    model = backbones.create_model(name).eval()
    layers = timm.models.group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    reached: list[int] = []

    def note(prefix):
        own = [n for n in layers if n.rpartition(".")[0] == prefix]
        return lambda *_: reached.extend(layers[n] for n in own)

    for prefix, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(note(prefix))
    model(image(model))
    assert len(set(reached)) > 5
    assert reached == sorted(reached)


@STRUCTURES
def test_drop_path_acts_in_training_only(name):
    with_drop = build(name, **shallow(name), drop_path_rate=0.5, num_classes=3)
    torch.manual_seed(0)
    without = backbones.create_model(name, **shallow(name), num_classes=3).eval()
    without.load_state_dict(with_drop.state_dict())
    x = image(with_drop, 2, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(with_drop(x), without(x), rtol=0, atol=0)
        features = [with_drop.train().forward_features(x) for _ in range(2)]
    assert not torch.equal(*features)


@STRUCTURES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_half_types_after_a_forward_in_float32(name, dtype):
    model = build(name, **shallow(name))
    x = image(model, 1, 64, 96)
    expected = model(x)
    half = model.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    assert torch.isfinite(half).all()
    agreement = torch.nn.functional.cosine_similarity(half.float(), expected)
    assert agreement.min() > 0.95  # rounding flips near-ties where a block takes an argmax
    # back and forth leaves no cache of another type behind
    assert model.double()(x.double()).dtype == torch.float64


@STRUCTURES
@torch.no_grad()
def test_channels_last_gives_the_same(name):
    model = build(name, **shallow(name))
    x = image(model, 2)
    expected = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    actual = last(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@STRUCTURES
@torch.no_grad()
def test_deepcopy_is_independent(name):
    model = build(name, **shallow(name), num_classes=3)
    x = image(model)
    expected = model(x)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)
    for parameter in twin.parameters():
        parameter.zero_()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    assert twin.arguments == model.arguments


@TRACED
def test_compiles_as_one_graph_with_gradients(name):
    model = build(name, **shallow(name, blocks=1), num_classes=3)
    x = image(model, 2)
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), [*model.parameters()])
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(torch.autograd.grad(found.square().sum(), [*model.parameters()]), gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * max(1, float(b.abs().max())))


@TRACED
@torch.no_grad()
def test_exports_with_dynamic_batch(name):
    model = build(name, **shallow(name, blocks=1), num_classes=3)
    x = image(model, 2)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    other = image(model, 5)
    torch.testing.assert_close(program.module()(other), model(other), rtol=1e-3, atol=1e-4)


@STRUCTURES
def test_output_stride(name):
    model = backbones.create_model(name, device="meta")
    if not model.dilatable:
        with pytest.raises(backbones.BackbonesError, match="output_stride=8"):
            backbones.create_model(name, output_stride=8, device="meta")
        return
    for output_stride in (8, 16):
        dilated = backbones.create_model(
            name, output_stride=output_stride, features_only=True, device="meta"
        ).eval()
        maps = dilated(torch.empty(1, 3, 64, 96, device="meta"))
        strides = dilated.feature_info.reduction()
        assert max(strides) == output_stride
        assert [m.shape[-2:] for m in maps] == [(64 // r, 96 // r) for r in strides]
