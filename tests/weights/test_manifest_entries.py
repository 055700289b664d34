"""Every entry of the manifest: what its file must hold loads completely, and what it states holds.

The files themselves cannot be had in a test. What they hold is known: see `released_keys`.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import pytest
import timm
import timm.data
import torch
from golden import FOLDER, Golden, variant_of
from released_keys import (
    from_siblings,
    golden_shapes,
    merge_branches,
    released,
    siblings,
)
from tiers import WithoutInitialization, families_in_manifest, smallest_of_each_family

import backbones
from backbones.config import data_folder, read_yaml
from backbones.errors import CheckpointError, WeightsUnavailableError
from backbones.manifest import load_manifest
from backbones.registry import pretrained_cfg_of, registry
from backbones.weights import map_checkpoint

MANIFEST = load_manifest()
ENTRIES = list(MANIFEST.entries.values())
VARIANTS = list(MANIFEST.by_variant)
SMALLEST = [
    name
    for name in smallest_of_each_family()
    if registry.variants[name].family in families_in_manifest()
]
UNKNOWN_CLASSES = 10460  # stands for a number that nobody published
CLIP_WIDTH = 640
# What a file may leave out, by the manifest's word for it.
LACKING = {"classifier": (), "head": ("head.norm.weight", "head.norm.bias")}
# Goldens that stand for what has none: other depths, shapes with ones, shared positions, branches.
CARRIED_OVER = (
    "convnextv2_atto",
    "convnext_dcls_tiny",
    "cpubone_b0",
    "unireplknet_n",
    "hornet_tiny_gf",
    "overlock_xt",
    "moganet_tiny",
    "patchconvnet_b60",
    "rednet38",
    "spanet_base",
    "transnext_tiny",
    "uniformer_small_tl",
    "uniformer_xs",
)
# Who writes files of another layout than the authors'.
PUBLISHERS = {
    "timm/": "timm",
    "Kaeruu/": "timm",
    "whyu/": "timm",
    "facebook/": "transformers",
    "https://download.openmmlab.com/": "mmpretrain",
    "https://github.com/Westlake-AI/openmixup/": "openmixup",
}
PRESET = ("input_size", "crop_pct", "crop_mode", "interpolation", "mean", "std", "num_classes")
# timm's models of these families that no variant of ours is; test_* are for its own tests.
TIMM_ONLY = {
    "convnext_large_mlp",
    "convnext_tiny_hnf",
    "convnext_xxlarge",
    "convnext_zepto_rms",
    "convnext_zepto_rms_ols",
}


@cache
def own_model(variant, classes):
    with WithoutInitialization():
        return backbones.create_model(variant, num_classes=classes, device="meta")


# What a file must hold loads.


def kind_of(entry):
    """What decides the names and shapes in an entry's file, beside its variant."""
    classes = UNKNOWN_CLASSES if entry.num_classes is None else entry.num_classes
    return entry.layout, classes, tuple(entry.lacks), entry.tag.endswith("_reparam")


@pytest.mark.parametrize("variant", VARIANTS)
def test_files_load_completely(variant):
    """Each kind of file that the variant's entries name, once."""
    unneeded = re.compile(r"(^|\.)aux_head\.|\.(attention_bias_idxs|kernel_coord)$")
    for entry in {kind_of(e): e for e in MANIFEST.by_variant[variant].values()}.values():
        layout, classes, lacks, merged = kind_of(entry)
        model = own_model(variant, classes)
        shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
        with WithoutInitialization():
            file = released(variant, layout, classes, lacks=lacks, merged=merged)
            mapped = map_checkpoint(file, model, strict=not lacks)
        # Where theirs are our own names, there is no layout to name.
        known = layout if layout in model.layouts else "backbones"
        assert (mapped.layout, mapped.prefix) == (known, ""), entry.name
        absent = [key for part in lacks for key in LACKING[part]]
        assert list(mapped.missing) == absent, entry.name
        assert mapped.unexpected == mapped.ignored == (), entry.name
        assert all(unneeded.search(key) for key in mapped.dropped), entry.name
        needed = {key for key in shapes if not key.endswith("num_batches_tracked")}
        assert needed - mapped.tensors.keys() == set(absent), entry.name
        for key, tensor in mapped.tensors.items():
            assert tensor.shape == shapes[key], (entry.name, key)
        rows = {shapes[f"{name}.weight"][0] for name in model.classifier_names if classes}
        assert rows == ({classes} if classes else set()), entry.name
        assert (classes == 0) == bool(lacks), entry.name


@pytest.mark.parametrize("variant", SMALLEST)
def test_incomplete_files_do_not_load(variant):
    """One entry less, or one of another shape, and nothing fits."""
    model = own_model(variant, 1000)
    file = released(variant, MANIFEST.find(variant).layout, 1000)
    first = next(iter(file))
    shorter = {key: tensor for key, tensor in file.items() if key != first}
    with pytest.raises(CheckpointError, match=r"missing \(1\)"):
        map_checkpoint(shorter, model)
    wider = {**file, first: torch.empty(8, *file[first].shape, device="meta")}
    with pytest.raises(CheckpointError, match=r"do not fit \(1\)"):
        map_checkpoint(wider, model)


def test_authors_merged_form_as_derived_is_theirs():
    """Where there are goldens of both forms, deriving one from the other gives the other."""
    both = [p.name.split("_reparam")[0] for p in FOLDER.glob("overlock_*_reparam.json.gz")]
    both = [name for name in both if golden_shapes(name)]
    assert len(both) >= 2
    for name in both:
        assert merge_branches(golden_shapes(name)) == golden_shapes(f"{name}_reparam"), name


@pytest.mark.parametrize("name", CARRIED_OVER)
def test_names_carried_over_are_the_authors(name):
    """From its siblings' goldens follow a golden's names and shapes."""
    assert name not in siblings(name)
    assert from_siblings(name) == golden_shapes(name)


def test_checked_keys_have_a_witness():
    """`checked: keys` is said of layouts that the owners' own code was compared for."""
    for entry in [entry for entry in ENTRIES if entry.checked == "keys"]:
        if entry.layout in ("timm", "transformers"):
            continue  # those packages' classes, in test_files_load_completely
        if entry.variant.startswith("inception_next"):
            assert golden_shapes("inception_next_base")  # all have the keys of timm's class
            continue
        form = "_reparam" if entry.tag.endswith("_reparam") else ""
        assert golden_shapes(entry.variant + form), f"{entry.name}: no golden, so checked is null"


# What the entries state.


def test_every_variant_has_an_entry():
    """One that was never released says so; only new families have none at all."""
    families = families_in_manifest()
    known = [name for name, variant in registry.variants.items() if variant.family in families]
    assert sorted(VARIANTS) == sorted(known)


def test_families_with_goldens_have_entries():
    """Who compared a family with its authors' code has seen what they released."""
    variants = {variant_of(path.name) for path in FOLDER.glob("*.json.gz")}
    compared = {registry.variants[name].family for name in variants & registry.variants.keys()}
    assert len(compared) >= 8
    assert compared <= set(families_in_manifest())


def test_entries_are_whole():
    for entry in ENTRIES:
        places = [place for place in (entry.repo, entry.url) if place]
        if entry.available:
            assert len(places) == 1
            assert entry.page is None
            assert bool(entry.file) == bool(entry.repo)
            assert entry.repo is None or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repo)
            assert entry.url is None or entry.url.startswith("https://")
        else:
            assert not places and not entry.file
            assert (entry.status == "page_only") == (entry.page is not None)
            assert entry.note, "say why it cannot be downloaded"
        assert entry.license == entry.license.lower() and entry.license
        assert (entry.top1 is None) == (entry.top1_source is None)
        assert entry.top1 is None or 70 < entry.top1 < 90
        assert entry.data or entry.note
        assert len(entry.input_size) == 3 and entry.input_size[0] == 3
        assert (entry.test_crop_pct is None) == (entry.test_input_size is None)
        assert entry.crop_mode != "squash" or entry.crop_pct == 1.0


def test_layouts_are_the_publishers():
    for entry in ENTRIES:
        place = entry.repo or entry.url or ""
        layouts = [layout for start, layout in PUBLISHERS.items() if place.startswith(start)]
        assert entry.layout == (layouts[0] if layouts else "authors")
        bare = entry.tag.startswith(("dinov3_", "eupe_"))
        masked = entry.tag in ("fcmae", "authors_fcmae")  # masked autoencoding trains no norm
        assert list(entry.lacks) == (["head"] if masked else ["classifier"] if bare else [])


def test_places_differ():
    """No two entries are of the same file."""
    files = Counter((entry.repo, entry.file, entry.url) for entry in ENTRIES if entry.available)
    assert [place for place, count in files.items() if count > 1] == []
    pages = Counter(entry.page for entry in ENTRIES if "drive.google" in (entry.page or ""))
    assert pages and max(pages.values()) == 1


def test_digests_have_lines_of_their_own():
    """`backbones weights lock` writes into lines that are there."""
    families = read_yaml(data_folder() / "weights_manifest.yaml")["families"]
    nodes = {k: node for block in families.values() for k, node in block["weights"].items()}
    for entry in ENTRIES:
        if entry.available:
            assert {"revision", "sha256", "size"} <= nodes[entry.name].keys(), entry.name


@pytest.mark.parametrize("entry", [pytest.param(e, id=e.name) for e in ENTRIES if not e.available])
def test_what_cannot_be_downloaded_says_where_it_is(entry, monkeypatch):
    monkeypatch.setattr("backbones.registry.build_model_with_cfg", None)  # none is built in vain
    with pytest.raises(WeightsUnavailableError) as caught:
        backbones.create_model(entry.name, pretrained=True)
    message = str(caught.value)
    assert entry.variant in message
    assert "checkpoint_path=" in message
    assert (entry.page or "never released") in message


# Against timm.


@pytest.mark.parametrize("variant", VARIANTS)
def test_timm_resolves_the_preset(variant):
    """timm's own reading of a model gives the numbers of its entry, for training and for test."""
    model = own_model(variant, 1000)
    default, *others = MANIFEST.by_variant[variant].values()
    registered = registry.variants[variant].timm_name or variant
    built_with = model.pretrained_cfg
    for entry in (default, *others):
        cfg = timm.models.get_pretrained_cfg(f"{registered}.{entry.tag}")
        assert cfg == pretrained_cfg_of(registry.variants[variant], entry)
        assert entry is not default or built_with["tag"] == cfg.tag
        model.pretrained_cfg = cfg.to_dict()  # in which alone a model of another tag differs
        check = {
            "input_size": tuple(entry.input_size),
            "interpolation": entry.interpolation,
            "mean": tuple(entry.mean),
            "std": tuple(entry.std),
            "crop_pct": entry.crop_pct,
            "crop_mode": entry.crop_mode,
        }
        assert timm.data.resolve_model_data_config(model) == check, entry.name
        if entry.test_input_size:
            check["input_size"] = tuple(entry.test_input_size)
            check["crop_pct"] = entry.test_crop_pct
        tested = timm.data.resolve_model_data_config(model, use_test_size=True)
        assert tested == check, entry.name
    model.pretrained_cfg = built_with


def test_every_tag_of_timm_is_listed():
    """All weights that timm has of these families, and its default tag where timm has the name."""
    lone = set()
    for module in ("convnext", "inception_next", "cpubone"):
        for name in timm.list_models(module=module, pretrained=True):
            cfg = timm.models.get_pretrained_cfg(name)
            if cfg.architecture not in registry.variants:
                lone.add(cfg.architecture)
                continue
            listed = MANIFEST.entries[f"{cfg.architecture}.{cfg.tag}"]
            assert listed.layout == "timm"
            assert listed.repo == cfg.hf_hub_id
        for name in timm.list_models(module=module):
            cfg = timm.models.get_pretrained_cfg(name)
            if name in registry.variants and cfg.has_weights:
                assert MANIFEST.tags(name)[0] == cfg.tag, name
    assert {name for name in lone if not name.startswith("test_")} == TIMM_ONLY


def test_entries_are_timms():
    for entry in [entry for entry in ENTRIES if (entry.repo or "").startswith("timm/")]:
        cfg = timm.models.get_pretrained_cfg(entry.name)
        assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (entry.repo, None)
        assert entry.file == "model.safetensors"
        for field in (*PRESET, "test_input_size", "test_crop_pct"):
            ours, timms = getattr(entry, field), getattr(cfg, field)
            assert (tuple(ours) if isinstance(ours, list) else ours) == timms, field
        # timm writes its default license where nobody stated one; the owners' goes first.
        if entry.tag.startswith("fb_") or entry.num_classes == CLIP_WIDTH:
            assert (entry.license, cfg.license) == ("mit", "apache-2.0")
            assert "apache-2.0" in entry.note
        else:
            assert entry.license == (cfg.license or "unstated")


def test_goldens_of_pretrained_cfgs_agree():
    """What timm's goldens recorded of its configuration is what the manifest says."""
    recorded = [Golden(path) for path in FOLDER.glob("*__timm.json.gz")]
    recorded = [golden for golden in recorded if golden.content.get("pretrained_cfg")]
    assert recorded
    for golden in recorded:
        entry, cfg = MANIFEST.find(golden.variant), golden.pretrained_cfg
        assert tuple(entry.input_size) == tuple(cfg["input_size"])
        assert entry.crop_pct == cfg["crop_pct"]
