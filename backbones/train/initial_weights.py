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
from backbones.weights import load_checkpoint, read_checkpoint, sizes_in_file

__all__ = ["InitialWeights", "classifier_layers", "create_initial_model", "hub_responds"]

HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class InitialWeights:
    """Which weights a run began with; its text says so in a sentence.

    `source` is model and tag, or the checkpoint file; None for fresh weights.
    """

    source: str | None
    license: str | None
    sentence: str

    def __str__(self) -> str:
        return self.sentence

    @property
    def from_scratch(self) -> bool:
        """Whether the weights are fresh."""
        return self.source is None


def classifier_layers(model: nn.Module) -> nn.ModuleList:
    """Return the classifier of a model of ours or of timm, or all where it has several."""
    found = model.get_classifier()  # type: ignore[operator]
    return nn.ModuleList(found if isinstance(found, (tuple, list)) else [found])


def create_initial_model(
    config: TrainConfig, num_classes: int, classes: list[str] | None = None
) -> tuple[nn.Module, InitialWeights]:
    """Return the model to train and where its weights come from.

    With ``pretrained=None`` released weights are taken where there are some and where the Hub
    answers within five seconds (or, offline, where its cache holds them). The classes of an
    `initial_checkpoint` must be those of the data, `classes`, where both are known.
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
        for layer in classifier_layers(model).modules():
            for value in layer.parameters(recurse=False):
                value.data.mul_(config.head_init_scale)
    facts = ("crop_pct", "mean", "std", "interpolation")
    set_input(model, config.img_size, **{name: getattr(config, name) for name in facts})
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    cfg["license"] = initial.license
    return model, initial


def _create(
    config: TrainConfig, arguments: dict[str, Any], classes: list[str] | None
) -> tuple[nn.Module, InitialWeights]:
    name, path = config.model, config.pretrained_path
    if config.initial_checkpoint and path:
        raise ConfigError("initial_checkpoint and pretrained_path exclude each other")
    if config.initial_checkpoint:
        return _of_whole_checkpoint(name, config.initial_checkpoint, arguments, classes)
    if path:
        checkpoint = read_checkpoint(path)
        model = create_model(name, checkpoint_path=checkpoint, **arguments)
        model.reset_classifier(arguments["num_classes"])  # type: ignore[operator]
        sentence = f"starting from {path}, with a new classifier"
        return model, InitialWeights(path, checkpoint.description.get("license"), sentence)
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


def _released(name: str, arguments: dict[str, Any]) -> tuple[nn.Module, InitialWeights]:
    model = create_model(name, pretrained=True, **arguments)
    cfg: dict[str, Any] = model.pretrained_cfg  # type: ignore[assignment]
    tagged = ".".join(filter(None, (name.partition(".")[0], cfg.get("tag"))))
    source = name if ":" in name else tagged
    told = f"starting from pretrained weights, {source}"
    return model, InitialWeights(source, cfg.get("license"), told)


def _unavailable(name: str, required: bool | None) -> str | None:
    """Return why released weights are not even worth an attempt; None where they are."""
    if required:
        return None
    variant, tag = find_variant(name)
    if variant is not None:
        if name.endswith((".yaml", ".yml")) or "#" in name:
            return "a model of one's own has no released weights"
        entry = load_manifest().find(variant.name, tag)
        released = entry is not None and entry.available
    else:
        released = not timm.is_model(name) or timm.models.is_model_pretrained(name)
    if not released:
        return f"no weights of {name} can be downloaded"
    if not hub.HF_HUB_OFFLINE and not hub_responds():
        return f"{hub.ENDPOINT} does not answer within {HUB_TIMEOUT_S:.0f} s"
    return None


def hub_responds(timeout: float = HUB_TIMEOUT_S) -> bool:
    """Return whether the Hub (``HF_ENDPOINT``) responds in time, with whatever status."""
    responded = threading.Event()

    def request() -> None:
        try:
            head = urllib.request.Request(hub.ENDPOINT, method="HEAD")
            urllib.request.urlopen(head, timeout=timeout).close()
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
