"""Writes what an experiment says so far: figures, table and picture."""

import json
from dataclasses import asdict
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
    for folder in folders:
        draw_experiment(experiment, found, rows, folder / f"{experiment.name}.png")
    return rows


def _pixels(experiment: Experiment, output: Path) -> dict:
    """The row of raw pixels of the first run's images, which is found once for them."""
    path, recipe = output / _PIXELS, experiment.runs()[0].read(output)
    size = pair(recipe.objective.build_config(recipe.model).image_size)
    asked = {"data": asdict(recipe.data), "evaluation": asdict(recipe.evaluation), "image_size": list(size)}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("of") != asked:
        before = {"of": asked, "row": evaluate_pixels(recipe, size)}
        write_json(path, before)
    return before["row"]
