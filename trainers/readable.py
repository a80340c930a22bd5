"""Images that cannot be read are found before a command begins its work, left out, counted and listed."""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from trainers.datasets import ImageSource, StoredImages
from trainers.decoding import UnreadableImage, decode_image
from trainers.errors import InputError
from trainers.files import write_text_atomically
from trainers.subsets import with_common_classes

SKIPPED = "skipped.jsonl"
MAX_SKIPPED_SHARE = 0.01
_NUM_SHOWN = 3
_BATCH_SIZE = 64


def allowed_to_skip(num_images: int, share: float) -> int:
    """How many of so many images may be left out as unreadable: a share of them, and ten of however few; none at 0."""
    return max(10, int(share * num_images)) if share else 0


def readable_positions(
    source: ImageSource, num_workers: int = 0, progress: bool = True, state: PartialState | None = None
) -> tuple[np.ndarray, list[dict]]:
    """
    Which images of a source can be read, and which are to be left out; the latter are said in one line.

    Every stored image is decoded once more than the work itself does it; rendered scenes, which are pixels already,
    cost nothing.

    Args:
        source ([`ImageSource`]): The images.
        num_workers (`int`): Processes that decode; 0: this one.
        progress (`bool`): Whether to show a bar.
        state (`PartialState`, *optional*): The processes that share the decoding and all come to the same answer; when
            not given this one decodes all.

    Returns:
        `(kept, skipped)`: The positions of the readable, and of each other image `dataset` (the source's name),
        `index` (its row), `path` (its file's, or None) and `reason`.

    Raises:
        InputError: More are unreadable than [`allowed_to_skip`] says, or all are.
    """
    total, images = len(source), source.images
    if not isinstance(images, StoredImages):
        return np.arange(total), []
    reasons = _find_unreadable(images, num_workers, progress, state)
    skipped = [
        {"dataset": source.name, **images.place(position), "reason": reasons[position]} for position in sorted(reasons)
    ]
    if skipped:
        shown = "; ".join(_told(entry) for entry in skipped[:_NUM_SHOWN]) + ("; ..." * (len(skipped) > _NUM_SHOWN))
        said = f"{len(skipped):,} of {total:,} images of {source.name} cannot be read"
        allowed = min(allowed_to_skip(total, MAX_SKIPPED_SHARE), total - 1)
        if len(skipped) > allowed:
            raise InputError(f"{said} ({shown}), and up to {allowed:,} would be left out; repair or remove them.")
        if state is None or state.is_main_process:
            print(f"{said} and are left out: {shown}", flush=True)
    return np.setdiff1d(np.arange(total), list(reasons)), skipped


def readable_splits(
    train: ImageSource,
    test: ImageSource,
    num_workers: int = 0,
    progress: bool = True,
    state: PartialState | None = None,
) -> tuple[ImageSource, ImageSource, list[dict]]:
    """
    Labelled train and test images without those that cannot be read.

    Args:
        train, test ([`ImageSource`]): The images, whose classes are alike.
        num_workers, progress, state: As in [`readable_positions`].

    Returns:
        `(train, test, skipped)`: Both, their classes numbered alike, and those left out of either.

    Raises:
        InputError: Too many cannot be read, or a test class has lost all of its train images.
    """
    (kept, skipped), (kept_test, skipped_test) = (
        readable_positions(source, num_workers, progress, state) for source in (train, test)
    )
    # once more: a class may have lost its images
    return *with_common_classes(train.take(kept), test.take(kept_test)), skipped + skipped_test


def write_skipped(folder: Path, skipped: list[dict]):
    """
    Lists images that were left out in `skipped.jsonl`, one a line; without any, there is no such file.

    Args:
        folder (`Path`): Where to.
        skipped (`list[dict]`): Of [`readable_positions`].
    """
    if skipped:
        write_text_atomically(folder / SKIPPED, "".join(f"{json.dumps(entry)}\n" for entry in skipped))
    else:
        (folder / SKIPPED).unlink(missing_ok=True)


def _told(entry: dict) -> str:
    return f"{entry['path'] or 'number {index}'.format(**entry)}: {entry['reason']}"


def _find_unreadable(images: StoredImages, num_workers: int, progress: bool, state) -> dict[int, str]:
    """Why some images cannot be read, by their positions."""
    rank, number = (state.process_index, state.num_processes) if state else (0, 1)
    mine = range(rank, len(images), number)
    # a generator of its own: the loader draws a seed for its workers, and shall not draw it from the caller's
    loader = DataLoader(_Reasons(images), _BATCH_SIZE, sampler=mine, num_workers=num_workers, collate_fn=list,
                        generator=torch.Generator())  # fmt: skip
    found = []
    with tqdm(total=len(mine), desc="checking images", unit="image", disable=not progress or rank > 0) as bar:
        for reasons in loader:
            found += reasons
            bar.update(len(reasons))
    unreadable = [(position, reason) for position, reason in zip(mine, found, strict=True) if reason is not None]
    return dict(gather_object(unreadable) if number > 1 else unreadable)


class _Reasons(torch.utils.data.Dataset):
    """Why an image cannot be read, by its position; None if it can be."""

    def __init__(self, images: StoredImages):
        self.images = images

    def __getitem__(self, index: int) -> str | None:
        try:
            decode_image(self.images[index])
        except UnreadableImage as error:
            return str(error)
        return None
