"""What is known of an experiment's runs, and its results as files."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainers.errors import InputError, first_line
from trainers.experiment_plan import Experiment
from trainers.experiment_runs import EVALUATION, FAILURE, check_settings, digest_of, settings_text
from trainers.files import write_json, write_text_atomically

SUMMARY = "summary.json"


@dataclass
class Found:
    """
    What is known of the runs of an experiment.

    Args:
        runs (`list[dict]`): The evaluations of those that are done, in the experiment's order.
        failed (`list[dict]`): `method`, `seed` and `why` of those that failed when they were last tried.
        pixels (`dict`, *optional*): The row of raw pixels.
    """

    runs: list[dict] = field(default_factory=list)
    failed: list[dict] = field(default_factory=list)
    pixels: dict | None = None

    def format_failures(self) -> str:
        """A line for each run that failed."""
        return "".join(f"- Failed: {run['method']}, seed {run['seed']}: {run['why']}\n" for run in self.failed)


def find(experiment: Experiment, output: Path, results: Path | None = None) -> Found:
    """
    Reads what is known of an experiment's runs.

    Args:
        experiment ([`Experiment`]): What they belong to.
        output (`Path`): The folder of all runs.
        results (`Path`, *optional*): A folder with earlier results of the experiment. What was found there with the
            same settings, on the same test images, of runs whose folders are not here is taken over.

    Returns:
        [`Found`].

    Raises:
        InputError: A file of them is broken, or a run has other settings than the experiment.
    """
    here = {}
    for run in experiment.runs():
        folder = output / run.place
        digest = digest_of(run, check_settings(experiment, run, folder))
        here[digest] = _read(folder / EVALUATION) or _read(folder / FAILURE)
    earlier = _earlier(experiment, results) if results else {}
    there = {told.get("asked"): told for told in earlier.get("failed", []) + earlier.get("runs", [])}
    images = {told["images"]["fingerprint"] for told in here.values() if _is_done(told)}
    known = [_best_known(told, there.get(digest), images) for digest, told in here.items()]
    failed = [told for told in known if told and not _is_done(told)]
    # raw pixels are of the images of the runs beside them
    is_of_others = images and not any(_is_on(images, told) for told in there.values())
    return Found(list(filter(_is_done, known)), failed, None if is_of_others else earlier.get("pixels"))


def outdated(experiment: Experiment, results: Path) -> list[str]:
    """The runs, such as `c-jepa, seed 42`, whose figures in a folder of results are of other settings than now."""
    earlier = _earlier(experiment, results).get("runs", [])
    asked = {digest_of(run, settings_text(experiment, run)) for run in experiment.runs()} if earlier else set()
    return [f"{told['method']}, seed {told['seed']}" for told in earlier if told.get("asked") not in asked]


def refuse_other_images(experiment: Experiment, found: Found, results: Path):
    """Refuses a folder of results with figures on other test images than what was found, which would be lost."""
    images = {told["images"]["fingerprint"] for told in found.runs}
    if any(not _is_on(images, told) for told in _earlier(experiment, results).get("runs", [])):
        raise InputError(
            f"{results / experiment.name}.json has figures on other test images, and nothing was written there; name "
            "another --results, or remove that file."
        )


def _earlier(experiment: Experiment, results: Path) -> dict:
    """What a folder of results has of an experiment."""
    return _read(results / f"{experiment.name}.json") or {}


def _is_done(told: dict | None) -> bool:
    """Whether what is told of a run is its evaluation, and not why it failed, or nothing."""
    return told is not None and "points" in told


def _is_on(images: set[str], told: dict) -> bool:
    """Whether what is told of a run is its evaluation on some test images, given by their fingerprints."""
    return _is_done(told) and told["images"]["fingerprint"] in images


def _best_known(here: dict | None, there: dict | None, images: set[str]) -> dict | None:
    """An evaluation rather than a failure, and what is here rather than what is elsewhere, on the same test images."""
    if _is_done(there) and images and not _is_on(images, there):
        there = None
    if here is None or (_is_done(there) and not _is_done(here)):
        return there
    return here


def _read(file: Path):
    """What a JSON file holds, None if there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise InputError(f"{file} is broken ({first_line(error)}); remove it, and repeat the command.") from error


def write_results(
    folder: Path, experiment: Experiment, rows: list[dict], differences: list[dict], table: str, found: Found
):
    """
    Writes `NAME.json` and `NAME.md`, and puts the rows into `summary.json`, by experiment, in place of its
    earlier ones.

    Args:
        folder (`Path`): Where to; made if there is none.
        experiment ([`Experiment`]): Whose.
        rows (`list[dict]`): Of [`~experiment_results.summarise`].
        differences (`list[dict]`): Of [`~experiment_differences.differences`].
        table (`str`): What `NAME.md` holds.
        found ([`Found`]): Of [`find`].

    Raises:
        InputError: `summary.json` there is broken or no list of rows.
    """
    summary = folder / SUMMARY
    try:
        others = [row for row in _read(summary) or [] if row["experiment"] != experiment.label]
    except (TypeError, KeyError) as error:
        raise InputError(f"{summary} is no list of rows ({first_line(error)}); mend or remove it.") from error
    told = {"title": experiment.title, "rows": rows, "differences": differences}
    write_json(folder / f"{experiment.name}.json", told | asdict(found))
    write_text_atomically(folder / f"{experiment.name}.md", table)
    write_json(summary, sorted(others + rows, key=lambda row: row["experiment"]))
