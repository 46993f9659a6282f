"""Staged fine-tuning of torchvision's pretrained image classifiers with the Hugging Face Trainer.

Importing the package registers the `Auto` classes of transformers for `model_type: torchthaw` and does nothing else.
Names are resolved on first use, so that the command line answers `--help` without importing torch.
"""

import importlib
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchthaw._version import __version__

if TYPE_CHECKING:
    from torchthaw.backbones.configuration import TorchvisionConfig
    from torchthaw.backbones.image_processing import TorchvisionImageProcessor
    from torchthaw.backbones.modeling import TorchvisionForImageClassification, TorchvisionModel
    from torchthaw.data.audit.audit import audit_dataset
    from torchthaw.data.loading import load_image_dataset
    from torchthaw.data.splitting import fold_dataset, split_dataset
    from torchthaw.evaluation.evaluate_metric import ClassificationMetrics
    from torchthaw.stages.param_groups import param_groups
    from torchthaw.stages.plan import Stage, StagePlan
    from torchthaw.training.arguments import ThawTrainingArguments
    from torchthaw.training.trainer import ThawTrainer

__all__ = [
    "ClassificationMetrics",
    "Stage",
    "StagePlan",
    "ThawTrainer",
    "ThawTrainingArguments",
    "TorchvisionConfig",
    "TorchvisionForImageClassification",
    "TorchvisionImageProcessor",
    "TorchvisionModel",
    "__version__",
    "audit_dataset",
    "fold_dataset",
    "load_image_dataset",
    "param_groups",
    "split_dataset",
]

_MODULE_OF = {
    "ClassificationMetrics": "torchthaw.evaluation.evaluate_metric",
    "Stage": "torchthaw.stages.plan",
    "StagePlan": "torchthaw.stages.plan",
    "ThawTrainer": "torchthaw.training.trainer",
    "ThawTrainingArguments": "torchthaw.training.arguments",
    "TorchvisionConfig": "torchthaw.backbones.configuration",
    "TorchvisionForImageClassification": "torchthaw.backbones.modeling",
    "TorchvisionImageProcessor": "torchthaw.backbones.image_processing",
    "TorchvisionModel": "torchthaw.backbones.modeling",
    "audit_dataset": "torchthaw.data.audit.audit",
    "fold_dataset": "torchthaw.data.splitting",
    "load_image_dataset": "torchthaw.data.loading",
    "param_groups": "torchthaw.stages.param_groups",
    "split_dataset": "torchthaw.data.splitting",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'torchthaw' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _started_as_command() -> bool:
    arguments = sys.orig_argv[1:]
    as_module = any(pair == ("-m", "torchthaw") for pair in itertools.pairwise(arguments))
    return as_module or Path(sys.argv[0] if sys.argv else "").stem == "torchthaw"


# The command line registers when a command needs it: registration imports torch and transformers.
if not _started_as_command():
    from torchthaw.backbones.registration import register_auto_classes

    register_auto_classes()
