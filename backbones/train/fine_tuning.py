"""run(): images in, a fine-tuned model and its checkpoints out."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.utils import random_seed
from torch import nn

from backbones.errors import ConfigError
from backbones.train.checkpoints import SavedRun
from backbones.train.config import TrainConfig, check_options
from backbones.train.data import Splits, open_splits
from backbones.train.distributed import join_process_group
from backbones.train.initial_weights import InitialWeights, create_initial_model
from backbones.train.recipes import Recipe, find_recipe
from backbones.train.setup import check_options_together, deploy_form
from backbones.train.trainer import Update
from backbones.train.training_run import Say, TrainingRun, TrainReport

__all__ = ["run"]


def run(
    *,
    say: Say = lambda line: None,
    progress: Callable[[Update], None] | None = None,
    checking: Callable[[int, int], None] | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> TrainReport:
    """Fine-tune a model on a folder of images.

    The run's folder (`output`/`experiment`) then holds what timm's script writes, and besides
    ``model_best.safetensors`` (class names, arguments, source weights and their license in its
    metadata) and, with matplotlib, ``curves.png``. Under torchrun, every process calls this.

    Args:
        say: takes lines for people.
        progress: called after every optimizer step.
        checking: called while images are checked, with how many are done, and of how many.
        resume: a checkpoint of an earlier run to go on with, at the epoch after it; its options
            hold unless others are given, and its folder is gone on with.
        options: fields of `TrainConfig`; what is not given comes from the recipe.

    Raises:
        ConfigError: options that do not fit together.
        DataError: the images cannot be used.
        TrainingError: the loss is not finite, or a checkpoint cannot be written.
        CheckpointError: a checkpoint cannot be read or does not fit.
        KeyboardInterrupt: Ctrl-C; ``last.pth.tar`` holds the last whole epoch.
    """
    saved = None if resume is None else SavedRun(resume)
    if saved is not None:
        options = {**saved.options, **options}
    check_options(options)
    if not options.get("model"):
        raise ConfigError("model is missing; name one (--model NAME; backbones list shows them)")
    # The options of a resumed run hold the recipe's.
    recipe_name = options.get("recipe") if saved is None else "none"
    recipe, variant = find_recipe(recipe_name, options["model"])
    if saved is None:
        options["recipe"] = recipe.name
    qat = bool(options.get("qat"))
    config = _with_recipe(recipe.for_model(variant, qat=qat), options)
    with join_process_group(config.device) as group:
        if not group.primary:
            say, progress, checking = (lambda line: None), None, None
        random_seed(config.seed)
        splits = open_splits(config, checking)
        num_classes = _count_classes(config, splits)
        for note in splits.notes:
            say(note)
        if saved is None:
            config, model, initial = _begin(config, recipe, variant, options, splits, num_classes)
            say(str(initial))
        else:
            model, initial = _as_it_was(config, saved, splits, num_classes)
        check_options_together(config, group)
        if config.qat:
            model = deploy_form(model)
        started = TrainingRun(config, group, splits, model, num_classes, initial, say)
        return started.train(saved, progress)


def _begin(
    config: TrainConfig,
    recipe: Recipe,
    variant: str | None,
    options: Mapping[str, Any],
    splits: Splits,
    num_classes: int,
) -> tuple[TrainConfig, nn.Module, InitialWeights]:
    """Return the model of a new run, and its options now that its initial weights are known."""
    model, initial = create_initial_model(config, num_classes, splits.classes)
    if initial.from_scratch and config.qat:
        raise ConfigError(
            f"qat goes on from trained weights (--initial-checkpoint FILE), and {config.model} has"
            f" none: {initial}"
        )
    if initial.from_scratch:  # the recipe may then have another drop path, say
        config = _with_recipe(recipe.for_model(variant, from_scratch=True), options)
        random_seed(config.seed)
        model, _ = create_initial_model(dataclasses.replace(config, pretrained=False), num_classes)
    return config, model, initial


def _as_it_was(
    config: TrainConfig, saved: SavedRun, splits: Splits, num_classes: int
) -> tuple[nn.Module, InitialWeights]:
    """Return the model of a resumed run, whose weights are still to be restored."""
    saved.check_classes(splits.classes, config.data_dir)
    fresh = dataclasses.replace(
        config, pretrained=False, pretrained_path=None, initial_checkpoint=None
    )
    model, _ = create_initial_model(fresh, num_classes)
    facts = saved.facts
    return model, InitialWeights(facts.get("start"), facts.get("license"), "resumed")


def _with_recipe(recipe: Mapping[str, Any], options: Mapping[str, Any]) -> TrainConfig:
    config = TrainConfig(**{**recipe, **options})
    if config.warmup_epochs > config.epochs / 2:
        if "warmup_epochs" in options:
            raise ConfigError(
                f"warmup_epochs={config.warmup_epochs:g} is over half of epochs={config.epochs}"
            )
        config = dataclasses.replace(config, warmup_epochs=config.epochs / 4)
    return config


def _count_classes(config: TrainConfig, splits: Splits) -> int:
    found, asked = len(splits.classes or ()), config.num_classes or 0
    if not (asked or found):
        raise ConfigError("the dataset does not say how many classes it has; give num_classes")
    if asked and found and asked != found:
        raise ConfigError(
            f"num_classes={asked}, but {config.data_dir or config.dataset} holds"
            f" {found} classes; leave num_classes out"
        )
    return found or asked
