"""Experiments as YAML files: read, and refused with a sentence where they cannot be carried out."""

import math
import re
from pathlib import Path

import yaml

from modeling_cjepa.configuration_cjepa import choose_level
from trainers.errors import InputError
from trainers.experiment_plan import Experiment, Run
from trainers.flags import check_value, closest, type_hints
from trainers.resources import experiment_path
from trainers.rivals import RIVALS

ACCURACIES = ("knn", "linear")
FIGURES = ("bars", "curves", "map")
# what the runner sets of each run
_SAVES = "num_checkpoints says at how many places runs are saved"
_OF_THE_RUNNER = {
    "seed": "`seeds` are theirs",
    "output_dir": "--output names the folder of all runs",
    "resume_from_checkpoint": "runs are gone on with by themselves",
    "evaluate": "all runs are evaluated",
    "save_strategy": _SAVES, "save_steps": _SAVES, "save_total_limit": _SAVES, "keep_checkpoints_every": _SAVES,
    "push_to_hub": "publish the run you choose when all are done",
    "streaming": "all runs are evaluated on the images themselves; give --dataset a folder or parquet files",
}  # fmt: skip
# rows of what has to be beaten and is not trained; no method is called so
RANDOM, PIXELS = "random encoder", "raw pixels"
BASELINES = (RANDOM, PIXELS)
# files among results; no experiment is called so
_FILES = ("summary", "raw_pixels")
_NAME = re.compile(r"[A-Za-z0-9][\w .,:()'+=%-]{0,99}")
# what is added to a method's name in rows of its encoders
_OF_ENCODERS = re.compile(r", (context encoder|all levels|level \d+)$")
# keys by which the images are others than the file says
_IMAGES = (
    "num_train_images", "num_eval_images", "num_probe_images", "image_size", "train_split", "eval_split",
    "dataset_config", "label_column",
)  # fmt: skip


def read_experiment(path_or_name: str, overrides: dict | None = None) -> Experiment:
    """
    Reads an experiment and builds the configuration of every run's model.

    Args:
        path_or_name (`str`): A YAML file, or the name of a shipped experiment.
        overrides (`dict`, *optional*): Keys of a recipe to be laid on all runs. Where they choose other images, the
            rows say so.

    Returns:
        [`Experiment`].

    Raises:
        InputError: There is no such file, or it says what cannot be run; the message names the key.
    """
    path, overrides = experiment_path(path_or_name), overrides or {}
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())}); mend it.") from error
    experiment = _checked(values, path)
    _check_overrides(overrides, experiment)
    as_written = experiment.runs()[0]
    experiment.settings = experiment.settings | overrides
    runs = experiment.runs()
    places = [run.place for run in runs]
    for run in runs:
        if places.count(run.place) > 1:
            raise InputError(f"{path}: two runs are {run.place}; give methods, swept values and seeds that differ.")
        _check_run(run, experiment, path)
    if others := _other_images(overrides, as_written):
        experiment.dataset += f" ({', '.join(others)})"
    return experiment


def _other_images(overrides: dict, as_written: Run) -> list[str]:
    """By which keys the images are others than those of a run as the file has it; where they lie does not matter."""
    others = [f"{name} {overrides[name]}" for name in _IMAGES if name in overrides]
    if "dataset" in overrides:
        name = Path(overrides["dataset"]).name
        if name != Path(as_written.read(Path("runs")).data.dataset).name:
            others.insert(0, f"dataset {name}")
    return others


def _check_run(run: Run, experiment: Experiment, path: Path):
    """Refuses a run whose recipe, model or level cannot be."""
    try:
        recipe = run.read(Path("runs"))
        config = recipe.objective.build_config(recipe.model)
        if run.rival is not None:
            RIVALS[run.rival].check(config)
            if recipe.run.start_from is not None:
                raise InputError(f"rival {run.rival} starts anew; leave start_from out.")
            if recipe.training.get("exact_accumulation"):
                raise InputError(f"rival {run.rival} has no statistics of a batch; leave exact_accumulation out.")
        if experiment.level != "all" and config.num_levels > 1:
            choose_level(experiment.level, config.num_levels)
    except (InputError, ValueError) as error:
        raise InputError(f"{path}, {run.method}: {' '.join(str(error).split())}") from error


def _checked(values, path: Path) -> Experiment:
    """The experiment of a file's keys; `InputError` for the first that is unknown, missing or of another kind."""
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a mapping of keys to values; write lines such as `title: ...`.")
    if path.stem in _FILES:
        raise InputError(f"{path} would write over {path.stem}.json, which is another file; rename it.")
    hints = {name: hint for name, hint in type_hints(Experiment).items() if name != "name"}
    for key in values:
        if key not in hints:
            close = closest(str(key), hints)
            guess = f" (did you mean {close!r}?)" if close else ""
            raise InputError(f"{path}: unknown key {key!r}{guess}; an experiment has {', '.join(hints)}.")
    for key in ("title", "dataset", "recipe", "methods"):
        if not values.get(key):
            raise InputError(f"{path}: {key!r} is missing; every experiment has title, dataset, recipe and methods.")
    for key, value in values.items():
        check_value(key, value, hints[key], str(path))
    values["methods"] = {name: {} if own is None else own for name, own in values["methods"].items()}
    experiment = Experiment(path.stem, **values)
    _check_methods(experiment, path)
    _check_numbers(experiment, path)
    return experiment


def _check_methods(experiment: Experiment, path: Path):
    for name, own in experiment.methods.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name) or name.startswith(BASELINES):
            raise InputError(
                f"{path}: {name!r} cannot be a method's name; give up to 100 letters, digits and spaces, and not "
                f"{' or '.join(BASELINES)}."
            )
        if of_encoder := _OF_ENCODERS.search(name):
            raise InputError(
                f"{path}: {name!r} would be taken for a row of another method's; leave {of_encoder[0]!r} out."
            )
        if not isinstance(own, dict) or not all(isinstance(key, str) for key in own):
            raise InputError(f"{path}: {name}: {own!r} must be a mapping of keys to values.")
        check_value("recipe", own.get("recipe", ""), str, f"{path}, {name}")
        rival = own.get("rival")
        check_value("rival", rival, str | None, f"{path}, {name}")
        if rival is not None and rival not in RIVALS:
            raise InputError(f"{path}, {name}: rival={rival!r} is not known; choose one of {', '.join(RIVALS)}.")
    _check_sweep(experiment, path)
    for own in (experiment.settings, *experiment.methods.values(), experiment.swept_keys):
        for key in own:
            _refuse_runners_own(key, f"{path}: {key}")


def _check_numbers(experiment: Experiment, path: Path):
    lists = {"seeds": experiment.seeds, **experiment.sweep}
    for name, values in lists.items():
        if not isinstance(values, list) or not values or not all(map(_is_number, values)):
            raise InputError(f"{path}: {name}={values!r} must be a list of numbers, one or more.")
    for name, percent in experiment.reach.items():
        if name not in ACCURACIES:
            raise InputError(f"{path}: reach: {name!r} is not known; choose {' or '.join(ACCURACIES)}.")
        if not _is_number(percent):
            raise InputError(f"{path}: reach: {name}={percent!r} must be a number of percent.")
    if experiment.figure not in FIGURES:
        raise InputError(f"{path}: figure={experiment.figure!r} is not known; choose one of {', '.join(FIGURES)}.")
    if experiment.figure == "map" and len(experiment.sweep) != 2:
        raise InputError(f"{path}: a map has two swept keys, and `sweep` has {len(experiment.sweep)}.")
    if experiment.num_checkpoints < 1:
        raise InputError(f"{path}: num_checkpoints={experiment.num_checkpoints!r} must be a whole number from 1 up.")
    if isinstance(experiment.level, str) and experiment.level != "all":
        raise InputError(f"{path}: level={experiment.level!r} is no level; give a number from 0, or all.")


def _check_sweep(experiment: Experiment, path: Path):
    if not all(isinstance(keys, str) for keys in experiment.sweep):
        raise InputError(f"{path}: sweep: {list(experiment.sweep)} must be keys of a recipe.")
    swept = experiment.swept_keys
    if len(set(swept)) < len(swept):
        raise InputError(f"{path}: sweep: {', '.join(swept)} has a key twice; leave one out.")
    for name, own in experiment.methods.items():
        for key in own:
            if key in swept:
                raise InputError(f"{path}, {name}: {key!r} is swept, too; leave it out of the method or of the sweep.")


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_overrides(overrides: dict, experiment: Experiment):
    """Refuses flags for what the runs of an experiment differ in."""
    for name in overrides:
        _refuse_runners_own(name, f"--{name}")
        if name in experiment.swept_keys or any(name in own for own in experiment.methods.values()):
            raise InputError(f"--{name} is what runs of {experiment.name} differ in; write an experiment of your own.")


def _refuse_runners_own(name: str, where: str):
    if name in _OF_THE_RUNNER:
        raise InputError(f"{where} is set for each run of an experiment ({_OF_THE_RUNNER[name]}); leave it out.")
