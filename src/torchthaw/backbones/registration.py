"""Makes the Auto classes of transformers find torchthaw's."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from torchthaw.backbones.configuration import TorchvisionConfig
from torchthaw.backbones.image_processing import TorchvisionImageProcessor
from torchthaw.backbones.modeling import TorchvisionForImageClassification, TorchvisionModel


def register_auto_classes() -> None:
    """Registers configuration, models and image processor; more than once does no harm."""
    AutoConfig.register(TorchvisionConfig.model_type, TorchvisionConfig, exist_ok=True)
    AutoModel.register(TorchvisionConfig, TorchvisionModel, exist_ok=True)
    AutoModelForImageClassification.register(TorchvisionConfig, TorchvisionForImageClassification, exist_ok=True)
    processors: dict[str, type] = {"torchvision": TorchvisionImageProcessor, "pil": TorchvisionImageProcessor}
    AutoImageProcessor.register(TorchvisionConfig, image_processor_classes=processors, exist_ok=True)
