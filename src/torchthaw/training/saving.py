"""Checkpoints of a staged run: what each holds besides `Trainer`'s, and which are kept."""

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from torchthaw.stages.low_rank import adapter_parameters
from torchthaw.stages.snapshots import take_snapshot
from torchthaw.training import processes
from torchthaw.training.checkpoints import prune, seal, step_of
from torchthaw.training.identity import identity_of
from torchthaw.training.probing import ProbingTrainer
from torchthaw.training.resume import check_same_run, find_checkpoint, this_runs_checkpoints, write_journal


class SavingTrainer(ProbingTrainer):
    """Saves checkpoints from which a run goes on exactly, and a journal of the stages that are over."""

    _identity: dict[str, Any]
    _last_checkpoint: Path | None
    _stage_started: float

    def _checkpoint_to_resume(self, wanted: str | bool) -> Path:
        checkpoint = find_checkpoint(wanted, Path(str(self.args.output_dir)))
        check_same_run(self._describe_run(self._plan_lengths()[0]), checkpoint)
        return checkpoint

    def _describe_run(self, planned_steps: list[int]) -> dict[str, Any]:
        data = {"train": self._train_data, "validation": self.eval_dataset}
        return identity_of(self.args, self.model, self.plan, planned_steps, data)

    def _write_journal(self, *, finished: bool) -> None:
        if self.args.should_save and self.args.save_strategy != "no":
            stages = [record.to_dict() for record in self.stage_records]
            write_journal(
                self._run_folder,
                run_id=self._progress.run_id,
                identity=self._identity,
                stages=stages,
                finished=finished,
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self._run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if folder.resolve() == self._last_checkpoint:
            # The rest of the step is done again from there; to write it anew would leave none meanwhile.
            return
        # Some come in the middle of a step: before a machine is taken away.
        self._settle()
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # half-written, or of an earlier run in the same place
        processes.wait()
        self._note_stop()
        # The older ones must stay until this one is whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        progress = dataclasses.replace(
            self._progress,
            loss_sum=self._progress.loss_sum + self._total_loss_scalar,
            unlogged_loss=_mean(processes.gather(self._tr_loss.item())),
            last_logged_step=self._globalstep_last_logged,
            last_grad_norm=self._last_norm.item(),
            group_norms=self._norms_of_groups().state(),
            epoch_stopped=self.control.should_epoch_stop,
            adapters=take_snapshot(self.model, adapter_parameters(self.model)),
            stage_seconds=self._progress.stage_seconds + time.monotonic() - self._stage_started,
        )
        processes.wait()
        if self.args.should_save:
            progress.save(folder, self._identity)
            seal(folder, run_id=progress.run_id)
            best = self.state.best_model_checkpoint
            # Those of later steps were passed over when the run was resumed.
            mine = this_runs_checkpoints(self._run_folder, progress.run_id)
            mine = [checkpoint for checkpoint in mine if step_of(checkpoint) <= self.state.global_step]
            prune(mine, limit=limit, keep=[Path(best)] if best else [])
        self._last_checkpoint = folder.resolve()
        processes.wait()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
