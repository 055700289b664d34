"""The constructor arguments that a checkpoint says its model was created with.

They are data from a stranger, like its tensors: a few bytes of metadata could ask for a model of
terabytes, or for one that takes forever to build.
"""

from __future__ import annotations

from typing import Any

from backbones.errors import CheckpointError
from backbones.weights.untrusted import Checkpoint

__all__ = ["saved_arguments"]

# A re-parameterized file holds fewer numbers than the training form of its model: parallel branches
# and norms are gone. No family merges away more than a third.
_MOST_MERGED = 4
_SLACK = 1 << 20


def saved_arguments(checkpoint: Checkpoint, model_class: Any) -> dict[str, Any]:
    """Return the arguments that `save_checkpoint` wrote; empty for files of any other origin.

    Args:
        checkpoint: the file as read.
        model_class: the `StagedBackbone` that takes the arguments.

    Raises:
        CheckpointError: they make no model, or one much larger than the file.
    """
    arguments = checkpoint.description.get("arguments")
    if not arguments:
        return {}

    def refusal(what: str) -> CheckpointError:
        return CheckpointError(
            f"{checkpoint.source}: describes {what}; the file is damaged or forged, do not use it"
        )

    depths = arguments.get("depths")
    counts = depths if isinstance(depths, list) else [depths]
    blocks = sum(count for count in counts if isinstance(count, int))
    if blocks > len(checkpoint.tensors):
        raise refusal(f"a model of {blocks} blocks and holds {len(checkpoint.tensors)} tensors")
    placed = {key: value for key, value in arguments.items() if key not in ("device", "dtype")}
    try:
        model = model_class(**placed, device="meta")
    except Exception as error:  # a family's constructor on a stranger's values
        raise refusal(f"no {model_class.__name__} ({error})") from error
    needed = sum(tensor.numel() for tensor in model.state_dict().values())
    stored = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    if needed > _MOST_MERGED * stored + _SLACK:
        raise refusal(f"a model of {needed} numbers and holds {stored}")
    return dict(arguments)
