"""Loading: all or nothing, into every kind of model, and through timm's builder."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from timm.models import build_model_with_cfg
from torch import nn
from weights_toy import Getter, Toy, assert_same, authors, filled, flat, snapshot

from backbones.errors import CheckpointError, UnsafeCheckpointError
from backbones.families.convnext.model import ConvNeXt
from backbones.weights import filter_for_timm, load_checkpoint, read_checkpoint

STATE = filled()


def changed(**entries):
    return {**STATE, **{key.replace("__", "."): value for key, value in entries.items()}}


def test_values_arrive(tmp_path):
    torch.save({"model": authors(STATE)}, tmp_path / "m.pth")
    for source in (
        tmp_path / "m.pth",
        str(tmp_path / "m.pth"),
        read_checkpoint(tmp_path / "m.pth"),
    ):
        model = Toy()
        report = load_checkpoint(model, source)
        assert_same(model, STATE)
        assert report.source == str(tmp_path / "m.pth")
        assert (report.layout, report.wrapper, report.prefix) == ("authors", "model", "")
        assert report.loaded == len(STATE)
    model = Toy()
    load_checkpoint(model, OrderedDict(flat(STATE)))
    assert_same(model, STATE)


def test_report_reads_well():
    state = {"module." + k: v for k, v in authors(STATE).items()}
    state["module.aux_head.weight"] = torch.ones(1)
    text = str(load_checkpoint(Toy(), {"model": {**state, "epoch": 3}}))
    assert text == (
        "loaded 36 entries from the given dict (layout authors, wrapper model, prefix module.)\n"
        "  dropped 1: aux_head.weight\n"
        "  ignored 1: epoch"
    )


BAD = {
    "wrong shape": changed(stem__0__weight=torch.ones(4, 3, 3, 3)),
    "transposed": changed(head__fc__weight=torch.ones(4, 5)),
    "missing": {k: v for k, v in STATE.items() if k != "head.norm.bias"},
    "unexpected": changed(extra=torch.ones(1)),
    "nan": changed(head__fc__bias=torch.full((5,), torch.nan)),
    "one infinity": changed(head__fc__bias=torch.tensor([0, 1, torch.inf, 2, 3])),
    "infinities that cancel": changed(
        head__fc__bias=torch.tensor([torch.inf, -torch.inf, 0, 0, 0])
    ),
    "integers": changed(head__fc__bias=torch.ones(5, dtype=torch.int64)),
    "floating counter": {**STATE, "stages.1.1.bn.num_batches_tracked": torch.tensor(1.0)},
    "complex": changed(head__fc__bias=torch.ones(5, dtype=torch.complex64)),
    "too large": changed(head__fc__bias=torch.full((5,), 1e300, dtype=torch.float64)),
    "meta": changed(head__fc__bias=torch.ones(5, device="meta")),
    "sparse": changed(head__norm__bias=torch.ones(4).to_sparse()),
    "nothing": {},
    "other model": nn.Linear(3, 3).state_dict(),
    "module": {"model": Toy()},
}


@pytest.mark.parametrize("kind", BAD)
def test_all_or_nothing(kind):
    model = Toy()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"^the given dict: "):
        load_checkpoint(model, BAD[kind])
    assert_same(model, before)


@pytest.mark.parametrize("kind", sorted(set(BAD) - {"missing", "unexpected"}))
def test_not_strict_forgives_nothing_else(kind):
    model = Toy()
    before = snapshot(model)
    with pytest.raises(CheckpointError):
        load_checkpoint(model, BAD[kind], strict=False)
    assert_same(model, before)


def test_entries_named_in_errors():
    for kind, key in {"nan": "head.fc.bias", "integers": "head.fc.bias"}.items():
        with pytest.raises(CheckpointError, match=f"entry '{key}'"):
            load_checkpoint(Toy(), BAD[kind])


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code ran')",))


def bad_files(folder):
    torch.save({"model": STATE}, folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    yield "code", pickle.dumps(Evil())
    torch.save({"model": STATE, "x": Evil()}, folder / "evil.pth")
    yield "code in archive", (folder / "evil.pth").read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        yield f"cut at {share}", whole[: int(len(whole) * share)]
    yield "page", b"<html>"
    safetensors.torch.save_file(STATE, folder / "s")
    yield "header", b"\xff" * 7 + (folder / "s").read_bytes()[7:]


def test_bad_files_leave_the_model_alone(tmp_path):
    model = Toy()
    before = snapshot(model)
    path = tmp_path / "bad.pth"
    for kind, content in bad_files(tmp_path):
        path.write_bytes(content)
        error = UnsafeCheckpointError if "code" in kind else CheckpointError
        for strict in (True, False):
            with pytest.raises(error, match=r"bad\.pth"):
                load_checkpoint(model, path, strict=strict)
        assert_same(model, before)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(model, tmp_path / "none.pth")


def test_not_strict_loads_what_fits():
    model = Toy()
    before = snapshot(model)
    report = load_checkpoint(model, BAD["missing"], strict=False)
    assert report.missing == ("head.norm.bias",)
    assert_same(model, {**STATE, "head.norm.bias": before["head.norm.bias"]})
    report = load_checkpoint(model, BAD["unexpected"], strict=False)
    assert report.unexpected == ("extra",)
    assert_same(model, STATE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_model_keeps_its_number_type(dtype):
    model = Toy().to(dtype)
    load_checkpoint(model, STATE)
    for key, value in model.state_dict().items():
        expected = STATE[key].to(dtype) if STATE[key].is_floating_point() else STATE[key]
        assert torch.equal(value, expected)
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in STATE.items()}
    model = Toy()
    load_checkpoint(model, half)
    assert all(torch.equal(v, half[k].to(v.dtype)) for k, v in model.state_dict().items())


def test_values_too_large_for_half_precision():
    model = Toy().half()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"too large for torch.float16"):
        load_checkpoint(model, changed(head__fc__bias=torch.full((5,), 1e5)))
    assert_same(model, before)
    load_checkpoint(Toy(), changed(head__fc__bias=torch.full((5,), 3e38)))  # the sum overflows


def test_counters_may_be_missing():
    model = Toy()
    report = load_checkpoint(model, {k: v for k, v in STATE.items() if "num_batches" not in k})
    assert report.missing == ()
    assert int(model.stages[0][0].bn.num_batches_tracked) == 0


def test_models_on_the_meta_device_are_refused():
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(CheckpointError, match="to_empty"):
        load_checkpoint(model, STATE)


def test_shared_parameters_must_agree():
    model = Toy()
    model.stages[1][1].conv = model.stages[0][1].conv
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"'stages.0.1.conv.weight' and 'stages.1.1"):
        load_checkpoint(model, STATE)
    assert_same(model, before)
    tied = {k: STATE[k.replace("stages.1.1.conv", "stages.0.1.conv")] for k in STATE}
    load_checkpoint(model, tied)
    assert_same(model, tied)


def test_wrapped_models():
    """Compiled and data-parallel models take the checkpoint of the model inside."""
    for wrap in (lambda m: torch.compile(m, backend="eager"), nn.DataParallel):
        model = Toy()
        load_checkpoint(wrap(model), authors(STATE))
        assert_same(model, STATE)


@pytest.mark.parametrize("layout", [dict, authors])
def test_features_only(layout):
    model = Getter(Toy())
    report = load_checkpoint(model, layout(STATE))
    kept = {k: v for k, v in STATE.items() if k.startswith(("stem.", "stages.0."))}
    assert_same(model.model, kept)
    assert set(report.ignored) == STATE.keys() - kept.keys()
    before = snapshot(model)
    bad = {k: v + 1 for k, v in layout(STATE).items()}
    del bad[next(k for k in bad if k.endswith("conv.bias"))]
    with pytest.raises(CheckpointError, match=r"missing \(1\)"):
        load_checkpoint(model, bad)
    assert_same(model, before)
    # What the getter itself saves has timm's prefix and comes back.
    other = Getter(Toy())
    assert load_checkpoint(other, model.state_dict()).prefix == "model."
    assert_same(other, before)


# Through timm's own builder.


def build(path, **arguments):
    cfg = {
        "file": str(path),
        "num_classes": 5,
        "input_size": (3, 32, 32),
        "first_conv": "stem.0",
        "classifier": "head.fc",
    }
    return build_model_with_cfg(
        ConvNeXt,
        "toy",
        bool(path),
        pretrained_cfg=cfg,
        pretrained_filter_fn=filter_for_timm,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        depths=(1, 1, 1, 1),
        dims=(8, 12, 16, 20),
        **arguments,
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small ConvNeXt in its authors' layout, and the same weights in ours."""
    torch.manual_seed(0)
    own = {k: torch.randn_like(v) for k, v in build("").state_dict().items()}
    renames = [("stem.", "downsample_layers.0."), (".blocks.", "."), (".conv_dw.", ".dwconv.")]
    renames += [(".mlp.fc", ".pwconv"), ("head.norm.", "norm."), ("head.fc.", "head.")]
    theirs = {}
    for key, value in own.items():
        new = key
        for ours, other in renames:
            new = new.replace(ours, other)
        if ".downsample." in key:
            _, stage, _, rest = key.split(".", 3)
            new = f"downsample_layers.{stage}.{rest}"
        theirs[new] = value
    path = tmp_path_factory.mktemp("small") / "authors.pth"
    torch.save({"model": theirs, "epoch": 1}, path)
    return path, own, theirs


def test_builder_loads_a_foreign_layout(small):
    path, own, _ = small
    assert_same(build(path), own)


def test_builder_adapts_classifier_and_channels(small):
    path, own, _ = small
    model = build(path, num_classes=3, in_chans=1)
    state = model.state_dict()
    assert torch.allclose(state["stem.0.weight"], own["stem.0.weight"].sum(1, keepdim=True))
    assert state["head.fc.weight"].shape == (3, 20)
    assert all(torch.equal(state[k], own[k]) for k in own if k[:4] not in ("stem", "head"))
    assert torch.equal(state["head.norm.weight"], own["head.norm.weight"])


def test_builder_features(small):
    path, own, _ = small
    model = build(path, features_only=True, out_indices=(0, 1))
    assert_same(model.model, {k: own[k] for k in model.model.state_dict()})
    assert not any(k.startswith("stages.3") for k in model.model.state_dict())


@pytest.mark.parametrize("num_classes", [5, 3])
def test_builder_refuses_what_does_not_fit(small, tmp_path, num_classes):
    """Also with other classes, where timm by itself would load nothing and go on."""
    _, _, theirs = small
    bad = {
        "renamed": {"x" + k: v for k, v in theirs.items()},
        "missing": {k: v for k, v in theirs.items() if k != "norm.weight"},
        "shape": {**theirs, "norm.weight": torch.ones(21)},
        "kernel": {**theirs, "downsample_layers.0.0.weight": torch.ones(8, 3, 2, 2)},
        "nan": {**theirs, "norm.weight": torch.full((20,), torch.nan)},
        "empty": {"epoch": 3},
    }
    for state in bad.values():
        torch.save(state, tmp_path / "bad.pth")
        with pytest.raises(CheckpointError, match="the pretrained weights: "):
            build(tmp_path / "bad.pth", num_classes=num_classes)


def test_features_only_of_the_getter(small):
    path, own, _ = small
    model = build("", features_only=True, out_indices=(1,))
    report = load_checkpoint(model, path)
    assert_same(model.model, {k: own[k] for k in model.model.state_dict()})
    assert set(report.ignored) == own.keys() - model.model.state_dict().keys()
    assert report.layout == "authors"
