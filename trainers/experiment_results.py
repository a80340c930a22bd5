"""What the runs of an experiment say together: means over seeds with 95 % intervals, as rows, table and files."""

import json
import statistics
from pathlib import Path

from trainers.errors import InputError, first_line
from trainers.experiment_file import ACCURACIES
from trainers.experiment_plan import Experiment
from trainers.experiment_runs import EVALUATION, check_settings
from trainers.files import write_json, write_text_atomically
from trainers.probes import mean_interval
from trainers.reports import markdown_table

# of the encoders on test images, but for LiDAR, which needs views and is of the last log
METRICS = (*ACCURACIES, "rankme", "lidar", "feature_std")
SUMMARY = "summary.json"
_REACHED = "images_to_"
_FORMS = {"feature_std": "{:.3f}"}
_UNTRAINED = {"images_seen": 0, "seconds": 0.0}


def finished_runs(experiment: Experiment, output: Path) -> list[dict]:
    """
    What was found of the runs that are done.

    Args:
        experiment ([`Experiment`]): What they belong to.
        output (`Path`): The folder of all runs.

    Returns:
        `list[dict]`: Of each run its evaluation, in the experiment's order.

    Raises:
        InputError: A file of them is broken, or a run has other settings than the experiment.
    """
    found = []
    for run in experiment.runs():
        check_settings(experiment, run, output / run.place)
        file = output / run.place / EVALUATION
        try:
            found += [json.loads(file.read_text(encoding="utf-8"))] if file.is_file() else []
        except ValueError as error:
            raise InputError(f"{file} is broken ({first_line(error)}); remove it, and repeat the command.") from error
    return found


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
        `machine`, `commit`, `command`.
    """
    rows = []
    for name, runs in by_method(found).items():
        shared = {"experiment": experiment.label, "method": name, "dataset": experiment.dataset}
        facts = _facts(runs, command)
        for label, of_seeds in _ends(name, runs).items():
            rows += _metric_rows(shared | {"method": label}, of_seeds, facts)
        rows += [_reached(shared, metric, percent, runs, facts) for metric, percent in experiment.reach.items()]
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
    return {
        "seeds": [run["seed"] for run in runs],
        "images_seen": round(statistics.mean(run["training"]["images_seen"] for run in runs)),
        "seconds": round(statistics.mean(run["training"]["seconds"] for run in runs), 1),
        "machine": "; ".join(sorted(machines)),
        "commit": ", ".join(sorted({run["software"].get("commit", "unknown") for run in runs})),
        "command": command,
    }


def _ends(name: str, runs: list[dict]) -> dict[str, list[dict]]:
    """By what they are called, the rows of a method's encoders at the end of training, one a seed."""
    ends: dict[str, list[dict]] = {}
    for run in runs:
        for row in run["points"][-1]["rows"]:
            label, signs = (f"{name}, {row['encoder']}", {}) if row["encoder"] else (name, run["signs"])
            ends.setdefault(label, []).append(row | {"lidar": signs.get("lidar")})
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


def _reached(shared: dict, metric: str, percent: float, runs: list[dict], facts: dict) -> dict:
    """The row of the images after which an accuracy was reached; its value is None if a seed did not reach it."""
    values = [images_until(run, metric, percent) for run in runs]
    is_reached = None not in values
    return shared | {
        "metric": f"{_REACHED}{metric}_{percent:g}",
        "value": statistics.mean(values) if is_reached else None,
        "ci95": mean_interval(values) if is_reached else None,
    } | facts  # fmt: skip


def images_until(run: dict, metric: str, percent: float) -> float | None:
    """
    After how many images an accuracy was reached for the first time, on straight lines between the evaluations.

    Args:
        run (`dict`): Of [`finished_runs`]; the encoder before training, where evaluated, is where the lines begin.
        metric (`"knn"` or `"linear"`): Which.
        percent (`float`): What is to be reached.

    Returns:
        `float`: None if it never was.
    """
    course = course_of(run, metric)
    for (images, value), (images_then, value_then) in zip([course[0], *course], course, strict=False):
        if value_then >= percent:
            share = (percent - value) / (value_then - value) if value_then > value else 1.0
            return images + max(share, 0.0) * (images_then - images)
    return None


def course_of(run: dict, metric: str) -> list[tuple[int, float]]:
    """Images seen and a figure of the method's own encoder, from before training, where that is known, to the end."""
    begin = [(0, row[metric]) for row in run["baselines"][:1]]
    return begin + [(point["images_seen"], point["rows"][0][metric]) for point in run["points"]]


def format_rows(experiment: Experiment, rows: list[dict]) -> str:
    """The rows of an experiment as Markdown: a line a method."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    of = {(row["method"], row["metric"]): row for row in rows}
    cells = [["method", *map(_called, metrics), "images seen", "minutes", "seeds"]]
    for method in methods:
        any_row = next(row for row in rows if row["method"] == method)
        known = [_cell(of.get((method, metric))) for metric in metrics]
        seen, minutes = f"{any_row['images_seen']:,}", f"{any_row['seconds'] / 60:.1f}"
        cells.append([method, *known, seen, minutes, ", ".join(map(str, any_row["seeds"]))])
    facts = {name: "; ".join(dict.fromkeys(row[name] for row in rows)) for name in ("machine", "commit", "command")}
    return "\n".join([
        f"# {experiment.title}",
        "",
        f"{experiment.dataset}; `{facts['command']}`; {facts['machine']}; commit {facts['commit']}. In brackets 95 % "
        "intervals: of the mean over seeds, or over test images where there is one seed.",
        "",
        *markdown_table(cells),
        "",
    ])  # fmt: skip


def _called(metric: str) -> str:
    if metric.startswith(_REACHED):
        accuracy, percent = metric.removeprefix(_REACHED).split("_")
        return f"images to {percent} % {accuracy}"
    return {"knn": "kNN %", "linear": "linear %", "rankme": "RankMe", "lidar": "LiDAR", "feature_std": "std"}[metric]


def _cell(row: dict | None) -> str:
    if row is None:
        return "-"
    if row["value"] is None:
        return "not reached"
    form = "{:,.0f}" if row["metric"].startswith(_REACHED) else _FORMS.get(row["metric"], "{:.1f}")
    ends = f" ({' to '.join(map(form.format, row['ci95']))})" if row["ci95"] else ""
    return form.format(row["value"]) + ends


def write_results(folder: Path, experiment: Experiment, rows: list[dict], found: list[dict]):
    """
    Writes `NAME.json` and `NAME.md`, and puts the rows into `summary.json` in place of the experiment's earlier ones.

    Args:
        folder (`Path`): Where to; made if there is none.
        experiment ([`Experiment`]): Whose.
        rows (`list[dict]`): Of [`summarise`].
        found (`list[dict]`): Of [`finished_runs`].

    Raises:
        InputError: `summary.json` there is no list of rows.
    """
    summary = folder / SUMMARY
    try:
        before = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else []
        others = [row for row in before if row["experiment"] != experiment.label]
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{summary} is no list of rows ({first_line(error)}); mend or remove it.") from error
    write_json(folder / f"{experiment.name}.json", {"title": experiment.title, "rows": rows, "runs": found})
    write_text_atomically(folder / f"{experiment.name}.md", format_rows(experiment, rows))
    write_json(summary, others + rows)
