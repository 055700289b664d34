"""A whole run: images in, a fine-tuned model and its checkpoints out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from timm.data import resolve_model_data_config
from timm.utils import (
    get_outdir,
    random_seed,
    trim_summary,
    unwrap_model,
    update_summary,
)
from torch import nn

from backbones.errors import ConfigError, MissingDependencyError
from backbones.train.checkpoints import (
    LAST,
    Checkpoints,
    check_classes,
    options_of,
    read_training_checkpoint,
    restore,
    resumed_options,
    uninterrupted,
)
from backbones.train.config import TrainConfig, check_options
from backbones.train.data import Splits, open_splits
from backbones.train.distributed import World, joined
from backbones.train.images import DataError
from backbones.train.initial_weights import Start, starting_point
from backbones.train.loop import EpochReport, Trainer, Update, learning_rate
from backbones.train.plots import draw_curves
from backbones.train.recipes import find_recipe
from backbones.train.setup import assemble, check, distribute
from backbones.weights import load_checkpoint, save_checkpoint

__all__ = ["BEST", "CURVES", "SUMMARY", "TrainReport", "run"]

ARGS, SUMMARY, CURVES = "args.yaml", "summary.csv", "curves.png"
BEST = "model_best.safetensors"
DRAWING_PAUSE_S = 30.0
Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainReport:
    """What a run gave: the best epoch's model in eval mode, and its history."""

    model: nn.Module
    classes: list[str] | None
    folder: Path
    epochs: list[EpochReport]
    best_epoch: int
    """Counts from 1."""
    start: Start
    seconds: float


def run(
    *,
    say: Say = lambda line: None,
    progress: Callable[[Update], None] | None = None,
    checking: Callable[[int, int], None] | None = None,
    resume: str | Path | None = None,
    **options: Any,
) -> TrainReport:
    """Fine-tune a model on a folder of images.

    The run's folder (`output`/`experiment`) then holds timm's ``args.yaml``, ``summary.csv``,
    ``last.pth.tar``, ``checkpoint-*.pth.tar`` and ``model_best.pth.tar``, and besides
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
    content = None if resume is None else read_training_checkpoint(resume)
    if content is not None:
        options = {**resumed_options(content, Path(str(resume))), **options}
    check_options(options)
    if not options.get("model"):
        raise ConfigError("model is missing; name one (--model NAME; backbones list shows them)")
    # The options of a resumed run hold the recipe's.
    wanted = options.get("recipe") if content is None else "none"
    recipe, variant = find_recipe(wanted, options["model"])
    if content is None:
        options["recipe"] = recipe.name
    config = _merged(recipe.for_model(variant), options)
    with joined(config.device) as world:
        if not world.primary:
            say, progress, checking = (lambda line: None), None, None
        random_seed(config.seed)
        splits = open_splits(config, checking)
        num_classes = _count_classes(config, splits)
        for note in splits.notes:
            say(note)
        if content is None:
            model, start = starting_point(config, num_classes, splits.classes)
            say(start.sentence)
            if start.from_scratch:  # the recipe may then want another drop path, say
                config = _merged(recipe.for_model(variant, from_scratch=True), options)
                random_seed(config.seed)
                fresh = dataclasses.replace(config, pretrained=False)
                model, _ = starting_point(fresh, num_classes)
        else:
            check_classes(content, splits.classes, config.data_dir)
            fresh = dataclasses.replace(
                config, pretrained=False, pretrained_path=None, initial_checkpoint=None
            )
            model, _ = starting_point(fresh, num_classes)
            facts = options_of(content)
            start = Start(facts.get("start"), facts.get("license"), "resumed")
        check(config, world)
        job = _Job(config, world, splits, model, num_classes, start, say)
        return job.work(content, resume, progress)


class _Job:
    """One run in one process; a class, because its parts need one another."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        splits: Splits,
        model: nn.Module,
        num_classes: int,
        start: Start,
        say: Say,
    ) -> None:
        self.config, self.world, self.splits = config, world, splits
        self.model, self.num_classes, self.start, self.say = model, num_classes, start, say
        self.folder = _folder(config, model)
        self.saved = 0  # epochs that the last checkpoint has behind it
        self.drawing, self.drawn = True, -math.inf

    def work(
        self,
        content: Mapping[str, Any] | None,
        resume: str | Path | None,
        progress: Callable[[Update], None] | None,
    ) -> TrainReport:
        """Train, epoch by epoch, and return the best model."""
        begun = time.perf_counter()
        config, world = self.config, self.world
        if world.primary:  # a new run gets a new folder, whatever its name
            self.folder = Path(get_outdir(str(self.folder), inc=content is None))
        folder = self.folder
        trainer = assemble(
            config, world, self.splits, self.model, num_classes=self.num_classes, progress=progress
        )
        facts = {
            "classes": self.splits.classes,
            "start": self.start.source,
            "license": self.start.license,
        }
        first = 0
        if content is not None:
            path = str(resume)
            first = restore(content, path, trainer.task, trainer.optimizer, trainer.scaler)
        saver = Checkpoints(folder, config, facts, trainer.task, trainer.optimizer, trainer.scaler)
        if content is not None and isinstance(content.get("saver"), Mapping):
            saver.load_state_dict(content["saver"])
        self.saved = first
        distribute(trainer)
        if trainer.scheduler is not None:
            if config.sched_on_updates:
                trainer.scheduler.step_update(first * trainer.updates_per_epoch)
            else:
                trainer.scheduler.step(first)
        if world.primary:
            _write_args(config, folder / ARGS)
            trim_summary(str(folder / SUMMARY), first)
            if content is None:
                saver.save(-1, None)
        self.say(
            f"training {config.model} on {len(self.splits.train)} images of {self.num_classes}"
            f" classes, epochs {first + 1} to {trainer.epochs}; results go to {folder}"
        )
        history: list[EpochReport] = []
        try:
            for epoch in range(first, trainer.epochs):
                history.append(self._epoch(trainer, saver, epoch))
        except KeyboardInterrupt:
            self._draw(pause=0)
            self.say(f"interrupted; --resume {folder / LAST} goes on with epoch {self.saved + 1}")
            raise
        except DataError as error:
            raise DataError(_own_words(error)) from error
        self._draw(pause=0)
        world.wait()
        best = first if saver.best_epoch is None else saver.best_epoch
        model = self.model
        if world.primary and (folder / BEST).is_file():
            load_checkpoint(model, folder / BEST)
        return TrainReport(
            model.eval(),
            self.splits.classes,
            folder,
            history,
            best + 1,
            self.start,
            time.perf_counter() - begun,
        )

    def _epoch(self, trainer: Trainer, saver: Checkpoints, epoch: int) -> EpochReport:
        config, world, folder = self.config, self.world, self.folder
        begun = time.perf_counter()
        # Whatever is random in an epoch depends on the epoch alone, so that a run can be resumed.
        random_seed(config.seed + 1_000_003 * epoch, world.rank)
        _set_epoch(trainer.train_batches, epoch)
        loss = trainer.train(epoch)
        rate = learning_rate(trainer.optimizer)
        found = trainer.validate()
        report = EpochReport(
            epoch + 1,
            rate,
            loss,
            time.perf_counter() - begun,
            *(found[key] if found else None for key in ("loss", "top1", "top5")),
        )
        if trainer.scheduler is not None:
            trainer.scheduler.step(epoch + 1)
        if world.primary:
            metric = found[config.eval_metric] if found else -loss
            if config.eval_metric == "loss" and not found:
                metric = loss
            with uninterrupted():
                if saver.save(epoch, metric):
                    self._export(trainer, report)
                update_summary(
                    epoch, {"loss": loss}, found, filename=str(folder / SUMMARY), lr=rate
                )
                self.saved = epoch + 1
            self._draw()
        shown = f", validation {report.val_top1:.2f} % top-1" if found else ""
        left = (trainer.epochs - epoch - 1) * report.seconds
        self.say(
            f"epoch {epoch + 1}/{trainer.epochs}: loss {loss:.4f}{shown}, {report.seconds:.1f} s,"
            f" {timedelta(seconds=round(left))} left"
        )
        world.wait()
        return report

    def _export(self, trainer: Trainer, report: EpochReport) -> None:
        """Save the weights of the best epoch so far, ready for use."""
        average = trainer.task.has_ema()
        model = unwrap_model(trainer.task.get_eval_model(ema=average))
        inner = getattr(model, "student", model)  # of a task that compares features
        provenance = {
            "started_from": self.start.source and Path(self.start.source).name,
            "license_of_source": self.start.license,
            "trained_on": Path(self.config.data_dir or self.config.dataset).name,
            "recipe": self.config.recipe,
            "epoch": report.epoch,
            "average_of_weights": average,
            "top1": report.val_top1,
        }
        save_checkpoint(
            inner,
            self.folder / BEST,
            license=self.start.license,
            provenance=provenance,
            classes=self.splits.classes,
        )

    def _draw(self, pause: float = DRAWING_PAUSE_S) -> None:
        now = time.monotonic()
        if not (self.world.primary and self.drawing and now - self.drawn >= pause):
            return
        self.drawn = now
        if not (self.folder / SUMMARY).is_file():
            return
        try:
            draw_curves(self.folder / CURVES, self.folder / SUMMARY)
        except MissingDependencyError as error:
            self.say(f"no {CURVES}: {error}")
            self.drawing = False


def _merged(recipe: Mapping[str, Any], options: Mapping[str, Any]) -> TrainConfig:
    merged = {**recipe, **options}
    config = TrainConfig(**merged)
    if config.warmup_epochs > config.epochs / 2:
        if "warmup_epochs" in options:
            raise ConfigError(
                f"warmup_epochs={config.warmup_epochs:g} is over half of epochs={config.epochs}"
            )
        config = dataclasses.replace(config, warmup_epochs=config.epochs / 4)
    return config


def _count_classes(config: TrainConfig, splits: Splits) -> int:
    found = len(splits.classes) if splits.classes else None
    if config.num_classes is None and found is None:
        raise ConfigError("the dataset does not say how many classes it has; give num_classes")
    if config.num_classes is not None and found is not None and config.num_classes != found:
        raise ConfigError(
            f"num_classes={config.num_classes}, but {config.data_dir or config.dataset} holds"
            f" {found} classes; leave num_classes out"
        )
    return found or int(config.num_classes or 0)


def _folder(config: TrainConfig, model: nn.Module) -> Path:
    size = resolve_model_data_config(model)["input_size"][-1]
    name = Path(config.model.partition("#")[2] or config.model.replace(":", "_")).stem
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(config.output) / (config.experiment or f"{stamp}-{name}-{size}")


def _write_args(config: TrainConfig, path: Path) -> None:
    plain = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }
    path.write_text(yaml.safe_dump(plain, sort_keys=False), encoding="utf-8")


def _own_words(error: DataError) -> str:
    """Return an error's message without the traceback that a loader's worker puts before it."""
    text = str(error).strip()
    return text.splitlines()[-1].partition("DataError: ")[2] or text


def _set_epoch(loader: Any, epoch: int) -> None:
    for part in (loader.dataset, loader.sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
