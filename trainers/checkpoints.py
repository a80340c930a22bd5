"""Checkpoints to resume from: the newest whole one is found, a broken or foreign one refused with the reason."""

import json
from pathlib import Path

from transformers import PreTrainedConfig, TrainerState

from trainers.checkpoint_files import LAST, all_checkpoints, best_beside, choose_checkpoint
from trainers.errors import InputError
from trainers.evaluation import EvaluationArguments
from trainers.flags import type_hints
from trainers.model_facts import model_fields
from trainers.processes import in_main_process
from trainers.progress import Progress
from trainers.recipe_files import recipe_beside
from trainers.recipes import Recipe, first_difference
from trainers.training_args import JepaTrainingArguments

# keys that may differ between a run and its continuation without a word: no weight depends on them
WITHOUT_EFFECT = {
    "output_dir", "resume_from_checkpoint", "report_to", "run_name", "num_monitored_images",
    "push_to_hub", *(f"hub_{name}" for name in ("model_id", "strategy", "token", "private_repo", "always_push",
                                                "revision", "update")),
    "max_unreadable_share", "max_hours", "max_skipped_steps", "stop_on_collapse",
    *(f"dataloader_{name}" for name in ("num_workers", "persistent_workers", "prefetch_factor", "pin_memory")),
    *(f"logging_{name}" for name in ("strategy", "steps", "first_step", "nan_inf_filter")),
    *(f"save_{name}" for name in ("strategy", "steps", "total_limit")), "keep_checkpoints_every",
    *(type_hints(EvaluationArguments).keys() - {"seed", "precision"}),
}  # fmt: skip
# what batches are made of: [`changed_batches`] tells
_BATCHES = {"per_device_train_batch_size"}


def find_checkpoint(args: JepaTrainingArguments) -> str | None:
    """
    The checkpoint to resume from, if any; a folder that already holds a run is never started anew silently.

    Args:
        args ([`JepaTrainingArguments`]): `resume_from_checkpoint` is a folder, `last`, or nothing.

    Returns:
        `str`: Its folder, or None for a new run.

    Raises:
        InputError: The output folder holds a run that was not asked for, or there is no whole checkpoint.
    """
    # one process reads for all: a checkpoint is large, and all must choose the same
    asked, output = args.resume_from_checkpoint, Path(args.output_dir)
    if (output / "final").exists():
        raise InputError(f"{output} already holds a finished run; choose another --output_dir.")
    if asked is not None:
        return in_main_process(choose_checkpoint, output, asked)
    checkpoints = in_main_process(all_checkpoints, output)
    if checkpoints:
        raise InputError(
            f"{output} already holds {checkpoints[0].name}; go on with --resume_from_checkpoint {LAST} or choose "
            "another --output_dir."
        )
    return None


def check_same_model(checkpoint: str, config: PreTrainedConfig):
    """Refuses a checkpoint of another architecture, grid or loss, naming the first field that differs."""
    saved = json.loads(Path(checkpoint, "config.json").read_text(encoding="utf-8"))
    ours = json.loads(config.to_json_string(use_diff=False))
    if saved.get("model_type") != config.model_type:
        raise InputError(
            f"{checkpoint} holds a model of type {saved.get('model_type')!r}, the recipe one of "
            f"{config.model_type!r}; resume with the recipe it was trained with (recipe.yaml beside it)."
        )
    for name in model_fields(type(config)):
        if name in saved and saved[name] != ours[name]:
            name, before, now = first_difference(name, saved[name], ours[name])
            raise InputError(
                f"{checkpoint} was trained with {name}={before}, the recipe says {now}; resume with the recipe it was "
                "trained with (recipe.yaml beside it)."
            )


def changed_batches(checkpoint: str, args: JepaTrainingArguments) -> str:
    """In words how a run goes on with other batches or processes than those that wrote a checkpoint; or nothing."""
    progress = Progress.read(checkpoint)
    before = progress.batch_size, progress.num_processes
    now = args.train_batch_size * args.world_size * args.gradient_accumulation_steps, args.world_size
    if before == now:
        return ""
    told = [f"{images} images a step in {count} process{'es' if count > 1 else ''}" for images, count in (before, now)]
    place = f"the image at which it stopped, number {progress.samples_seen:,} of the order"
    return f"; with {told[1]}, before {told[0]}, from {place}"


def changed_settings(recipe: Recipe, checkpoint: str) -> str:
    """What the run sets otherwise than the one that wrote a checkpoint, and weights depend on, in words."""
    before = recipe_beside(checkpoint)
    if not before:
        return ""
    before, now = (
        {name: value for name, value in settings.items() if name not in WITHOUT_EFFECT | _BATCHES}
        for settings in (before, recipe.values)
    )
    changed = [
        f"{name} was {before.get(name, 'not set')} and is {now.get(name, 'not set')}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    return f" with other settings, so not as an uninterrupted run: {'; '.join(changed)}" if changed else ""


def load_state(checkpoint: str) -> TrainerState:
    """How far the run that wrote a checkpoint had come, and its log."""
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    state.best_model_checkpoint = best_beside(Path(checkpoint), state.best_global_step)
    return state


def is_finished(checkpoint: str, args: JepaTrainingArguments) -> bool:
    """Whether a checkpoint is the last of the run asked for."""
    state = load_state(checkpoint)
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.epoch is not None and state.epoch >= args.num_train_epochs
