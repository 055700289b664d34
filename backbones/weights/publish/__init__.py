"""Models on their way to the Hugging Face Hub: weights, config.json and a model card."""

from backbones.weights.publish.pushing import (
    FILES,
    PublishError,
    check_repo_id,
    push_to_hub,
    save_for_hf,
)

__all__ = ["FILES", "PublishError", "check_repo_id", "push_to_hub", "save_for_hf"]
