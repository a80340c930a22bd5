"""Segmentation maps as files and as a picture: images, their masks, and what the probes of several encoders say.

Shapes: H and W rows and columns of an image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image as PILImage

from trainers.decoding import read_image
from trainers.dense_evaluation import Segmenter
from trainers.errors import InputError
from trainers.files import save_figure, whole_file
from trainers.level_views import class_colors
from trainers.mask_sources import IGNORED, MaskSource

_MAX_LEGEND = 24


def palette(num_classes: int) -> np.ndarray:
    """Colours (256, 3) uint8 of the classes; what counts for nothing, and what is no class, is white."""
    colors = np.full((256, 3), 255, dtype=np.uint8)
    colors[:num_classes] = [[round(255 * part) for part in to_rgb(color)] for color in class_colors(num_classes)]
    return colors


def save_map(classes: np.ndarray, num_classes: int, path: Path):
    """Writes a segmentation map (H, W) as a PNG with a palette, whose values are the classes."""
    image = PILImage.fromarray(classes)
    image.putpalette(palette(num_classes).flatten().tolist())
    with whole_file(path) as unfinished:
        image.save(unfinished, format="png")


def draw_segmentation(segmenters: list[Segmenter], test: MaskSource, names: list[str], path: Path, number: int = 8):
    """
    Draws evaluation images, their masks, and what each encoder's probe makes of them, a column each.

    Args:
        segmenters (`list` of [`Segmenter`]): The columns after image and mask.
        test ([`~mask_sources.MaskSource`]): The images, of which evenly spread ones are drawn.
        names (`list[str]`): Of the classes.
        path (`Path`): The PNG to write.
        number (`int`): Images to draw.
    """
    chosen = np.unique(np.linspace(0, len(test) - 1, number).round().astype(int))
    titles = ["image", "mask", *(segmenter.label for segmenter in segmenters)]
    figure = Figure(figsize=(1.6 * len(titles) + 2.4, 1.65 * len(chosen) + 0.3), layout="constrained")
    colors, seen = palette(len(names)), set()
    for line, index in zip(figure.subplots(len(chosen), len(titles), squeeze=False), chosen, strict=True):
        image, mask = test.images.image(index), test.mask(index)
        maps = [mask, *(segmenter.segment(image) for segmenter in segmenters)]
        seen |= {int(value) for drawn in maps for value in np.unique(drawn) if value != IGNORED}
        for axes, picture in zip(line, [np.asarray(image), *(colors[drawn] for drawn in maps)], strict=True):
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
    for axes, title in zip(figure.axes, titles, strict=False):
        axes.set_title(title, fontsize=9)
    shown = sorted(seen)[:_MAX_LEGEND]
    patches = [Patch(color=colors[value] / 255, label=names[value]) for value in shown]
    figure.legend(handles=patches, loc="outside right upper", fontsize=8, frameon=False)
    save_figure(figure, path, 130)


def check_files(files: Sequence[str | Path]):
    """Refuses images to segment that [`segment_files`] could not read or would write one map of two of."""
    stems = [Path(file).stem for file in files]
    if len(set(stems)) < len(stems):
        raise InputError("Two images to segment have the same name, and so would their maps; give one at a time.")
    for file in files:
        read_image(file)


def segment_files(segmenter: Segmenter, names: list[str], files: Sequence[str | Path], folder: Path) -> list[Path]:
    """
    Segments images of the user's: a PNG each, in the image's own size, whose values are the classes.

    Args:
        segmenter ([`Segmenter`]): The encoder and its probe.
        names (`list[str]`): Of the classes.
        files (`list` of `str` or `Path`): The images, which [`check_files`] has seen.
        folder (`Path`): Where to; the maps are called as the images.

    Returns:
        `list[Path]`: The maps.
    """
    written = [folder / f"{Path(file).stem}_map.png" for file in files]
    for file, path in zip(files, written, strict=True):
        image = read_image(file)
        classes = PILImage.fromarray(segmenter.segment(image)).resize(image.size, PILImage.Resampling.NEAREST)
        save_map(np.array(classes), len(names), path)
    return written
