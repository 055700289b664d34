"""Efficient vision backbones that run where you deploy.

``create_model("convnext_tiny")`` gives a model that computes what its authors' model computes, in
plain PyTorch. Importing this package registers every model with timm.
"""

from backbones.bench import BenchReport, benchmark
from backbones.engines import DeployReport, ExportReport, deploy, export
from backbones.errors import BackbonesError
from backbones.factory import create_model, list_families, list_models, load_model
from backbones.inference import embed, predict
from backbones.info import ModelInfo, model_info
from backbones.reparameterization import reparameterize
from backbones.timm_bridge import register_family, register_shipped_families
from backbones.weights import (
    LoadReport,
    load_checkpoint,
    push_to_hub,
    save_checkpoint,
    save_for_hf,
)

__version__ = "0.1.0"
__all__ = [
    "BackbonesError",
    "BenchReport",
    "DeployReport",
    "ExportReport",
    "LoadReport",
    "ModelInfo",
    "benchmark",
    "create_model",
    "deploy",
    "embed",
    "export",
    "list_families",
    "list_models",
    "load_checkpoint",
    "load_model",
    "model_info",
    "predict",
    "push_to_hub",
    "register_family",
    "reparameterize",
    "save_checkpoint",
    "save_for_hf",
]

register_shipped_families()
