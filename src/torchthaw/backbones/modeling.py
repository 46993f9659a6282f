"""torchvision classifiers as transformers models."""

import contextlib
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any, TypeVar

import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention, ImageClassifierOutput

from .anatomy import FAMILIES, HEAD, closest, family_of
from .checkpointing import recomputed_blocks
from .configuration import TorchvisionConfig, names_by_id
from .label_loss import classification_loss
from .layer_groups import LayerGroup, layer_groups
from .network import align_memory, build_network, like, with_version

Model = TypeVar("Model", bound="TorchvisionPreTrainedModel")

_PREFIX = "backbone"


class TorchvisionPreTrainedModel(PreTrainedModel):
    """What the models have in common: they hold a torchvision network at `backbone` and know its layer groups.

    The state_dict is torchvision's own under the prefix `backbone.`.
    """

    config_class = TorchvisionConfig
    base_model_prefix = _PREFIX
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = sorted({block for family in FAMILIES for block in family.blocks})

    config: TorchvisionConfig

    def __init__(self, config: TorchvisionConfig) -> None:
        super().__init__(config)
        self.backbone = build_network(config)
        self.gradient_checkpointing = False
        self._checkpoint_function: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
        self._checkpoint_every = 1
        self._held_in_eval: tuple[str, ...] = ()
        # Whether the head is as it was drawn: not loaded, and trained by no stage that was kept.
        self.head_is_new = True
        self._drew_head = False

    @classmethod
    def from_torchvision(
        cls: type[Model],
        architecture: str,
        weights: "str | PathLike[str] | torchvision.models.WeightsEnum | None" = "DEFAULT",
        *,
        id2label: Sequence[str] | Mapping[int, str] | None = None,
        image_size: int | None = None,
        dropout: float | None = None,
        stochastic_depth: float | None = None,
        aux_logits: bool = False,
        problem_type: str | None = None,
    ) -> Model:
        """Builds a model from a torchvision architecture and pretrained weights.

        Args:
            architecture: torchvision's name of the network, such as `resnet50`.
            weights: A name of torchvision's weights enum of that architecture (`DEFAULT`, `IMAGENET1K_V2` ...) or a
                member of it; a `.pth`, `.pt` or `.safetensors` file with a state_dict of torchvision; a folder or Hub
                repository that torchthaw saved; `builtin`; or None for random weights.
            id2label: Class names in the order of the logits. Where the weights' head fits them (the same names, or in
                a file, which has no names, the same number) it is kept, else replaced by a fresh one. None keeps the
                pretrained head.
            image_size: Side of the input images in pixels. ViT's position embeddings are interpolated to it.
            dropout: See `TorchvisionConfig`.
            stochastic_depth: See `TorchvisionConfig`.
            aux_logits: Whether to build the auxiliary heads of GoogLeNet and Inception v3; their weights are left out
                otherwise.
            problem_type: `multi_label_classification` where an image may have several labels; None for one.

        Raises:
            ValueError: If an argument does not fit the architecture, or the weights cannot be had or do not fit.
        """
        options: dict[str, Any] = {
            "architecture": architecture,
            "dropout": dropout,
            "stochastic_depth": stochastic_depth,
            "aux_logits": aux_logits,
            "problem_type": problem_type,
        }
        if weights is None:
            return cls(TorchvisionConfig(**options, image_size=image_size, id2label=id2label)).eval()
        # Imported by name: a copy of this file beside a saved model has no such neighbour, and does not need it.
        loader = importlib.import_module("torchthaw.backbones.weights")
        TorchvisionConfig(**options, image_size=image_size, id2label=id2label)  # Fails before a download.
        pretrained = loader.resolve_weights(architecture, weights)
        pretrained = loader.resize_positions(pretrained, image_size)
        config = TorchvisionConfig(
            **options,
            image_size=pretrained.image_size,
            transform_input=pretrained.transform_input,
            pretrained_weights=pretrained.origin,
            id2label=pretrained.categories,
            num_labels=pretrained.num_labels,
        )
        with torch.device("meta"):
            model = cls(config)
        loader.load_into(model.backbone, pretrained)
        model.head_is_new = False
        if id2label is not None and not pretrained.head_fits(id2label):
            model.replace_head(id2label)
        elif id2label is not None:
            model.config.id2label = names_by_id(id2label)
        return model.eval()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Loads a saved model as transformers does, so that its outputs are those of the saved one to the last bit."""
        result = super().from_pretrained(*args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        align_memory(model)
        model.head_is_new = model._drew_head
        return result

    def layer_groups(self) -> dict[str, LayerGroup]:
        """Returns the layer groups by name, in forward order; the last one is `head`.

        Each parameter is in exactly one group, and so is each layer with parameters or statistics and each dropout.
        What was added to the model belongs to the group in whose modules it was put, and else to the head, since it is
        as untrained as that.
        """
        return layer_groups(self, self.config.architecture, _PREFIX)

    @property
    def held_in_eval(self) -> tuple[str, ...]:
        """Dotted names of the modules that stay in eval mode."""
        return self._held_in_eval

    def hold_in_eval(self, names: Iterable[str]) -> None:
        """Keeps modules in eval mode whatever `train()` says, until the next call of this method.

        Args:
            names: Dotted names from the model's root; modules inside them are held too. They replace the former ones.

        Raises:
            ValueError: If the model has no module of that name.
        """
        names = tuple(names)
        known = dict(self.named_modules())
        for name in names:
            if name not in known or not name:
                raise ValueError(f"The model has no module {name!r} to hold in eval mode.{closest(name, known)}")
        self._held_in_eval = names
        self.train(self.training)

    def train(self: Model, mode: bool = True) -> Model:
        """Sets train or eval mode; modules named in `hold_in_eval` stay in eval mode."""
        super().train(mode)
        for name in self._held_in_eval:
            self.get_submodule(name).eval()
        return self

    def replace_head(self, id2label: Sequence[str] | Mapping[int, str]) -> None:
        """Puts freshly initialised final layers in place, one output a class, and renames the classes.

        Auxiliary heads get a new final layer too. The layers are initialised as torch does by default.

        Args:
            id2label: Class names in the order of the logits.
        """
        config = self.config
        config.id2label = names_by_id(id2label)
        family = family_of(config.architecture)
        for path in (family.final_layer, *(family.auxiliary if config.aux_logits else ())):
            old = self.backbone.get_submodule(path)
            if not isinstance(old, nn.Identity):
                self.backbone.set_submodule(path, like(old, config.num_labels))
        self.head_is_new = True

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Loads a state_dict as torch does, also one of MNASNet that came from a safetensors file."""
        result = super().load_state_dict(with_version(state_dict, self.backbone, _PREFIX), *args, **kwargs)
        self.head_is_new = False
        return result

    def init_weights(self) -> None:
        """Leaves the weights alone: torchvision's builder has initialised them."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises what a checkpoint has not filled, as torch does by default."""
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        empty = [name for name, tensor in own if not getattr(tensor, "_is_hf_initialized", False)]
        if not empty:
            return
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is None:
            names = {id(part): name for name, part in self.named_modules()}
            lost = ", ".join(f"{names[id(module)]}.{name}" for name in empty)
            raise ValueError(
                f"The checkpoint has no {lost} of the shape that {self.config.architecture} needs. For another image "
                "size, use from_torchvision(architecture, weights=<folder>, image_size=...)."
            )
        reset()
        final_layer = f"{_PREFIX}.{family_of(self.config.architecture).final_layer}"
        self._drew_head |= dict(self.named_modules()).get(final_layer) is module

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "Gradient checkpointing with use_reentrant=True would update BatchNorm statistics twice per step. "
                "Write gradient_checkpointing_kwargs={'use_reentrant': False}, or leave it out."
            )
        self.gradient_checkpointing = enable
        self._checkpoint_function = partial(gradient_checkpointing_func, use_reentrant=False)
        self._checkpoint_every = every_n_layers

    def _run(self, pixel_values: torch.Tensor | None, recorded: Mapping[str, nn.Module]) -> tuple[Any, dict[str, Any]]:
        """Runs the network; returns its output and the outputs of the recorded modules."""
        self._check_input(pixel_values)
        outputs: dict[str, Any] = {}

        def record(name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[name] = output

        with contextlib.ExitStack() as stack:
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                stack.enter_context(
                    recomputed_blocks(
                        self.backbone, self.config.architecture, self._checkpoint_function, self._checkpoint_every
                    )
                )
            for name, module in recorded.items():
                stack.callback(module.register_forward_hook(partial(record, name)).remove)
            result = self.backbone(pixel_values)
        return result, outputs

    def _check_input(self, pixel_values: torch.Tensor | None) -> None:
        if pixel_values is None or pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must have the shape (batch, 3, height, width); its shape is {shape}.")
        if family_of(self.config.architecture).fixed_size:
            size = self.config.image_size or 224
            if tuple(pixel_values.shape[2:]) != (size, size):
                raise ValueError(
                    f"This {self.config.architecture} takes images of {size} x {size} pixels, and pixel_values has "
                    f"{pixel_values.shape[2]} x {pixel_values.shape[3]}. Resize them, or build the model with "
                    "from_torchvision(..., image_size=...)."
                )

    def _group_ends(self) -> dict[str, nn.Module]:
        """Returns the last module of each group before the head."""
        groups = self.layer_groups()
        return {name: list(group.modules.values())[-1] for name, group in groups.items() if name != HEAD}


class TorchvisionModel(TorchvisionPreTrainedModel):
    """A torchvision network without its final layer: images in, features out.

    Loads from the checkpoint of a classifier. Auxiliary heads are never built.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: TorchvisionConfig) -> None:
        super().__init__(config)
        family = family_of(config.architecture)
        self.backbone.set_submodule(family.final_layer, nn.Identity())
        self._remove_auxiliary_heads()
        self._keys_to_ignore_on_load_unexpected = [
            rf"^{_PREFIX}\.{path.replace('.', chr(92) + '.')}\."
            for path in (family.final_layer, *(path.rsplit(".", 1)[0] for path in family.auxiliary))
        ]
        self.post_init()

    def _remove_auxiliary_heads(self) -> None:
        for path in family_of(self.config.architecture).auxiliary:
            setattr(self.backbone, path.split(".")[0], None)
        if hasattr(self.backbone, "aux_logits"):
            setattr(self.backbone, "aux_logits", False)  # noqa: B010 - mypy takes it for a module

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple[Any, ...]:
        """Computes features.

        Args:
            pixel_values: Images, (batch, 3, height, width), preprocessed.
            output_hidden_states: Whether to return the output of each layer group.
            return_dict: Whether to return an output object (the default) or a tuple.

        Returns:
            `pooler_output`: the input of the final layer, (batch, features).
            `last_hidden_state`: the last feature map, (batch, channels, height, width), or ViT's tokens,
            (batch, tokens, features).
            `hidden_states`: one tensor per layer group before the head, as the next group gets it.
        """
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        feature_map = self.backbone.get_submodule(family_of(self.config.architecture).feature_map)
        ends = self._group_ends() if with_states else {}
        pooled, recorded = self._run(pixel_values, {"": feature_map, **ends})
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=recorded[""],
            pooler_output=pooled,
            hidden_states=tuple(recorded[name] for name in ends) if with_states else None,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


class TorchvisionForImageClassification(TorchvisionPreTrainedModel):
    """A torchvision classifier: the network that torchvision builds, with a loss."""

    # Makes `save_pretrained` copy this file, and those that it imports, beside the weights.
    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: TorchvisionConfig) -> None:
        super().__init__(config)
        self.loss_function = classification_loss
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        """Classifies images.

        Args:
            pixel_values: Images, (batch, 3, height, width), preprocessed.
            labels: Class ids, (batch,); or the distribution over the classes that mixup gives, (batch, num_labels);
                or with `problem_type="multi_label_classification"` a 0 or 1 for each class, (batch, num_labels).
            output_hidden_states: Whether to return the output of each layer group.
            return_dict: Whether to return an output object (the default) or a tuple.

        Returns:
            `loss`, a scalar, if there are labels: cross entropy, in train mode plus 0.3 (GoogLeNet) or 0.4
            (Inception v3) times that of each auxiliary head. `logits`, (batch, num_labels); in eval mode divided by
            the configuration's `temperature`, as they then are in the loss. `hidden_states`: one tensor per layer
            group before the head, as the next group gets it.
        """
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        ends = self._group_ends() if with_states else {}
        result, recorded = self._run(pixel_values, ends)
        logits, *auxiliary = result if isinstance(result, tuple) else (result,)
        if not self.training and self.config.temperature != 1:
            logits = logits / self.config.temperature
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config)
            weight = family_of(self.config.architecture).auxiliary_weight
            for extra in auxiliary:
                loss = loss + weight * self.loss_function(labels, extra, self.config)
        output = ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=tuple(recorded[name] for name in ends) if with_states else None,
        )
        return output if _wants_dict(self.config, return_dict) else output.to_tuple()


def _wants_dict(config: TorchvisionConfig, return_dict: bool | None) -> bool:
    return bool(config.return_dict if return_dict is None else return_dict)


__all__ = ["TorchvisionForImageClassification", "TorchvisionModel", "TorchvisionPreTrainedModel"]
