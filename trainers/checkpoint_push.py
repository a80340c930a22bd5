"""Checkpoints on the Hub: what a run uploads of them while it goes on, and what it says when that fails."""

import shlex
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from huggingface_hub import CommitOperationAdd
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from trainers.cards import CARD
from trainers.checkpoint_files import MANIFEST, checkpoint_step
from trainers.errors import InputError, first_line
from trainers.hub import (
    Destination,
    additions,
    check_name,
    check_private,
    num_files_of,
    patient_api,
    refusals_named,
    removals,
    upload,
)

# what of a checkpoint only goes on training
_TRAINING_FILES = ("optimizer.*", "scheduler.json", "trainer_state.json", "progress.json", MANIFEST)


class CheckpointPush:
    """
    Uploads checkpoints in the background, one after the other, each by one commit that loads as a model; failures are
    kept to be told.

    Args:
        args (`TrainingArguments`): Repository, strategy, token and revision.

    Attributes:
        repo (`str`): `user/name`; without a user until the Hub was reached, if the arguments name none.
        may_hold_a_model (`bool`): Whether a repository that holds something is taken: where `hub_update` is set, a run
            is resumed, or this one has begun to fill it.
        newest (`Path`, *optional*): The checkpoint whose upload was begun last.

    Raises:
        InputError: There can be no repository of that name.
    """

    def __init__(self, args: TrainingArguments):
        self.args = args
        self.repo = args.hub_model_id or Path(args.output_dir).absolute().name
        check_name(self.repo, "--hub_model_id")
        self.may_hold_a_model = getattr(args, "hub_update", False) or bool(args.resume_from_checkpoint)
        self.newest: Path | None = None
        self._executor = ThreadPoolExecutor(1, "push")
        self._uploads: list[tuple[Path, Future]] = []
        self._is_open = False

    @property
    def pending(self) -> list[Path]:
        """The checkpoints that are being uploaded or wait for it, and must stay."""
        return [checkpoint for checkpoint, future in self._uploads if not future.done()]

    def open(self):
        """
        Makes the repository if it is not there.

        Raises:
            InputError: The Hub refuses or cannot be reached, or the repository holds something, or is not private.
        """
        api, args = patient_api(self.args.hub_token), self.args
        with refusals_named(f"Nothing can be pushed to {self.repo}"):
            self.repo = api.create_repo(self.repo, private=args.hub_private_repo, exist_ok=True).repo_id
            if args.hub_private_repo:
                check_private(api, self.repo, "--hub_private_repo")
            num_files = 0 if self.may_hold_a_model else num_files_of(api, self.repo, args.hub_revision)
            if num_files:
                raise InputError(
                    f"{self.repo} exists and holds {num_files} files; give another --hub_model_id, or --hub_update "
                    "true to replace the model in it."
                )
            if args.hub_revision is not None:
                api.create_branch(self.repo, branch=args.hub_revision, exist_ok=True)
        self._is_open = True

    def start(self, checkpoint: Path, card: str | None):
        """
        Begins to upload a checkpoint, after those under way; failures are told by [`~settle`].

        Args:
            checkpoint (`Path`): Its folder.
            card (`str`, *optional*): The model card.
        """
        self.newest = checkpoint
        self._uploads.append((checkpoint, self._executor.submit(self._upload, checkpoint, card)))

    def settle(self) -> list[str]:
        """Why uploads that are done have failed, each told once."""
        done = [(checkpoint, future) for checkpoint, future in self._uploads if future.done()]
        self._uploads = [entry for entry in self._uploads if entry not in done]
        return [self._told(checkpoint, error) for checkpoint, future in done if (error := future.exception())]

    def wait(self, seconds: float) -> bool:
        """Waits some seconds at most for the uploads under way; whether there are any then."""
        return bool(wait([future for _, future in self._uploads], seconds).not_done)

    def fill(self, folder: Path, message: str) -> str:
        """
        Fills the repository, which is open, with a model's folder.

        Args:
            folder (`Path`): Whose files to send, and no others.
            message (`str`): Of the commit.

        Returns:
            `str`: The repository's address.

        Raises:
            InputError: The Hub refuses or cannot be reached.
        """
        destination = Destination(self.repo, revision=self.args.hub_revision, update=True, token=self.args.hub_token)
        url = upload(folder, destination, message)
        self.may_hold_a_model = True
        return url

    def _told(self, checkpoint: Path, error: BaseException) -> str:
        """A failure in a sentence: no error of an upload, whatever it is, may end a training."""
        if isinstance(error, InputError):
            return str(error)
        return f"{self._what(checkpoint)}: {type(error).__name__}, {first_line(error)}."

    def _what(self, checkpoint: Path) -> str:
        return f"The checkpoint of step {checkpoint_step(checkpoint)} was not pushed to {self.repo}"

    def _upload(self, checkpoint: Path, card: str | None):
        if not self._is_open:
            self.open()
        api = patient_api(self.args.hub_token)
        with refusals_named(self._what(checkpoint)):
            added = self._additions(checkpoint, card)
            removed = removals(api, self.repo, self.args.hub_revision, {file.path_in_repo for file in added})
            message = f"Training in progress, step {checkpoint_step(checkpoint)}"
            self.may_hold_a_model = True  # one of this run, from now on
            api.create_commit(self.repo, added + removed, commit_message=message, revision=self.args.hub_revision)

    def _additions(self, checkpoint: Path, card: str | None) -> list[CommitOperationAdd]:
        files = [file for file in additions(checkpoint) if Path(file.path_in_repo).name != CARD]  # none of peft's
        if not files:
            raise InputError(f"{self._what(checkpoint)}: {checkpoint} is not there any more.")
        added = [
            file
            for file in files
            if not any(Path(file.path_in_repo).match(pattern) for pattern in _TRAINING_FILES)
        ]  # fmt: skip
        if card is not None:
            added.append(CommitOperationAdd(CARD, card.encode("utf-8")))
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            place = "last-checkpoint" if self.args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
            added += [CommitOperationAdd(f"{place}/{file.path_in_repo}", file.path_or_fileobj) for file in files]
        return added

    def command(self, folder: Path) -> str:
        """What publishes a model later, where this has failed."""
        words = ["cjepa", "publish", str(folder), "--repo", self.repo if "/" in self.repo else f"YOU/{self.repo}"]
        words += ["--private"] if self.args.hub_private_repo else []
        words += ["--revision", self.args.hub_revision] if self.args.hub_revision else []
        return shlex.join([*words, *(["--update"] if self.may_hold_a_model else [])])
