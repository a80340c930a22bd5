"""The levels of a stack as pictures for a paper: a grid of scatter plots, and one class with its sub-clusters.

Shapes: n images, H and W a thumbnail's height and width.
"""

import math
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from trainers.files import save_figure
from trainers.level_views import ClassPlot, ClassView, LevelView, class_colors
from trainers.projections import METHODS
from trainers.subclusters import NUM_NEAREST, NUM_SUBCLUSTERS

_DPI = 160
# more names than these would be larger than the plots they explain
_MAX_LEGEND = 40
_LONGEST_NAME = 24
# inches of a name in the legend, and of a column of names of usual length
_NAME_HEIGHT, _LEGEND_WIDTH = 0.21, 1.6
# pixels between thumbnails, and of the bar of a sub-cluster's colour before them
_GAP, _BAR = 2, 4


def draw_levels(view: LevelView, path: Path):
    """
    Draws every level, a row each, by every projection, a column each, coloured by the fine classes.

    Args:
        view ([`LevelView`]): What to draw.
        path (`Path`): The PNG to write; it has a legend for up to 40 classes.
    """
    fine = view.labellings[0]
    colors = class_colors(len(fine.names))
    height = 0.4 + 3.7 * len(view.plots)
    columns = math.ceil(len(fine.names) / int(height / _NAME_HEIGHT))
    has_legend = len(fine.names) <= _MAX_LEGEND
    width = 8.5 + (_LEGEND_WIDTH * columns if has_legend else 0)
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(len(view.plots), len(METHODS), squeeze=False)
    for row, plot in zip(grid, view.plots, strict=True):
        for axes, (method, called) in zip(row, METHODS.items(), strict=True):
            _scatter(axes, plot.points[method], [colors[label] for label in fine.labels])
            axes.set_title(f"{_short(plot.title, 60)}, {called}", fontsize=11, parse_math=False)
    if has_legend:
        _add_legend(figure, fine.names, colors, columns)
    _save(figure, path)


def draw_class(view: ClassView, thumbnails: np.ndarray, path: Path):
    """
    Draws one class at every level, a row each, beside the images nearest to the centres of its sub-clusters.

    Args:
        view ([`ClassView`]): What to draw.
        thumbnails (`np.ndarray` of shape `(n, H, W, 3)`, uint8): The drawn images.
        path (`Path`): The PNG to write.
    """
    colors = class_colors(NUM_SUBCLUSTERS)
    figure = Figure(figsize=(10.5, 0.4 + 3.3 * len(view.plots)), layout="constrained")
    figure.suptitle(f"class {_short(view.name, 60)}", fontsize=12, parse_math=False)
    grid = figure.subplots(len(view.plots), 2, squeeze=False, width_ratios=(4, 5))
    for (left, right), plot in zip(grid, view.plots, strict=True):
        _scatter(left, plot.points, [colors[cluster] for cluster in plot.subclusters.clusters], size=14)
        left.set_title(f"{_short(plot.title, 60)}, t-SNE", fontsize=11, parse_math=False)
        right.imshow(subcluster_strips(plot, view.members, thumbnails, colors), interpolation="nearest")
        right.set_axis_off()
        right.set_title(
            f"nearest to the centres; silhouette {plot.subclusters.silhouette:.2f}, "
            f"mean over all classes {plot.mean_silhouette:.2f}",
            fontsize=9,
        )
    _save(figure, path)


def subcluster_strips(plot: ClassPlot, members: np.ndarray, thumbnails: np.ndarray, colors: list[str]) -> np.ndarray:
    """
    The images nearest to the centres of a class's sub-clusters, a row each behind a bar of its colour.

    Args:
        plot ([`ClassPlot`]): The class at one level.
        members (`np.ndarray` of shape `(c,)`): Which of the thumbnails are of the class.
        thumbnails (`np.ndarray` of shape `(n, H, W, 3)`, uint8): The drawn images.
        colors (`list[str]`): Of the sub-clusters.

    Returns:
        `np.ndarray` of shape `(rows * (H + 2) - 2, 4 + 8 * (W + 2), 3)`, uint8: Thumbnails on white.
    """
    height, width = thumbnails.shape[1:3]
    nearest = plot.subclusters.nearest
    shape = (len(nearest) * (height + _GAP) - _GAP, _BAR + NUM_NEAREST * (width + _GAP), 3)
    picture = np.full(shape, 255, np.uint8)
    for row, positions in enumerate(nearest):
        top = row * (height + _GAP)
        picture[top : top + height, :_BAR] = np.round(255 * np.array(to_rgb(colors[row])))
        for column, image in enumerate(members[positions]):
            left = _BAR + _GAP + column * (width + _GAP)
            picture[top : top + height, left : left + width] = thumbnails[image]
    return picture


def _scatter(axes, points: np.ndarray, colors: list[str], size: float = 7):
    axes.scatter(*points.T, s=size, c=colors, alpha=0.85, linewidths=0)
    # distances mean the same in both directions, and the numbers on the axes mean nothing
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_xticks([])
    axes.set_yticks([])


def _add_legend(figure: Figure, names: list[str], colors: list[str], columns: int):
    dots = [Line2D([], [], color=color, marker="o", linestyle="", markersize=6) for color in colors]
    # the names are set afterwards: matplotlib leaves out labels that begin with an underscore
    settings = {"loc": "outside right center", "ncols": columns, "fontsize": 9, "frameon": False}
    legend = figure.legend(dots, [" "] * len(dots), **settings)
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(_short(name, _LONGEST_NAME))


def _short(text: str, longest: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _save(figure: Figure, path: Path):
    save_figure(figure, path, _DPI)
