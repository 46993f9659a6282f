"""What the two parts of a stage's network are computed in: the frozen one, and the one that trains."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from torchthaw.backbones.borders import Border
from torchthaw.backbones.precision import Work, frozen_dtype, live_dtype
from torchthaw.data.caches.location import default_cache_folder
from torchthaw.data.views import ImageView
from torchthaw.stages.plan import Stage
from torchthaw.stages.snapshots import put_back, take_snapshot
from torchthaw.training import processes
from torchthaw.training.frozen_part import digest_of_weights
from torchthaw.training.starting_points import AnchoredTrainer

# Below as many pixels through a part of the network in a stage, choosing a precision costs more than it can gain.
_WORTH_MEASURING = 4_000_000
# Likewise in images, for what trains: the choice takes steps of some 70 images.
_WORTH_STEPS = 256
# Images of 224 px, and as many smaller ones as have their pixels: of few small ones the time is not that of kernels.
_PROBED = 8
DEFAULT_SIDE = 224


class PrecisionTrainer(AnchoredTrainer):
    """Runs the forward passes of training in the precision that was chosen; validation as the saved model computes."""

    _live_dtype: torch.dtype | None = None

    def compute_loss_context_manager(self) -> contextlib.ExitStack:
        stack = super().compute_loss_context_manager()
        if self._live_dtype is not None and self.model.training:
            stack.enter_context(torch.autocast(self.args.device.type, self._live_dtype))
        return stack

    def _probe(self, number: int) -> torch.Tensor:
        """Returns images like those of the stage, or noise of their size where they cannot be had without a loss."""
        data: Any = self.train_dataset
        if isinstance(data, ImageView):
            images = [data[row % len(data)]["pixel_values"] for row in range(number)]
            return torch.stack(images).to(self.args.device)
        size = self.model.config.image_size or DEFAULT_SIDE
        noise = torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(0))
        return noise.to(self.args.device)

    def _choose_frozen_dtype(self, border: Border, stage: Stage) -> torch.dtype:
        given = self._given_dtype(self.args.frozen_precision)
        if given is not None:
            return given
        # On resume, as it was chosen before.
        chosen = self._progress.frozen_part.get("dtype")
        if chosen is None:
            chosen = processes.on_main(lambda: name_of(self._measured_frozen_dtype(border, stage)))
        return cast(torch.dtype, getattr(torch, chosen))

    def _measured_frozen_dtype(self, border: Border, stage: Stage) -> torch.dtype:
        if not self._is_worth_it(stage, recurring=True):
            return torch.float32
        weights = digest_of_weights(self._progress.fingerprints)
        key = {**self._probe_key(), "border": border.path, "weights": weights}
        return frozen_dtype(
            border.prefix, self._images_to_probe, self.args.device, key=key, folder=default_cache_folder()
        ).dtype

    def _choose_live_dtype(self, border: Border | None, stage: Stage, folded: int) -> None:
        """Settles what the part that trains is computed in, its weights as they are."""
        own = next(self.model.parameters()).dtype
        given = self._given_dtype(self.args.live_precision)
        if border is not None and border.at_head and not (self.args.bf16 or self.args.fp16):
            # The head alone costs next to nothing.
            given = own
        # On resume, as it was chosen before.
        chosen = self._progress.live_dtype if given is None else name_of(given)
        if chosen is None:
            chosen = processes.on_main(lambda: name_of(self._measured_live_dtype(border, stage, folded)))
        self._progress.live_dtype = chosen
        dtype = cast(torch.dtype, getattr(torch, chosen))
        # accelerate sees to its own mixed precision.
        self._live_dtype = None if dtype == own or self.args.bf16 or self.args.fp16 else dtype

    def _measured_live_dtype(self, border: Border | None, stage: Stage, folded: int) -> torch.dtype:
        if not self._is_worth_it(stage, least_images=_WORTH_STEPS) or _synchronizes(self.model):
            return torch.float32
        key = {
            **self._probe_key(),
            "live": ", ".join(self._frozen.live),
            "from": "" if border is None else border.path,
            "folded": str(folded),
            **({} if stage.adapters is None else {"lora": str(stage.adapters)}),
        }
        return live_dtype(
            lambda: training_steps(self.model, border, self._images_to_probe()),
            self.args.device,
            key=key,
            folder=default_cache_folder(),
        ).dtype

    def _given_dtype(self, asked: str) -> torch.dtype | None:
        """Returns the type that the arguments or the model leave no choice about; None if it is to be measured."""
        own = next(self.model.parameters()).dtype
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        if asked != "auto" or own != torch.float32:
            return torch.bfloat16 if asked == "bfloat16" else own
        return None

    def _is_worth_it(self, stage: Stage, *, least_images: int = 0, recurring: bool = False) -> bool:
        data: Any = self.train_dataset
        if not isinstance(data, ImageView):
            return False
        passes = 1 if recurring and fixed_views(data) is not None else stage.epochs or 1
        images = len(data) * passes
        return images >= least_images and images * side_of(data) ** 2 >= _WORTH_MEASURING

    def _images_to_probe(self) -> torch.Tensor:
        number = round(_PROBED * (DEFAULT_SIDE / side_of(cast(Any, self.train_dataset))) ** 2)
        return self._probe(min(max(_PROBED, number), self.args.per_device_train_batch_size))

    def _probe_key(self) -> dict[str, str]:
        return {"architecture": self.model.config.architecture, "side": str(side_of(cast(Any, self.train_dataset)))}


def training_steps(model: Any, border: Border | None, images: torch.Tensor) -> tuple[Work, Work]:
    """Returns a training step to time, and one in eval mode, without anything random, to compare gradients of.

    Both return the gradient of all that trains, (parameters,), and leave weights, statistics, gradients, modes and
    random state as they were.

    Args:
        model: The model, frozen for its stage, in training mode.
        border: Where its frozen part ends, if it has one: only what follows is run.
        images: (N, 3, height, width), on the model's device.
    """
    values = images if border is None else border.prefix(images)
    labels = torch.arange(len(images), device=images.device) % model.config.num_labels
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def work(context: AbstractContextManager[object], *, training: bool) -> torch.Tensor:
        buffers = take_snapshot(model, [name for name, _ in model.named_buffers()])
        with torch.random.fork_rng(devices=[images.device] if images.device.type == "cuda" else []):
            model.train(training)
            try:
                with contextlib.nullcontext() if border is None else border.resumed(), context:
                    logits = model(pixel_values=values).logits
                loss = F.cross_entropy(logits.float(), labels)
                found = torch.autograd.grad(loss, trainable, allow_unused=True)
            finally:
                model.train()
                put_back(model, buffers)
        return torch.cat([gradient.flatten().float() for gradient in found if gradient is not None])

    return (lambda context: work(context, training=True)), (lambda context: work(context, training=False))


def name_of(dtype: torch.dtype) -> str:
    """Returns a type's name as it stands in recipes and results."""
    return str(dtype).removeprefix("torch.")


def fixed_views(view: ImageView) -> int | None:
    """Returns how many views of each image a stage goes through; None if each epoch has its own."""
    return 1 if view.augmentation is None else view.views


def side_of(view: ImageView) -> int:
    """Returns the side of a view's images in pixels."""
    return int(view.processor.crop_size["height"])


def _synchronizes(model: nn.Module) -> bool:
    """Whether a training step waits for the other processes, of which none takes part in a probe."""
    return any(isinstance(module, nn.SyncBatchNorm) and module.training for module in model.modules())
