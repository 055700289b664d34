"""Puts a run's parts together: loaders, task with its losses, optimizer, schedule."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.data import Mixup, resolve_model_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import NativeScaler
from torch import nn
from torch.optim import Optimizer

from backbones.errors import ConfigError, UnsupportedError, nearest
from backbones.train.config import TrainConfig
from backbones.train.data import Splits, eval_loader, train_loader
from backbones.train.distributed import ProcessGroup
from backbones.train.setup.freezing import freeze_backbone
from backbones.train.setup.rounding import rounding_twin
from backbones.train.setup.tasks import create_task
from backbones.train.trainer import Trainer, Update

__all__ = ["assemble", "check_options_together", "create_optimizer", "distribute"]


def check_options_together(config: TrainConfig, group: ProcessGroup) -> None:
    """Refuse options that exclude each other, by ConfigError or UnsupportedError."""
    if config.sync_bn and group.device.type != "cuda":
        raise UnsupportedError("sync_bn needs GPUs; leave it out on CPUs")
    if config.mixes and config.batch_size % 2:
        raise ConfigError(f"mixup and cutmix need an even batch_size, got {config.batch_size}")
    if config.torchcompile:
        backends = torch.compiler.list_backends(exclude_tags=None)
        if config.torchcompile not in backends:
            raise ConfigError(
                f"no backend {config.torchcompile!r} of torch.compile"
                f"{nearest(config.torchcompile, backends)} (there are {', '.join(backends)})"
            )
    if config.qat:
        for name in ("torchcompile", "grad_checkpointing", "sync_bn"):
            if getattr(config, name):
                raise ConfigError(f"qat and {name} exclude each other; leave one out")
    if config.kd_checkpoint and not config.kd_model_name:
        raise ConfigError("kd_checkpoint needs kd_model_name, the teacher's model")


def assemble(
    config: TrainConfig,
    group: ProcessGroup,
    splits: Splits,
    model: nn.Module,
    *,
    num_classes: int,
    progress: Callable[[Update], None] | None = None,
) -> Trainer:
    """Return what trains a model, which goes to the group's device; it is not yet compiled or
    wrapped for several processes. What cannot be done is a ConfigError."""
    data_config = resolve_model_data_config(model)
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    model.to(device=group.device).to(memory_format=layout)  # type: ignore[call-overload]
    if config.grad_checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if config.sync_bn and group.distributed:
        model = convert_sync_batchnorm(model)
    train_batches, val_batches = _batches(config, group, splits, data_config)
    if config.qat:
        model = rounding_twin(model, (images.to(group.device) for images, _ in train_batches))
    frozen = freeze_backbone(model) if config.freeze_backbone else []
    task = create_task(model, config, group.device, num_classes=num_classes, classes=splits.classes)
    lr = config.lr or _scaled_rate(config, group, train_batches)
    # A distilling task may have parameters of its own, beside the model's.
    optimizer = create_optimizer(task.get_trainable_module(), config, lr)
    schedule = scheduler_kwargs(config)
    schedule |= {key: min(schedule[key], lr) for key in ("min_lr", "warmup_lr")}
    updates = math.ceil(len(train_batches) / config.grad_accum_steps)
    scheduler, epochs = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=updates)
    if config.model_ema:
        task.setup_ema(decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)
    mixup = None
    if config.mixes:
        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            cutmix_minmax=config.cutmix_minmax,
            prob=config.mixup_prob,
            switch_prob=config.mixup_switch_prob,
            mode=config.mixup_mode,
            label_smoothing=config.smoothing,
            num_classes=num_classes,
        )
    half = config.amp and config.amp_dtype == "float16" and group.device.type == "cuda"
    return Trainer(
        config,
        group,
        task,
        optimizer,
        scheduler,
        train_batches,
        val_batches,
        scaler=NativeScaler(device=group.device.type) if half else None,
        mixup=mixup,
        frozen=frozen,
        progress=progress,
        epochs=epochs,
    )


def _batches(
    config: TrainConfig, group: ProcessGroup, splits: Splits, data_config: Mapping[str, Any]
) -> tuple[Any, Any | None]:
    """Return loaders of training images and, where there are any, of validation images."""
    try:
        train_batches = train_loader(splits.train, config, data_config, group)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f"aa {config.aa!r} and other augmentation: {error}") from error
    if splits.val is None:
        return train_batches, None
    return train_batches, eval_loader(
        splits.val,
        data_config,
        batch_size=config.validation_batch_size or config.batch_size,
        workers=config.workers,
        pin_mem=config.pin_mem,
        group=group,
    )


def create_optimizer(module: nn.Module, config: TrainConfig, lr: float) -> Optimizer:
    """Return timm's optimizer of a module's parameters; ConfigError where there is none."""
    options = {**optimizer_kwargs(cfg=config), **config.opt_kwargs, "lr": lr}
    try:
        return create_optimizer_v2(module, **options)
    except (AssertionError, IndexError, TypeError, ValueError) as error:
        raise ConfigError(f"optimizer {config.opt!r}: {error}") from error


def distribute(trainer: Trainer) -> None:
    """Compile what is to be compiled, and connect the processes."""
    config, group, task = trainer.config, trainer.group, trainer.task
    if config.torchcompile:
        task.compile(backend=config.torchcompile, mode=config.torchcompile_mode)
    if group.distributed:
        ids = [group.device.index] if group.device.type == "cuda" else None
        task.prepare_distributed(device_ids=ids)


def _scaled_rate(config: TrainConfig, group: ProcessGroup, batches: Any) -> float:
    batch_size = getattr(batches, "batch_size", None) or config.batch_size
    ratio = batch_size * group.size * config.grad_accum_steps / config.lr_base_size
    adaptive = any(word in config.opt.lower() for word in ("ada", "lamb"))
    scale = config.lr_base_scale or ("sqrt" if adaptive else "linear")
    return config.lr_base * (math.sqrt(ratio) if scale == "sqrt" else ratio)
