"""A trainer whose checkpoints go to the Hub while it trains, and which no failure of the Hub stops."""

from pathlib import Path

from transformers.trainer_utils import HubStrategy

from trainers.checkpoint_files import present_checkpoints
from trainers.checkpoint_push import CheckpointPush
from trainers.checkpointed_trainer import CheckpointedTrainer
from trainers.hub import UnreachableError


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
            InputError: The Hub refuses.
        """
        if not self.is_world_process_zero():
            return
        self.push = CheckpointPush(self.args)
        try:
            self.push.open()
        except UnreachableError as error:
            print(f"{error} Training goes on, and the first checkpoint will try again.", flush=True)
        self.hub_model_id = self.push.repo

    def checkpoints_to_keep(self, output: Path) -> set[str]:
        """As of [`CheckpointedTrainer`], and what is being uploaded."""
        kept = super().checkpoints_to_keep(output)
        return kept | {self.push.checkpoint.name} if self.push is not None and self.push.is_running else kept

    def _push_from_checkpoint(self, checkpoint_folder):
        """Begins to push a checkpoint, unless one is being pushed and `hub_always_push` is not set."""
        if self.push is None or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push.is_running and not self.args.hub_always_push:
            return
        self._say(self.push.settle(), "training goes on, and a later checkpoint will be pushed")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.push.start(Path(checkpoint_folder), self.card_text())

    def _finish_current_push(self):
        """Waits for the upload under way, and pushes the newest checkpoint if it is not the one that has arrived."""
        if self.push is None or self.push.checkpoint is None:
            return
        failure = self.push.wait()
        newest = next(iter(present_checkpoints(Path(self.args.output_dir))), None)
        if newest is not None and (failure or newest != self.push.checkpoint):
            self._say(failure, "it is tried once more")
            self.push.start(newest, self.card_text())
            failure = self.push.wait()
        self._say(
            failure, f"publish it later by `cjepa publish {self.args.output_dir} --repo {self.push.repo} --update`"
        )

    @staticmethod
    def _say(failure: str | None, consequence: str):
        if failure is not None:
            print(f"{failure.removesuffix('.')}: {consequence}.", flush=True)
