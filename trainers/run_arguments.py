"""Training arguments of a run, for the processes that were launched and in a folder that can be made."""

import os
from datetime import datetime
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from trainers.errors import InputError
from trainers.recipes import Recipe
from trainers.training_args import JepaTrainingArguments


def training_arguments(recipe: Recipe) -> JepaTrainingArguments:
    """The run's arguments."""
    return start_arguments(recipe.objective.training_class, recipe.training, recipe.name)


def start_arguments(training_class: type[TrainingArguments], values: dict, name: str) -> TrainingArguments:
    """
    Training arguments for the processes that were launched.

    Args:
        training_class (`type`): Their class.
        values (`dict`): The fields that are set; without `output_dir` a new folder under `runs/` is named after the
            run and the time.
        name (`str`): What the run is called.

    Returns:
        An instance of `training_class`.

    Raises:
        InputError: A value is out of its range, or the devices do not suffice for the processes.
    """
    values = dict(values)
    values.setdefault("report_to", "none")
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1 and not torch.accelerator.is_available():
        # without it, transformers starts a run in each process
        values.setdefault("use_cpu", True)
    if "output_dir" not in values:
        folder = [f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"]
        if num_processes > 1:
            # the clocks of the processes may differ by the second that matters
            PartialState(cpu=bool(values.get("use_cpu", False)))
            broadcast_object_list(folder)
        values["output_dir"] = folder[0]
    _check_output_dir(values["output_dir"])
    try:
        args = training_class(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if args.world_size != num_processes:
        raise InputError(
            f"{num_processes} processes were launched, and {args.world_size} would train on {args.device}; launch as "
            "many as there are devices, or all on the CPU with --use_cpu."
        )
    return args


def _check_output_dir(output_dir: str):
    """Refuses what is no folder and cannot be one, though it is not made yet."""
    output = Path(output_dir)
    if output_dir == "":
        raise InputError("--output_dir '' names no folder; name one, or leave it out.")
    try:
        os.lstat(output)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        raise InputError(f"--output_dir {output} cannot be a folder ({error}); name another.") from error
    if any(path.exists() and not path.is_dir() for path in (output, *output.parents)):
        raise InputError(f"--output_dir {output} is a file or lies in one; name a folder.")
