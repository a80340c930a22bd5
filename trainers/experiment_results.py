"""What the runs of an experiment say together: means over seeds with 95 % intervals, as rows, table and files."""

import json
import statistics
from pathlib import Path
from typing import NamedTuple

from trainers.encoder_lidar import NUM_CROPS, NUM_IMAGES
from trainers.errors import InputError, first_line
from trainers.experiment_file import ACCURACIES
from trainers.experiment_plan import Experiment
from trainers.experiment_runs import EVALUATION, FAILURE, check_settings, digest_of
from trainers.files import write_json, write_text_atomically
from trainers.probes import mean_interval
from trainers.reports import markdown_table

METRICS = (*ACCURACIES, "rankme", "lidar", "feature_std")
SUMMARY = "summary.json"
_IMAGES, _MINUTES = "images_to_", "minutes_to_"
_SKIPPED = "skipped_steps"
_CALLED = {"knn": "kNN %", "linear": "linear %", "rankme": "RankMe", "lidar": "LiDAR", "feature_std": "std",
           _SKIPPED: "skipped steps %"}  # fmt: skip
_FORMS = {"feature_std": "{:.3f}"}
_UNTRAINED = {"images_seen": 0, "seconds": 0.0}


def finished_runs(experiment: Experiment, output: Path, results: Path | None = None) -> list[dict]:
    """
    What was found of the runs that are done.

    Args:
        experiment ([`Experiment`]): What they belong to.
        output (`Path`): The folder of all runs.
        results (`Path`, *optional*): A folder with earlier results of the experiment. Runs that were done with the
            same settings, and whose folders are not here, are taken over from there.

    Returns:
        `list[dict]`: Of each run its evaluation, in the experiment's order.

    Raises:
        InputError: A file of them is broken, or a run has other settings than the experiment.
    """
    earlier = _earlier_runs(experiment, results) if results else {}
    found = []
    for run in experiment.runs():
        check_settings(experiment, run, output / run.place)
        here = _read(output / run.place / EVALUATION)
        found.append(here or earlier.get((run.method, run.seed, digest_of(experiment, run))))
    return [run for run in found if run]


def failed_runs(experiment: Experiment, output: Path) -> list[dict]:
    """`method`, `seed` and `why` of each run that could not be carried out when it was last tried."""
    return [failure for run in experiment.runs() if (failure := _read(output / run.place / FAILURE))]


def _earlier_runs(experiment: Experiment, results: Path) -> dict[tuple, dict]:
    """The runs that results hold, by method, seed and hash of their settings."""
    runs = (_read(results / f"{experiment.name}.json") or {}).get("runs", [])
    return {(run["method"], run["seed"], run.get("asked")): run for run in runs}


def _read(file: Path):
    """What a JSON file holds, None if there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise InputError(f"{file} is broken ({first_line(error)}); remove it, and repeat the command.") from error


def by_method(found: list[dict]) -> dict[str, list[dict]]:
    """The runs of each method, seed by seed."""
    methods: dict[str, list[dict]] = {}
    for run in found:
        methods.setdefault(run["method"], []).append(run)
    return methods


def summarise(experiment: Experiment, found: list[dict], pixels: dict | None, command: str) -> list[dict]:
    """
    The rows of an experiment.

    Args:
        experiment ([`Experiment`]): What was compared.
        found (`list[dict]`): Of [`finished_runs`].
        pixels (`dict`, *optional*): The row of raw pixels.
        command (`str`): What repeats the experiment.

    Returns:
        `list[dict]`: Of each method and encoder a row a metric: `experiment`, `method`, `dataset`, `metric`, `value`
        (accuracies in percent), `ci95` (low and high; of several seeds that of their mean, of an accuracy of one seed
        that over test images, else None), `seeds`, `images_seen` and `seconds` of training (means over seeds),
        `machine`, `commit` (of training, and of evaluation where it is another), `command`. Two rows more for each of
        the experiment's `reach`: the images and the minutes at the first evaluation that found it reached. If steps
        were skipped anywhere, a row of their share.
    """
    rows = []
    for name, runs in by_method(found).items():
        shared = {"experiment": experiment.label, "method": name, "dataset": experiment.dataset}
        facts = _facts(runs, command)
        for label, of_seeds in _ends(name, runs).items():
            rows += _metric_rows(shared | {"method": label}, of_seeds, facts)
        if any(run["training"][_SKIPPED] for run in found):
            rows.append(_skipped(shared, runs, facts))
        for metric, percent in experiment.reach.items():
            rows += _reached(shared, metric, percent, runs, facts)
    untrained = _random_encoders(found)
    if pixels is not None and found:
        untrained.append(("raw pixels", [pixels], found[:1]))
    for label, of_seeds, runs in untrained:
        shared = {"experiment": experiment.label, "method": label, "dataset": experiment.dataset}
        rows += _metric_rows(shared, of_seeds, _facts(runs, command) | _UNTRAINED)
    return rows


def _facts(runs: list[dict], command: str) -> dict:
    """What a row says of how its figures were made."""
    machines = {", ".join(f"{value} {name}" if name in ("cores", "threads") else str(value)
                          for name, value in run["machine"].items()) for run in runs}  # fmt: skip
    commits = {facts.get("commit", "unknown") for run in runs for facts in (run["software"], run["evaluated"])}
    return {
        "seeds": [run["seed"] for run in runs],
        "images_seen": round(statistics.mean(run["training"]["images_seen"] for run in runs)),
        "seconds": round(statistics.mean(run["training"]["seconds"] for run in runs), 1),
        "machine": "; ".join(sorted(machines)),
        "commit": ", ".join(sorted(commits)),
        "command": command,
    }


def _ends(name: str, runs: list[dict]) -> dict[str, list[dict]]:
    """By what they are called, the rows of a method's encoders at the end of training, one a seed."""
    ends: dict[str, list[dict]] = {}
    for run in runs:
        for row in run["points"][-1]["rows"]:
            label = f"{name}, {row['encoder']}" if row["encoder"] else name
            ends.setdefault(label, []).append(row)
    return ends


def _random_encoders(found: list[dict]) -> list[tuple[str, list[dict], list[dict]]]:
    """The encoders before training: once for all methods that have the same."""
    kinds: list[tuple[set, dict[str, list[dict]]]] = []
    for name, runs in by_method(found).items():
        # alike by the figures of a seed that both have: a method may lack others
        figures = {
            (run["seed"], row.get("num_parameters"), row["dim"], row["knn"], row["linear"])
            for run in runs
            for row in run["baselines"][:1]
        }
        if not figures:
            continue
        known, of_methods = next((kind for kind in kinds if kind[0] & figures), (set(), {}))
        if not of_methods:
            kinds.append((known, of_methods))
        known |= figures
        of_methods[name] = runs
    encoders = []
    for _, of_methods in kinds:
        runs = max(of_methods.values(), key=len)
        label = "random encoder" if len(kinds) == 1 else f"random encoder of {', '.join(of_methods)}"
        encoders.append((label, [run["baselines"][0] for run in runs], runs))
    return encoders


def _metric_rows(shared: dict, of_seeds: list[dict], facts: dict) -> list[dict]:
    rows = []
    for metric in METRICS:
        values = [row[metric] for row in of_seeds if row.get(metric) is not None]
        if len(values) < len(of_seeds):
            continue
        ci95 = mean_interval(values) or of_seeds[0].get(f"{metric}_interval")
        rows.append(shared | {"metric": metric, "value": statistics.mean(values), "ci95": ci95} | facts)
    return rows


def _skipped(shared: dict, runs: list[dict], facts: dict) -> dict:
    """The row of the percentage of steps that were skipped, since their loss or gradient was not finite."""
    shares = [100 * run["training"][_SKIPPED] / run["training"]["steps"] for run in runs]
    return shared | {"metric": _SKIPPED, "value": statistics.mean(shares), "ci95": mean_interval(shares)} | facts


def _reached(shared: dict, metric: str, percent: float, runs: list[dict], facts: dict) -> list[dict]:
    """
    The rows of the images and of the minutes of training at the first evaluation that found an accuracy reached.

    Their values are means over the seeds, and None where one did not reach it.
    """
    first = [next((point for point in course_of(run, metric) if point.percent >= percent), None) for run in runs]
    rows = []
    for name, field in ((_IMAGES, "images"), (_MINUTES, "minutes")):
        values = None if None in first else [getattr(point, field) for point in first]
        told = {"value": values and statistics.mean(values), "ci95": values and mean_interval(values)}
        rows.append(shared | {"metric": f"{name}{metric}_{percent:g}"} | told | facts)
    return rows


class Point(NamedTuple):
    """
    A method's own encoder on its way.

    Args:
        images (`int`): Seen in training.
        minutes (`float`): Of training.
        percent (`float`): An accuracy.
    """

    images: int
    minutes: float
    percent: float


def course_of(run: dict, metric: str) -> list[Point]:
    """
    An accuracy at each of a run's evaluations.

    Args:
        run (`dict`): Of [`finished_runs`].
        metric (`"knn"` or `"linear"`): Which.

    Returns:
        `list` of [`Point`].
    """
    training = run["training"]
    minutes_of_image = training["seconds"] / 60 / training["images_seen"]
    return [
        Point(point["images_seen"], point["images_seen"] * minutes_of_image, point["rows"][0][metric])
        for point in run["points"]
    ]


def format_rows(experiment: Experiment, rows: list[dict], failed: list[dict]) -> str:
    """The rows of an experiment as Markdown, a line a method, and what could not be carried out."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    of = {(row["method"], row["metric"]): row for row in rows}
    cells = [["method", *map(_called, metrics), "images seen", "minutes", "seeds"]]
    for method in methods:
        any_row = next(row for row in rows if row["method"] == method)
        known = [_cell(of.get((method, metric))) for metric in metrics]
        seen, minutes = f"{any_row['images_seen']:,}", f"{any_row['seconds'] / 60:.1f}"
        cells.append([method, *known, seen, minutes, ", ".join(map(str, any_row["seeds"]))])
    facts = {name: "; ".join(dict.fromkeys(row[name] for row in rows)) for name in ("machine", "command")}
    commits = ", ".join(dict.fromkeys(commit for row in rows for commit in row["commit"].split(", ")))
    return "\n".join([
        f"# {experiment.title}",
        "",
        f"{experiment.dataset}; `{facts['command']}`; {facts['machine']}; commit {commits}. In brackets 95 % "
        "intervals: of the mean over seeds, or over test images where there is one seed. RankMe and std are of test "
        f"images, LiDAR is of {NUM_CROPS} crops each of {NUM_IMAGES:,} of them; levels side by side have length 1.",
        "",
        *markdown_table(cells),
        "",
        *(f"- Failed: {run['method']}, seed {run['seed']}: {run['why']}" for run in failed),
        *([""] if failed else []),
    ])  # fmt: skip


def _called(metric: str) -> str:
    for begin, unit in ((_IMAGES, "images"), (_MINUTES, "minutes")):
        if metric.startswith(begin):
            accuracy, percent = metric.removeprefix(begin).split("_")
            return f"{unit} to {percent} % {accuracy}"
    return _CALLED[metric]


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["value"] is None:
        return "not reached"
    form = "{:,.0f}" if row["metric"].startswith(_IMAGES) else _FORMS.get(row["metric"], "{:.1f}")
    ends = f" ({' to '.join(map(form.format, row['ci95']))})" if row["ci95"] else ""
    return form.format(row["value"]) + ends


def write_results(folder: Path, experiment: Experiment, rows: list[dict], found: list[dict], failed: list[dict]):
    """
    Writes `NAME.json` and `NAME.md`, and puts the rows into `summary.json` in place of the experiment's earlier ones.

    Args:
        folder (`Path`): Where to; made if there is none.
        experiment ([`Experiment`]): Whose.
        rows (`list[dict]`): Of [`summarise`].
        found (`list[dict]`): Of [`finished_runs`].
        failed (`list[dict]`): Of [`failed_runs`].

    Raises:
        InputError: `summary.json` there is no list of rows.
    """
    summary = folder / SUMMARY
    try:
        before = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else []
        others = [row for row in before if row["experiment"] != experiment.label]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{summary} is no list of rows ({first_line(error)}); mend or remove it.") from error
    told = {"title": experiment.title, "rows": rows, "runs": found, "failed": failed}
    write_json(folder / f"{experiment.name}.json", told)
    write_text_atomically(folder / f"{experiment.name}.md", format_rows(experiment, rows, failed))
    write_json(summary, others + rows)
