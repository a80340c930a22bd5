"""Writes what an experiment says so far: figures, table and picture."""

import json
from dataclasses import asdict
from pathlib import Path

from trainers.experiment_evaluation import evaluate_pixels, saved_image_size
from trainers.experiment_figures import draw_experiment
from trainers.experiment_plan import Experiment, choose_runs
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
    pixels = _pixels(experiment, call, found) if experiment.baselines and found else None
    rows = summarise(experiment, found, pixels, call.command)
    for folder in folders:
        write_results(folder, experiment, rows, found)
    for folder in folders:
        draw_experiment(experiment, found, rows, folder / f"{experiment.name}.png")
    return rows


def _pixels(experiment: Experiment, call: Call, found: list[dict]) -> dict:
    """The row of raw pixels of the images of the first run that is done, which is found once for them."""
    (first,) = choose_runs(experiment, [found[0]["method"]], [found[0]["seed"]])
    path, recipe = Path(call.output, _PIXELS), first.read(Path(call.output))
    size = saved_image_size(call.folder(first))
    asked = {"data": asdict(recipe.data), "evaluation": asdict(recipe.evaluation), "image_size": list(size)}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("of") != asked:
        before = {"of": asked, "row": evaluate_pixels(recipe, size)}
        write_json(path, before)
    return before["row"]
