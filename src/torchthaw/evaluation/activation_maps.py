"""Where in an image the evidence for a class lies: gradient-weighted class activation maps.

The maps are those of Selvaraju et al. (2017), Grad-CAM: the last feature map, each channel weighted by the mean
gradient of the class's logit, summed over channels, without what is negative.
"""

from typing import Any

import numpy as np
import torch

from torchthaw.backbones.anatomy import family_of
from torchthaw.backbones.modeling import TorchvisionForImageClassification


def activation_layer(model: TorchvisionForImageClassification) -> str:
    """Returns the dotted name, from the model's root, of the module whose output the maps are made of.

    It is the last one with an extent in space: the feature map before pooling, with channels first, in ViT the
    normalised tokens that enter the last block. What leaves ViT's last block is no use, because the logits see
    nothing of it but the class token.
    """
    family = family_of(model.config.architecture)
    if family.by_child is not None:
        *_, last = model.backbone.get_submodule(family.by_child).named_children()
        return f"backbone.{family.by_child}.{last[0]}.ln_1"
    return f"backbone.{family.feature_map}"


def activation_maps(
    model: TorchvisionForImageClassification, pixel_values: torch.Tensor, classes: torch.Tensor
) -> np.ndarray:
    """Computes Grad-CAM of one class for each image.

    The model is used where it is, in eval mode, and left in the mode and with the gradients it came with.

    Args:
        model: Any of torchvision's classifiers, CNN or transformer.
        pixel_values: Preprocessed images, shape (images, 3, height, width).
        classes: For each image the id of the class that is asked for, shape (images,).

    Returns:
        Float32 array of shape (images, rows, columns), in the feature map's own resolution; 0 where nothing speaks
        for the class, otherwise positive, in units of the logit per cell up to the number of cells.
    """
    device = next(model.parameters()).device
    kept: list[torch.Tensor] = []

    def begin_graph(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # A leaf of its own: nothing before it needs a graph, and what follows may change its copy in place.
        kept.append(output.detach().requires_grad_())
        return kept[-1].clone()

    was_training = model.training
    model.eval()
    hook = model.get_submodule(activation_layer(model)).register_forward_hook(begin_graph)
    try:
        with torch.enable_grad():
            logits = model(pixel_values=pixel_values.to(device)).logits.float()
            chosen = logits.gather(1, classes.to(device)[:, None])
            [gradients] = torch.autograd.grad(chosen.sum(), kept)
    finally:
        hook.remove()
        model.train(was_training)
    features = kept[0].detach()
    if features.ndim == 3:
        features, gradients = (_as_grid(tokens, pixel_values.shape[-2:]) for tokens in (features, gradients))
    weights = gradients.mean(dim=(2, 3), keepdim=True)
    maps: np.ndarray = (weights * features).sum(dim=1).clamp_min(0).float().cpu().numpy()
    return maps


def _as_grid(tokens: torch.Tensor, image_size: tuple[int, int] | torch.Size) -> torch.Tensor:
    """Lays tokens, (images, 1 + rows * columns, channels), out as a feature map, without the class token."""
    height, width = image_size
    patches = tokens.shape[1] - 1
    rows = round((patches * height / width) ** 0.5)
    return tokens[:, 1:].transpose(1, 2).unflatten(2, (rows, patches // rows))
