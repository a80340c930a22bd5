"""Checkpoints on the Hub: what a run uploads of them while it goes on."""

from functools import partial
from pathlib import Path

from huggingface_hub import HfApi
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from trainers.checkpoint_files import MANIFEST, checkpoint_step

# what of a checkpoint only goes on training
_TRAINING_FILES = ["optimizer.*", "scheduler.json", "trainer_state.json", "progress.json", MANIFEST]


def push_checkpoint(checkpoint: Path, repo_id: str, args: TrainingArguments) -> PushInProgress:
    """
    Starts to upload the model of a checkpoint, and where `hub_strategy` says so all of it; nothing is pickled.

    Args:
        checkpoint (`Path`): Its folder, which must stay until the upload is done.
        repo_id (`str`): Of the repository on the Hub.
        args (`TrainingArguments`): Strategy, token and revision.

    Returns:
        `PushInProgress`: The uploads.
    """
    upload = partial(
        HfApi().upload_folder,
        repo_id=repo_id,
        folder_path=str(checkpoint),
        token=args.hub_token,
        revision=args.hub_revision,
        run_as_future=True,
    )
    message = f"Training in progress, step {checkpoint_step(checkpoint)}"
    jobs = [upload(commit_message=message, ignore_patterns=_TRAINING_FILES)]
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        place = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else checkpoint.name
        jobs.append(upload(commit_message=f"{message}, checkpoint", path_in_repo=place))
    return PushInProgress(jobs)
