"""One run in one process: epoch after epoch, with checkpoints, history and curves."""

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
from timm.utils import get_outdir, random_seed, trim_summary, unwrap_model, update_summary
from torch import nn

from backbones.errors import DataError, MissingDependencyError
from backbones.files import write_text
from backbones.train.checkpoints import LAST, Checkpoints, SavedRun, uninterrupted
from backbones.train.config import TrainConfig
from backbones.train.data import Splits
from backbones.train.distributed import ProcessGroup
from backbones.train.initial_weights import InitialWeights
from backbones.train.plots import draw_curves
from backbones.train.setup import assemble, distribute, weights_of_twin, with_memory_layout
from backbones.train.trainer import EpochReport, Trainer, Update, learning_rate
from backbones.weights import load_checkpoint, save_checkpoint

__all__ = ["BEST", "CURVES", "SUMMARY", "Say", "TrainReport", "TrainingRun"]

ARGS, SUMMARY, CURVES = "args.yaml", "summary.csv", "curves.png"
BEST = "model_best.safetensors"
DRAWING_PAUSE_S = 30.0
MOST_KEPT = 0.1  # of the average for the first weights, above which it is said
Say = Callable[[str], None]


@dataclass(frozen=True)
class TrainReport:
    """What a run gave: the best epoch's model in eval mode, and its history."""

    model: nn.Module
    classes: list[str] | None
    folder: Path
    epochs: list[EpochReport]
    best_epoch: int  # counts from 1
    initial_weights: InitialWeights
    seconds: float

    def __str__(self) -> str:
        best = next((e for e in self.epochs if e.epoch == self.best_epoch), None)
        shown = f", {best.val_top1:.2f} % top-1" if best and best.val_top1 is not None else ""
        names = [name for name in (BEST, CURVES) if (self.folder / name).is_file()]
        return (
            f"best epoch: {self.best_epoch}{shown}, after {self.seconds:.0f} s\n"
            f"{self.folder} holds {', '.join(names)}"
        )


class TrainingRun:
    """A run that is ready to start; the folder of its results appears with `train`."""

    def __init__(
        self,
        config: TrainConfig,
        group: ProcessGroup,
        splits: Splits,
        model: nn.Module,
        num_classes: int,
        initial_weights: InitialWeights,
        say: Say,
    ) -> None:
        self.config, self.group, self.splits, self.model = config, group, splits, model
        self.num_classes, self.initial_weights, self.say = num_classes, initial_weights, say
        self.folder = _folder(config, model)
        self.epochs_saved = 0
        self.drawing, self.drawn = True, -math.inf

    def train(
        self,
        saved: SavedRun | None,
        progress: Callable[[Update], None] | None,
    ) -> TrainReport:
        """Train, epoch by epoch, and return the best model; `saved` is the run to go on with."""
        begun = time.perf_counter()
        if self.group.primary:  # a new run gets a new folder, whatever its name
            self.folder = Path(get_outdir(str(self.folder), inc=saved is None))
        self.config = with_memory_layout(self.config, self.group, self.model, self.say)
        parts = self.config, self.group, self.splits, self.model
        trainer = assemble(*parts, num_classes=self.num_classes, progress=progress)
        first = 0 if saved is None else saved.restore(trainer)
        saver = self._saver(trainer, saved)
        self.epochs_saved = first
        distribute(trainer)
        self._begin_at(trainer, saver, first, new=saved is None)
        history: list[EpochReport] = []
        try:
            for epoch in range(first, trainer.epochs):
                history.append(self._epoch(trainer, saver, epoch))
        except KeyboardInterrupt:
            self._draw(pause=0)
            last, following = self.folder / LAST, self.epochs_saved + 1
            self.say(f"interrupted; --resume {last} goes on with epoch {following}")
            raise
        except DataError as error:
            raise DataError(_without_traceback(error)) from error
        self._draw(pause=0)
        self.group.barrier()
        best = first if saver.best_epoch is None else saver.best_epoch
        if self.group.primary and (self.folder / BEST).is_file():
            load_checkpoint(self.model, self.folder / BEST)
        return TrainReport(
            self.model.eval(),
            self.splits.classes,
            self.folder,
            history,
            best + 1,
            self.initial_weights,
            time.perf_counter() - begun,
        )

    def _saver(self, trainer: Trainer, saved: SavedRun | None) -> Checkpoints:
        """Return what saves checkpoints, and knows those of the run to go on with."""
        facts = {
            "classes": self.splits.classes,
            "start": self.initial_weights.source,
            "license": self.initial_weights.license,
        }
        saver = Checkpoints(
            self.folder, self.config, facts, trainer.task, trainer.optimizer, trainer.scaler
        )
        if saved is not None and isinstance(saved.content.get("saver"), Mapping):
            saver.load_state_dict(saved.content["saver"])
        return saver

    def _begin_at(self, trainer: Trainer, saver: Checkpoints, first: int, *, new: bool) -> None:
        """Bring schedule and files to the first epoch."""
        if trainer.scheduler is not None:
            if self.config.sched_on_updates:
                trainer.scheduler.step_update(first * trainer.updates_per_epoch)
            else:
                trainer.scheduler.step(first)
        if self.group.primary:
            options = {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in dataclasses.asdict(self.config).items()
            }
            write_text(self.folder / ARGS, yaml.safe_dump(options, sort_keys=False))
            trim_summary(str(self.folder / SUMMARY), first)
            if new:
                saver.save(-1, None)
        self.say(
            f"training {self.config.model} on {len(self.splits.train)} images of"
            f" {self.num_classes} classes, epochs {first + 1} to {trainer.epochs}; results go to"
            f" {self.folder}"
        )
        updates = trainer.epochs * trainer.updates_per_epoch
        # timm's average begins as a copy of the weights after the first update.
        kept = self.config.model_ema_decay ** (updates - 1)
        if self.config.model_ema and not self.config.model_ema_warmup and kept > MOST_KEPT:
            self.say(
                f"model_ema: after all {updates} updates, {kept:.0%} of the average will still be"
                " the weights after the first; add --model-ema-warmup"
            )

    def _epoch(self, trainer: Trainer, saver: Checkpoints, epoch: int) -> EpochReport:
        begun = time.perf_counter()
        # Whatever is random in an epoch depends on the epoch alone, so that a run can be resumed.
        random_seed(self.config.seed + 1_000_003 * epoch, self.group.rank)
        _set_epoch(trainer.train_batches, epoch)
        loss = trainer.train(epoch)
        rate = learning_rate(trainer.optimizer)
        metrics = trainer.validate()
        report = EpochReport(
            epoch + 1,
            rate,
            loss,
            time.perf_counter() - begun,
            *(metrics[key] if metrics else None for key in ("loss", "top1", "top5")),
        )
        if trainer.scheduler is not None:
            trainer.scheduler.step(epoch + 1)
        if self.group.primary:
            self._save(trainer, saver, report, metrics)
            self._draw()
        shown = f", validation {report.val_top1:.2f} % top-1" if metrics else ""
        left = (trainer.epochs - epoch - 1) * report.seconds
        self.say(
            f"epoch {epoch + 1}/{trainer.epochs}: loss {loss:.4f}{shown}, {report.seconds:.1f} s,"
            f" {timedelta(seconds=round(left))} left"
        )
        self.group.barrier()
        return report

    def _save(
        self,
        trainer: Trainer,
        saver: Checkpoints,
        report: EpochReport,
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Save an epoch's checkpoint, its line of the summary, and the best weights so far."""
        epoch, loss, by = report.epoch - 1, report.train_loss, self.config.eval_metric
        metric = metrics[by] if metrics else loss if by == "loss" else -loss
        with uninterrupted():
            if saver.save(epoch, metric):
                self._save_best(trainer, report)
            summary = str(self.folder / SUMMARY)
            update_summary(epoch, {"loss": loss}, metrics, filename=summary, lr=report.lr)
            self.epochs_saved = report.epoch

    def _save_best(self, trainer: Trainer, report: EpochReport) -> None:
        """Save the weights of the best epoch so far, ready for use."""
        average = trainer.task.has_ema()
        model = unwrap_model(trainer.task.get_eval_model(ema=average))
        inner = getattr(model, "student", model)  # of a task that compares features
        if self.config.qat:
            self.model.load_state_dict(weights_of_twin(inner))
            inner = self.model
        initial = self.initial_weights
        provenance = {
            "started_from": initial.source and Path(initial.source).name,
            "license_of_source": initial.license,
            "trained_on": Path(self.config.data_dir or self.config.dataset).name,
            "recipe": self.config.recipe,
            "epoch": report.epoch,
            "average_of_weights": average,
            "qat": self.config.qat,
            "top1": report.val_top1,
        }
        path, license, classes = self.folder / BEST, initial.license, self.splits.classes
        save_checkpoint(inner, path, license=license, provenance=provenance, classes=classes)

    def _draw(self, pause: float = DRAWING_PAUSE_S) -> None:
        """Draw the curves, unless that was done less than `pause` seconds ago."""
        now, summary = time.monotonic(), self.folder / SUMMARY
        if not (self.group.primary and self.drawing and now - self.drawn >= pause):
            return
        self.drawn = now
        if not summary.is_file():
            return
        try:
            draw_curves(self.folder / CURVES, summary)
        except MissingDependencyError as error:
            self.say(f"no {CURVES}: {error}")
            self.drawing = False


def _folder(config: TrainConfig, model: nn.Module) -> Path:
    size = resolve_model_data_config(model)["input_size"][-1]
    name = Path(config.model.partition("#")[2] or config.model.replace(":", "_")).stem
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(config.output) / (config.experiment or f"{stamp}-{name}-{size}")


def _without_traceback(error: DataError) -> str:
    """Return an error's message without the traceback that a loader's worker puts before it."""
    text = str(error).strip()
    return text.splitlines()[-1].partition("DataError: ")[2] or text


def _set_epoch(loader: Any, epoch: int) -> None:
    for part in (loader.dataset, loader.sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
