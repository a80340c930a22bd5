"""What the runs of an experiment say together: means over seeds with 95 % intervals, as rows and as a table."""

import statistics
import string
from typing import NamedTuple

from trainers.encoder_lidar import NUM_CROPS, NUM_IMAGES
from trainers.experiment_file import ACCURACIES, PIXELS, RANDOM
from trainers.experiment_plan import Experiment
from trainers.experiment_store import Found
from trainers.probes import mean_interval
from trainers.reports import markdown_table

_STRUCTURE = ("silhouette", "nmi", "coarse_silhouette", "coarse_nmi")
METRICS = (*ACCURACIES, "rankme", "lidar", "feature_std", *_STRUCTURE)
_IMAGES, _MINUTES = "images_to_", "minutes_to_"
_SKIPPED = "skipped_steps"
_CALLED = {
    "knn": "kNN %", "linear": "linear %", "rankme": "RankMe", "lidar": "LiDAR", "feature_std": "std",
    "silhouette": "silhouette", "nmi": "NMI", "coarse_silhouette": "coarse silhouette", "coarse_nmi": "coarse NMI",
    _SKIPPED: "skipped steps %",
}  # fmt: skip
_FORMS = dict.fromkeys(("feature_std", *_STRUCTURE), "{:.3f}")
INTERVALS = "95 % intervals: of the mean over seeds, or over test images where there is one seed"
_OF_STRUCTURE = " Silhouette is of the classes of up to 5,000 test images, NMI of these classes and k-means' clusters."
_UNTRAINED = {"images_seen": 0, "seconds": 0.0}


def by_method(found: list[dict]) -> dict[str, list[dict]]:
    """The runs of each method, seed by seed."""
    methods: dict[str, list[dict]] = {}
    for run in found:
        methods.setdefault(run["method"], []).append(run)
    return methods


def summarise(experiment: Experiment, found: Found, command: str) -> list[dict]:
    """
    The rows of an experiment.

    Args:
        experiment ([`Experiment`]): What was compared.
        found ([`~experiment_store.Found`]): What is known of its runs.
        command (`str`): What repeats the experiment.

    Returns:
        `list[dict]`: Of each method and encoder a row a metric: `experiment`, `method`, `dataset`, `metric`, `value`
        (accuracies in percent), `ci95` (low and high; of several seeds that of their mean, of an accuracy of one seed
        that over test images, else None), `seeds`, `images_seen` and `seconds` of training (means over seeds),
        `machine`, `commit` (of training, and of evaluation where it is another), `command` (with `--seeds` if
        some are missing). Two rows more for each of the experiment's `reach`: the images and the minutes at the first
        evaluation that found it reached. If steps were skipped anywhere, a row of their share.
    """
    rows, any_skipped = [], any(run["training"][_SKIPPED] for run in found.runs)
    for name, runs in by_method(found.runs).items():
        shared = {"experiment": experiment.label, "method": name, "dataset": experiment.dataset}
        facts = _facts(experiment, runs, command)
        for label, of_seeds in ends_of(name, runs).items():
            rows += _metric_rows(shared | {"method": label}, of_seeds, facts)
        if any_skipped:
            rows.append(_skipped(shared, runs, facts))
        for metric, percent in experiment.reach.items():
            rows += _reached(shared, metric, percent, runs, facts)
    untrained = [(label, of_seeds, _facts(experiment, runs, command)) for label, of_seeds, runs in _random(found.runs)]
    if found.pixels is not None and found.runs:
        # of the first run's images; any call of the command has them
        facts = _facts(experiment, found.runs[:1], command) | {"command": rows[0]["command"]}
        untrained.append((PIXELS, [found.pixels], facts))
    for label, of_seeds, facts in untrained:
        shared = {"experiment": experiment.label, "method": label, "dataset": experiment.dataset}
        rows += _metric_rows(shared, of_seeds, facts | _UNTRAINED)
    return rows


def machines_of(runs: list[dict]) -> list[str]:
    """What the machines were, that runs were trained on: each once."""
    return sorted({", ".join(f"{value} {name}" if name in ("cores", "threads") else str(value)
                             for name, value in run["machine"].items()) for run in runs})  # fmt: skip


def _facts(experiment: Experiment, runs: list[dict], command: str) -> dict:
    """What a row says of how its figures were made."""
    seeds = [run["seed"] for run in runs]
    chosen = "" if seeds == experiment.seeds else f" --seeds {' '.join(map(str, seeds))}"
    commits = {facts.get("commit", "unknown") for run in runs for facts in (run["software"], run["evaluated"])}
    return {
        "seeds": seeds,
        "images_seen": round(statistics.mean(run["training"]["images_seen"] for run in runs)),
        "seconds": round(statistics.mean(run["training"]["seconds"] for run in runs), 1),
        "machine": "; ".join(machines_of(runs)),
        "commit": ", ".join(sorted(commits)),
        "command": command + chosen,
    }


def ends_of(name: str, runs: list[dict]) -> dict[str, list[dict]]:
    """By what they are called, the rows of a method's encoders at the end of training, one a seed."""
    ends: dict[str, list[dict]] = {}
    for run in runs:
        for row in run["points"][-1]["rows"]:
            label = f"{name}, {row['encoder']}" if row["encoder"] else name
            ends.setdefault(label, []).append(row)
    return ends


def _random(found: list[dict]) -> list[tuple[str, list[dict], list[dict]]]:
    """What random encoders are called, their rows and the runs beside them: once for all that share them."""
    kinds: list[tuple[set, dict[str, list[dict]]]] = []
    for name, runs in by_method(found).items():
        weights = {row["weights"] for run in runs for row in run["baselines"][:1]}
        if not weights:
            continue
        known, of_methods = next((kind for kind in kinds if kind[0] & weights), (set(), {}))
        if not of_methods:
            kinds.append((known, of_methods))
        known |= weights
        of_methods[name] = runs
    encoders = []
    for _, of_methods in kinds:
        runs = max(of_methods.values(), key=len)
        label = RANDOM if len(kinds) == 1 else f"{RANDOM} of {'; '.join(of_methods)}"
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

    Their values are means over the seeds, and None where one did not reach it. They have no interval: what lies
    between two evaluations is not known.
    """
    first = [next((point for point in course_of(run, metric) if point.percent >= percent), None) for run in runs]
    rows = []
    for name, field in ((_IMAGES, "images"), (_MINUTES, "minutes")):
        values = None if None in first else [getattr(point, field) for point in first]
        told = {"value": values and statistics.mean(values), "ci95": None}
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
        run (`dict`): As its `evaluation.json` has it.
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


def format_rows(experiment: Experiment, rows: list[dict]) -> str:
    """The rows of an experiment as Markdown: a line a method. Where machines differ, each line names its own."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    of = {(row["method"], row["metric"]): row for row in rows}
    letters = dict(zip(_each_once(rows, "machine", "; "), string.ascii_uppercase, strict=False))
    is_mixed = len(letters) > 1
    last = ["machine", "seeds"] if is_mixed else ["seeds"]
    cells = [["method", *map(_called, metrics), "images seen", "minutes", *last]]
    for method in methods:
        any_row = next(row for row in rows if row["method"] == method)
        known = [format_cell(of.get((method, metric))) for metric in metrics]
        seen, minutes = f"{any_row['images_seen']:,}", f"{any_row['seconds'] / 60:.1f}"
        told = {"machine": ", ".join(letters[name] for name in any_row["machine"].split("; "))}
        told["seeds"] = ", ".join(map(str, any_row["seeds"]))
        cells.append([method, *known, seen, minutes, *(told[name] for name in last)])
    machines = "; ".join(f"{letter}: {name}" if is_mixed else name for name, letter in letters.items())
    commits, commands = ", ".join(_each_once(rows, "commit", ", ")), "; ".join(_each_once(rows, "command", "; "))
    return "\n".join([
        f"# {experiment.title}",
        "",
        f"{experiment.dataset}; `{commands}`; {machines}; commit {commits}. In brackets {INTERVALS}. RankMe and std "
        f"are of test images, LiDAR is of {NUM_CROPS} crops each of up to {NUM_IMAGES:,}; levels side by side have "
        "length 1, and no LiDAR." + (_OF_STRUCTURE if "silhouette" in metrics else ""),
        "",
        *markdown_table(cells),
        "",
    ])  # fmt: skip


def _each_once(rows: list[dict], name: str, between: str) -> list[str]:
    """What rows tell under a name, each once, in the order it is first told."""
    return list(dict.fromkeys(each for row in rows for each in row[name].split(between)))


def _called(metric: str) -> str:
    for begin, unit in ((_IMAGES, "images"), (_MINUTES, "minutes")):
        if metric.startswith(begin):
            accuracy, percent = metric.removeprefix(begin).split("_")
            return f"{unit} to {percent} % {accuracy}"
    return _CALLED[metric]


def format_cell(row: dict | None) -> str:
    """The value of a row with its interval, as tables have it."""
    if row is None:
        return "-"
    if row["value"] is None:
        return "not reached"
    form = "{:,.0f}" if row["metric"].startswith(_IMAGES) else _FORMS.get(row["metric"], "{:.1f}")
    ends = f" ({' to '.join(map(form.format, row['ci95']))})" if row["ci95"] else ""
    return form.format(row["value"]) + ends
