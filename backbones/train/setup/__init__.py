"""What a run is put together from, before its first step."""

from backbones.train.setup.assembling import (
    assemble,
    check_options_together,
    create_optimizer,
    distribute,
)
from backbones.train.setup.layouts import with_memory_layout
from backbones.train.setup.rounding import deploy_form, weights_of_twin
from backbones.train.setup.tasks import AuxiliaryHeadTask, create_task

__all__ = [
    "AuxiliaryHeadTask",
    "assemble",
    "check_options_together",
    "create_optimizer",
    "create_task",
    "deploy_form",
    "distribute",
    "weights_of_twin",
    "with_memory_layout",
]
