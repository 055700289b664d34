"""The recipes that come with the package, and those of the user."""

import dataclasses

import pytest
from tiers import families_in_manifest
from timm.data import auto_augment_transform, rand_augment_transform
from timm.optim import create_optimizer_v2, optimizer_kwargs

import backbones
from backbones.config import read_yaml
from backbones.errors import ConfigError
from backbones.train import TrainConfig, list_recipes, read_options
from backbones.train.recipes import _folder, find_recipe, read_recipe

NAMES = list_recipes()


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_makes_a_run_of_every_variant(name):
    content = read_yaml(_folder() / f"{name}.yaml")
    recipe = read_recipe(name)
    variants = backbones.list_models(family=content.get("family"))
    assert set(recipe.variants) <= set(variants)
    for variant in (None, *variants):
        for scratch in (False, True):
            config = TrainConfig(**recipe.for_model(variant, from_scratch=scratch))
            assert config.aa is None or policy(config.aa)
    if content.get("family"):
        assert name.startswith(content["family"])


def policy(words):
    make = rand_augment_transform if words.startswith("rand") else auto_augment_transform
    return make(words, {"translate_const": 100, "img_mean": (124, 116, 104)})


@pytest.mark.parametrize("family", backbones.list_families())
def test_fine_tuning_takes_the_familys_recipe_or_the_general_one(family):
    variant = backbones.list_models(family=family)[0]
    recipe, known = find_recipe(None, variant)
    own = f"{family}_finetune"
    assert recipe.name == (own if own in NAMES else "finetune")
    assert known == variant
    assert recipe.for_model(variant)["layer_decay"] is not None
    for tag in backbones.model_info(variant).tags[:1]:
        assert find_recipe(None, f"{variant}.{tag}") == (recipe, variant)


@pytest.mark.parametrize("family", families_in_manifest())
def test_families_with_weights_have_their_authors_recipe_and_one_for_fine_tuning(family):
    assert {f"{family}_in1k", f"{family}_finetune"} <= set(NAMES)


@pytest.mark.parametrize("family", backbones.list_families())
def test_fine_tuning_moves_early_layers_least_in_every_family(family):
    variant = min(
        backbones.list_models(family=family), key=lambda name: backbones.model_info(name).params
    )
    options = TrainConfig(**find_recipe(None, variant)[0].for_model(variant))
    model = backbones.create_model(variant, device="meta")
    optimizer = create_optimizer_v2(model, **{**optimizer_kwargs(cfg=options), "lr": 1.0})
    scale, decay = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[id(parameter)], decay[id(parameter)] = group["lr_scale"], group["weight_decay"]
    parameters = dict(model.named_parameters())
    assert set(scale) == {id(parameter) for parameter in parameters.values()}
    stem = scale[id(parameters[model.first_conv + ".weight"])]
    assert stem == min(scale.values()) < 0.8
    classifier = {id(p) for n, p in parameters.items() if n.startswith("head.")}
    assert {scale[key] for key in classifier} == {1.0}
    assert all(decay[id(p)] == 0 for n, p in parameters.items() if n.endswith(".bias"))
    assert len(set(scale.values())) >= 5


@pytest.mark.parametrize("name", [n for n in NAMES if n.endswith(("_in1k", "_in22k"))])
def test_training_from_scratch_takes_no_released_weights(name):
    begins_with_weights = "_ft_" in name or name.startswith("convnextv2")
    expected = None if begins_with_weights else False
    assert read_recipe(name).options.get("pretrained") is expected


def test_other_models_take_the_general_recipe():
    assert find_recipe(None, "resnet18")[0].name == "finetune"
    assert find_recipe("none", "resnet18")[0].options == {}


def test_what_is_particular_counts_more(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "like: finetune\nepochs: 7\nvariants: {lsnet_t: {epochs: 8}}\nfrom_scratch: {epochs: 9}\n"
    )
    recipe = read_recipe(str(path))
    general = read_recipe("finetune")
    assert recipe.for_model(None)["epochs"] == 7
    assert recipe.for_model("lsnet_t")["epochs"] == 8
    assert recipe.for_model("lsnet_t", from_scratch=True)["epochs"] == 9
    assert recipe.for_model(None)["weight_decay"] == general.options["weight_decay"]
    assert recipe.from_scratch["lr_base"] == general.from_scratch["lr_base"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", r"mine\.yaml:1: unknown option 'epoch'; did you mean 'epochs'"),
        ("opt: adamw\nepochs: many", r"mine\.yaml:2: epochs must be an integer, got 'many'"),
        ("like: finetun", r"mine\.yaml:1: no recipe 'finetun'; did you mean 'finetune'"),
        ("variants: 3", "must hold 'name: value' lines"),
        ("variants: {lsnet_t: 3}", "must hold 'option: value' lines"),
        ("variants: {lsnet_t: {lrr: 3}}", "unknown option 'lrr'"),
        ("from_scratch: {lrr: 3}", "unknown option 'lrr'"),
    ],
)
def test_wrong_recipes_are_refused_by_line(tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=words):
        read_recipe(str(path))


def test_config_files_of_timm(tmp_path):
    path = tmp_path / "timm.yaml"
    path.write_text("lr: 0.1\nbatch-size: 8\nmodel-kwargs: {depths: [1, 1, 1, 1]}\n")
    options = read_options(path)
    assert options == {"lr": 0.1, "batch_size": 8, "model_kwargs": {"depths": [1, 1, 1, 1]}}
    path.write_text("lr: 0.1\nnaflex-loader: true\n")
    with pytest.raises(ConfigError, match=r"timm\.yaml:2: unknown option 'naflex_loader'"):
        read_options(path)


def test_every_option_has_words_for_people():
    for field in dataclasses.fields(TrainConfig):
        assert len(field.metadata["help"]) > 10, field.name
