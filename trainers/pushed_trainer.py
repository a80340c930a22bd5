"""A trainer whose checkpoints go to the Hub while it trains, and which no failure of the Hub stops."""

from pathlib import Path

from transformers.trainer_utils import HubStrategy

from trainers.checkpoint_files import present_checkpoints
from trainers.checkpoint_push import CheckpointPush
from trainers.checkpointed_trainer import CheckpointedTrainer
from trainers.hub import UnreachableError
from trainers.processes import in_main_process


class PushedTrainer(CheckpointedTrainer):
    """
    A [`CheckpointedTrainer`] that pushes every checkpoint (`push_to_hub`, `hub_strategy` other than `end`) by one
    commit from which the Auto classes load the model. A push that fails is said, training goes on, and the newest
    checkpoint is pushed at the end.

    Attributes:
        push ([`CheckpointPush`], *optional*): What uploads; None where nothing is pushed.
    """

    push: CheckpointPush | None = None

    def card_text(self) -> str | None:
        """The card of the model as it is now; None where nothing is known to write one of."""
        return None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None):
        """
        Makes the repository; where the Hub cannot be reached, that is said, and tried again with the first push.

        Raises:
            InputError: The Hub refuses, or the repository holds something, and neither `hub_update` is set nor a run
                resumed.
        """
        if self.is_world_process_zero():
            self.push = CheckpointPush(self.args)
        self.hub_model_id = in_main_process(self._open)

    def _open(self) -> str:
        may_hold_a_model = getattr(self.args, "hub_update", False) or bool(self.args.resume_from_checkpoint)
        try:
            self.push.open(may_hold_a_model)
        except UnreachableError as error:
            print(f"{error} Training goes on, and the first checkpoint will try again.", flush=True)
        return self.push.repo

    def checkpoints_to_keep(self, output: Path) -> set[str]:
        """As of [`CheckpointedTrainer`], and what is being uploaded or waits for it."""
        kept = super().checkpoints_to_keep(output)
        return kept if self.push is None else kept | {checkpoint.name for checkpoint in self.push.pending}

    def _push_from_checkpoint(self, checkpoint_folder):
        """Begins to push a checkpoint, unless one is being pushed and `hub_always_push` is not set."""
        if self.push is None or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push.pending and not self.args.hub_always_push:
            return
        self._say(self.push.settle(), "training goes on, and a later checkpoint will be pushed")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.push.start(Path(checkpoint_folder), self.card_text())

    def _finish_current_push(self):
        """Waits for the uploads under way, and pushes the newest checkpoint if it is not the one that has arrived."""
        if self.push is None or self.push.newest is None:
            return
        failures = self.push.wait()
        newest = next(iter(present_checkpoints(Path(self.args.output_dir))), None)
        if newest is not None and (failures or newest != self.push.newest):
            self._say(failures, "the newest checkpoint is pushed once more")
            self.push.start(newest, self.card_text())
            failures = self.push.wait()
        self._say(failures, f"publish it later by `{self.push.command(self.args.output_dir)}`")

    @staticmethod
    def _say(failures: list[str], consequence: str):
        for failure in failures:
            print(f"{failure.removesuffix('.')}: {consequence}.", flush=True)
