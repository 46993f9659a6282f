"""Pushes to the Hub from the trainer: at the end, and of checkpoints while training goes on.

The methods of `Trainer` that are overridden were read in transformers 5.23 and are tested with 5.10.1 too.
"""

import logging
import os
import shlex
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi
from torch import nn
from transformers.trainer_utils import HubStrategy

from torchthaw._version import __version__
from torchthaw.errors import ThawError
from torchthaw.sharing.hub import check_branch, check_repo_id, find_token, make_repository, push_files, push_folder
from torchthaw.sharing.hub_errors import Upload, clean, explained, retried
from torchthaw.sharing.pushed_files import CARD_FILE, REPORTS, saved_files
from torchthaw.training import processes
from torchthaw.training.checkpoints import step_of
from torchthaw.training.staged_loop import StagedTrainer

logger = logging.getLogger(__name__)

# Copies of what is being pushed, in the run's folder; checkpoints come and go meanwhile.
STAGING_FOLDER = ".push"
LAST_CHECKPOINT = "last-checkpoint"
_DRAFT_CARD = """\
---
library_name: transformers
pipeline_tag: image-classification
tags:
- torchthaw
- training-in-progress
---

# Training in progress

These are the weights at step {step} of {last}{stage}. The run goes on: they may be worse than earlier ones, or be
rolled back. The card of the finished model will stand here.
"""
# What Markdown and HTML would make something of in a stage's name.
_ESCAPES = str.maketrans({character: f"&#{ord(character)};" for character in "<>&`*_[]#|"})


@dataclass(frozen=True)
class CheckpointPush:
    """A push that runs beside training.

    Attributes:
        checkpoint: The checkpoint's folder.
        job: The push.
    """

    checkpoint: Path
    job: "Future[CommitInfo]"


class PushingTrainer(StagedTrainer):
    """Pushes as `Trainer` does, but only what belongs into a model repository, and says when it failed.

    A push has the model with its image processor and code, the card, results and plots. A checkpoint (`hub_strategy`
    `checkpoint` and `all_checkpoints`) is pushed whole besides, to be resumed from. Pushes of checkpoints run beside
    training; one that fails is told with a warning, training goes on, and at the end the newest checkpoint is tried
    again. With `hub_always_push=False`, a checkpoint that comes before the last one has been pushed is skipped.
    """

    hub_model_id: str | None  # type: ignore[assignment]  # as `Trainer` means it
    _pushes: list[CheckpointPush]
    _unpushed: Path | None = None
    _pusher: ThreadPoolExecutor | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Makes the repository `hub_model_id` (by default named as `output_dir`) and the branch, if they are missing.

        Args:
            token: Token that may write; by default `hub_token`, `HF_TOKEN` or the stored login.
            private: Whether a repository that is made is private; by default `hub_private_repo`.

        Raises:
            SharingError: the name is not valid, or the repository is to be private and is public.
            HubError: the Hub could not be reached, or refused.
        """
        # All processes have the name, so that all of them see alike whether there is one.
        self.hub_model_id = processes.on_main(lambda: self._make_repository(token, private))
        self.push_in_progress: Any = None

    def _make_repository(self, token: str | None, private: bool | None) -> str:
        # `Trainer` makes its state after the repository.
        afterwards = (
            "The model is in memory; save it with trainer.save_model() or trainer.save_run() after a switch to "
            "push_to_hub=False, and push the folder later with `torchthaw push`"
            if hasattr(self, "state")
            else "Nothing was trained; leave out push_to_hub to train without the Hub, and push later"
        )
        name = str(self.args.hub_model_id or Path(str(self.args.output_dir)).absolute().name)
        branch = check_branch(self.args.hub_revision)
        token = find_token(token or self.args.hub_token, afterwards)
        api = HfApi(token=token, library_name="torchthaw", library_version=__version__)
        if "/" not in name:
            with explained(Upload(name, branch, token, afterwards), "asking the Hub for the user's name"):
                name = f"{retried(api.whoami, logger.info)['name']}/{name}"
        check_repo_id(name)
        private = private if private is not None else self.args.hub_private_repo
        make_repository(api, Upload(name, branch, token, afterwards), private, logger.info)
        return name

    def push_to_hub(  # type: ignore[override]  # nothing to return in processes that push nothing
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> "CommitInfo | Future[CommitInfo] | None":
        """Saves the model into `output_dir`, writes the card, and pushes both with what is known of the run.

        Args:
            commit_message: Title of the commit.
            blocking: Whether to wait; if not, a failure is told with a warning.
            token: Token that may write; by default `hub_token`, `HF_TOKEN` or the stored login.
            revision: Branch; by default `hub_revision`, or else `main`.
            private: Whether a repository that is made is private; by default `hub_private_repo`.
            **kwargs: What `create_model_card` takes.

        Returns:
            The commit, or its future; None in all processes but the first.

        Raises:
            SharingError: what was saved, or the name of the repository, is not valid.
            HubError: the Hub could not be reached, or refused; `output_dir` is whole, and the message says how to push
                it later.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._settle_pushes(wait=True)
        folder, repo = Path(str(self.args.output_dir)), str(self.hub_model_id)

        def push() -> CommitInfo:
            return push_folder(
                folder,
                repo,
                private=private,
                revision=revision or self.args.hub_revision,
                token=token or self.args.hub_token,
                commit_message=commit_message,
                say=logger.info,
            ).info

        self._unpushed = None
        if blocking:
            return push()
        job = self._executor().submit(push)
        job.add_done_callback(lambda done: _warn(done, f"The push to {repo} failed."))
        return job

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # `Trainer` calls it before the checkpoint is whole; see `_save_checkpoint`.
        pass

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        before = self._last_checkpoint
        super()._save_checkpoint(model, trial)
        saved = self._last_checkpoint
        pushes = self.args.push_to_hub and self.args.hub_strategy != HubStrategy.END
        if pushes and self.is_world_process_zero() and saved is not None and saved != before:
            self._push_checkpoint(saved)

    def _push_checkpoint(self, checkpoint: Path) -> None:
        """Starts a push of a whole checkpoint, and tells of earlier ones that failed."""
        self._settle_pushes(wait=False)
        if self._running_pushes() and not self.args.hub_always_push:
            self._unpushed = checkpoint
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        try:
            saved_files(checkpoint)
            staged = self._stage_files(checkpoint)
        except (OSError, ThawError) as error:
            logger.warning("%s was not pushed to %s. %s", checkpoint.name, self.hub_model_id, error)
            self._unpushed = checkpoint
            return
        message = f"Training in progress, step {self.state.global_step}"
        job = self._executor().submit(self._push_staged, staged, checkpoint.name, message)
        self._running_pushes().append(CheckpointPush(checkpoint, job))

    def _stage_files(self, checkpoint: Path) -> Path:
        """Copies a checkpoint, without using space where links can be made, and adds a card for it."""
        root = self._run_folder / STAGING_FOLDER
        if self._pusher is None:
            shutil.rmtree(root, ignore_errors=True)  # of a run that was killed
        staged = root / checkpoint.name
        shutil.rmtree(staged, ignore_errors=True)
        shutil.copytree(checkpoint, staged / "checkpoint", copy_function=_link_or_copy)
        (staged / CARD_FILE).write_text(self._card_of_checkpoint(), encoding="utf-8")
        return staged

    def _card_of_checkpoint(self) -> str:
        state = self.state
        stage = "" if self.stage is None else f", in stage {self.stage.name!r}"
        return _DRAFT_CARD.format(step=state.global_step, last=state.max_steps, stage=stage.translate(_ESCAPES))

    def _push_staged(self, staged: Path, name: str, message: str) -> CommitInfo:
        """Pushes a copy of a checkpoint, in the background."""
        try:
            checkpoint = staged / "checkpoint"
            files = {**saved_files(checkpoint), CARD_FILE: staged / CARD_FILE}
            owned: tuple[str, ...] = REPORTS
            if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                folder = LAST_CHECKPOINT if self.args.hub_strategy == HubStrategy.CHECKPOINT else name
                whole = sorted(file for file in checkpoint.rglob("*") if file.is_file())
                files |= {f"{folder}/{file.relative_to(checkpoint).as_posix()}": file for file in whole}
                owned = (*REPORTS, f"{folder}/*")
            return push_files(
                files,
                str(self.hub_model_id),
                commit_message=message,
                revision=self.args.hub_revision,
                token=self.args.hub_token,
                owned=owned,
                say=logger.info,
            ).info
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _settle_pushes(self, *, wait: bool) -> None:
        """Tells of pushes that failed since the last time."""
        running = self._running_pushes()
        for push in [push for push in running if wait or push.job.done()]:
            running.remove(push)
            left = -1 if self._unpushed is None else step_of(self._unpushed)
            if _warn(push.job, f"{push.checkpoint.name} was not pushed to {self.hub_model_id}; it is saved."):
                self._unpushed = push.checkpoint if step_of(push.checkpoint) > left else self._unpushed
            elif step_of(push.checkpoint) >= left:
                self._unpushed = None

    def _finish_current_push(self) -> None:
        """Waits for pushes of checkpoints, and tries the newest one again if it was skipped or failed."""
        self._settle_pushes(wait=True)
        newest, self._unpushed = self._unpushed, None
        if newest is None or not newest.is_dir():
            return
        self._push_checkpoint(newest)
        self._settle_pushes(wait=True)
        if self._unpushed is not None:
            command = f"torchthaw push {shlex.quote(str(newest))} {self.hub_model_id}"
            logger.warning(
                "The end of the run is not on the Hub. Nothing is lost: all of it is saved in %s. Push the last "
                "weights with `%s`, or the finished model with its card with trainer.push_to_hub().",
                self._run_folder,
                command,
            )

    def _running_pushes(self) -> list[CheckpointPush]:
        if not hasattr(self, "_pushes"):
            self._pushes = []
        return self._pushes

    def _executor(self) -> ThreadPoolExecutor:
        if self._pusher is None:
            # One at a time, since commits to a branch follow each other.
            self._pusher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push")
        return self._pusher


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _warn(job: "Future[Any]", text: str) -> bool:
    """Tells of a push that failed; returns whether it did."""
    error = job.exception()
    if error is not None:
        reason = str(error) if isinstance(error, ThawError) else f"{type(error).__name__}: {error}"
        logger.warning("%s %s", text, clean(reason))
    return error is not None
