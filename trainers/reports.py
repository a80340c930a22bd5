"""What a run leaves to read: the facts of machine and software, its curves as a picture, its evaluation as a table."""

import csv
import math
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import matplotlib.figure
import matplotlib.ticker
import torch

from trainers.files import save_figure

_PACKAGES = ("cjepa", "torch", "torchvision", "transformers", "accelerate", "datasets")
# title, log keys (of every level: `rankme` stands for `level1_rankme`, too), logarithmic axis
_PANELS = (
    ("loss", ("loss", "loss_prediction"), True),
    ("invariance, unweighted", ("loss_invariance",), True),
    ("variance, unweighted", ("loss_variance",), False),
    ("covariance, unweighted", ("loss_covariance",), True),
    ("effective rank (RankMe) of embeddings", ("rankme",), False),
    ("standard deviation of embeddings", ("feature_std",), False),
    ("learning rate and weight decay", ("learning_rate", "weight_decay"), True),
    ("images per second", ("images_per_second",), False),
)


def machine_facts() -> dict:
    """Processor, cores and accelerator of this machine, as far as they are known."""
    facts = {"processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        facts["accelerator"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return {name: value for name, value in facts.items() if value}


def software_facts() -> dict:
    """Versions of the packages that matter, and the commit where the code is a git checkout."""
    facts = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    commit = _commit()
    return facts | ({"commit": commit} if commit else {})


def energy_facts(output: Path) -> dict:
    """Kilowatt-hours by CodeCarbon's estimate over all calls of a run, if asked for (`--report_to codecarbon`)."""
    emissions = output / "emissions.csv"
    if not emissions.is_file():
        return {}
    with open(emissions, newline="", encoding="utf-8") as file:
        return {"energy_kwh": math.fsum(_energy(row) for row in csv.DictReader(file))}


def _energy(row: dict[str, str | None]) -> float:
    """Kilowatt-hours of a call; 0 where its row is not written to its end."""
    try:
        return float(row["energy_consumed"])
    except (KeyError, TypeError, ValueError):
        return 0.0


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with a plus sign where files differ from it."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def draw_curves(
    log_history: list[dict],
    path: Path,
    panels: tuple[tuple, ...] = _PANELS,
    title: str | None = None,
    marked_steps: Sequence[int] = (),
):
    """
    Draws the curves of a run.

    Args:
        log_history (`list[dict]`): `trainer.state.log_history`.
        path (`Path`): The PNG to write.
        panels (`tuple`): Of each panel the title, the keys of the log, and whether its axis is logarithmic.
        title (`str`, *optional*): Of the picture.
        marked_steps (`Sequence[int]`): Steps with a dashed line.
    """
    num_columns = min(len(panels), 4)
    num_rows = math.ceil(len(panels) / num_columns)
    figure = matplotlib.figure.Figure(figsize=(3.75 * num_columns, 3.25 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    if title:
        figure.suptitle(title)
    for axes, (heading, names, logarithmic) in zip(grid.flat[: len(panels)], panels, strict=True):
        for key, label in logged_keys(log_history, names):
            points = [(entry["step"], entry[key]) for entry in log_history if entry.get(key) is not None]
            if not logarithmic or any(value > 0 for _, value in points):
                axes.plot(*zip(*points, strict=True), label=label)
        for step in marked_steps:
            axes.axvline(step, color="black", linestyle="--", linewidth=1)
        axes.set_title(heading, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.grid(alpha=0.3)
        if logarithmic and axes.lines:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            if high < 10 * low:  # no power of ten between the two: plain numbers are easier to read
                axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.3g"))
        if len(axes.lines) - len(marked_steps) > 1:
            axes.legend(fontsize=8)
    save_figure(figure, path)


def logged_keys(log_history: list[dict], names: tuple[str, ...]) -> list[tuple[str, str]]:
    """The logged keys of a panel, those of upper levels included, and what the legend calls them."""
    logged = dict.fromkeys(key for entry in log_history for key in entry)
    found = []
    for name in names:
        prefix = "loss_" if name.startswith("loss_") else ""
        term = name.removeprefix(prefix)
        matches = [re.fullmatch(rf"{prefix}level(\d+)_{term}", key) for key in logged]
        upper = [(match.group(0), match.group(1)) for match in matches if match]
        lowest = [(name, "0")] if name in logged else []
        called = term.replace("_", " ")
        found += [(key, f"{called}, level {level}" if upper else called) for key, level in lowest + upper]
    return found


def format_table(results: dict) -> str:
    """
    The results of an evaluation as text that is valid Markdown, too.

    Args:
        results (`dict`): What [`~evaluation.evaluate_model`] returned.

    Returns:
        `str`: A line with sizes and settings, then the table; a last line if a probe did not converge.
    """
    header = ["encoder", "parameters", "kNN % (95 % interval)", "linear % (95 % interval)", "RankMe"]
    cells = [header] + [_table_row(row) for row in results["rows"]]
    lines = markdown_table(cells)
    if not all(row["linear_converged"] for row in results["rows"]):
        lines += ["", "\\* The linear probe did not converge."]
    return "\n".join([_settings_line(results), "", *lines])


def with_interval(row: dict, name: str) -> str:
    """A figure in percent with its interval, as `51.2 (50.1-52.2)`."""
    return f"{row[name]:.1f} ({'-'.join(f'{end:.1f}' for end in row[f'{name}_interval'])})"


def markdown_table(cells: list[list[str]]) -> list[str]:
    """Lines of a table whose columns are aligned in plain text, too; the first row of cells is the header."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _table_row(row: dict) -> list[str]:
    percents = [f"{row[name]:.1f} ({_ends(row[f'{name}_interval'])})" for name in ("knn", "linear")]
    percents[1] += "" if row["linear_converged"] else " \\*"
    parameters = f"{row['num_parameters'] / 1e6:.2f} M" if row.get("num_parameters") else "-"
    return [row["encoder"], parameters, *percents, f"{row['rankme']:.1f} of {row['dim']}"]


def _settings_line(results: dict) -> str:
    knn = f"kNN k {results['num_neighbors']}, T {results['temperature']:g}"
    return f"{_images_line(results)}; {knn}; seed {results['seed']}."


def _images_line(results: dict) -> str:
    height, width = results["image_size"]
    return (
        f"{results['num_test_images']:,} images of {results['test_dataset']}, {results['num_classes']} classes "
        f"(chance {results['chance']:.1f} %), {height}x{width} pixels; fitted on {results['num_train_images']:,} of "
        f"{results['train_dataset']}"
    )


def format_suite(results: dict) -> str:
    """
    The results of the protocol suite as text that is valid Markdown, too.

    Args:
        results (`dict`): What [`~suite.evaluate_suite`] returned.

    Returns:
        `str`: A line with sizes and settings, then the table; a last line if a probe did not converge.
    """
    header = ["encoder", "features", "probe", "correct % (95 % interval)", "labels", "chosen on train images"]
    lines = markdown_table([header] + [_suite_row(row) for row in results["rows"]])
    if any(row["settings"].get("converged") is False for row in results["rows"]):
        lines += ["", "\\* The linear probe did not converge."]
    settings = (
        f"{_images_line(results)}; suite {results['suite']}; kNN T {results['temperature']:g}; intervals by bootstrap "
        f"over the test images ({results['num_resamples']:,} resamples); seed {results['seed']}."
    )
    return "\n".join([settings, "", *lines])


def _suite_row(row: dict) -> list[str]:
    settings = dict(row["settings"])
    mark = "" if settings.pop("converged", True) else " \\*"
    chosen = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())
    correct = "-" if row["accuracy"] is None else f"{row['accuracy']:.1f} ({_ends(row['interval'])}){mark}"
    features = f"{row['features']} ({row['dim']})"
    return [row["encoder"], features, row["probe"], correct, f"{row['num_labels']:,}", row.get("note") or chosen]


def _ends(interval: list[float]) -> str:
    return "-".join(f"{end:.1f}" for end in interval)
