"""Head stages that are solved as what they are, a logistic regression, and stages that go by what it found.

The methods of `Trainer` that are overridden here were read in transformers 5.24.
"""

import copy
import functools
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from torchthaw.backbones.anatomy import uses_transformer_recipe
from torchthaw.backbones.norm_shift import statistics_shift
from torchthaw.data.caches.digests import image_digests
from torchthaw.data.class_balance import class_counts, label_bits
from torchthaw.data.probe_folds import joined_units, probe_folds
from torchthaw.data.views import ImageView, collate
from torchthaw.stages import auto
from torchthaw.stages.linear_probe import ProbeFit, fit_linear_probe
from torchthaw.stages.param_groups import param_groups
from torchthaw.stages.plan import Stage, StagePlan
from torchthaw.training import processes
from torchthaw.training.datasets import as_view, labels_of, length_of
from torchthaw.training.probe_options import final_layer, settle_solvers
from torchthaw.training.records import StageRecord
from torchthaw.training.wise_ft import MixingTrainer

# Twice as many give the same to about 5 %.
_IMAGES_FOR_SHIFT = 64


class ProbingTrainer(MixingTrainer):
    """Fits the head of stages whose `solver` is `probe` in their only step; chooses for stages with `by_probe`."""

    @property
    def plan(self) -> StagePlan:
        return settle_solvers(super().plan, self.model, self.args, self._train_data, obstacle=self._obstacle())

    def _obstacle(self) -> str | None:
        """Returns what speaks against every linear probe of the run."""
        if self.compute_loss_func is not None:
            return "compute_loss_func was passed, whose minimum is not known"
        if self.data_collator is not collate:
            return "data_collator was passed, which may change images from epoch to epoch"
        return None

    def _is_probe(self) -> bool:
        return self.stage is not None and self.stage.solver == "probe"

    # What a stage with `by_probe` does

    def _stages(self) -> tuple[Stage, ...]:
        """Returns the stages of the plan, and the one that the probe adds at its end."""
        stages = self.plan.stages
        choice = self._choice_for(len(stages) - 1)
        return (*stages, auto.added(stages[-1])) if choice is not None and choice.tries_anew else stages

    def _chosen(self, stage: Stage) -> Stage:
        """Returns a stage with what the linear probe before it speaks for."""
        if self._progress.shift is None and self._wants_shift():
            self._progress.shift = processes.on_main(self._measured_shift)
            self._plan_added()
        choice = self._choice()
        if choice is None:
            return stage
        rate = cast(float, self.args.learning_rate)
        return auto.chosen(stage, choice, head_rate=rate, transformer=self._is_transformer())

    def _choice(self) -> auto.Choice | None:
        """Returns what is chosen for the stage that runs."""
        if self._is_added():
            return auto.anew(self._findings(len(self.plan.stages) - 1))
        return self._choice_for(self._progress.stage_index)

    def _choice_for(self, index: int) -> auto.Choice | None:
        """Returns what is chosen for a stage of the plan."""
        if not self.plan.stages[index].by_probe:
            return None
        return auto.choose(self._findings(index), transformer=self._is_transformer())

    def _findings(self, index: int) -> auto.Findings:
        # Where the run has validation choose the share of each mixture, the rule for few images gives none.
        images = None if self.args.wise_ft else length_of(self._train_data)
        shift = self._progress.shift if self._may_relearn(index) else None
        return auto.Findings(self._progress.probe_macro_f1, shift, images, self._extent(index).is_enough)

    def _wants_shift(self) -> bool:
        macro_f1 = self._progress.probe_macro_f1
        if macro_f1 is None or macro_f1 < auto.FAR_PROBE or self._is_added():
            return False
        return self._may_relearn(self._progress.stage_index)

    def _may_relearn(self, index: int) -> bool:
        return auto.may_relearn(
            self.plan.stages[index],
            self._extent(index),
            # A further stage comes after the plan's last one alone.
            validates=self.args.gate != "off" and index == len(self.plan.stages) - 1,
            transformer=self._is_transformer(),
        )

    def _extent(self, index: int) -> auto.Extent:
        batch_size = self.plan.stages[index].batch_size or self.args.per_device_train_batch_size
        return auto.Extent(length_of(self._train_data), batch_size, self._planned_steps[index], self._label_bits)

    @functools.cached_property
    def _label_bits(self) -> float | None:
        several = self.model.config.several_labels
        labels = None if several else labels_of(self._train_data, read=False)
        return None if labels is None else label_bits(class_counts(labels, self.model.config.num_labels))

    def _measured_shift(self) -> float | None:
        images = cast(ImageView, self._train_data).dataset
        view = self._with_pictures(as_view(images, self.model, self.processing_class, self.args, train=False))
        rows = np.random.default_rng(self.args.data_seed).permutation(len(images))[:_IMAGES_FOR_SHIFT]
        batches = self._in_order(Subset(view, np.sort(rows).tolist()))
        return statistics_shift(self.model, (batch["pixel_values"].to(self.model.device) for batch in batches))

    def _in_order(self, data: Any) -> DataLoader:
        """Returns batches of all samples, which draw no random numbers of the run."""
        return DataLoader(
            data,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.workers_for(data),
            collate_fn=self.data_collator,
            generator=torch.Generator(),
        )

    def _is_transformer(self) -> bool:
        return uses_transformer_recipe(self.model.config.architecture)

    def _name_stage(self) -> None:
        super()._name_stage()
        choice = self._choice()
        # Not a field of TrainerState, whose saved form other code reads back strictly.
        vars(self.state).update(stage_choice=None if choice is None else choice.reason)

    def _note_probe(self, record: StageRecord) -> None:
        """Writes into a stage's record what its probe found, or what an earlier one chose."""
        choice = self._choice()
        record.probe = self._progress.probe
        record.chosen = None if choice is None else choice.reason

    # The probe

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._is_probe():
            return super().training_step(model, inputs, *args, **kwargs)
        if self._progress.probe is None:
            self._fit_head()
        loss = super().training_step(model, inputs, *args, **kwargs)
        # That of all training images, in the place of one batch's.
        probe = cast(dict[str, Any], self._progress.probe)
        return torch.full_like(loss, probe["loss"] / self.current_gradient_accumulation_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Makes the stage's optimizer; that of a linear probe leaves the fitted head as it is."""
        if self.optimizer is None and self._is_probe():
            groups = param_groups(self.model, self.model.layer_groups(), cast(Stage, self.stage))
            self.optimizer = torch.optim.SGD([{**group, "lr": 0.0} for group in groups], lr=0.0)
        return super().create_optimizer(model)

    def _draw_head(self) -> None:
        """Gives the model a new head, which depends on the seed and the stage alone."""
        layer = final_layer(self.model)
        new = cast(nn.Linear | nn.Conv2d, copy.deepcopy(layer).to("cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.args.seed + self._progress.stage_index)
            new.reset_parameters()
        layer.load_state_dict(new.state_dict())

    def _average_kind(self) -> str:
        return "none" if self._is_probe() else super()._average_kind()

    def _fit_head(self) -> None:
        fit = processes.on_main(self._fitted)
        layer = final_layer(self.model)
        with torch.no_grad():
            for own, found in ((layer.weight, fit.weight), (layer.bias, fit.bias)):
                cast(torch.Tensor, own).copy_(found)
        self._progress.probe = {
            "penalty": fit.penalty,
            "loss": fit.loss,
            "macro_f1": fit.macro_f1,
            "accuracy": fit.accuracy,
            "held_out_images": fit.images_held_out,
        }
        self._progress.probe_macro_f1 = fit.macro_f1

    def _fitted(self) -> ProbeFit:
        rows = cast(ImageView, self._train_data).dataset
        groups = [rows["group"][:]] if "group" in rows.column_names else []
        units = joined_units(image_digests(rows), *groups)
        features, labels = self._head_inputs()
        weights, shift = self._probe_weighting()
        return fit_linear_probe(
            features,
            labels,
            self.model.config.num_labels,
            folds=probe_folds(labels.numpy(), units=units, seed=cast(int, self.args.data_seed)),
            class_weights=weights,
            shift=shift,
        )

    def _probe_weighting(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the weight of each class in the loss, and what is added to its logits; None for neither."""
        return None, None

    @torch.no_grad()
    def _head_inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the final layer gets for each training image, (N, d), and the labels, (N,)."""
        seen: list[torch.Tensor] = []
        labels: list[torch.Tensor] = []
        hook = final_layer(self.model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float().cpu()))
        self.model.eval()
        try:
            for batch in self._in_order(self.train_dataset):
                self._forward(batch)
                labels.append(batch["labels"])
        finally:
            hook.remove()
            self.model.train()
        return torch.cat(seen), torch.cat(labels)
