"""What a training run is made of; fields bear the names of timm's training script."""

import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

from backbones.errors import ConfigError, nearest
from backbones.schema import fits, in_words

__all__ = ["TrainConfig", "check_options", "option_types"]


def _option(default: Any, help: str) -> Any:
    """Declare a field with the text that ``--help`` shows for it."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run: data, model, optimization, augmentation, output.

    `lr` None takes `lr_base` times the global batch size over `lr_base_size` (its square root for
    Adam's kin), as timm does. A learning rate holds for one optimizer step, whatever the number of
    processes and of accumulated batches.

    Raises:
        ConfigError: a value outside its range; the message names the option.
    """

    # Data
    data_dir: str = _option("", "folder of images: <split>/<class>/<image>, or <class>/<image>")
    dataset: str = _option("", "another of timm's dataset readers, such as 'torch/cifar10'")
    train_split: str = _option("train", "name of the training split")
    val_split: str = _option("validation", "name of the validation split; '' for no validation")
    val_fraction: float = _option(
        0.2, "share of each class held out where there is no such split; 0 for no validation"
    )
    dataset_download: bool = _option(False, "let the dataset reader download")
    class_map: str = _option("", "file that maps class names to indices")
    input_key: str | None = _option(None, "the reader's key of the images")
    target_key: str | None = _option(None, "the reader's key of the labels")
    skip_bad: bool = _option(False, "leave unreadable images out instead of stopping")
    # Model
    model: str = _option("", "name, alias or YAML file of the model")
    recipe: str | None = _option(None, "name, YAML file, or 'none'; by default the family's own")
    pretrained: bool | None = _option(
        None, "start from released weights: required, forbidden, or (default) where they can be had"
    )
    pretrained_path: str | None = _option(None, "start from this checkpoint, with a new classifier")
    initial_checkpoint: str | None = _option(None, "start from this checkpoint and its classifier")
    num_classes: int | None = _option(None, "number of classes; by default that of the data")
    img_size: int | Sequence[int] | None = _option(
        None, "pixels a side, or height and width; by default the model's"
    )
    input_size: Sequence[int] | None = _option(None, "the same as channels, height, width")
    in_chans: int | None = _option(None, "channels of the images: 3 (default), 1 or 4")
    crop_pct: float | None = _option(None, "share of the image that validation keeps")
    mean: Sequence[float] | None = _option(None, "mean of the pixels; by default the model's")
    std: Sequence[float] | None = _option(None, "deviation of the pixels; by default the model's")
    interpolation: str | None = _option(None, "how images are resized; by default the model's")
    model_kwargs: dict[str, Any] = _option({}, "further arguments of the model, as key=value")  # noqa: RUF009
    head_init_scale: float | None = _option(None, "factor on the classifier's first values")
    drop: float | None = _option(None, "dropout before the classifier")
    drop_path: float | None = _option(None, "rate of stochastic depth")
    freeze_backbone: bool = _option(False, "train the classifier only (a linear probe)")
    qat: bool = _option(
        False, "train the re-parameterized form with weights and activations rounded as in int8"
    )
    grad_checkpointing: bool = _option(False, "recompute activations to save memory")
    channels_last: bool | Literal["auto"] = _option(
        "auto", "keep images channels last in memory; auto: where a step measured so is faster"
    )
    torchcompile: str | None = _option(None, "compile the model with this backend (inductor)")
    torchcompile_mode: str | None = _option(None, "mode of torch.compile")
    # Device
    device: str | None = _option(None, "'cpu', 'cuda', ...; by default a GPU where there is one")
    amp: bool = _option(False, "mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = _option("bfloat16", "type of mixed precision")
    sync_bn: bool = _option(False, "batch statistics over all processes (GPUs only)")
    dist_bn: Literal["reduce", "broadcast", ""] = _option(
        "reduce", "what becomes of BatchNorm's running statistics after an epoch, over processes"
    )
    # Batches
    batch_size: int = _option(64, "images a process and step")
    validation_batch_size: int | None = _option(None, "by default the batch size")
    grad_accum_steps: int = _option(1, "batches whose gradients make one step")
    workers: int = _option(0, "processes that load images, for each training process")
    pin_mem: bool = _option(False, "load into pinned memory")
    # Optimizer
    opt: str = _option("adamw", "any of timm's optimizers")
    opt_eps: float | None = _option(None, "epsilon; by default the optimizer's")
    opt_betas: Sequence[float] | None = _option(None, "betas; by default the optimizer's")
    momentum: float = _option(0.9, "momentum of SGD and its kin")
    weight_decay: float = _option(0.05, "weight decay; norms and biases are spared")
    clip_grad: float | None = _option(None, "bound on the gradients")
    clip_mode: Literal["norm", "value", "agc"] = _option("norm", "how gradients are bounded")
    layer_decay: float | None = _option(None, "factor on the learning rate from a layer to the one")
    layer_decay_min_scale: float = _option(0.0, "lower bound of that factor's product")
    opt_kwargs: dict[str, Any] = _option({}, "further arguments of the optimizer, as key=value")  # noqa: RUF009
    # Schedule
    epochs: int = _option(30, "epochs of the schedule; a cool-down comes on top")
    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "constant"] = _option(
        "cosine", "learning rate schedule"
    )
    sched_on_updates: bool = _option(True, "change the rate with every step, not every epoch")
    lr: float | None = _option(None, "learning rate; by default from lr-base")
    lr_base: float = _option(1e-3, "learning rate at a global batch of lr-base-size")
    lr_base_size: int = _option(256, "see lr-base")
    lr_base_scale: Literal["linear", "sqrt"] | None = _option(
        None, "how the rate grows with the batch; by default sqrt for Adam's kin, else linear"
    )
    warmup_epochs: float = _option(1, "epochs of linear warm-up")
    warmup_lr: float = _option(1e-6, "where warm-up begins")
    warmup_prefix: bool = _option(False, "start the schedule after warm-up")
    min_lr: float = _option(1e-6, "where the schedule ends")
    cooldown_epochs: int = _option(0, "epochs at min-lr")
    decay_epochs: float = _option(30, "epochs between the falls of the step schedule")
    decay_milestones: Sequence[int] = _option((30, 60), "epochs at which multistep falls")
    decay_rate: float = _option(0.1, "factor of a fall")
    # Augmentation and regularization
    no_aug: bool = _option(False, "no augmentation at all")
    train_crop_mode: str | None = _option(None, "timm's crop mode in training")
    scale: Sequence[float] = _option((0.08, 1.0), "area share of the random crop, least and most")
    ratio: Sequence[float] = _option((3 / 4, 4 / 3), "aspect ratio of the random crop")
    hflip: float = _option(0.5, "probability of mirroring")
    vflip: float = _option(0.0, "probability of turning upside down")
    color_jitter: float = _option(0.4, "strength of color jitter")
    aa: str | None = _option(None, "timm's AutoAugment policy, such as 'rand-m9-mstd0.5-inc1'")
    reprob: float = _option(0.0, "probability of erasing a rectangle")
    remode: Literal["const", "rand", "pixel"] = _option("pixel", "what an erased rectangle holds")
    recount: int = _option(1, "number of erased rectangles")
    train_interpolation: str = _option("random", "how training images are resized")
    mixup: float = _option(0.0, "alpha of mixup; 0 for none")
    cutmix: float = _option(0.0, "alpha of cutmix; 0 for none")
    cutmix_minmax: Sequence[float] | None = _option(None, "bounds of cutmix, instead of alpha")
    mixup_prob: float = _option(1.0, "probability of mixup or cutmix")
    mixup_switch_prob: float = _option(0.5, "probability of cutmix where both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = _option("batch", "what shares one mixture")
    mixup_off_epoch: int = _option(0, "epoch from which both are off; 0 for never")
    smoothing: float = _option(0.1, "label smoothing")
    bce_loss: bool = _option(False, "binary cross-entropy instead of cross-entropy")
    aux_loss_weight: float = _option(0.0, "weight of the loss of an auxiliary head")
    # Average of the weights
    model_ema: bool = _option(False, "average the weights, and validate and keep the average")
    model_ema_decay: float = _option(0.9998, "decay of the average")
    model_ema_warmup: bool = _option(False, "begin with a smaller decay")
    # Distillation
    kd_model_name: str | None = _option(None, "teacher: a model's name")
    kd_checkpoint: str | None = _option(None, "the teacher's weights; by default its released ones")
    kd_distill_type: Literal["logit", "feature", "token"] = _option("logit", "what is compared")
    kd_temperature: float = _option(4.0, "temperature of the logits' softmax")
    distill_loss_weight: float | None = _option(None, "weight of the distillation loss")
    task_loss_weight: float | None = _option(None, "weight of the loss on the labels")
    # Run
    seed: int = _option(
        42, "of everything random; a run in one memory layout repeats itself on the same machine"
    )
    eval_metric: Literal["top1", "top5", "loss"] = _option("top1", "which epoch is the best")
    checkpoint_hist: int = _option(3, "how many checkpoints to keep")
    output: str = _option("output/train", "folder of runs")
    experiment: str | None = _option(None, "the run's folder in it; by default date, model, size")

    def __post_init__(self) -> None:
        for names, allowed, words in _RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not allowed(value):
                    raise ConfigError(f"{name} must be {words}, got {value}")
        for name in ("interpolation", "train_interpolation"):
            value = getattr(self, name)
            if value not in (None, *_INTERPOLATIONS):
                raise ConfigError(
                    f"no {name} {value!r}{nearest(value, _INTERPOLATIONS)}"
                    f" (there are {', '.join(_INTERPOLATIONS)})"
                )
        for name in ("scale", "ratio"):
            low, high = (*getattr(self, name), 0, 0)[:2]
            if len(getattr(self, name)) != 2 or not 0 < low <= high:
                raise ConfigError(f"{name} takes two rising numbers, got {getattr(self, name)}")

        self._check_size()

    def _check_size(self) -> None:
        """Let `input_size` of timm's script say what `img_size` and `in_chans` do."""
        if self.input_size is not None:
            channels, *sides = (*self.input_size,) if len(self.input_size) == 3 else (0,)
            if min(channels, *sides, 1) < 1:
                raise ConfigError(f"input_size must be channels, height, width: {self.input_size}")
            if self.img_size is not None or self.in_chans not in (None, channels):
                raise ConfigError("input_size says img_size and in_chans; leave these out")
            object.__setattr__(self, "input_size", None)
            object.__setattr__(self, "img_size", tuple(sides))
            object.__setattr__(self, "in_chans", channels)
        size: Any = self.img_size
        shape = (1,) if size is None else (size,) if isinstance(size, int) else tuple(size)
        if len(shape) not in (1, 2) or min(shape) < 1:
            raise ConfigError(
                f"img_size must be at least 1, a side or height and width, got {self.img_size}"
            )
        if size is not None:
            object.__setattr__(self, "img_size", shape[0] if len(shape) == 1 else shape)

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "epochs batch_size validation_batch_size grad_accum_steps checkpoint_hist lr_base_size"
        " in_chans recount",
        lambda value: value >= 1,
        "at least 1",
    ),
    ("num_classes", lambda value: value >= 2, "at least 2"),
    (
        "weight_decay warmup_epochs warmup_lr min_lr cooldown_epochs workers mixup cutmix"
        " color_jitter seed mixup_off_epoch aux_loss_weight",
        lambda value: value >= 0,
        "at least 0",
    ),
    (
        "lr lr_base clip_grad layer_decay kd_temperature",
        lambda value: 0 < value < float("inf"),
        "above 0",
    ),
    (
        "smoothing drop drop_path val_fraction hflip vflip reprob mixup_prob mixup_switch_prob"
        " model_ema_decay crop_pct",
        lambda value: 0 <= value <= 1,
        "between 0 and 1",
    ),
    ("smoothing drop drop_path val_fraction model_ema_decay", lambda value: value < 1, "below 1"),
    # NumPy's seeds have 32 bits, and epochs are added.
    ("seed", lambda value: value <= 2**31, f"at most {2**31}"),
)
_INTERPOLATIONS = ("random", "bicubic", "bilinear", "nearest", "lanczos", "box", "hamming")


@cache
def option_types() -> dict[str, Any]:
    """Return the type of every option."""
    return typing.get_type_hints(TrainConfig)


def check_options(options: Mapping[str, Any], where: str = "", *, also: Sequence[str] = ()) -> None:
    """Refuse unknown options, and values of the wrong type, by ConfigError.

    `where` names their source, `also` what else may be there.
    """
    start = f"{where}: " if where else ""
    hints = option_types()
    for key, value in options.items():
        place = options.where(key) + ": " if hasattr(options, "where") else start
        if key in also:
            continue
        if key not in hints:
            raise ConfigError(
                f"{place}unknown option {key!r}{nearest(key, hints)} (timm's other options work in"
                " timm's own script: python -m backbones.train.launch train.py ...)"
            )
        if not fits(value, hints[key]):
            raise ConfigError(f"{place}{key} must be {in_words(hints[key])}, got {value!r}")
