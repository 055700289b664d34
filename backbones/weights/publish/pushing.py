"""Publishing models: a folder that timm and this package load, and its way to the Hub."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from torch import nn

from backbones.errors import BackbonesError, CheckpointError, ConfigError, first_line
from backbones.files import new_folder, write_json, write_text
from backbones.weights.download import is_connection_error
from backbones.weights.publish.config_json import check_rebuilt, hub_config
from backbones.weights.publish.model_card import UNSTATED, model_card
from backbones.weights.saving import save_checkpoint
from backbones.weights.target import inner_module

__all__ = ["FILES", "PublishError", "check_repo_id", "push_to_hub", "save_for_hf"]

FILES = ("model.safetensors", "config.json", "README.md")
"""What `save_for_hf` writes."""


class PublishError(BackbonesError, RuntimeError):
    """The Hub did not take a model; the message says why and the way out."""


def save_for_hf(
    model: nn.Module,
    folder: str | PathLike[str],
    *,
    license: str | None = None,
    classes: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    repo_id: str | None = None,
) -> Path:
    """Write and return a folder for ``timm.create_model("local-dir:<folder>", pretrained=True)``.

    ``backbones.create_model`` takes it too, and both take ``"hf-hub:<owner>/<name>"`` once it is on
    the Hub (`push_to_hub`). It holds the weights (`save_checkpoint`), timm's ``config.json`` and a
    model card. timm's own class takes the weights where timm has the variant under the same name;
    otherwise `backbones` must have been imported. Models in deploy form need ``deploy=True``.

    The model that timm makes of the description must take the weights. A new folder appears whole
    or not at all; in one that exists the three files are replaced, each at once.

    Args:
        model: a whole model of this package, of any type, memory layout and form, on any device.
        folder: where to write; its parent must exist.
        license: license of the weights; by default that of the pretrained weights the model was
            created with, else ``unstated``.
        classes: names of the classes, in the classifier's order.
        provenance: where the weights come from, as JSON values.
        repo_id: ``owner/name`` on the Hub, for the example in the card.

    Raises:
        UnsupportedError: the model is none of this package, or cannot be rebuilt from its variant
            and arguments (pruned, changed by hand).
        CheckpointError: the folder cannot be written.
    """
    folder = Path(folder)
    body = inner_module(model)
    license = license or (getattr(body, "pretrained_cfg", None) or {}).get("license") or UNSTATED
    config = hub_config(model, license=license, classes=classes)
    card = model_card(model, config, repo_id=repo_id, license=license, provenance=provenance)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is a file; name a folder")
    if not folder.parent.is_dir():
        raise CheckpointError(f"{folder}: the folder {folder.parent} does not exist; make it first")
    try:
        with new_folder(folder) as place:
            save_checkpoint(
                model, place / FILES[0], license=license, provenance=provenance, classes=classes
            )
            write_json(place / FILES[1], config)
            write_text(place / FILES[2], card)
            check_rebuilt(model, place)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be written ({error}); check free space and rights of the folder"
        ) from error
    return folder


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    license: str | None = None,
    classes: Sequence[str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    replace_card: bool = False,
    message: str = "Add model",
    token: str | None = None,
) -> str:
    """Upload what `save_for_hf` writes to a repository of the Hub; return the commit's address.

    The repository is made where needed. A model card that is there is kept: people edit it.

    Args:
        model, license, classes, provenance: as in `save_for_hf`.
        repo_id: ``owner/name``.
        private: whether a new repository is private; None for the owner's default.
        revision: branch, made where needed; None for the main branch.
        replace_card: replace the card too.
        message: message of the commit.
        token: with the right to write; None for `HF_TOKEN` or the token of ``hf auth login``.

    Raises:
        ConfigError: `repo_id` is not of the form ``owner/name``.
        PublishError: the Hub refuses, or cannot be reached.
        UnsupportedError, CheckpointError: as `save_for_hf`; nothing was sent.
    """
    check_repo_id(repo_id)
    api = HfApi(token=token, library_name="backbones")
    with TemporaryDirectory() as temporary:
        folder = save_for_hf(
            model,
            Path(temporary) / "model",
            license=license,
            classes=classes,
            provenance=provenance,
            repo_id=repo_id,
        )
        with _translated(repo_id):
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            keeps = not replace_card and api.file_exists(repo_id, FILES[2], revision=revision)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                ignore_patterns=[FILES[2]] if keeps else None,
            )
            return str(commit.commit_url)


def check_repo_id(repo_id: str) -> None:
    """Check the form of a repository's name.

    Raises:
        ConfigError: it is not ``owner/name``.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no repository: {first_line(error)}") from error
    if repo_id.count("/") != 1:
        raise ConfigError(f"{repo_id!r} is no repository; name it as owner/name")


@contextmanager
def _translated(repo_id: str) -> Iterator[None]:
    """Translate the client's errors."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise PublishError(f"{repo_id}: HF_HUB_OFFLINE forbids to send; unset it") from error
    except HfHubHTTPError as error:
        status = int(error.response.status_code) if error.response is not None else 0
        said = error.server_message or first_line(error)
        raise PublishError(_refusal(repo_id, status, said)) from error
    except ValueError as error:  # the client's words for an answer it does not like
        said = " ".join(str(error).split())
        raise PublishError(f"{constants.ENDPOINT} refuses {repo_id}: {said}") from error
    except Exception as error:
        if not is_connection_error(error):
            raise
        raise PublishError(
            f"{repo_id}: {constants.ENDPOINT} cannot be reached: {first_line(error)}; check the"
            " connection (HF_ENDPOINT names another Hub) and push again"
        ) from error


def _refusal(repo_id: str, status: int, message: str) -> str:
    owner = repo_id.partition("/")[0]
    hint = {
        400: "the Hub does not accept the files as they are",
        401: "set HF_TOKEN to a token with the right to write, made at"
        f" {constants.ENDPOINT}/settings/tokens",
        403: f"the token (HF_TOKEN) may not write to {owner}; take one that may, or another owner",
        404: f"there is no user or organization {owner}, or no such repository or branch",
        409: "the repository is being changed by somebody else; push again",
        429: "the Hub asks to wait; push again later",
    }.get(status, "push again later" if status >= 500 else "nothing more is known")
    said = " ".join(message.split())
    return f"{constants.ENDPOINT} refuses {repo_id} (status {status}): {hint}. It says: {said}"
