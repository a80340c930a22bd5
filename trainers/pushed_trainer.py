"""A trainer whose checkpoints go to the Hub while it trains, and which no failure of the Hub stops."""

from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.trainer_utils import HubStrategy

from trainers.cards import CARD
from trainers.checkpoint_files import present_checkpoints
from trainers.checkpoint_push import CheckpointPush
from trainers.checkpointed_trainer import CheckpointedTrainer
from trainers.errors import InputError, first_line
from trainers.hub import UnreachableError
from trainers.processes import in_main_process

# seconds that the other processes wait at once for the main one
_TURN = 60


class PushedTrainer(CheckpointedTrainer):
    """
    A [`CheckpointedTrainer`] that pushes every checkpoint (`push_to_hub`, `hub_strategy` other than `end`) by one
    commit from which the Auto classes load the model. A push that fails is said, training goes on, and the newest
    checkpoint is pushed at the end.

    Of a model with adapters no checkpoint is pushed: without the model that they adapt, it would not load.

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
        if self._has_adapters:
            print("Adapters alone load nowhere: no checkpoint is pushed, but the merged model at the end.", flush=True)
        try:
            self.push.open()
        except UnreachableError as error:
            print(f"{error} Training goes on, and the first checkpoint will try again.", flush=True)
        return self.push.repo

    @property
    def _has_adapters(self) -> bool:
        return hasattr(self._plain_model(), "peft_config")

    def checkpoints_to_keep(self, output: Path) -> set[str]:
        """As of [`CheckpointedTrainer`], and what is being uploaded or waits for it."""
        kept = super().checkpoints_to_keep(output)
        return kept if self.push is None else kept | {checkpoint.name for checkpoint in self.push.pending}

    def _push_from_checkpoint(self, checkpoint_folder):
        """Begins to push a checkpoint, unless one is being pushed and `hub_always_push` is not set."""
        if self.push is None or self._has_adapters or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push.pending and not self.args.hub_always_push:
            return
        self._say(self.push.settle(), "training goes on, and a later checkpoint will be pushed")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.push.start(Path(checkpoint_folder), self._card())

    def _card(self) -> str | None:
        """The card, or None where there is none: no error of one, whatever it is, may end a training."""
        try:
            return self.card_text()
        except Exception as error:
            failure = f"The card cannot be made ({type(error).__name__}: {first_line(error)})"
            self._say([failure], "the checkpoint is pushed without a new one")
            return None

    def _finish_current_push(self):
        """Waits for the uploads under way, and pushes the newest checkpoint if it is not the one that has arrived."""
        if self.hub_model_id is None:
            return
        self._wait_for_pushes()
        if self.push is not None and self.push.newest is not None:
            failures = self.push.settle()
            newest = next(iter(present_checkpoints(Path(self.args.output_dir))), None)
            if newest is not None and (failures or newest != self.push.newest):
                self._say(failures, "the newest checkpoint is pushed once more")
                self.push.start(newest, self._card())
            else:
                self._say_later(failures)
        self._wait_for_pushes()
        if self.push is not None:
            self._say_later(self.push.settle())

    def _wait_for_pushes(self):
        """Waits for the uploads under way in turns, since processes do not wait for ever for the main one."""
        while in_main_process(lambda: self.push.wait(_TURN)):
            pass

    def _say_later(self, failures: list[str]):
        self._say(failures, f"publish it later by `{self.push.command(self.args.output_dir)}`")

    def push_to_hub(self, commit_message: str = "End of training") -> str:
        """
        Pushes the model as it is now, with its code and card; all processes call it. transformers' method of this name
        would upload all of `output_dir`.

        Args:
            commit_message (`str`): Of the commit.

        Returns:
            `str`: The repository's address.

        Raises:
            InputError: The Hub refuses or cannot be reached, the repository holds another model, or this one has
                adapters.
        """
        if self._has_adapters:
            raise InputError(
                "Adapters alone load nowhere; merge them, save the model, and `cjepa publish` its folder."
            )
        if self.hub_model_id is None:
            self.init_hf_repo()
        self._finish_current_push()
        with TemporaryDirectory() as temporary:
            self.save_model(temporary, _internal_call=True)
            return in_main_process(self._push_model, Path(temporary), commit_message)

    def _push_model(self, folder: Path, message: str) -> str:
        self.push.open()
        (folder / CARD).write_text(self.card_text(), encoding="utf-8")
        return self.push.fill(folder, message)

    @staticmethod
    def _say(failures: list[str], consequence: str):
        for failure in failures:
            print(f"{failure.removesuffix('.')}: {consequence}.", flush=True)
