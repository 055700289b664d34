"""Mapping keys and shapes: layouts, prefixes, completeness, and all combinations of them."""

from __future__ import annotations

import random
import time

import pytest
import safetensors.torch
import torch
from torch import nn
from weights_toy import Getter, Toy, authors, filled, flat, snapshot

from backbones.errors import CheckpointError
from backbones.weights import load_checkpoint, map_checkpoint
from backbones.weights.prefixes import prefixes

MODEL = Toy()
STATE = filled()
LAYOUTS = {"backbones": dict, "authors": authors, "flat": flat}
PREFIXES = ["module.", "_orig_mod.", "model.", "backbone.", "encoder."]


def assert_mapped(mapped, expected=STATE):
    shapes = MODEL.state_dict()
    assert mapped.tensors.keys() == expected.keys()
    for key, tensor in mapped.tensors.items():
        assert tensor.shape == shapes[key].shape
        assert torch.equal(tensor.flatten(), expected[key].flatten())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(layout):
    mapped = map_checkpoint(LAYOUTS[layout](STATE), Toy())
    assert_mapped(mapped)
    assert (mapped.layout, mapped.prefix) == (layout, "")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", [*PREFIXES, "module._orig_mod.", "_orig_mod.module.model."])
def test_each_prefix(layout, prefix):
    state = {prefix + key: value for key, value in LAYOUTS[layout](STATE).items()}
    mapped = map_checkpoint(state, Toy())
    assert_mapped(mapped)
    assert (mapped.layout, mapped.prefix) == (layout, prefix)


def test_a_prefix_that_is_part_of_a_name_stays():
    """Names that begin like a prefix are left alone where they fit as they are."""
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "model": nn.Linear(2, 3)})
    state = {key: value + 1 for key, value in model.state_dict().items()}
    assert map_checkpoint(state, model).prefix == ""
    assert map_checkpoint({"module." + k: v for k, v in state.items()}, model).prefix == "module."


def test_prefix_on_some_keys_only():
    state = {("module." if i % 2 else "") + k: v for i, (k, v) in enumerate(STATE.items())}
    assert_mapped(map_checkpoint(state, Toy()))
    with pytest.raises(CheckpointError, match="unexpected"):
        map_checkpoint({**STATE, "module.stem.0.bias": STATE["stem.0.bias"]}, Toy())


def test_backbone_of_a_detector():
    """`backbone.` names a part: what lies outside of it is ignored, and the head is missing."""
    state = {"backbone." + k: v for k, v in STATE.items() if not k.startswith("head")}
    state["neck.conv.weight"] = torch.ones(2)
    with pytest.raises(CheckpointError, match=r"missing \(4\): 'head.norm.weight'"):
        map_checkpoint(state, Toy())
    mapped = map_checkpoint(state, Getter(Toy()))
    assert mapped.prefix == "backbone."
    assert "neck.conv.weight" in mapped.ignored


def test_averaged_model_of_torch():
    model = Toy()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    mapped = map_checkpoint(dict(averaged.state_dict()), model)
    assert mapped.dropped == ("n_averaged",)


def test_own_layout_goes_first():
    """The own layout wins outright, without asking the others."""

    class Shy(Toy):
        layouts = {"other": lambda tensors, model: pytest.fail("was asked")}

    assert map_checkpoint(STATE, Shy()).layout == "backbones"


def test_two_layouts_are_an_error_unless_equal():
    swap = ((r"^x\.", "stages.0.0."), (r"^y\.", "stages.0.1."))
    state = {
        k.replace("stages.0.0.", "x.").replace("stages.0.1.", "y."): v for k, v in STATE.items()
    }
    gammas = ("stages.0.0.gamma", "stages.0.1.gamma")

    class Ambiguous(Toy):
        layouts = {"one": swap, "two": ((r"^y\.", "stages.0.0."), (r"^x\.", "stages.0.1."))}

    class Agreeing(Toy):
        layouts = {"one": swap, "two": swap}

    def without_gammas(model):
        for block in model.stages[0]:
            block.gamma = None
        return model

    state = {k: v for k, v in state.items() if not k.endswith("gamma") or "stages.1" in k}
    with pytest.raises(CheckpointError, match=r"several layouts \(one, two\)"):
        map_checkpoint(state, without_gammas(Ambiguous()))
    mapped = map_checkpoint(state, without_gammas(Agreeing()))
    assert mapped.layout == "one"
    assert not set(gammas) & set(mapped.tensors)


def test_two_keys_becoming_one_are_refused():
    state = {**authors(STATE), "stem.0.weight": STATE["stem.0.weight"]}
    with pytest.raises(CheckpointError, match=r"'stem.0.weight' comes twice, also as"):
        map_checkpoint(state, Toy())
    with pytest.raises(CheckpointError, match="comes twice"):
        map_checkpoint(state, Toy(), strict=False)


def test_dropped_entries_are_listed():
    state = {
        **authors(STATE),
        "layers0_0.idxs": torch.ones(3),
        "aux_head.weight": torch.ones(5, 4),
        "aux_head.bias": torch.ones(5),
        "teacher.weight": torch.ones(1),
    }
    mapped = map_checkpoint(state, Toy())
    assert set(mapped.dropped) == {
        "stages.0.0.idxs",
        "aux_head.weight",
        "aux_head.bias",
        "teacher.weight",
    }
    with_aux = map_checkpoint(state, Toy(aux_head=True))
    assert "aux_head.weight" in with_aux.tensors
    with pytest.raises(CheckpointError, match=r"missing \(2\): 'aux_head.weight'"):
        map_checkpoint(STATE, Toy(aux_head=True))


def test_complete_checkpoint_hook():
    class Lifting(Toy):
        def complete_checkpoint(self, tensors):
            tensors.setdefault("stages.0.0.gamma", torch.zeros(1, 4, 1, 1))
            return tensors

    state = {k: v for k, v in authors(STATE).items() if k != "layers0_0.gamma"}
    with pytest.raises(CheckpointError, match=r"missing \(1\): 'stages.0.0.gamma'"):
        map_checkpoint(state, Toy())
    mapped = map_checkpoint(state, Lifting())
    assert not mapped.tensors["stages.0.0.gamma"].any()

    class Refusing(Toy):
        def complete_checkpoint(self, tensors):
            raise CheckpointError("the gamma is a beta")

    with pytest.raises(CheckpointError, match="the gamma is a beta"):
        map_checkpoint(state, Refusing())


def test_shapes_may_differ_by_dimensions_of_one_only():
    state = dict(STATE)
    state["stages.0.0.conv.weight"] = state["stages.0.0.conv.weight"].reshape(4, 4)
    state["stages.0.0.gamma"] = state["stages.0.0.gamma"].flatten()
    state["head.fc.bias"] = state["head.fc.bias"].reshape(1, 1, 5)
    assert_mapped(map_checkpoint(state, Toy()))
    state["stages.0.0.conv.weight"] = state["stages.0.0.conv.weight"].reshape(2, 8)
    with pytest.raises(CheckpointError, match=r"'stages.0.0.conv.weight' is \(2, 8\)"):
        map_checkpoint(state, Toy())


def test_the_error_names_the_closest_layout_and_the_differences():
    state = authors(STATE)
    del state["norm.weight"]
    state["extra"] = torch.ones(1)
    with pytest.raises(CheckpointError) as caught:
        map_checkpoint({"module." + k: v for k, v in state.items()}, Toy())
    message = str(caught.value)
    for part in ("toy_t", "'authors'", "'module.'", "35 of 36", "(1): 'head.norm.weight'", "extra"):
        assert part in message, message


def test_wrong_classes_have_their_own_advice():
    with pytest.raises(CheckpointError, match="num_classes"):
        map_checkpoint(STATE, Toy(num_classes=7))
    with pytest.raises(CheckpointError, match="create the variant"):
        map_checkpoint(STATE, Toy(dim=8))


def test_not_strict():
    state = authors(STATE)
    del state["norm.weight"]
    state["extra"] = torch.ones(1)
    mapped = map_checkpoint(state, Toy(), strict=False)
    assert (mapped.missing, mapped.unexpected) == (("head.norm.weight",), ("extra",))
    assert mapped.layout == "authors"
    with pytest.raises(CheckpointError, match="do not fit"):
        map_checkpoint(state, Toy(dim=8), strict=False)
    with pytest.raises(CheckpointError, match="0 of 36"):
        map_checkpoint({"x": torch.ones(1)}, Toy(), strict=False)


def test_ignoring_the_classifier():
    other = filled(num_classes=9)
    mapped = map_checkpoint(other, Toy(), ignore_classifier=True)
    assert mapped.tensors["head.fc.weight"].shape == (9, 4)
    headless = {k: v for k, v in STATE.items() if not k.startswith("head.fc")}
    assert not map_checkpoint(headless, Toy(), ignore_classifier=True).missing
    mapped = map_checkpoint(STATE, Toy(num_classes=0))
    assert set(mapped.ignored) == {"head.fc.weight", "head.fc.bias"}


def test_merged_model_takes_its_own_form_only():
    """A merged model that has fewer entries must not pass for a pruned one."""
    model = Toy()
    del model.stages[0][0].gamma
    merged = {k: v for k, v in STATE.items() if k != "stages.0.0.gamma"}
    model.deployed = True
    assert map_checkpoint(merged, model).tensors.keys() == merged.keys()
    for state in (STATE, authors(STATE)):
        with pytest.raises(CheckpointError, match="re-parameterized"):
            map_checkpoint(state, model)


def test_meta_models_and_meta_checkpoints():
    with torch.device("meta"):
        model = Toy()
    assert map_checkpoint(STATE, model).tensors.keys() == STATE.keys()
    meta = {key: value.to("meta") for key, value in authors(STATE).items()}
    assert map_checkpoint(meta, model).layout == "authors"


def test_large_models_are_quick():
    count = 5000
    model = nn.Module()
    for i in range(count):
        setattr(model, f"layer{i}", nn.Parameter(torch.empty(1)))
    model.layouts = {
        f"layout{n}": [(rf"^part{n}_(\d+)_{r}$", r"layer\1") for r in range(5)] for n in range(2)
    }
    keys = [f"module.part1_{i}_0" for i in range(count)]
    random.Random(0).shuffle(keys)
    start = time.perf_counter()
    mapped = map_checkpoint({key: torch.ones(1) for key in keys}, model)
    assert mapped.layout == "layout1"
    assert time.perf_counter() - start < 5


# Number types: the model keeps its own, values are converted.


@pytest.mark.parametrize("model_type", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "file_type", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn]
)
def test_floating_point_types(tmp_path, file_type, model_type):
    """Each value becomes the nearest one of the model's type; widening is exact and reversible."""
    state = {k: v.to(file_type) if v.is_floating_point() else v for k, v in STATE.items()}
    safetensors.torch.save_file(state, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.pth")
    for name in ("m.safetensors", "m.pth"):
        model = Toy().to(model_type)
        load_checkpoint(model, tmp_path / name)
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                assert value.dtype == model_type
                assert torch.equal(value, state[key].to(model_type))
                if torch.finfo(file_type).bits <= 16 and model_type == torch.float32:
                    assert torch.equal(value.to(file_type).float(), state[key].float())


@pytest.mark.parametrize(
    ("value", "model_type"),
    [(1e5, torch.float16), (1e39, torch.float32), (3.4028e38, torch.bfloat16), (-7e4, torch.half)],
)
def test_overflow_is_refused_and_rounding_to_zero_is_not(value, model_type):
    state = {k: v.double() if v.is_floating_point() else v for k, v in STATE.items()}
    state["stages.0.0.bn.weight"][2] = value
    model = Toy().to(model_type)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"bn\.weight' holds values too large for"):
        load_checkpoint(model, state)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key])
    state["stages.0.0.bn.weight"][2] = 1e-60
    load_checkpoint(model, state)
    assert model.stages[0][0].bn.weight[2] == 0


def test_whole_numbers_must_survive():
    model = nn.Module()
    model.register_buffer("n", torch.zeros(2, dtype=torch.uint8))
    for dtype in (torch.int64, torch.int32, torch.int16):
        load_checkpoint(model, {"n": torch.tensor([3, 255], dtype=dtype)})
        assert model.n.tolist() == [3, 255]
        with pytest.raises(CheckpointError, match="numbers too large for torch.uint8"):
            load_checkpoint(model, {"n": torch.tensor([3, 256], dtype=dtype)})
    model.register_buffer("n", torch.zeros(2, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="numbers too large for torch.int8"):
        load_checkpoint(model, {"n": torch.tensor([3, 200], dtype=torch.uint8)})
    assert model.n.tolist() == [0, 0]


def test_prefixes_are_bounded():
    """A file can hold every chain of prefixes; each costs a look at all of it."""
    chains = [x + y + z for x in PREFIXES for y in PREFIXES for z in PREFIXES]
    one = {"a": torch.ones(1)}
    assert len(prefixes({chain + "a": torch.ones(1) for chain in chains}, one)) == 8
    assert (
        prefixes({"module._orig_mod.backbone.a": torch.ones(1)}, one)[-1]
        == "module._orig_mod.backbone."
    )
