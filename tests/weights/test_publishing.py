"""Published models: folders and repositories that timm and this package load, and what they say."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import textwrap

import pytest
import timm
import torch
import yaml
from loopback_upload import TOKEN, serve_uploads
from torch import nn

import backbones
from backbones.errors import CheckpointError, ConfigError, UnsupportedError
from backbones.registry import registry
from backbones.weights import PublishError, push_to_hub, read_metadata
from backbones.weights.publish.config_json import check_rebuilt, hub_config
from backbones.weights.publish.pushing import FILES, save_for_hf

WEIGHT = "blocks.0.mlp.fc1.conv.weight"
SMALL = {"depths": [1, 1, 1, 1], "dims": [16, 16, 32, 32]}
WITH_TABLES = {"depths": [1, 1, 1, 2], "dims": [16, 16, 32, 32]}
MINE = """
family: convnext
variants:
  mine: {depths: [1, 1, 1, 1], dims: [8, 16, 24, 32], use_grn: true, ls_init_value: null}
"""


def filled(name, **arguments):
    """A model in evaluation mode with parameters, statistics included, that differ from fresh."""
    torch.manual_seed(1)
    model = backbones.create_model(str(name), **arguments).eval()
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(value + 0.1 * torch.rand_like(value))
    return model


def logits(model):
    torch.manual_seed(2)
    with torch.no_grad():
        return model.eval()(torch.randn(2, model.in_chans, 64, 64))


def read_card(folder):
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(MINE)
    return path


ROADS = [
    # timm has a class of its own for these
    ("convnext_atto", {"num_classes": 7, "in_chans": 1}, False, "timm.models.convnext"),
    ("inception_next_atto", {}, False, "timm.models.inception_next"),
    ("cpubone_nano", {"drop_rate": 0.1}, False, "timm.models.cpubone"),
    # ... but not for these
    ("convnext_atto", SMALL, False, "backbones.families.convnext.model"),
    ("convnext_atto", SMALL | {"num_classes": 3}, True, "backbones.families.convnext.model"),
    (
        "lsnet_t",
        WITH_TABLES | {"table_size": 14, "distilled": True},
        False,
        "backbones.families.lsnet.model",
    ),
    (
        "lsnet_t",
        WITH_TABLES | {"distilled": True, "in_chans": 4},
        True,
        "backbones.families.lsnet.model",
    ),
    ("convnext_atto", SMALL | {"num_classes": 0}, False, "backbones.families.convnext.model"),
    ("mine", {"num_classes": 4}, False, "backbones.families.convnext.model"),
    ("mine", {"num_classes": 4}, True, "backbones.families.convnext.model"),
]


@pytest.mark.parametrize(("name", "arguments", "deploy", "module"), ROADS)
def test_a_folder_loads_by_timm_and_by_us(tmp_path, mine, name, arguments, deploy, module):
    model = filled(mine if name == "mine" else name, **arguments)
    expected = logits(model)
    options = {}
    if deploy:
        model, options = backbones.reparameterize(model), {"deploy": True}
        assert torch.allclose(logits(model), expected, atol=1e-4)
        expected = logits(model)
    folder = save_for_hf(model, tmp_path / "out")
    assert sorted(os.listdir(folder)) == sorted(FILES)
    by_timm = timm.create_model(f"local-dir:{folder}", pretrained=True, **options)
    ours = backbones.create_model(f"local-dir:{folder}", pretrained=True, **options)
    assert type(by_timm).__module__ == module
    assert type(ours) is type(model)
    assert torch.equal(logits(ours), expected)
    # timm's classes may add in another order
    assert torch.allclose(logits(by_timm), expected, rtol=1e-4, atol=1e-5)
    assert module.startswith("timm") or torch.equal(logits(by_timm), expected)


def test_memory_layout_and_number_type_do_not_matter(tmp_path):
    model = filled("convnext_atto", num_classes=7, **SMALL).bfloat16()
    folder = save_for_hf(model.to(memory_format=torch.channels_last), tmp_path / "out")
    expected = logits(model.float())
    for create in (timm.create_model, backbones.create_model):
        loaded = create(f"local-dir:{folder}", pretrained=True)
        assert torch.allclose(logits(loaded), expected, rtol=1e-4, atol=1e-4)
        for one, other in zip(loaded.parameters(), model.parameters()):
            assert torch.equal(one, other)  # bfloat16 numbers are float32 numbers
    assert "stored as torch.bfloat16" in read_card(folder)[1]


def test_a_wrapped_model_is_published_as_itself(tmp_path):
    model = filled("convnext_atto", **SMALL)
    wrapped = nn.DataParallel(torch.compile(model, backend="eager"))
    folder = save_for_hf(wrapped, tmp_path / "out")
    loaded = backbones.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(loaded), logits(model))


def test_new_classes_and_adapted_channels_of_a_published_model(tmp_path):
    model = filled("lsnet_t", num_classes=3, **WITH_TABLES)
    folder = save_for_hf(model, tmp_path / "out", classes=["a", "b", "c"])
    for create in (timm.create_model, backbones.create_model):
        other = create(f"local-dir:{folder}", pretrained=True, num_classes=5, in_chans=1)
        first, weight = "stem.0.conv.weight", other.stem[0].conv.weight
        assert torch.allclose(weight, model.get_parameter(first).sum(1, keepdim=True))
        assert other.get_classifier().out_features == 5
        assert torch.equal(
            other.stages[0].state_dict()[WEIGHT], model.stages[0].state_dict()[WEIGHT]
        )


def test_what_timm_writes_of_the_same_model_is_what_we_write(tmp_path):
    """timm's own writer is the measure; ours adds the classifier's license and names."""
    model = timm.create_model("convnext_atto", num_classes=7, in_chans=1)
    timm.models.save_for_hf(
        model,
        tmp_path / "timm",
        model_config={"label_names": list("abcdefg")},
        safe_serialization=True,
    )
    theirs = json.loads((tmp_path / "timm" / "config.json").read_text())
    model = backbones.create_model("convnext_atto.d2_in1k", num_classes=7, in_chans=1)
    save_for_hf(model, tmp_path / "ours", classes=list("abcdefg"))
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    for key in ("architecture", "num_classes", "num_features", "label_names"):
        assert ours[key] == theirs[key]
    assert ours["model_args"].items() <= theirs["model_args"].items()
    cfg = ours["pretrained_cfg"]
    assert cfg["license"] == "apache-2.0"
    assert "tag" not in cfg  # these are not the weights of that tag
    for key, value in theirs["pretrained_cfg"].items():
        if key not in ("tag", "custom_load", "min_input_size", "license"):
            assert cfg.get(key) == pytest.approx(value), key


def test_card_config_and_metadata_agree(tmp_path):
    model = filled("convnext_atto", num_classes=2, **SMALL)
    provenance = {"data": "my ```images```\n---", "epochs": 3}
    folder = save_for_hf(
        model,
        tmp_path / "out",
        license="CC-BY-4.0",
        classes=["ant", "bee"],
        provenance=provenance,
        repo_id="me/ants",
    )
    front, text = read_card(folder)
    assert front["license"] == "cc-by-4.0"
    assert front["library_name"] == "timm"
    assert {"image-classification", "timm"} <= set(front["tags"])
    count = sum(p.numel() for p in model.parameters())
    for fact in (f"{count:,}", "3 x 224 x 224", "2 classes", "hf-hub:me/ants", "not measured"):
        assert fact in text
    assert '    "epochs": 3' in text
    assert "\n---" not in text
    ours = read_metadata(folder / "model.safetensors")["backbones"]
    assert ours["license"] == "CC-BY-4.0"
    assert ours["provenance"] == provenance
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["license"] == "CC-BY-4.0"
    assert config["label_names"] == ours["classes"] == ["ant", "bee"]
    assert ours["input"]["num_classes"] == config["num_classes"] == 2


@pytest.mark.parametrize(
    ("license", "front"),
    [
        ("unstated", {"license": "unknown"}),
        ("my-own: terms", {"license": "other", "license_name": "my-own: terms"}),
        ("mit", {"license": "mit"}),
    ],
)
def test_licenses_as_the_hub_spells_them(tmp_path, license, front):
    folder = save_for_hf(filled("convnext_atto", **SMALL), tmp_path / "out", license=license)
    found, text = read_card(folder)
    assert {key: found[key] for key in found if key.startswith("license")} == front
    assert f"{license}\n" in text


def test_license_of_the_weights_that_a_model_was_created_from(tmp_path, mine):
    model = backbones.create_model("convnextv2_atto.fcmae_ft_in1k", **SMALL)
    assert read_card(save_for_hf(model, tmp_path / "a"))[0]["license"] == "cc-by-nc-4.0"
    model = backbones.create_model(str(mine))
    front, text = read_card(save_for_hf(model, tmp_path / "b"))
    assert front["license"] == "unknown"
    assert "Nothing was recorded" in text


def test_the_card_says_how_to_load(tmp_path, mine):
    whole = filled(mine)
    text = read_card(save_for_hf(whole, tmp_path / "a"))[1]
    assert "import backbones\n    import timm" in text
    assert "`backbones_convnext_atto` with other arguments" in text
    assert "deploy" not in text
    text = read_card(save_for_hf(backbones.reparameterize(whole), tmp_path / "b"))[1]
    assert text.count("pretrained=True, deploy=True)") == 2
    text = read_card(save_for_hf(filled("convnext_atto"), tmp_path / "c"))[1]
    assert "\n\n    import timm" in text


def test_a_deploy_form_is_refused_without_the_word(tmp_path):
    model = backbones.reparameterize(filled("convnext_atto", num_classes=3, **SMALL))
    folder = save_for_hf(model, tmp_path / "out")
    for create in (timm.create_model, backbones.create_model):
        with pytest.raises(CheckpointError, match=r"out.model.safetensors: .*with deploy=True"):
            create(f"local-dir:{folder}", pretrained=True)


def test_tables_of_the_size_of_a_checkpoint(tmp_path):
    wide = filled("lsnet_t", table_size=14, **WITH_TABLES)
    model = backbones.create_model("lsnet_t", **WITH_TABLES)
    backbones.load_checkpoint(model, wide.state_dict())
    del model.arguments["table_size"]  # no family needs to keep it: sizes follow from the file
    folder = save_for_hf(model, tmp_path / "out")
    for create in (timm.create_model, backbones.create_model):
        loaded = create(f"local-dir:{folder}", pretrained=True)
        assert torch.equal(logits(loaded), logits(wide))


def test_the_model_as_it_is_now_is_described(tmp_path):
    model = filled("convnext_atto", **SMALL)
    model.reset_classifier(4, "max")
    folder = save_for_hf(model, tmp_path / "out")
    for create in (timm.create_model, backbones.create_model):
        loaded = create(f"local-dir:{folder}", pretrained=True)
        assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(CheckpointError, match="3 names for 4 classes"):
        save_for_hf(model, tmp_path / "other", classes=["a", "b", "c"])
    assert os.listdir(tmp_path) == ["out"]


def test_timms_instance_rebuilt_as_ours(tmp_path):
    model = timm.create_model("convnext_atto", num_classes=3, **SMALL).eval()
    merged = backbones.reparameterize(timm.create_model("convnext_femto").eval())
    folder = save_for_hf(merged, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["architecture"] == (
        "backbones_convnext_femto"
    )
    with pytest.raises(UnsupportedError, match=r"timm\.models\.save_for_hf"):
        save_for_hf(model, tmp_path / "other")


def pruned(model):
    model.prune_intermediate_layers([0, 1])
    return model


def widened(model):
    model.head.fc = nn.Linear(32, 1001)
    return model


def no_number(model):
    model.arguments["drop_rate"] = torch.tensor(0.5)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pruned, "cannot be rebuilt"),
        (widened, r"head\.fc\.bias.*cannot be rebuilt|cannot be rebuilt.*head\.fc"),
        (no_number, "argument drop_rate=.*cannot be written"),
        (lambda m: nn.Sequential(m), "Sequential was not made by"),
        (lambda m: type(m)(**m.arguments), "was not made by backbones.create_model"),
    ],
)
def test_what_could_not_be_loaded_is_not_written(tmp_path, change, message):
    model = change(filled("convnext_atto", **SMALL))
    with pytest.raises(UnsupportedError, match=message):
        save_for_hf(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_features_only_models_are_no_whole_models(tmp_path):
    model = backbones.create_model("convnext_atto", features_only=True, **SMALL)
    with pytest.raises(UnsupportedError, match="Publish a whole model"):
        save_for_hf(model, tmp_path / "out")


def test_a_variant_of_ones_own_with_a_name_that_is_taken(tmp_path):
    for name in ("lsnet_t", "convnext_atto", "resnet18"):
        (tmp_path / "taken.yaml").write_text(MINE.replace("mine", name))
        model = filled(tmp_path / "taken.yaml")
        folder = save_for_hf(model, tmp_path / name)
        for create in (timm.create_model, backbones.create_model):
            loaded = create(f"local-dir:{folder}", pretrained=True)
            assert torch.equal(logits(loaded), logits(model))


def test_families_of_ones_own(tmp_path, monkeypatch):
    for part in ("classes", "variants", "aliases"):
        monkeypatch.setattr(registry, part, dict(getattr(registry, part)))
    (tmp_path / "own_cnn.py").write_text(
        "from backbones.families.convnext import ConvNeXt\n\n\nclass Own(ConvNeXt):\n    pass\n"
    )
    text = MINE.replace("convnext", "own_cnn").replace("mine", "own_cnn_t")
    (tmp_path / "own_cnn.yaml").write_text(text)
    backbones.register_family(tmp_path / "own_cnn.yaml", tmp_path / "own_cnn.py")
    model = filled("own_cnn_t", num_classes=3)
    folder = save_for_hf(model, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["model_args"]) == ("own_cnn_t", {"num_classes": 3})
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(loaded), logits(model))
    (tmp_path / "other.yaml").write_text(text.replace("own_cnn_t", "unregistered"))
    with pytest.raises(UnsupportedError, match="register it with backbones.register_family"):
        save_for_hf(filled(tmp_path / "other.yaml"), tmp_path / "unregistered")


@pytest.mark.slow
@pytest.mark.parametrize("name", backbones.list_models())
def test_every_variant_can_be_described(tmp_path, name):
    with torch.device("meta"):
        model = backbones.create_model(name, num_classes=5)
    for form in (model, backbones.reparameterize(model.eval(), verify=False)):
        (tmp_path / "config.json").write_text(json.dumps(hub_config(form, license="mit")))
        check_rebuilt(form, tmp_path)


def limited(size, action):
    """Run with a limit on file sizes, which stands for the full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(CheckpointError, match="cannot be written"):
            action()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_or_the_old_files(tmp_path):
    model = filled("convnext_atto", num_classes=3, **SMALL)
    limited(4096, lambda: save_for_hf(model, tmp_path / "new"))
    assert os.listdir(tmp_path) == []
    folder = save_for_hf(model, tmp_path / "old")
    (folder / "notes.txt").write_text("keep me")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    wider = filled("convnext_atto", num_classes=100, **SMALL)
    limited(4096, lambda: save_for_hf(wider, folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_for_hf(wider, folder)
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] == before[name]] == ["notes.txt"]
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(loaded), logits(wider))


def test_places_that_are_no_folder(tmp_path):
    model = filled("convnext_atto", **SMALL)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="file: is a file"):
        save_for_hf(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="the folder .*no does not exist"):
        save_for_hf(model, tmp_path / "no" / "out")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("repo_id", ["mine", "me/mine/too", "me/mi ne", "-me/mine", ""])
def test_names_that_are_no_repository(repo_id):
    with pytest.raises(ConfigError, match="is no repository"):
        push_to_hub(nn.Identity(), repo_id)


def test_offline_nothing_is_sent():
    """These tests run with HF_HUB_OFFLINE=1."""
    with pytest.raises(PublishError, match="^me/a: HF_HUB_OFFLINE forbids to send; unset it$"):
        push_to_hub(filled("convnext_atto", **SMALL), "me/a")


# With a hub: real clients in processes of their own.


def run(hub, home, program, *arguments):
    settings = {
        **os.environ,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
    }
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=settings,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


PUSH = """
    import json, sys, torch, backbones
    from backbones.cli import main
    x = torch.randn(2, 3, 64, 64)
    small = {"depths": [1, 1, 1, 2], "dims": [16, 16, 32, 32], "num_classes": 3}
    plain = backbones.create_model("convnext_atto", num_classes=3).eval()
    merged = backbones.reparameterize(backbones.create_model("lsnet_t", **small).eval())
    models = {
        "plain": plain.to(memory_format=torch.channels_last),
        "merged": merged,
        "mine": backbones.create_model(sys.argv[1], num_classes=3).eval(),
    }
    expected, said = {}, {}
    facts = {"license": "mit", "classes": ["a", "b", "c"]}
    for name, model in models.items():
        said[name] = backbones.push_to_hub(model, f"me/{name}", private=name == "mine", **facts)
        expected[name] = model(x).detach()
    # by the command, from a file
    file = str(backbones.save_checkpoint(merged, sys.argv[2] + ".safetensors", **facts))
    said["exit code"] = main(["weights", "push", file, "me/file", "--private", "--json"])
    expected["file"] = expected["merged"]
    torch.save((x, expected), sys.argv[2])

    def push(key, repo_id, **options):
        try:
            said[key] = backbones.push_to_hub(merged, repo_id, **options)
        except backbones.BackbonesError as error:
            said[key] = f"{type(error).__name__}: {error}"
    push("no token", "me/a", token="hf_wrong")
    for owner in ("them", "nobody", "busy", "broken", "hangs-up"):
        push(owner, f"{owner}/a")
    push("first", "me/kept", license="mit")
    push("branch", "me/kept", license="mit", revision="dev", message="On a branch")
    push("again", "me/kept", license="cc-by-nc-4.0")
    push("card", "me/kept", license="apache-2.0", replace_card=True)
    print(json.dumps(said))
"""

PULL = """
    import os, sys, timm, torch
    from pathlib import Path
    x, expected = torch.load(sys.argv[1])
    def same(model, name):
        with torch.no_grad():
            return torch.allclose(model.eval()(x), expected[name], rtol=1e-4, atol=1e-5)
    # timm alone
    assert same(timm.create_model("hf-hub:me/plain", pretrained=True), "plain")
    try:
        timm.create_model("hf-hub:me/mine", pretrained=True)
    except RuntimeError as error:
        print(error)
    assert "backbones" not in sys.modules
    # and with this package
    import backbones
    from backbones.weights import read_metadata
    for name in expected:
        options = {"deploy": True} if name in ("merged", "file") else {}
        ours = backbones.create_model(f"hf-hub:me/{name}", pretrained=True, **options)
        by_timm = timm.create_model(f"hf-hub:me/{name}", pretrained=True, **options)
        print(name, type(ours).__module__, type(by_timm).__module__)
        for model in (ours, by_timm):
            assert same(model, name)
            assert model.pretrained_cfg["license"] == "mit"
            assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]
        if options:
            for create in (backbones.create_model, timm.create_model):
                try:
                    create(f"hf-hub:me/{name}", pretrained=True)
                except backbones.BackbonesError as error:
                    assert "deploy=True" in str(error)
                else:
                    raise AssertionError("a merged model was taken for another")
    files = list(Path(os.environ["HF_HOME"]).rglob("model.safetensors"))
    print(len(files), {read_metadata(file)["backbones"]["license"] for file in files})
"""


def test_pushed_models_load_by_timm_and_by_us(tmp_path, mine):
    (tmp_path / "hub").mkdir()
    with serve_uploads(tmp_path / "hub") as hub:
        hub.refusals = {
            "them": (403, "You don't have the rights to create a model under this namespace"),
            "nobody": (404, "Not found"),
            "busy": (429, "Too many requests"),
            "broken": (503, "Down"),
            "hangs-up": (0, ""),
        }
        said = json.loads(run(hub, tmp_path / "a", PUSH, mine, tmp_path / "x").splitlines()[-1])
        check_messages(said, hub.address)
        check_repositories(tmp_path / "hub" / "me", hub)
        pulled = run(hub, tmp_path / "b", PULL, tmp_path / "x")
    assert pulled.splitlines() == [
        "Unknown model (backbones_convnext_atto)",
        "plain backbones.families.convnext.model timm.models.convnext",
        "merged backbones.families.lsnet.model backbones.families.lsnet.model",
        "mine backbones.families.convnext.model backbones.families.convnext.model",
        "file backbones.families.lsnet.model backbones.families.lsnet.model",
        "4 {'mit'}",
    ]


def check_messages(said, address):
    for name in ("plain", "merged", "mine", "first"):
        repo = "kept" if name == "first" else name
        assert said[name].startswith(f"{address}/me/{repo}/commit/")
    assert said["exit code"] == 0
    for key, words in {
        "no token": ("me/a (status 401)", "HF_TOKEN", f"{address}/settings/tokens"),
        "them": ("them/a (status 403)", "HF_TOKEN", "may not write to them", "namespace"),
        "nobody": ("nobody/a (status 404)", "no user or organization nobody"),
        "busy": ("busy/a (status 429)", "push again later", "Too many requests"),
        "broken": ("broken/a (status 503)", "push again later", "Down"),
        "hangs-up": (f"hangs-up/a: {address} cannot be reached", "check the connection"),
    }.items():
        assert said[key].startswith("PublishError: ")
        for word in words:
            assert word in said[key], key


def check_repositories(folder, hub):
    """What arrived: nothing of what was refused, weights as large files, a kept card."""
    assert sorted(os.listdir(folder)) == ["file", "kept", "kept@dev", "merged", "mine", "plain"]
    assert [repo for repo, private in hub.private.items() if private] == ["me/mine", "me/file"]
    assert [commit for commit in hub.commits if "kept" in commit[0]] == [
        ("kept", "Add model", sorted(FILES)),
        ("kept@dev", "On a branch", sorted(FILES)),
        ("kept", "Add model", ["config.json", "model.safetensors"]),
        ("kept", "Add model", sorted(FILES)),
    ]
    # the file that the command read, and what is on the branch, were there already
    assert len(hub.objects) == 6
    assert read_card(folder / "kept")[0]["license"] == "apache-2.0"
    assert read_card(folder / "kept@dev")[0]["license"] == "mit"
    front, text = read_card(folder / "plain")
    assert front["license"] == "mit"
    assert 'timm.create_model("hf-hub:me/plain", pretrained=True)' in text
