"""One stage of a run, run for itself on a copy of the model, so that the trainer stays what it is, bit for bit."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from accelerate.state import GradientState
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from torchthaw.backbones.modeling import TorchvisionForImageClassification
from torchthaw.errors import TrainingError
from torchthaw.training.arguments import ThawTrainingArguments
from torchthaw.training.callbacks import StagedCallbackHandler, StageEndCallback
from torchthaw.training.progress import Progress
from torchthaw.training.random_states import random_states_kept
from torchthaw.training.records import StageRecord
from torchthaw.training.staged_loop import StagedTrainer


class StageCopyTrainer(StagedTrainer):
    """Runs one stage of a plan by the loop of training, without validation, checkpoints, reports and the gate.

    Instances come from `copy_for_stage`.

    Attributes:
        failure: Why the stage broke down; None if it did not.
    """

    failure: str | None = None
    _index: int
    _most_steps: int

    def _start_run(self, *args: Any, **kwargs: Any) -> None:
        super()._start_run(*args, **kwargs)
        self._progress.stage_index = self._index

    def _note_start(self) -> None:
        """Keeps the starting point of the trainer's own run, since a later stage's copy begins elsewhere."""

    def _plan_lengths(self) -> tuple[list[int], list[int]]:
        steps, epochs = super()._plan_lengths()
        steps[self._index] = self._length(steps[self._index])
        return steps, epochs

    def _length(self, planned: int) -> int:
        """Returns the length of the stage in optimizer steps, given that by the plan."""
        return min(planned, self._most_steps)

    def _leave_stage(self, failure: str | None, ignore_keys: list[str] | None = None) -> StageRecord | None:
        self.failure = failure
        return super()._leave_stage(failure, ignore_keys)

    def _average_kind(self) -> str:
        return "none"

    def _move_on(self, record: StageRecord) -> bool:
        return False

    def run(self) -> None:
        """Trains `model`; after a loss that is not finite, `failure` is set and the weights are those before.

        Raises:
            TrainingError: something frozen moved, or parameters got no gradient.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.args.output_dir = folder
            try:
                self.train()
            except TrainingError:
                if self.failure is None:
                    raise


Copy = TypeVar("Copy", bound=StageCopyTrainer)


class _StepCallback(TrainerCallback):
    def __init__(self, on_step: Callable[[int], None]) -> None:
        self._on_step = on_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._on_step(state.global_step)


def copy_for_stage(
    kind: type[Copy],
    trainer: StagedTrainer,
    model: TorchvisionForImageClassification,
    *,
    index: int,
    steps: int,
    on_step: Callable[[int], None],
) -> Copy:
    """Returns a trainer that shares the data and all settings with another one, and nothing that training changes.

    What the class of `trainer` overrides (a loss, a loader) is overridden in the copy too. Its callbacks are left out.

    Args:
        kind: How the stage is run.
        trainer: Stays as it is.
        model: Will be trained; a deep copy of the trainer's.
        index: Number of the stage in the plan.
        steps: Length of the stage in optimizer steps, at most.
        on_step: Called with the number of steps done.
    """
    twin = cast(Any, object.__new__(type(kind.__name__, (kind, type(trainer)), {})))
    vars(twin).update(vars(trainer))
    twin.args = _arguments_without_outputs(trainer.args)
    # `train` would make a new model with it.
    twin.model_init = None
    twin.model = twin.model_wrapped = model
    twin.optimizer = twin.lr_scheduler = None
    twin._index, twin._most_steps = index, steps
    twin._start = trainer._take_start()
    twin._progress, twin._validated = Progress(run_id=""), {}
    twin._rows, twin._pictures, twin._store = {}, {}, None
    twin._form = twin._part = twin._validated_part = twin._live_dtype = None
    twin._memory_tracker = copy.copy(trainer._memory_tracker)
    twin.state, twin.control = TrainerState(), TrainerControl()
    callbacks = [
        DefaultFlowCallback(),
        StageEndCallback(twin._last_step_of_stage, twin._on_epoch_end),
        _StepCallback(on_step),
    ]
    twin.callback_handler = StagedCallbackHandler(callbacks, model, trainer.processing_class, None, None)
    # It keeps what it has prepared, and the scale of losses in fp16.
    twin.create_accelerator_and_postprocess()
    return twin


@contextmanager
def surroundings_kept() -> Iterator[None]:
    """Puts back what a run changes outside of its trainer: the state of all random generators, and accelerate's."""
    gradients = copy.copy(GradientState._shared_state)
    references = list(gradients.get("dataloader_references", []))
    try:
        with random_states_kept():
            yield
    finally:
        GradientState._shared_state.clear()
        GradientState._shared_state.update(gradients)
        if references:
            GradientState._shared_state["dataloader_references"] = references


def _arguments_without_outputs(args: ThawTrainingArguments) -> ThawTrainingArguments:
    twin = copy.copy(args)
    twin.eval_strategy = twin.logging_strategy = IntervalStrategy.NO
    twin.save_strategy = SaveStrategy.NO
    twin.eval_on_start = twin.load_best_model_at_end = twin.push_to_hub = False
    twin.gate = "off"
    twin.disable_tqdm = True
    return twin
