"""What the page and the pictures of a stack's levels show: points, thumbnails, colours, and numbers as text.

Shapes: n images that are drawn, c images of one class, H and W a thumbnail's height and width.
"""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from trainers.reports import markdown_table
from trainers.structure import MAX_SILHOUETTE_IMAGES, NUM_K_MEANS, NUMBERS
from trainers.subclusters import Subclusters

# matplotlib's ten, then black and lighter and darker ones that differ from them
_PALETTE = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
    "#222222", "#98df8a", "#aec7e8", "#ffbb78", "#393b79", "#ff9896", "#c49c94", "#004d40", "#dbdb8d", "#f7b6d2",
)  # fmt: skip


@dataclass
class Labelling:
    """
    One way to colour the images.

    Args:
        name (`str`): Such as `fine`.
        labels (`np.ndarray` of shape `(n,)`): Class indices.
        names (`list[str]`): Of the classes.
    """

    name: str
    labels: np.ndarray
    names: list[str]


@dataclass
class LevelPlot:
    """
    All images at one level of one encoder.

    Args:
        title (`str`): Such as `level 0`.
        points (`dict` of `np.ndarray` of shape `(n, 2)`): Their places, by method of projection.
    """

    title: str
    points: dict[str, np.ndarray]


@dataclass
class ClassPlot:
    """
    The images of one class at one level.

    Args:
        title (`str`): As of the [`LevelPlot`].
        points (`np.ndarray` of shape `(c, 2)`): Their places by t-SNE of this class alone.
        subclusters ([`Subclusters`]): Which sub-cluster each is in.
        mean_silhouette (`float`): The mean over all classes of their sub-clusters' silhouette.
    """

    title: str
    points: np.ndarray
    subclusters: Subclusters
    mean_silhouette: float


@dataclass
class ClassView:
    """
    One class zoomed in.

    Args:
        name (`str`): Of the class.
        members (`np.ndarray` of shape `(c,)`): Which of the drawn images are of this class.
        reason (`str`): Why this class, a sentence.
        plots (`list` of [`ClassPlot`]): One a level.
    """

    name: str
    members: np.ndarray
    reason: str
    plots: list[ClassPlot]


@dataclass
class LevelView:
    """
    All that is shown.

    Args:
        title (`str`): Of the page.
        notes (`list[str]`): What a reader has to know, a paragraph each.
        thumbnails (`np.ndarray` of shape `(n, H, W, 3)`, uint8): The images, in an order without meaning, so that no
            class is always painted over the others.
        labellings (`list` of [`Labelling`]): The fine one first.
        plots (`list` of [`LevelPlot`]): One a level.
        class_view ([`ClassView`], *optional*): None if no class has images enough.
        table (`list` of `list[str]`): The numbers, header first.
    """

    title: str
    notes: list[str]
    thumbnails: np.ndarray
    labellings: list[Labelling]
    plots: list[LevelPlot]
    class_view: ClassView | None
    table: list[list[str]]


def class_colors(number: int) -> list[str]:
    """Colours such as `#1f77b4`: up to 20 that are told apart, and for more classes hues around the circle."""
    if number <= len(_PALETTE):
        return list(_PALETTE[:number])
    # neighbours on the circle differ in lightness
    circle = [colorsys.hls_to_rgb(index / number, (0.35, 0.5, 0.68)[index % 3], 0.75) for index in range(number)]
    return ["#" + "".join(f"{round(255 * channel):02x}" for channel in color) for color in circle]


def structure_table(rows: Sequence[Mapping]) -> list[list[str]]:
    """
    The numbers of structure.py as cells of text.

    Args:
        rows (`list` of `dict`): `encoder` (its name), `dim` (its width, not of differences) and `structure`, of
            [`structure_of`] or, for several runs, of [`summarize`].

    Returns:
        `list` of `list[str]`: The header, then a row each.
    """
    header = ["encoder", "width"]
    for name in rows[0]["structure"]:
        header += [f"{name}: silhouette", f"{name}: NMI", f"{name}: kNN %"]
    table = [header]
    for row in rows:
        cells = [_number(entry, number) for entry in row["structure"].values() for number in NUMBERS]
        table.append([row["encoder"], str(row.get("dim", "")), *cells])
    return table


def _number(entry: Mapping, name: str) -> str:
    digits = 1 if name == "knn" else 3
    text = f"{entry[name]:.{digits}f}"
    if entry[f"{name}_interval"] is None:
        return text
    low, high = entry[f"{name}_interval"]
    return f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def settings_line(results: dict) -> str:
    """What was measured on what, and how to read it; `results` is what [`~visualize.visualize_levels`] returns."""
    classes = ", ".join(f"{len(names)} {name}" for name, names in results["classes"].items())
    several = [name for name, number in results["num_runs"].items() if number > 1]
    runs = f" Of {', '.join(several)} the mean of several runs, intervals over them." if several else ""
    if results["differences"]:
        runs += " The last rows are differences of levels, run by run."
    sample = (
        f", of {MAX_SILHOUETTE_IMAGES:,} of the images" if results["num_test_images"] > MAX_SILHOUETTE_IMAGES else ""
    )
    return (
        f"Measured on {results['num_test_images']:,} images of {results['test_dataset']} ({classes} classes), kNN by "
        f"the votes of {results['num_train_images']:,} of {results['train_dataset']}; seed {results['seed']}. "
        f"Silhouette: from -1 to 1, how far the classes are apart{sample}. NMI: from 0 to 1, how well k-means finds "
        f"them, 95 % interval over {NUM_K_MEANS} seeds of k-means. kNN: percent correct, 95 % interval over the "
        f"choice of test images.{runs}"
    )


def format_structure(results: dict) -> str:
    """
    The numbers as text that is valid Markdown, too.

    Args:
        results (`dict`): What [`~visualize.visualize_levels`] returned.

    Returns:
        `str`: A paragraph with sizes and settings, then the table.
    """
    table = structure_table(results["rows"] + results["differences"])
    return "\n".join([settings_line(results), "", *markdown_table(table)])
