"""Writes what an experiment says so far: figures, table and picture."""

import json
from pathlib import Path

from modeling_cjepa.configuration_cjepa import pair
from trainers.experiment_evaluation import evaluate_pixels
from trainers.experiment_figures import draw_experiment
from trainers.experiment_plan import Experiment
from trainers.experiment_results import finished_runs, summarise, write_results
from trainers.experiment_runs import Call
from trainers.files import write_json

_PIXELS = "raw_pixels.json"


def report(experiment: Experiment, call: Call, folders: list[Path]) -> list[dict]:
    """
    Writes the results of the runs that are done.

    Args:
        experiment ([`Experiment`]): Of which.
        call ([`Call`]): How they were carried out.
        folders (`list[Path]`): Where to.

    Returns:
        `list[dict]`: The rows of [`~experiment_results.summarise`].
    """
    found = finished_runs(experiment, Path(call.output))
    pixels = _pixels(experiment, Path(call.output)) if experiment.baselines else None
    rows = summarise(experiment, found, pixels, call.command)
    for folder in folders:
        write_results(folder, experiment, rows, found)
        draw_experiment(experiment, found, rows, folder / f"{experiment.name}.png")
    return rows


def _pixels(experiment: Experiment, output: Path) -> dict:
    """The row of raw pixels, which is found once."""
    path = output / _PIXELS
    if not path.is_file():
        recipe = experiment.runs()[0].read(output)
        config = recipe.objective.build_config(recipe.model)
        write_json(path, evaluate_pixels(recipe, pair(config.image_size)))
    return json.loads(path.read_text(encoding="utf-8"))
