"""The doctor's picture: a run's curves with the step where it turned, or the spectra of weights alone."""

from pathlib import Path

import matplotlib.figure

from trainers.doctor import Diagnosis
from trainers.files import save_figure
from trainers.reports import draw_curves, logged_keys

# as in `reports`: title, keys of the log, whether the axis is logarithmic
_PANELS = (
    ("loss", ("loss", "loss_prediction"), True),
    ("effective rank (RankMe) of embeddings", ("rankme",), False),
    ("standard deviation of embeddings", ("feature_std",), False),
    ("variance term: 1 is collapsed", ("loss_variance",), False),
    ("mean correlation of two features", ("correlation",), False),
    ("LiDAR of an image's views", ("lidar",), False),
    ("context encoder to target encoder", ("context_distance",), False),
    ("predictions over targets", ("prediction_norm", "prediction_std"), False),
)


def draw_diagnosis(history: list[dict], diagnosis: Diagnosis, path: Path):
    """
    Draws the curves that the doctor reads, as far as they were logged; a dashed line is where an ill level turned.

    Args:
        history (`list[dict]`): The run's log.
        diagnosis ([`Diagnosis`]): What it says.
        path (`Path`): The PNG to write.
    """
    entries = [entry for entry in history if "rankme" in entry]
    panels = tuple(panel for panel in _PANELS if logged_keys(entries, panel[1]))
    turned = [level.turned for level in diagnosis.levels if level.turned is not None]
    draw_curves(entries, path, panels, title=f"{diagnosis.state}, step {diagnosis.step}", marked_steps=turned)


def draw_spectra(spectra: list[tuple], diagnosis: Diagnosis, path: Path):
    """
    Draws the singular values of each level's embeddings beside those of a random encoder.

    Args:
        spectra (`list[tuple]`): Of [`~doctor_runs.diagnose_weights`].
        diagnosis ([`Diagnosis`]): What it says.
        path (`Path`): The PNG to write.
    """
    figure = matplotlib.figure.Figure(figsize=(4.5 * len(spectra), 3.5), layout="constrained")
    for axes, level, curves in zip(
        figure.subplots(1, len(spectra), squeeze=False).flat, diagnosis.levels, spectra, strict=True
    ):
        for values, label in zip(curves, ("encoder", "random encoder"), strict=True):
            axes.loglog(range(1, len(values) + 1), [max(value, 1e-12) for value in values], label=label)
        axes.set_title(f"level {level.level}: {level.state}", fontsize=10)
        axes.set_xlabel("singular value, the largest first", fontsize=8)
        axes.set_ylabel("share of their sum", fontsize=8)
        axes.set_ylim(bottom=1e-7)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(figure, path)
