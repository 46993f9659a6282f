"""The code that goes with saved models."""

CODE_FILES = (
    "anatomy.py", "checkpointing.py", "configuration.py", "image_processing.py", "label_loss.py", "layer_groups.py",
    "modeling.py", "network.py",
)  # fmt: skip
