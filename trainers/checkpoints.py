"""Checkpoints to resume from: the newest whole one is found, a broken or foreign one refused with the reason."""

import json
import re
import zipfile
from pathlib import Path

import yaml
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, TrainerState

from trainers.errors import InputError
from trainers.recipes import Recipe, model_fields
from trainers.training_args import JepaTrainingArguments

LAST = "last"
# keys that may differ between a run and its continuation without a word
_PLACES = {"output_dir", "resume_from_checkpoint", "max_steps", "num_train_epochs"}


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
    asked, output = args.resume_from_checkpoint, Path(args.output_dir)
    if (output / "final").exists():
        raise InputError(f"{output} already holds a finished run; choose another --output_dir.")
    checkpoints = sorted(output.glob("checkpoint-*"), key=_step, reverse=True)
    if asked is None:
        if checkpoints:
            raise InputError(
                f"{output} already holds {checkpoints[0].name}; go on with --resume_from_checkpoint {LAST} or choose "
                "another --output_dir."
            )
        return None
    if asked != LAST:
        broken = broken_part(Path(asked))
        if broken:
            raise InputError(f"{asked} is no whole checkpoint ({broken}); mend --resume_from_checkpoint.")
        return asked
    for checkpoint in checkpoints:
        broken = broken_part(checkpoint)
        if not broken:
            return str(checkpoint)
        if args.process_index == 0:
            print(f"{checkpoint} is passed over: {broken}", flush=True)
    raise InputError(f"{output} holds no whole checkpoint to resume from; mend --output_dir.")


def _step(checkpoint: Path) -> int:
    number = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return int(number.group(1)) if number else -1


def broken_part(checkpoint: Path) -> str | None:
    """Why a folder is no whole checkpoint, or None if it is one."""
    for name in ("trainer_state.json", "config.json"):
        try:
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"{name} is missing or broken"
    weights = sorted(checkpoint.glob("model*.safetensors"))
    if not weights:
        return "it has no weights"
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError):
            return f"{file.name} is broken"
    for name in ("optimizer.pt", "scheduler.pt"):
        if not _is_whole_zip(checkpoint / name):
            return f"{name} is missing or broken"
    return None


def _is_whole_zip(file: Path) -> bool:
    """Whether a file that `torch.save` wrote is there and its checksums are right."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


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


def first_difference(name: str, before, now) -> tuple:
    """Where two values that differ do so first, such as `levels[1].stop_gradient`, and what each has there."""
    inside = []
    if isinstance(before, dict) and isinstance(now, dict):
        inside = [(f"{name}.{key}", before.get(key), now.get(key)) for key in {**before, **now}]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        inside = [(f"{name}[{index}]", *pair) for index, pair in enumerate(zip(before, now, strict=True))]
    for part, *values in inside:
        if values[0] != values[1]:
            return first_difference(part, *values)
    return name, before, now


def changed_settings(recipe: Recipe, checkpoint: str) -> str:
    """What the recipe sets otherwise than the run that wrote a checkpoint, in words."""
    path = Path(checkpoint).parent / "recipe.yaml"
    if not path.is_file():
        return ""
    try:
        before = dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(f"{path}, the recipe of the run to resume, cannot be read; mend or remove it.") from error
    changed = [
        f"{name} was {before.get(name, 'not set')} and is {recipe.values.get(name, 'not set')}"
        for name in sorted((before.keys() | recipe.values.keys()) - _PLACES)
        if before.get(name) != recipe.values.get(name)
    ]
    return f" with other settings, so not as an uninterrupted run: {'; '.join(changed)}" if changed else ""


def is_finished(checkpoint: str, args: JepaTrainingArguments) -> bool:
    """Whether a checkpoint is the last of the run asked for."""
    state = TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json")))
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return state.epoch is not None and state.epoch >= args.num_train_epochs
