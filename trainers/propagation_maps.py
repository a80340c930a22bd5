"""Masks carried through videos, as files laid out as DAVIS', and as a picture.

Shapes: T frames, H and W rows and columns of a frame.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from trainers.files import save_figure
from trainers.mask_sources import IGNORED, MaskSource
from trainers.segmentation_maps import palette, save_map

_NUM_CLIPS, _NUM_FRAMES = 3, 6
_NUM_COLORS = 20
_OPACITY = 0.6


class MaskWriter:
    """
    Writes the masks of the first encoder that gives some, and keeps a few of all encoders for a picture.

    Args:
        folder (`Path`): Where to; the masks of a video lie in `masks/VIDEO`, called as its frames are.
        clips (`list` of [`~mask_sources.MaskSource`]): The videos, of which the first three are drawn.
    """

    def __init__(self, folder: Path, clips: list[MaskSource]):
        self.folder, self.drawn = folder, clips[:_NUM_CLIPS]
        self.written_of: str | None = None
        self.rows: dict[str, dict[str, list[np.ndarray]]] = {}

    def __call__(self, label: str, clip: MaskSource, masks: list[np.ndarray]):
        """Takes the masks of a video's frames from the second on; the first frame's is the true one."""
        masks = [clip.mask(0), *masks]
        self.written_of = self.written_of or label
        if label == self.written_of:
            for index, mask in enumerate(masks):
                path = self.folder / "masks" / clip.images.name / f"{_stem(clip, index)}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_map(mask, _NUM_COLORS, path)
        if any(clip is each for each in self.drawn):
            chosen = _frames(len(clip))
            self.rows.setdefault(label, {})[clip.images.name] = [masks[index] for index in chosen]

    def draw(self, path: Path):
        """Draws frames of the first videos: under the true masks those of each encoder."""
        labels = ["true masks", *self.rows]
        num_lines = len(self.drawn) * len(labels)
        figure = Figure(figsize=(1.4 * _NUM_FRAMES + 1.6, 1.4 * num_lines), layout="constrained")
        lines = iter(figure.subplots(num_lines, _NUM_FRAMES, squeeze=False))
        for clip in self.drawn:
            chosen = _frames(len(clip))
            frames = [np.asarray(clip.images.image(index)) for index in chosen]
            of_clip = {"true masks": [clip.mask(index) for index in chosen]}
            of_clip |= {label: rows[clip.images.name] for label, rows in self.rows.items()}
            for label in labels:
                for axes, frame, mask in zip(next(lines), frames, of_clip[label], strict=False):
                    axes.imshow(overlay(frame, mask), interpolation="nearest")
        for axes in figure.axes:
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        for number, line in enumerate(figure.axes[::_NUM_FRAMES]):
            line.set_ylabel(labels[number % len(labels)].replace(", ", ",\n"), fontsize=8, rotation=0, ha="right")
        save_figure(figure, path)


def overlay(frame: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) uint8 with the objects of a mask (H, W) in their colours."""
    mixed = (1 - _OPACITY) * frame + _OPACITY * palette(_NUM_COLORS)[mask]
    return np.where(((mask > 0) & (mask != IGNORED))[..., None], mixed, frame).astype(np.uint8)


def _frames(number: int) -> list[int]:
    """Positions of the frames to draw."""
    return np.unique(np.linspace(0, number - 1, _NUM_FRAMES).round().astype(int)).tolist()


def _stem(clip: MaskSource, index: int) -> str:
    """What a frame's file is called, or its number in five digits, as in DAVIS."""
    item = clip.images.images[index]
    return Path(item["path"]).stem if isinstance(item, dict) and item.get("path") else f"{index:05d}"
