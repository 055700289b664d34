"""Configs and manifest: what is read, and what is refused with file, line and the nearest key."""

from __future__ import annotations

import pytest
from tiers import parameters_of

import backbones
from backbones.config import check_arguments, read_family, read_yaml
from backbones.errors import ConfigError, UnknownModelError
from backbones.manifest import load_manifest, read_manifest
from backbones.registry import registry
from backbones.schema import fits


@pytest.fixture
def write(tmp_path):
    def _write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


GOOD = """family: convnext
variants:
  mine:
    depths: [1, 1, 2, 1]
    dims: [16, 32, 48, 64]
    ls_init_value: 1e-6
"""


def test_numbers_without_a_dot_are_numbers(write):
    content = read_yaml(write("a: 1e-6\nb: 2E5\nc: 1e6x\nd: -3e+2\n"))
    assert content == {"a": 1e-6, "b": 2e5, "c": "1e6x", "d": -300.0}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (GOOD + "    dims: [1, 2, 3, 4]\n", 7, "duplicate key 'dims' .first on line 5"),
        (GOOD.replace("depths", "depth"), 4, "unknown key 'depth'; did you mean 'depths'"),
        (GOOD.replace("[1, 1, 2, 1]", "deep"), 4, "depths must be a list of .an integer.*'deep'"),
        (GOOD.replace("[1, 1, 2, 1]", "[1, 1, 2.5, 1]"), 4, "depths must be"),
        (GOOD.replace("1e-6", "true"), 6, "ls_init_value must be a number or null, not True"),
        (GOOD + "    stem_type: overlapping\n", 7, "one of 'patch', 'overlap'"),
        (GOOD.replace("    dims: [16, 32, 48, 64]\n", ""), 3, "missing dims"),
        (GOOD + "    device: cuda\n", 7, "unknown key 'device'"),
        (
            GOOD.replace("variants", "variant"),
            2,
            "unknown key .variant. in a family file; did you mean",
        ),
        (GOOD + "    like: convnext_tinny\n", 7, "did you mean 'convnext_tiny'"),
        (GOOD + "    like: mine\n", 7, "no variant"),
        (GOOD + "  b: {like: c}\n  c: {like: b}\n", 7, "circle"),
        (GOOD + "aliases: {m: mein}\n", 7, "names no variant: 'mein'; did you mean 'mine'"),
        (GOOD + "    1: 2\n", 7, "is not text"),
        ("family: convnext\nvariants: [1]\n", 2, "'variants' must hold"),
        ("variants: {a: {}}\n", 1, "'family: <name>' is missing"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: 2026-13-45\n", 1, "cannot read the value"),
    ],
)
def test_errors_name_file_line_and_way_out(write, text, line, message):
    path = write(text)
    with pytest.raises(ConfigError, match=message) as caught:
        backbones.create_model(str(path), device="meta")
    assert str(caught.value).startswith(f"{path}:{line}:")
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: &x [1]\nb: [*x, *x]\n", "aliases"),
        (b"- 1\n", "top level"),
        (b"", "top level"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"[" * 100_000, "not valid YAML"),
        (b"a" * (5 << 20), "larger than"),
    ],
)
def test_no_config_file_at_all(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_family(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(ConfigError, match=str(tmp_path)):
            read_family(path)


def test_user_file_over_a_registered_family(write):
    path = write(
        GOOD + "  wider:\n    like: mine\n    dims: [24, 32, 48, 64]\n"
        "  as_tiny:\n    like: convnext_tiny\n    kernel_sizes: [3, 5, 7, 9]\n"
    )
    mine = backbones.create_model(f"{path}#mine", num_classes=3)
    assert mine.config["name"] == "mine"
    assert [p.dim for p in mine.plans] == [16, 32, 48, 64]
    assert backbones.create_model(f"{path}#wider", device="meta").plans[0].dim == 24
    kernels = backbones.create_model(f"{path}#as_tiny", device="meta")
    assert kernels.stages[3].blocks[0].conv_dw.kernel_size == (9, 9)
    assert backbones.model_info(f"{path}#mine").params > 0
    with pytest.raises(ConfigError, match="name one as .*#NAME .mine, wider, as_tiny"):
        backbones.create_model(str(path))
    with pytest.raises(UnknownModelError, match="did you mean 'wider'"):
        backbones.create_model(f"{path}#wide")
    assert "mine" not in backbones.list_models()


def test_unregistered_family(write):
    with pytest.raises(UnknownModelError, match="no family 'convnex'; did you mean 'convnext'"):
        backbones.create_model(str(write(GOOD.replace("convnext", "convnex"))))


def test_wrong_number_of_stages(write):
    text = GOOD.replace("[16, 32, 48, 64]", "[16, 32]")
    with pytest.raises(ValueError, match="has 4 stages"):
        backbones.create_model(str(write(text)))


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [(1, int, True), (True, int, False), (1, float, True), (True, float, False), (1.0, int, False)],
)
def test_kinds_of_numbers(value, hint, expected):
    assert fits(value, hint) is expected


@pytest.mark.parametrize("name", backbones.list_models())
def test_shipped_variants_fit_their_constructors(name):
    variant = registry.variants[name]
    check_arguments(variant, registry.classes[variant.family], hidden=("device", "dtype"))
    assert variant.source is not None
    assert variant.source.license
    assert parameters_of(name) > 1e6


def test_every_entry_names_a_variant():
    strange = [e.name for e in load_manifest().entries.values() if registry.find(e.variant) is None]
    assert strange == []


MANIFEST = """version: 1
families:
  toy:
    weights:
      toy.in1k:
        repo: me/toy
        file: model.safetensors
        license: mit
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MANIFEST.replace("license", "licence"), r":8: toy.in1k: unknown key 'licence'; did you"),
        (MANIFEST + "        top1: good\n", r":9: toy.in1k: top1 must be a number"),
        (MANIFEST + "        sha256: abc\n", "sha256 is not of the form"),
        (MANIFEST + "        url: https://example.org/x\n", "need 'repo' or 'url'"),
        (MANIFEST.replace("        file: model.safetensors\n", ""), "'repo' needs 'file'"),
        (MANIFEST + "        status: page_only\n", "page_only needs 'page'"),
        (MANIFEST + "        status: lost\n", "status must be one of"),
        (MANIFEST.replace("version: 1", "version: 2"), "expected 'version: 1'"),
        (MANIFEST.replace("toy.in1k", "toy"), "expected 'variant.tag:'"),
    ],
)
def test_manifest_errors(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError, match=message):
        read_manifest(path)


def test_manifest_default_tag_is_the_first(write):
    text = MANIFEST + "      toy.b:\n        status: unreleased\n"
    manifest = read_manifest(write(text))
    assert manifest.tags("toy") == ["in1k", "b"]
    assert manifest.find("toy").tag == "in1k"
    assert manifest.find("other") is None
    with pytest.raises(UnknownModelError, match="no weights 'toy.in2k'; did you mean 'in1k'"):
        manifest.find("toy", "in2k")
