"""Pictures that are a grid of small images with titles and outlines, and the patches of an image to be drawn in them.

Shapes: H and W rows and columns of pixels.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image as PILImage

from trainers.files import full_disk_named, save_figure, write_json
from trainers.transforms import eval_transform

HIDDEN = (200, 200, 200)
"""The colour of patches that are not shown, and of what is beyond an image."""
_DPI = 160
# inches of a panel's width and of a line of a title; characters of the latter
_PANEL, _LINE, _CHARACTERS = 1.75, 0.16, 23


@dataclass
class Outline:
    """
    A rectangle drawn on a panel, in pixels of its image.

    Args:
        top, left, height, width (`int`): Where.
        color (`str`): Such as `#d62728`.
        line (`float`): How wide it is drawn, in points.
    """

    top: int
    left: int
    height: int
    width: int
    color: str
    line: float = 1.6


@dataclass
class Panel:
    """
    One image of a picture.

    Args:
        pixels (`np.ndarray` of shape `(H, W, 3)`, uint8): The image.
        title (`str`): What is written above; long lines are broken.
        outlines (`list` of [`Outline`]): What is drawn on it.
    """

    pixels: np.ndarray
    title: str = ""
    outlines: Sequence[Outline] = ()


@dataclass
class PatchGrid:
    """
    The patches of an image.

    Args:
        columns (`int`): How many lie side by side.
        patch_size (`(int, int)`): Height and width of one in pixels.
    """

    columns: int
    patch_size: tuple[int, int]

    def outline(self, ids: np.ndarray, color: str) -> Outline:
        """The rectangle of the patches at positions (n,) in raster order, which fill one."""
        (height, width), rows, columns = self.patch_size, ids // self.columns, ids % self.columns
        down, right = np.ptp(rows) + 1, np.ptp(columns) + 1
        return Outline(rows.min() * height, columns.min() * width, down * height, right * width, color)

    def show(self, view: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """An image (H, W, 3) of which only the patches at positions (n,) are shown, all else is `HIDDEN`."""
        shown = np.full_like(view, HIDDEN)
        for position in ids:
            place = self._place(position)
            shown[place] = view[place]
        return shown

    def surroundings(self, view: np.ndarray, position: int, margin: int) -> tuple[np.ndarray, "PatchGrid"]:
        """
        A patch with so many patches on each side of it.

        Args:
            view (`np.ndarray` of shape `(H, W, 3)`): The image.
            position (`int`): Of the patch.
            margin (`int`): Patches on each side; beyond the image is `HIDDEN`.

        Returns:
            The pixels, and their grid, in the middle of which the patch is.
        """
        height, width = self.patch_size
        beyond = [(margin * height,) * 2, (margin * width,) * 2]
        padded = np.stack([np.pad(view[..., c], beyond, constant_values=HIDDEN[c]) for c in range(3)], axis=-1)
        top, left = position // self.columns * height, position % self.columns * width
        around = 2 * margin + 1
        return padded[top : top + around * height, left : left + around * width], PatchGrid(around, self.patch_size)

    def _place(self, position: int) -> tuple[slice, slice]:
        height, width = self.patch_size
        top, left = position // self.columns * height, position % self.columns * width
        return slice(top, top + height), slice(left, left + width)


def view_of(image: PILImage.Image, image_size: tuple[int, int]) -> np.ndarray:
    """An RGB image as an encoder sees it, (H, W, 3) uint8: the view of evaluation."""
    return eval_transform(image_size)(image).permute(1, 2, 0).numpy()


def write_picture(folder: Path, name: str, rows: list[list[Panel]], results: dict):
    """
    Writes a picture for paper and the settings and numbers behind it.

    Args:
        folder (`Path`): Where to; made if there is none.
        name (`str`): Of the files, `NAME.png` and `NAME.json`.
        rows (`list` of `list` of [`Panel`]): What is drawn.
        results (`dict`): What the JSON file holds.
    """
    with full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        draw_panels(rows, folder / f"{name}.png")
        write_json(folder / f"{name}.json", results)


def draw_panels(rows: list[list[Panel]], path: Path):
    """
    Draws panels, as many columns as the longest row has.

    Args:
        rows (`list` of `list` of [`Panel`]): From the top.
        path (`Path`): The PNG to write.
    """
    num_columns = max(map(len, rows))
    heights = [max(_PANEL * panel.pixels.shape[0] / panel.pixels.shape[1] for panel in row) for row in rows]
    title_heights = [_LINE * max(len(_broken(panel.title)) for panel in row) for row in rows]
    inches = _PANEL * num_columns, sum(heights) + sum(title_heights)
    figure = Figure(figsize=inches, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.04, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), num_columns, squeeze=False, height_ratios=heights)
    for line, row in zip(grid, rows, strict=True):
        for axes in line:
            axes.set_axis_off()
        for axes, panel in zip(line, row, strict=False):
            axes.imshow(panel.pixels, interpolation="nearest")
            axes.set_title("\n".join(_broken(panel.title)), fontsize=8, pad=3, parse_math=False)
            for outline in panel.outlines:
                corner = (outline.left - 0.5, outline.top - 0.5)
                size = outline.width, outline.height
                axes.add_patch(Rectangle(corner, *size, fill=False, ec=outline.color, lw=outline.line, clip_on=False))
    save_figure(figure, path, _DPI)


def _broken(text: str) -> list[str]:
    """A title's lines, each broken where it is longer than a panel is wide."""
    return [part for line in text.splitlines() for part in textwrap.wrap(line, _CHARACTERS)]
