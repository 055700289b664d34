"""Puts a run's parts together: loaders, task, optimizer, schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.data import Mixup, resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import NativeScaler
from torch import nn

from backbones.errors import ConfigError, UnsupportedError
from backbones.train.config import TrainConfig
from backbones.train.data import Splits, eval_loader, train_loader
from backbones.train.distributed import World
from backbones.train.loop import Trainer, Update
from backbones.train.tasks import create_task

__all__ = ["assemble", "check", "distribute"]


def check(config: TrainConfig, world: World) -> None:
    """Refuse options that exclude each other.

    Raises:
        ConfigError, UnsupportedError: with the way out.
    """
    if config.sync_bn and world.device.type != "cuda":
        raise UnsupportedError("sync_bn needs GPUs; leave it out on CPUs")
    if config.mixes and config.batch_size % 2:
        raise ConfigError(f"mixup and cutmix need an even batch_size, got {config.batch_size}")
    if config.kd_checkpoint and not config.kd_model_name:
        raise ConfigError("kd_checkpoint needs kd_model_name, the teacher's model")


def assemble(
    config: TrainConfig,
    world: World,
    splits: Splits,
    model: nn.Module,
    *,
    num_classes: int,
    progress: Callable[[Update], None] | None = None,
) -> Trainer:
    """Return what trains a model, not yet compiled or wrapped for several processes.

    Args:
        config: the options.
        world: the processes; the model goes to this one's device.
        splits: the images.
        model: the model.
        num_classes: width of its classifier.
        progress: called after every optimizer step.

    Raises:
        ConfigError: an unknown optimizer, or what the model or teacher cannot do.
    """
    data_config = resolve_model_data_config(model)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model.to(device=world.device).to(memory_format=layout)  # type: ignore[call-overload]
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    frozen = _freeze_all_but(model, _classifier(model)) if config.freeze_backbone else []
    if config.sync_bn and world.distributed:
        model = convert_sync_batchnorm(model)
    task = create_task(model, config, world.device, num_classes=num_classes, classes=splits.classes)
    train_batches = train_loader(splits.train, config, data_config, world)
    val_batches = None
    if splits.val is not None:
        val_batches = eval_loader(
            splits.val,
            data_config,
            batch_size=config.validation_batch_size or config.batch_size,
            workers=config.workers,
            pin_mem=config.pin_mem,
            world=world,
        )
    lr = config.lr or _scaled_rate(config, world, train_batches)
    try:
        # A distilling task may have parameters of its own, beside the model's.
        optimizer = create_optimizer_v2(
            task.get_trainable_module(),
            **{**optimizer_kwargs(cfg=config), **config.opt_kwargs, "lr": lr},
        )
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {config.opt!r}: {error}") from error
    schedule = scheduler_kwargs(config)
    schedule |= {key: min(schedule[key], lr) for key in ("min_lr", "warmup_lr")}
    updates = math.ceil(len(train_batches) / config.grad_accum_steps)
    scheduler, epochs = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates)
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
    half = config.amp and config.amp_dtype == "float16" and world.device.type == "cuda"
    return Trainer(
        config,
        world,
        task,
        optimizer,
        scheduler,
        train_batches,
        val_batches,
        scaler=NativeScaler(device=world.device.type) if half else None,
        mixup=_mixup(config, num_classes) if config.mixes else None,
        frozen=frozen,
        progress=progress,
        epochs=epochs,
    )


def distribute(trainer: Trainer) -> None:
    """Compile what is to be compiled, and connect the processes."""
    config, world, task = trainer.config, trainer.world, trainer.task
    if config.torchcompile:
        task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
    if world.distributed:
        ids = [world.device.index] if world.device.type == "cuda" else None
        task.prepare_distributed(device_ids=ids)


def _mixup(config: TrainConfig, num_classes: int) -> Mixup:
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        cutmix_minmax=config.cutmix_minmax,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        mode=config.mixup_mode,
        label_smoothing=config.smoothing,
        num_classes=num_classes,
    )


def _scaled_rate(config: TrainConfig, world: World, batches: Any) -> float:
    batch_size = getattr(batches, "batch_size", None) or config.batch_size
    ratio = batch_size * world.size * config.grad_accum_steps / config.lr_base_size
    adaptive = any(word in config.opt.lower() for word in ("ada", "lamb"))
    scale = config.lr_base_scale or ("sqrt" if adaptive else "linear")
    return config.lr_base * (math.sqrt(ratio) if scale == "sqrt" else ratio)


def _classifier(model: nn.Module) -> nn.Module:
    found = model.get_classifier()  # type: ignore[operator]
    return nn.ModuleList(found) if isinstance(found, (tuple, list)) else found


def _freeze_all_but(model: nn.Module, trained: nn.Module) -> list[nn.Module]:
    """Stop gradients everywhere but in one part, and return the modules to keep in eval mode."""
    model.requires_grad_(False)
    trained.requires_grad_(True)
    kept = set(map(id, trained.modules()))
    return [m for m in model.modules() if id(m) not in kept and not list(m.children())]
