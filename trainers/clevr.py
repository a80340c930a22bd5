"""CLEVR as it is downloaded, with the labels of its two low-level tasks: how many objects, and how far the nearest is.

The classes are those of VTAB (arXiv 1910.04867), on which I-JEPA and C-JEPA report: 3 to 10 objects, and six ranges of
the distance of the nearest object to the camera. The test split has no annotations; its place takes `val`.
"""

import json
from pathlib import Path

import numpy as np

from trainers.datasets import ImageSource, StoredImages
from trainers.errors import InputError, first_line

SPLITS = {"train": "train", "test": "val"}
_DISTANCES = (8.0, 8.5, 9.0, 9.5, 10.0)
_DISTANCE_NAMES = ("up to 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "over 10")
_COUNTS = range(3, 11)


def is_clevr(folder: Path) -> bool:
    """Whether a folder is a download of CLEVR: `images/train/*.png` and `scenes/CLEVR_train_scenes.json`."""
    return (folder / "scenes" / "CLEVR_train_scenes.json").is_file()


def load_clevr(folder: Path, label: str | None) -> tuple[ImageSource, ImageSource]:
    """
    The images of `train` and `val`.

    Args:
        folder (`Path`): The download, `CLEVR_v1.0`.
        label (`str`, *optional*): `"count"` (the default) or `"distance"`.

    Returns:
        The train and the evaluation [`ImageSource`].

    Raises:
        InputError: The label is another, or the annotations are broken.
    """
    label = label or "count"
    if label not in ("count", "distance"):
        raise InputError(f"CLEVR has no labels {label!r}; give --label_column count or distance.")
    return tuple(_load_split(folder, split, label) for split in SPLITS.values())


def _load_split(folder: Path, split: str, label: str) -> ImageSource:
    file = folder / "scenes" / f"CLEVR_{split}_scenes.json"
    try:
        scenes = json.loads(file.read_text(encoding="utf-8"))["scenes"]
        paths = [folder / "images" / split / scene["image_filename"] for scene in scenes]
        if label == "count":
            labels = [_COUNTS.index(len(scene["objects"])) for scene in scenes]
            names = [f"{count} objects" for count in _COUNTS]
        else:
            nearest = [min(thing["pixel_coords"][2] for thing in scene["objects"]) for scene in scenes]
            labels = np.searchsorted(_DISTANCES, nearest)
            names = list(_DISTANCE_NAMES)
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{file}, annotations of CLEVR, cannot be read ({first_line(error)}); download it again."
        ) from error
    if not paths:
        raise InputError(f"{file} lists no scene; download it again.")
    return ImageSource(StoredImages.of_files(paths), np.asarray(labels, dtype=np.int64), names, f"{folder} ({split})")
