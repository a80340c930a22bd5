"""Checkpoints on the Hub: what a run uploads of them while it goes on, and what it says when that fails."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from trainers.checkpoint_files import MANIFEST, checkpoint_step
from trainers.errors import InputError
from trainers.hub import refusals_named

# what of a checkpoint only goes on training
_TRAINING_FILES = ("optimizer.*", "scheduler.json", "trainer_state.json", "progress.json", MANIFEST)


class CheckpointPush:
    """
    Uploads checkpoints in the background, one commit each, which loads as a model; a failure is kept to be told.

    Args:
        args (`TrainingArguments`): Repository, strategy, token and revision.

    Attributes:
        repo (`str`): `user/name`; without a user until the Hub was reached, if the arguments name none.
        checkpoint (`Path`, *optional*): The one whose upload was begun last.
    """

    def __init__(self, args: TrainingArguments):
        self.args = args
        self.repo = args.hub_model_id or Path(args.output_dir).absolute().name
        self.checkpoint: Path | None = None
        self._executor = ThreadPoolExecutor(1, "push")
        self._running: Future | None = None
        self._is_open = False

    @property
    def is_running(self) -> bool:
        """Whether an upload goes on, for which its checkpoint must stay."""
        return self._running is not None and not self._running.done()

    def open(self):
        """Makes the repository if it is not there; raises `InputError` if the Hub refuses or cannot be reached."""
        api, args = HfApi(token=self.args.hub_token), self.args
        with refusals_named(f"Nothing can be pushed to {self.repo}"):
            self.repo = api.create_repo(self.repo, private=args.hub_private_repo, exist_ok=True).repo_id
            if args.hub_revision is not None:
                api.create_branch(self.repo, branch=args.hub_revision, exist_ok=True)
        self._is_open = True

    def start(self, checkpoint: Path, card: str | None):
        """
        Begins to upload a checkpoint, after the one that is under way; failures are told by [`~settle`].

        Args:
            checkpoint (`Path`): Its folder.
            card (`str`, *optional*): The model card.
        """
        self.checkpoint = checkpoint
        self._running = self._executor.submit(self._upload, checkpoint, card)

    def settle(self) -> str | None:
        """Why the upload that is done has failed; None if it has not, or was told before."""
        if self._running is None or not self._running.done():
            return None
        error, self._running = self._running.exception(), None
        if error is not None and not isinstance(error, InputError):
            raise error
        return None if error is None else str(error)

    def wait(self) -> str | None:
        """As [`~settle`], when the upload under way is done."""
        if self._running is not None:
            self._running.exception()
        return self.settle()

    def _upload(self, checkpoint: Path, card: str | None):
        step = checkpoint_step(checkpoint)
        if not self._is_open:
            self.open()
        with refusals_named(f"The checkpoint of step {step} was not pushed to {self.repo}"):
            HfApi(token=self.args.hub_token).create_commit(
                self.repo,
                self._operations(checkpoint, card),
                commit_message=f"Training in progress, step {step}",
                revision=self.args.hub_revision,
            )

    def _operations(self, checkpoint: Path, card: str | None) -> list[CommitOperationAdd]:
        files = {path.relative_to(checkpoint): path for path in checkpoint.rglob("*") if path.is_file()}
        added = [
            CommitOperationAdd(name.as_posix(), path)
            for name, path in files.items()
            if not any(name.match(pattern) for pattern in _TRAINING_FILES)
        ]
        if card is not None:
            added.append(CommitOperationAdd("README.md", card.encode("utf-8")))
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            added += [CommitOperationAdd(f"{place}/{name.as_posix()}", path) for name, path in files.items()]
        return added
