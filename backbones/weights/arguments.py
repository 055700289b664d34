"""The constructor arguments of a checkpoint's model, as far as the file tells them.

What it says is data from a stranger, like its tensors: a few bytes of metadata could ask for a
model of terabytes, or for one that takes forever to build.
"""

from typing import Any

from torch import nn

from backbones.errors import CheckpointError
from backbones.weights.mapping import map_file
from backbones.weights.target import Target
from backbones.weights.untrusted import Checkpoint

__all__ = ["saved_arguments", "sizes_in_file"]

# A re-parameterized file holds fewer numbers than the training form of its model: parallel branches
# and norms are gone. No family merges away more than a third.
_MOST_MERGED = 4
_SLACK = 1 << 20


def saved_arguments(checkpoint: Checkpoint, model_class: Any) -> dict[str, Any]:
    """Return the arguments that `save_checkpoint` wrote; empty for files of any other origin.

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


def sizes_in_file(checkpoint: Checkpoint, twin: nn.Module) -> dict[str, int]:
    """Return ``num_classes`` and ``in_chans`` of a file, as far as found; `twin` has any others."""
    target = Target(twin)
    options = {"ignore_classifier": True, "any_input_channels": target.first_convs}
    try:
        tensors = map_file(checkpoint, target, **options).tensors
    except CheckpointError:
        return {}  # what does not fit is named when it is loaded
    places = [("in_chans", name, 1) for name in target.first_convs[:1]]
    places += [("num_classes", f"{name}.weight", 0) for name in target.classifiers[:1]]
    return {size: tensors[name].shape[axis] for size, name, axis in places if name in tensors}
