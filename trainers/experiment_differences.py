"""How far methods are from the first one: differences of runs that have the same seed, with 95 % intervals."""

import statistics

from trainers.experiment_file import ACCURACIES
from trainers.experiment_plan import Experiment
from trainers.experiment_results import by_method, ends_of, format_cell
from trainers.probes import mean_interval
from trainers.reports import markdown_table


def differences(experiment: Experiment, runs: list[dict]) -> list[dict]:
    """
    The accuracies of each method and encoder less those of the first method, seed by seed.

    Runs of the same seed see the same images in the same order, and begin alike where their encoders are, so that
    differences may be clear where the intervals of means overlap.

    Args:
        experiment ([`Experiment`]): What was compared.
        runs (`list[dict]`): The evaluations of its runs.

    Returns:
        `list[dict]`: `method`, `less` (the first method), `metric`, `value` (points of percent, the mean over seeds),
        `ci95` (of that mean, by Student's t), `seeds` (those that both have; two or more). Nothing of a sweep, each
        place of which would be compared with its corner.
    """
    methods = by_method(runs)
    first = next(iter(experiment.methods))
    if experiment.sweep or first not in methods:
        return []
    origin = {run["seed"]: run["points"][-1]["rows"][0] for run in methods[first]}
    rows = []
    for name, of_method in methods.items():
        paired = [run for run in of_method if run["seed"] in origin]
        for label, ends in ends_of(name, paired).items():
            if label == first or len(ends) < 2 or len(ends) < len(paired):
                continue
            seeds = [run["seed"] for run in paired]
            for metric in ACCURACIES:
                values = [end[metric] - origin[seed][metric] for end, seed in zip(ends, seeds, strict=True)]
                told = {"value": statistics.mean(values), "ci95": mean_interval(values), "seeds": seeds}
                rows.append({"method": label, "less": first, "metric": metric} | told)
    return rows


def format_differences(rows: list[dict]) -> str:
    """The rows of [`differences`] as Markdown, a line a method; nothing if there are none."""
    if not rows:
        return ""
    of = {(row["method"], row["metric"]): row for row in rows}
    cells = [["method", "kNN", "linear", "seeds"]]
    for method in dict.fromkeys(row["method"] for row in rows):
        told = [of[method, metric] for metric in ACCURACIES]
        cells.append([method, *map(format_cell, told), ", ".join(map(str, told[0]["seeds"]))])
    return "\n".join([
        f"Less `{rows[0]['less']}` of the same seed, in points of percent, with the 95 % interval of the mean:",
        "",
        *markdown_table(cells),
        "",
    ])  # fmt: skip
