"""A whole run: images in, a fine-tuned model and its checkpoints out."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.data import Mixup, resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import (
    NativeScaler,
    get_outdir,
    random_seed,
    trim_summary,
    unwrap_model,
    update_summary,
)
from torch import nn

from backbones.errors import CheckpointError, ConfigError, MissingDependencyError, UnsupportedError
from backbones.train.checkpoints import (
    FACTS,
    LAST,
    Checkpoints,
    options_of,
    read_training_checkpoint,
    restore,
)
from backbones.train.config import TrainConfig, check_options
from backbones.train.data import Splits, eval_loader, open_splits, train_loader
from backbones.train.images import DataError
from backbones.train.loop import EpochReport, Trainer, Update, freeze_all_but, learning_rate
from backbones.train.pictures import draw_curves
from backbones.train.recipes import find_recipe
from backbones.train.start import Start, starting_point
from backbones.train.tasks import create_task
from backbones.train.world import World, joined
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
        options = _resumed_options(content, Path(str(resume)), options)
    check_options(options)
    if not options.get("model"):
        raise ConfigError("model is missing; name one (--model NAME; backbones list shows them)")
    recipe, variant = find_recipe(options.get("recipe"), options["model"])
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
            if start.from_scratch:
                config = _merged(recipe.for_model(variant, from_scratch=True), options)
        else:
            model, start = _resumed_model(content, config, num_classes, splits)
        _check(config, world)
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
        trainer = self._trainer(progress)
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
        self._distribute(trainer)
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
            self.say(
                f"interrupted; --resume {folder / LAST} goes on with epoch"
                f" {first + len(history) + 1}"
            )
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

    def _trainer(self, progress: Callable[[Update], None] | None) -> Trainer:
        config, world, model = self.config, self.world, self.model
        data_config = resolve_model_data_config(model)
        layout = torch.channels_last if config.channels_last else torch.preserve_format
        model.to(device=world.device).to(memory_format=layout)  # type: ignore[call-overload]
        if config.grad_checkpointing:
            model.set_grad_checkpointing(True)  # type: ignore[operator]
        frozen = freeze_all_but(model, _classifier(model)) if config.freeze_backbone else []
        if config.sync_bn and world.distributed:
            self.model = model = convert_sync_batchnorm(model)
        task = create_task(
            model,
            config,
            world.device,
            num_classes=self.num_classes,
            classes=self.splits.classes,
        )
        train_batches = train_loader(self.splits.train, config, data_config, world)
        val_batches = None
        if self.splits.val is not None:
            val_batches = eval_loader(
                self.splits.val,
                data_config,
                batch_size=config.validation_batch_size or config.batch_size,
                workers=config.workers,
                pin_mem=config.pin_mem,
                world=world,
            )
        lr = config.lr or _scaled_rate(config, world, train_batches)
        kwargs = {**optimizer_kwargs(cfg=config), **config.opt_kwargs, "lr": lr}
        # A distilling task may have parameters of its own, beside the model's.
        owner = task.get_trainable_module()
        try:
            optimizer = create_optimizer_v2(owner, **kwargs)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"optimizer {config.opt!r}: {error}") from error
        updates = math.ceil(len(train_batches) / config.grad_accum_steps)
        schedule = scheduler_kwargs(config)
        schedule |= {key: min(schedule[key], lr) for key in ("min_lr", "warmup_lr")}
        scheduler, epochs = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates)
        half = config.amp and config.amp_dtype == "float16" and world.device.type == "cuda"
        if config.model_ema:
            task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
        return Trainer(
            config,
            world,
            task,
            optimizer,
            scheduler,
            train_batches,
            val_batches,
            scaler=NativeScaler(device=world.device.type) if half else None,
            mixup=self._mixup(),
            frozen=frozen,
            progress=progress,
            epochs=epochs,
        )

    def _mixup(self) -> Mixup | None:
        config = self.config
        if not config.mixes:
            return None
        return Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            cutmix_minmax=config.cutmix_minmax,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=config.smoothing,
            num_classes=self.num_classes,
        )

    def _distribute(self, trainer: Trainer) -> None:
        config, world, task = self.config, self.world, trainer.task
        if config.torchcompile:
            task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
        if world.distributed:
            ids = [world.device.index] if world.device.type == "cuda" else None
            task.prepare_distributed(device_ids=ids)

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
            if saver.save(epoch, metric):
                self._export(trainer, report)
            update_summary(epoch, {"loss": loss}, found, filename=str(folder / SUMMARY), lr=rate)
            self._draw()
        shown = f", validation {report.val_top1:.2f} % top-1" if found else ""
        self.say(
            f"epoch {epoch + 1}/{trainer.epochs}: loss {loss:.4f}{shown}, {report.seconds:.1f} s"
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


def _check(config: TrainConfig, world: World) -> None:
    if config.sync_bn and world.device.type != "cuda":
        raise UnsupportedError("sync_bn needs GPUs; leave it out on CPUs")
    if config.mixes and config.batch_size % 2:
        raise ConfigError(f"mixup and cutmix need an even batch_size, got {config.batch_size}")
    if config.kd_checkpoint and not config.kd_model_name:
        raise ConfigError("kd_checkpoint needs kd_model_name, the teacher's model")


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


def _scaled_rate(config: TrainConfig, world: World, batches: Any) -> float:
    batch_size = getattr(batches, "batch_size", None) or config.batch_size
    ratio = batch_size * world.size * config.grad_accum_steps / config.lr_base_size
    adaptive = any(word in config.opt.lower() for word in ("ada", "lamb"))
    scale = config.lr_base_scale or ("sqrt" if adaptive else "linear")
    return config.lr_base * (math.sqrt(ratio) if scale == "sqrt" else ratio)


def _classifier(model: nn.Module) -> nn.Module:
    found = model.get_classifier()  # type: ignore[operator]
    return nn.ModuleList(found) if isinstance(found, (tuple, list)) else found


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


def _resumed_options(
    content: Mapping[str, Any], path: Path, options: Mapping[str, Any]
) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    saved = {key: value for key, value in options_of(content).items() if key in names}
    if not saved.get("model"):
        raise CheckpointError(f"{path}: does not say which run it is of (it holds no args)")
    place = {"output": str(path.parent.parent), "experiment": path.parent.name}
    return {**saved, **place, "recipe": "none", **options}


def _resumed_model(
    content: Mapping[str, Any], config: TrainConfig, num_classes: int, splits: Splits
) -> tuple[nn.Module, Start]:
    facts = {key: options_of(content).get(key) for key in FACTS}
    if facts["classes"] and splits.classes and list(facts["classes"]) != splits.classes:
        raise CheckpointError(
            f"the run was on other classes ({len(facts['classes'])}) than {config.data_dir} holds"
            f" now ({len(splits.classes)})"
        )
    fresh = dataclasses.replace(
        config, pretrained=False, pretrained_path=None, initial_checkpoint=None
    )
    model, _ = starting_point(fresh, num_classes)
    start = Start(facts["start"], facts["license"], "resumed")
    return model, start
