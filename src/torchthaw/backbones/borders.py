"""Cuts a network in two at the input of its first live module: a frozen part that is computed once, and the rest."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

from .anatomy import HEAD, family_of
from .conv_norm_pairs import without_hooks
from .modeling import TorchvisionForImageClassification

# What a probe of the cut may differ by, relative to the largest logit: sums of another order, no other network.
_TOLERANCE = 1e-4
_RATES = ("p", "drop_rate", "dropout", "attention_dropout")


@dataclass(frozen=True)
class Border:
    """The place where the frozen part of a model ends.

    Attributes:
        model: The model.
        path: Dotted name, from the backbone on, of the module whose input is computed by the frozen part.
        passed_over: Dotted names of the modules that need not run when that input is known.
        shape: Shape of one image's value at the border.
    """

    model: TorchvisionForImageClassification
    path: str
    passed_over: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def at_head(self) -> bool:
        """Whether nothing but the head is behind the border."""
        return f"backbone.{self.path}" in self.model.layer_groups()[HEAD].modules

    @torch.no_grad()
    def prefix(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Computes the frozen part: images (N, 3, height, width) to values at the border (N, *shape).

        Raises:
            RuntimeError: the model is resumed at the border just now.
        """
        if "_check_input" in vars(self.model):
            raise RuntimeError("the frozen part cannot run within resumed(); compute its values before")
        return _run_up_to(self.model.backbone, self.path, pixel_values)

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """While this lasts, the model takes values at the border as `pixel_values`, and computes only what follows.

        Modules of the frozen part hand on a blank in place of their result, so that what torchvision's `forward` does
        between them costs next to nothing. The model's structure, parameters and state_dict are untouched.
        """
        model, backbone = self.model, self.model.backbone
        dtype = next(model.parameters()).dtype
        given: list[torch.Tensor] = []

        def take(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            given.append(inputs[0])
            return (self._blank_image(inputs[0]),)

        def put(_module: nn.Module, _inputs: Any) -> tuple[torch.Tensor]:
            # Values may be kept in a smaller type than the live part computes in.
            return (given.pop().to(dtype),)

        # Straight into the modules' own dictionaries, since this is done for every batch.
        skipped = [vars(backbone.get_submodule(path)) for path in self.passed_over]
        own = [attributes.get("forward") for attributes in skipped]
        handles = [
            backbone.register_forward_pre_hook(take),
            backbone.get_submodule(self.path).register_forward_pre_hook(put, prepend=True),
        ]
        try:
            for path, attributes in zip(self.passed_over, skipped, strict=True):
                attributes["forward"] = self._blank_patches if self._makes_patches(path) else _hand_on
            vars(model)["_check_input"] = _accept
            yield
        finally:
            del vars(model)["_check_input"]
            for attributes, forward in zip(skipped, own, strict=True):
                del attributes["forward"]
                attributes.update({} if forward is None else {"forward": forward})
            for handle in handles:
                handle.remove()

    # ViT cuts the output of its first layer into tokens, and checks the size of the image.

    def _is_vit(self) -> bool:
        return family_of(self.model.config.architecture).name == "vit"

    def _makes_patches(self, path: str) -> bool:
        return self._is_vit() and path == "conv_proj"

    def _blank_image(self, value: torch.Tensor) -> torch.Tensor:
        size = int(self.model.backbone.image_size) if self._is_vit() else 1  # type: ignore[arg-type]
        blank = torch.zeros((), device=value.device)
        # A real tensor where it is small: it may be written to in place.
        return blank.expand(len(value), 3, size, size) if size > 1 else blank.repeat(len(value), 3, 1, 1)

    def _blank_patches(self, image: torch.Tensor) -> torch.Tensor:
        backbone = self.model.backbone
        side = int(backbone.image_size) // int(backbone.patch_size)  # type: ignore[arg-type]
        return torch.zeros((), device=image.device).expand(len(image), int(backbone.hidden_dim), side, side)  # type: ignore[arg-type]


def find_border(
    model: TorchvisionForImageClassification, live: Collection[str], pixel_values: torch.Tensor
) -> Border | None:
    """Finds where the frozen part of a model ends that is ready for a stage (`freeze_for_stage`), in training mode.

    The cut is tried on images: the two parts must give the logits of the whole. It is refused where what comes before
    the first live module is not a fixed function of the image, or where somebody watches it: trainable parameters or
    active dropout before it, auxiliary heads, recorded hidden states, hooks on frozen modules.

    Args:
        model: The model; left in training mode and otherwise as it was.
        live: Names of the layer groups that train.
        pixel_values: A few images, (N, 3, height, width), on the model's device.

    Returns:
        The border; None if the whole model must run.
    """
    groups = model.layer_groups()
    names = list(groups)
    first = min(names.index(name) for name in live)
    if model.config.aux_logits or model.config.output_hidden_states:
        return None
    prefix = "backbone."
    start = next((path for path, module in groups[names[first]].modules.items() if _has_state(module)), None)
    if start is None or not start.startswith(prefix):
        return None
    before = [path for name in names[:first] for path in groups[name].modules]
    for path in groups[names[first]].modules:
        if path == start:
            break
        before.append(path)
    if not all(path.startswith(prefix) for path in before) or any(_is_watched(model, path) for path in before):
        return None
    path = start.removeprefix(prefix)
    if not before:
        return None
    # Hooks on live layers have nothing to do with a probe.
    with without_hooks(model):
        if not _is_still_before(model, path, pixel_values):
            return None
        shape = tuple(_run_up_to(model.backbone, path, pixel_values).shape[1:])
        border = Border(model, path, tuple(name.removeprefix(prefix) for name in before), shape)
        return border if _gives_the_same(border, pixel_values) else None


class _ReachedError(Exception):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__("the border is reached")
        self.value = value


@torch.no_grad()
def _run_up_to(backbone: nn.Module, path: str, pixel_values: torch.Tensor) -> torch.Tensor:
    def stop(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        raise _ReachedError(inputs[0])

    handle = backbone.get_submodule(path).register_forward_pre_hook(stop, prepend=True)
    try:
        backbone(pixel_values)
    except _ReachedError as reached:
        return reached.value
    finally:
        handle.remove()
    raise ValueError(f"The network does not call its module {path!r}.")


def _hand_on(value: Any, *_rest: Any) -> Any:
    return value


def _accept(_pixel_values: Any) -> None:
    pass


def _has_state(module: nn.Module) -> bool:
    """Whether a module trains, keeps statistics or drops at random; pooling and flattening do not."""
    if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
        return True
    return any(isinstance(part, nn.modules.dropout._DropoutNd | StochasticDepth) for part in module.modules())


def _is_watched(model: nn.Module, path: str) -> bool:
    return any(part._forward_hooks or part._forward_pre_hooks for part in model.get_submodule(path).modules())


@torch.no_grad()
def _is_still_before(model: TorchvisionForImageClassification, path: str, pixel_values: torch.Tensor) -> bool:
    """Whether all that runs before a module gives the same result each time, and leaves no trace."""
    ran: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any) -> None:
        ran.append(module)

    end = model.backbone.get_submodule(path)
    handles = [part.register_forward_pre_hook(note) for part in model.backbone.modules() if part is not end]
    was_training = model.training
    # Statistics of a BatchNorm that turns out to be live must not see the probe.
    model.eval()
    try:
        _run_up_to(model.backbone, path, pixel_values)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    finished = [part for part in ran if not any(inner is end for inner in part.modules())]
    containers = [part for part in ran if any(inner is end for inner in part.modules())]
    own = [p for part in containers for p in part.parameters(recurse=False)]
    return not any(p.requires_grad for p in own) and all(_is_still(part) for part in finished)


def _is_still(module: nn.Module) -> bool:
    if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
        return False
    if not module.training:
        return True
    return not isinstance(module, _BatchNorm) and not any(_rate(module, name) for name in _RATES)


def _rate(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, 0)
    return isinstance(value, int | float) and value > 0


@torch.no_grad()
def _gives_the_same(border: Border, pixel_values: torch.Tensor) -> bool:
    model = border.model
    was_training = model.training
    model.eval()
    try:
        whole = model(pixel_values=pixel_values).logits
        values = border.prefix(pixel_values)
        with border.resumed():
            parts = model(pixel_values=values).logits
    finally:
        model.train(was_training)
    scale = whole.abs().max().clamp(min=1e-6)
    return whole.shape == parts.shape and bool(((whole - parts).abs().max() / scale) <= _TOLERANCE)
