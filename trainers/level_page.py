"""The levels of a stack as one HTML file that needs no other: scatter plots to explore, thumbnails, numbers.

Shapes: n images that are drawn, H and W a thumbnail's height and width.
"""

import base64
import io
import math

import numpy as np
from PIL import Image

from trainers.level_views import ClassView, Labelling, LevelView, class_colors
from trainers.projections import METHODS
from trainers.resources import render_template
from trainers.subclusters import NUM_SUBCLUSTERS

# JPEG codes blocks of so many pixels: cells of whole blocks, and colours in full resolution, keep neighbours out
_BLOCK = 8
_JPEG_QUALITY = 85
# sides in pixels of the screen, of a thumbnail in a row and of the one beside the pointer
_ROW_SIDE, _TIP_SIDE = 60, 128
_DIGITS = 4


def render_page(view: LevelView) -> str:
    """
    The page, all text escaped.

    Args:
        view ([`LevelView`]): What it shows.

    Returns:
        `str`: HTML.
    """
    sprite, columns, cell = thumbnail_sprite(view.thumbnails)
    height, width = view.thumbnails.shape[1:3]
    facts = dict(
        title=view.title,
        notes=view.notes,
        methods=list(METHODS.values()),
        titles=[plot.title for plot in view.plots],
        labellings=[_legend(labelling) for labelling in view.labellings],
        table=view.table,
        class_view=view.class_view,
        class_rows=_class_rows(view.class_view),
        subcluster_colors=class_colors(NUM_SUBCLUSTERS),
        num_images=len(view.thumbnails),
        sprite=sprite,
        sprite_size=(columns * cell[0], math.ceil(len(view.thumbnails) / columns) * cell[1]),
        columns=columns,
        cell=cell,
        thumbnail_size=(width, height),
        row_zoom=_ROW_SIDE / max(height, width),
        tip_zoom=_TIP_SIDE / max(height, width),
        data=_script_data(view),
    )
    return render_template("levels.html.j2", facts, autoescape=True)


def thumbnail_sprite(thumbnails: np.ndarray) -> tuple[str, int, tuple[int, int]]:
    """
    All thumbnails as one picture.

    Args:
        thumbnails (`np.ndarray` of shape `(n, H, W, 3)`, uint8): Row by row in the picture.

    Returns:
        The picture as a data URI (JPEG), how many thumbnails a row has, and (width, height) of the cell of each,
        whose upper left it fills.
    """
    number, height, width = thumbnails.shape[:3]
    columns = math.ceil(math.sqrt(number))
    rows = math.ceil(number / columns)
    cell_height, cell_width = (math.ceil(side / _BLOCK) * _BLOCK for side in (height, width))
    padding = ((0, rows * columns - number), (0, cell_height - height), (0, cell_width - width), (0, 0))
    cells = np.pad(thumbnails, padding, mode="edge").reshape(rows, columns, cell_height, cell_width, 3)
    picture = cells.swapaxes(1, 2).reshape(rows * cell_height, columns * cell_width, 3)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=_JPEG_QUALITY, subsampling="4:4:4")
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/jpeg;base64,{data}", columns, (cell_width, cell_height)


def _legend(labelling: Labelling) -> dict:
    counts = np.bincount(labelling.labels, minlength=len(labelling.names)).tolist()
    entries = zip(labelling.names, class_colors(len(labelling.names)), counts, strict=True)
    return {"name": labelling.name, "entries": list(entries)}


def _class_rows(class_view: ClassView | None) -> list[list[tuple[int, list[int]]]]:
    """For each plot, and each of its sub-clusters: how many images it has, and which are nearest to its centre."""
    if class_view is None:
        return []
    rows = []
    for plot in class_view.plots:
        sizes = np.bincount(plot.subclusters.clusters)
        nearest = [class_view.members[positions].tolist() for positions in plot.subclusters.nearest]
        rows.append(list(zip(sizes.tolist(), nearest, strict=True)))
    return rows


def _script_data(view: LevelView) -> dict:
    """What the script draws: the plots in the page's order, and the labels of the images."""
    plots = [{"points": _places(plot.points[method])} for plot in view.plots for method in METHODS]
    if view.class_view is not None:
        plots += [
            {
                "points": _places(plot.points),
                "images": view.class_view.members.tolist(),
                "clusters": plot.subclusters.clusters.tolist(),
            }
            for plot in view.class_view.plots
        ]
    labellings = [
        {
            "name": labelling.name,
            "labels": labelling.labels.tolist(),
            "names": labelling.names,
            "colors": class_colors(len(labelling.names)),
        }
        for labelling in view.labellings
    ]
    return {"plots": plots, "labellings": labellings, "clusterColors": class_colors(NUM_SUBCLUSTERS)}


def _places(points: np.ndarray) -> list[list[float]]:
    """Points (n, 2) from 0, the longer side of their box 1 long, y downwards as on a screen."""
    low, high = points.min(axis=0), points.max(axis=0)
    extent = max(float((high - low).max()), np.finfo(np.float32).tiny)
    x, y = points[:, 0] - low[0], high[1] - points[:, 1]
    return [[round(float(value) / extent, _DIGITS) for value in axis] for axis in (x, y)]
