"""Pictures of an experiment: the course of its methods, their ends side by side, or a map over two swept keys."""

import math
import statistics
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

from trainers.experiment_file import ACCURACIES, BASELINES, PIXELS, RANDOM
from trainers.experiment_plan import Experiment
from trainers.experiment_results import INTERVALS, Point, by_method, course_of, machines_of
from trainers.files import save_figure
from trainers.probes import mean_interval

_TITLES = {
    "knn": "kNN, % correct", "linear": "linear probe, % correct", "rankme": "effective rank (RankMe)",
    "lidar": "LiDAR", "feature_std": "spread of features (std)", "skipped_steps": "steps skipped, %",
}  # fmt: skip
_DPI = 120
_WIDTH = 60  # letters of a method's name; the table has it whole
# matplotlib's without gray, which is that of raw pixels, and three more; they begin again with dotted lines
_COLORS = (
    "tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan",
    "black", "gold", "navy",
)  # fmt: skip


def draw_experiment(experiment: Experiment, found: list[dict], rows: list[dict], path: Path):
    """
    Draws an experiment as its `figure` says.

    Args:
        experiment ([`Experiment`]): What.
        found (`list[dict]`): Of [`~experiment_store.Found`].
        rows (`list[dict]`): Of [`~experiment_results.summarise`].
        path (`Path`): The PNG to write.
    """
    draw = {"curves": _curves, "bars": _bars, "map": _maps}[experiment.figure]
    figure = draw(experiment, found, rows)
    figure.suptitle(experiment.title, fontsize=11)
    save_figure(figure, path, _DPI)


def _curves(experiment: Experiment, found: list[dict], rows: list[dict]) -> Figure:
    """
    kNN and linear probe over the minutes of training (over images where machines differ, whose minutes do not
    compare), from a random encoder of the same kind on: means over seeds, and their 95 % intervals as bands.
    """
    over, unit = ("minutes", "minutes of training") if len(machines_of(found)) == 1 else ("images", "images seen")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ACCURACIES, strict=True):
        for number, (method, runs) in enumerate(by_method(found).items()):
            color, style = _COLORS[number % len(_COLORS)], "-" if number < len(_COLORS) else ":"
            courses = [{point.images: point for point in _from_the_start(run, metric)} for run in runs]
            images = [place for place in courses[0] if all(place in course for course in courses)]
            seen, percents = (
                [[getattr(course[place], field) for course in courses] for place in images]
                for field in (over, "percent")
            )
            x = list(map(statistics.mean, seen))
            y = list(map(statistics.mean, percents))
            axes.plot(x, y, style, color=color, marker="o", markersize=3, label=method)
            bands = [mean_interval(each) for each in percents]
            if bands and None not in bands:
                axes.fill_between(x, *zip(*bands, strict=True), color=color, alpha=0.15, linewidth=0)
        for row in _baselines(rows, metric, PIXELS):
            axes.axhline(row["value"], color="gray", linestyle="--", linewidth=1, label=row["method"])
        axes.set_title(_TITLES[metric], fontsize=10)
        axes.set_xlabel(f"{unit}; at 0 a random encoder of the same kind", fontsize=9)
        axes.grid(alpha=0.3)
    has_bands = any(axes.collections for axes in figure.axes)
    title = "bands are 95 % intervals of the mean over seeds" if has_bands else None
    names = axes.get_legend_handles_labels()
    figure.legend(*names, loc="outside lower center", ncols=4, fontsize=8, title=title, title_fontsize=8)
    return figure


def _from_the_start(run: dict, metric: str) -> list[Point]:
    begins = [Point(0, 0.0, row[metric]) for row in run["baselines"][:1]]
    return [*begins, *course_of(run, metric)]


def _baselines(rows: list[dict], metric: str, kind: str) -> list[dict]:
    return [row for row in rows if row["metric"] == metric and row["method"].startswith(kind)]


def _bars(experiment: Experiment, found: list[dict], rows: list[dict]) -> Figure:
    """The rows of kNN, linear probe and RankMe, each with its interval; that of pixels would flatten the ranks."""
    metrics = (*ACCURACIES, "rankme")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = Figure(figsize=(13, 1.4 + 0.32 * len(methods)), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 3, sharey=True), metrics, strict=True):
        of = {row["method"]: row for row in rows if row["metric"] == metric}
        for place, method in enumerate(methods):
            if method not in of or (metric not in ACCURACIES and method.startswith(PIXELS)):
                continue
            value, ci95 = of[method]["value"], of[method]["ci95"]
            color = "gray" if method.startswith(BASELINES) else "tab:blue"
            axes.plot(value, place, "o", color=color)
            if ci95:
                axes.plot(ci95, [place, place], "-", color=color, linewidth=2, alpha=0.6)
        axes.set_title(_TITLES[metric], fontsize=10)
        axes.grid(alpha=0.3)
    axes.set_yticks(
        range(len(methods)), [textwrap.shorten(method, _WIDTH, placeholder=" ...") for method in methods], fontsize=8
    )
    axes.invert_yaxis()
    figure.supxlabel(f"lines are {INTERVALS}", fontsize=8)
    return figure


def _maps(experiment: Experiment, found: list[dict], rows: list[dict]) -> Figure:
    """A row of maps a method, a column a metric; the first swept key goes up, the second to the right."""
    (up, ups), (right, rights) = experiment.swept.items()
    metrics = [metric for metric in _TITLES if any(row["metric"] == metric for row in rows)]
    figure = Figure(
        figsize=(0.8 + len(metrics) * (1.2 + 0.5 * len(rights)), len(experiment.methods) * (1.2 + 0.4 * len(ups))),
        layout="constrained",
    )
    grid = figure.subplots(len(experiment.methods), len(metrics), squeeze=False)
    names = {(run.base, *run.swept.values()): run.method for run in experiment.runs()}
    for column, metric in enumerate(metrics):
        of = {row["method"]: row["value"] for row in rows if row["metric"] == metric}
        known = [of[method] for method in names.values() if method in of]
        before = "".join(f"\n{row['method']} {row['value']:.3g}" for row in _baselines(rows, metric, RANDOM)[:1])
        grid[0, column].set_title(_TITLES[metric] + before, fontsize=8)
        grid[-1, column].set_xlabel(right, fontsize=8)
        for line, method in zip(grid, experiment.methods, strict=True):
            axes = line[column]
            values = [
                [of.get(names[method, of_up, of_right], float("nan")) for of_right in rights]
                for of_up in reversed(ups)
            ]
            image = axes.imshow(values, vmin=min(known), vmax=max(known), cmap="viridis", aspect="auto")
            for y, of_row in enumerate(values):
                for x, value in enumerate(of_row):
                    is_missing = math.isnan(value)
                    shade = "black" if is_missing or image.norm(value) > 0.6 else "white"
                    text = "-" if is_missing else f"{value:.3g}"
                    axes.text(x, y, text, ha="center", va="center", fontsize=7, color=shade)
            axes.set_xticks(range(len(rights)), [f"{value:g}" for value in rights], fontsize=7)
            axes.set_yticks(range(len(ups)), [f"{value:g}" for value in reversed(ups)], fontsize=7)
    for line, method in zip(grid, experiment.methods, strict=True):
        line[0].set_ylabel(f"{method}\n{up}", fontsize=8)
    return figure
