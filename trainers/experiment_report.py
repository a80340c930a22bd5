"""Writes what an experiment says so far: figures, table and picture."""

import json
from dataclasses import asdict
from pathlib import Path

from trainers.experiment_differences import differences, format_differences
from trainers.experiment_evaluation import evaluate_pixels, saved_image_size
from trainers.experiment_figures import draw_experiment
from trainers.experiment_plan import Experiment
from trainers.experiment_results import format_rows, summarise
from trainers.experiment_runs import Call, is_done
from trainers.experiment_store import Found, find, refuse_other_images, write_results
from trainers.files import write_json

_PIXELS = "raw_pixels.json"


def report(experiment: Experiment, call: Call, results: Path | None = None, is_whole: bool = True) -> str:
    """
    Writes the results of the runs that are done into their folder.

    Args:
        experiment ([`Experiment`]): Of which.
        call ([`Call`]): How they were carried out.
        results (`Path`, *optional*): Where to, too. What is there of runs that are not here is kept.
        is_whole (`bool`): Whether raw pixels are evaluated where they are not known; not where one waits for the end.

    Returns:
        `str`: The table, and which runs failed.

    Raises:
        InputError: The folder of results has figures on other test images; the runs' folder has what was found.
    """
    output = Path(call.output)
    found = find(experiment, output, results)
    if not found.runs:
        return found.format_failures()
    if experiment.baselines:
        found.pixels = _pixels(experiment, call, is_whole) or found.pixels
    rows, less_first = summarise(experiment, found, call.command), differences(experiment, found.runs)
    table = format_table(experiment, rows, less_first, found)
    _write(output, experiment, rows, less_first, table, found)
    if results:
        refuse_other_images(experiment, found, results)
        _write(results, experiment, rows, less_first, table, found)
    return table


def format_table(experiment: Experiment, rows: list[dict], less_first: list[dict], found: Found) -> str:
    """What an experiment says as Markdown: rows, their differences from the first method, which runs failed."""
    parts = format_rows(experiment, rows), format_differences(less_first), found.format_failures()
    return "\n".join(filter(None, parts))


def _write(folder: Path, experiment: Experiment, rows: list[dict], less_first: list[dict], table: str, found: Found):
    """Figures, table and picture into a folder."""
    write_results(folder, experiment, rows, less_first, table, found)
    draw_experiment(experiment, found.runs, rows, folder / f"{experiment.name}.png")


def _pixels(experiment: Experiment, call: Call, is_whole: bool) -> dict | None:
    """The row of raw pixels of the images of the first run that is done here, which is found once for them."""
    first = next((run for run in experiment.runs() if is_done(call.folder(run))), None)
    if first is None:
        return None
    path, recipe = Path(call.output, _PIXELS), first.read(Path(call.output))
    size = saved_image_size(call.folder(first))
    asked = {"data": asdict(recipe.data), "evaluation": asdict(recipe.evaluation), "image_size": list(size)}
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("of") != asked:
        if not is_whole:
            return None
        before = {"of": asked, "row": evaluate_pixels(recipe, size)}
        write_json(path, before)
    return before["row"]
