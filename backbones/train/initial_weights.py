"""Where a run begins: the model, with released weights, a checkpoint's, or fresh ones."""

import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

import huggingface_hub.constants as hub
import timm
from torch import nn

from backbones.errors import BackbonesError, CheckpointError, ConfigError
from backbones.factory import create_model, find_variant
from backbones.manifest import load_manifest
from backbones.train.config import TrainConfig
from backbones.train.data import set_input
from backbones.weights import load_checkpoint, read_checkpoint, read_description, sizes_in_file

__all__ = ["InitialWeights", "create_initial_model", "hub_responds"]

HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class InitialWeights:
    """Which weights a run began with; its text says so in a sentence."""

    source: str | None
    """Model and tag, or the checkpoint file; None for fresh weights."""
    license: str | None
    sentence: str

    def __str__(self) -> str:
        return self.sentence

    @property
    def from_scratch(self) -> bool:
        """Whether the weights are fresh."""
        return self.source is None


def create_initial_model(
    config: TrainConfig, num_classes: int, classes: list[str] | None = None
) -> tuple[nn.Module, InitialWeights]:
    """Return the model to train and where its weights come from.

    With ``pretrained=None`` released weights are taken where there are some and where the Hub
    answers within five seconds (or, offline, where its cache holds them).

    Args:
        config: the model and which weights to start from.
        num_classes: width of the classifier.
        classes: class names of the data, which those of `initial_checkpoint` must equal.

    Raises:
        ConfigError: the model does not take one of the arguments.
        BackbonesError: the weights asked for cannot be had or do not fit.
    """
    arguments: dict[str, Any] = {"num_classes": num_classes, **config.model_kwargs}
    given = {
        "in_chans": config.in_chans,
        "drop_rate": config.drop,
        "drop_path_rate": config.drop_path,
    }
    arguments |= {key: value for key, value in given.items() if value is not None}
    try:
        model, initial = _create(config, arguments, classes)
    except TypeError as error:
        raise ConfigError(f"{config.model} cannot be created: {error}") from error
    if config.head_init_scale is not None:
        for layer in model.get_classifier().modules():  # type: ignore[operator]
            for value in layer.parameters(recurse=False):
                value.data.mul_(config.head_init_scale)
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    cfg["license"] = initial.license
    set_input(
        model,
        config.img_size,
        crop_pct=config.crop_pct,
        mean=config.mean,
        std=config.std,
        interpolation=config.interpolation,
    )
    return model, initial


def _create(
    config: TrainConfig, arguments: dict[str, Any], classes: list[str] | None
) -> tuple[nn.Module, InitialWeights]:
    if config.initial_checkpoint and config.pretrained_path:
        raise ConfigError("initial_checkpoint and pretrained_path exclude each other")
    if config.initial_checkpoint:
        return _of_whole_checkpoint(config.model, config.initial_checkpoint, arguments, classes)
    if config.pretrained_path:
        return _with_new_classifier(config.model, config.pretrained_path, arguments)
    name = config.model
    reason = "as asked" if config.pretrained is False else _unavailable(name, config.pretrained)
    if reason is None:
        try:
            return _released(name, arguments)
        except (BackbonesError, OSError, RuntimeError) as error:
            if config.pretrained:
                raise
            reason = str(error)
    model = create_model(name, **arguments)
    return model, InitialWeights(None, None, f"starting from scratch: {reason}")


def _of_whole_checkpoint(
    name: str, path: str, arguments: dict[str, Any], classes: list[str] | None
) -> tuple[nn.Module, InitialWeights]:
    checkpoint = read_checkpoint(path)
    known = checkpoint.description.get("classes")
    if known and classes and list(known) != list(classes):
        raise CheckpointError(
            f"{path} was trained on other classes ({len(known)}: {', '.join(known[:5])}, ...)"
            f" than the data has ({len(classes)}: {', '.join(classes[:5])}, ...);"
            " --pretrained-path starts from it with a new classifier"
        )
    model = create_model(name, **arguments)
    sizes = sizes_in_file(checkpoint, model)
    if sizes and sizes.get("num_classes") != arguments["num_classes"]:
        raise CheckpointError(
            f"{path} is of a model of {sizes.get('num_classes', 'no')} classes, the data has"
            f" {arguments['num_classes']}; --pretrained-path starts from it with a new classifier"
        )
    load_checkpoint(model, checkpoint)
    license = checkpoint.description.get("license")
    return model, InitialWeights(path, license, f"starting from {path}")


def _with_new_classifier(
    name: str, path: str, arguments: dict[str, Any]
) -> tuple[nn.Module, InitialWeights]:
    model = create_model(name, checkpoint_path=path, **arguments)
    model.reset_classifier(arguments["num_classes"])  # type: ignore[operator]
    sentence = f"starting from {path}, with a new classifier"
    return model, InitialWeights(path, read_description(path).get("license"), sentence)


def _released(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, InitialWeights]:
    model = create_model(name, pretrained=True, **arguments)
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    tagged = ".".join(filter(None, (name.partition(".")[0], cfg.get("tag"))))
    source = name if ":" in name else tagged
    sentence = f"starting from pretrained weights, {source}"
    return model, InitialWeights(source, cfg.get("license"), sentence)


def _unavailable(name: str, required: bool | None) -> str | None:
    """Return why released weights are not even worth an attempt; None where they are."""
    if required:
        return None
    variant, tag = find_variant(name)
    if variant is not None:
        if name.endswith((".yaml", ".yml")) or "#" in name:
            return "a model of one's own has no released weights"
        entry = load_manifest().find(variant.name, tag)
        if entry is None or not entry.available:
            return f"no weights of {name} can be downloaded"
    elif timm.is_model(name) and not timm.models.is_model_pretrained(name):
        return f"no weights of {name} can be downloaded"
    if not hub.HF_HUB_OFFLINE and not hub_responds():
        return f"{hub.ENDPOINT} does not answer within {HUB_TIMEOUT_S:.0f} s"
    return None


def hub_responds(timeout: float = HUB_TIMEOUT_S) -> bool:
    """Return whether the Hub (``HF_ENDPOINT``) responds in time, with whatever status."""
    responded = threading.Event()

    def request() -> None:
        try:
            urllib.request.urlopen(
                urllib.request.Request(hub.ENDPOINT, method="HEAD"), timeout=timeout
            ).close()
        except urllib.error.HTTPError:
            pass  # any status will do
        except (OSError, ValueError):
            return
        responded.set()

    # A thread of its own, because resolving a name obeys no timeout.
    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(timeout)
    return responded.is_set()
