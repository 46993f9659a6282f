"""What training minimises in place of the model's own plain cross entropy; validation always measures the plain one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.errors import TrainingError


@dataclass(frozen=True)
class TrainingLoss:
    """A mean over images of cross entropy with class weights, focusing, adjusted logits and label smoothing.

    For an image with the label `y`, a distribution over the K classes (all on one of them, unless mixup or cutmix made
    it), and t = (1 - smoothing) y + smoothing / K:

        loss = sum over classes of w_c * t_c * (1 - p_c) ** gamma * -log p_c,  where p = softmax(logits + shift)
        weight = sum over classes of w_c * y_c

    The loss of a batch is the sum of losses over the sum of weights. For class ids that is
    `torch.nn.functional.cross_entropy(logits, y, weight=w, label_smoothing=smoothing)`. torch divides the loss of
    distributions by the number of images instead; here a distribution that is all on one class and the id of that class
    give the same loss, and mixing two images mixes their losses and their weights.

    With several labels per image, loss and weight are sums over the classes of the same for the two outcomes of each,
    by sigmoid instead of softmax, with K = 2 and without shift.

    Attributes:
        weights: w, shape (K,); None for all 1.
        gamma: Focusing of the focal loss, which makes less of images that are classified well already (Lin et al.,
            "Focal Loss for Dense Object Detection", ICCV 2017); 0 for none.
        shift: Added to the logits, shape (K,): tau times the logarithm of each class's share of the training images in
            the logit adjusted loss (Menon et al., "Long-tail Learning via Logit Adjustment", ICLR 2021, equation 10).
        smoothing: Share of each label spread over all classes; with several labels over the two outcomes of each.
        several_labels: Whether an image may have several labels.
    """

    weights: torch.Tensor | None = None
    gamma: float = 0.0
    shift: torch.Tensor | None = None
    smoothing: float = 0.0
    several_labels: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether this is the model's own loss."""
        return self.weights is None and self.gamma == 0 and self.shift is None and self.smoothing == 0

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, total_weight: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the loss of a batch, a scalar.

        Args:
            logits: (N, K).
            labels: (N,) class ids, or (N, K) floats.
            total_weight: What the sum of losses is divided by; None for the weight of this batch.

        Raises:
            TrainingError: labels and logits do not fit each other.
        """
        labels = self._distribution(labels.to(logits.device), logits)
        losses = self._binary_terms(logits, labels) if self.several_labels else self._terms(logits, labels)
        total = self._weight(labels) if total_weight is None else total_weight.to(logits.device)
        return (losses * self._class_weights(logits)).sum() / total

    def weight_of(self, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
        """Returns the sum of the weights of a batch's images, a scalar; labels as in `__call__`."""
        return self._weight(self._distribution(labels, torch.empty(len(labels), num_classes, device=labels.device)))

    def _weight(self, labels: torch.Tensor) -> torch.Tensor:
        if self.several_labels:
            return len(labels) * self._class_weights(labels).sum()
        return (labels * self._class_weights(labels)).sum()

    def _distribution(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        if labels.shape == logits.shape[:1] and not labels.is_floating_point() and not self.several_labels:
            labels = F.one_hot(labels.long(), logits.shape[1])
        if labels.shape != logits.shape:
            raise TrainingError(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit logits of shape "
                f"{tuple(logits.shape)}; pass class ids of shape (batch,), or floats of shape (batch, classes)"
            )
        return labels.float()

    def _class_weights(self, like: torch.Tensor) -> torch.Tensor:
        if self.weights is None:
            return torch.ones(like.shape[1], device=like.device)
        return self.weights.to(like.device)

    def _terms(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        targets = (1 - self.smoothing) * labels + self.smoothing / labels.shape[1]
        logits = logits.float()
        if self.shift is not None:
            logits = logits + self.shift.to(logits.device)
        log_p = F.log_softmax(logits, dim=1)
        return targets * -log_p * _focus(log_p, self.gamma)

    def _binary_terms(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = (1 - self.smoothing) * labels + self.smoothing / 2
        log_p, log_q = F.logsigmoid(logits.float()), F.logsigmoid(-logits.float())
        return labels * -log_p * _focus(log_p, self.gamma) + (1 - labels) * -log_q * _focus(log_q, self.gamma)


def _focus(log_p: torch.Tensor, gamma: float) -> torch.Tensor | float:
    """Returns (1 - p) ** gamma."""
    if gamma == 0:
        return 1.0
    # At p = 1 the power has no finite gradient if gamma is below 1.
    return (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).tiny) ** gamma


@contextmanager
def minimising(
    model: TorchvisionForImageClassification, loss: TrainingLoss, *, total_weight: torch.Tensor | None, scale: float
) -> Iterator[None]:
    """Lets `scale` times a loss stand in for the model's own in its forward passes, auxiliary heads included."""
    own = model.loss_function

    def replacement(labels: torch.Tensor, logits: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return scale * loss(logits, labels, total_weight)

    model.loss_function = replacement
    try:
        yield
    finally:
        model.loss_function = own
