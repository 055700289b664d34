"""Training the classifier alone."""

from torch import nn

from backbones.train.initial_weights import classifier_layers

__all__ = ["freeze_backbone"]


def freeze_backbone(model: nn.Module) -> list[nn.Module]:
    """Stop gradients but in the classifier, and return the modules to keep in eval mode."""
    classifier = classifier_layers(model)
    model.requires_grad_(False)
    classifier.requires_grad_(True)
    trained = set(classifier.modules())
    return [m for m in model.modules() if m not in trained and not list(m.children())]
