"""Train images decoded once: their pixels in one file that is mapped into memory, read without a decoder.

A folder holds `pixels.bin`, the images behind each other as (H, W, 3) uint8, and `index.safetensors`: `heights` and
`widths`, and of which images it was made. It is renamed to its own name when all is written, so that what a killed
process leaves is never read.

It stands for those images alone that it was made of: their encoded bytes are hashed as they are decoded. Files, of
images or of tables of them, that still have their sizes, inodes and times of change are known to be these without
reading them. Where one has not, as in a copy, all encoded bytes are read and hashed again at the start.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch.utils.data import DataLoader
from tqdm import tqdm

from trainers.datasets import ImageSource, StoredImages
from trainers.decoding import Box, UnreadableImage, open_image, stored_bytes
from trainers.errors import InputError, first_line
from trainers.files import is_disk_full, leftovers, make_place, unfinished_beside, user_path
from trainers.image_contents import bytes_hash, file_stamps
from trainers.processes import in_main_process

# of the files, and of how their pixels are made
_VERSION = 2
_PIXELS, _INDEX = "pixels.bin", "index.safetensors"
# images whose sizes tell how much room all need
_NUM_MEASURED = 256
_BATCH_SIZE = 16
# how long the other processes wait for a sign of the one that writes
_SECONDS = 60


class CachedImages(StoredImages):
    """
    Stored images, given as the decoded pixels of a cache; those that could not be read are given undecoded.

    Args:
        column, indices: As in [`StoredImages`].
        cache ([`DecodedCache`]): The pixels.
        places (`np.ndarray`, *optional*): Where the images are in it; all of them in its order when not given.
    """

    def __init__(self, column, indices: np.ndarray, cache: "DecodedCache", places: np.ndarray | None = None):
        super().__init__(column, indices)
        self.cache, self.places = cache, np.arange(len(indices)) if places is None else places

    def __getitem__(self, index):
        if isinstance(index, np.ndarray):
            return CachedImages(self.column, self.indices[index], self.cache, self.places[index])
        pixels = self.cache.pixels(int(self.places[index]))
        return super().__getitem__(index) if pixels is None else pixels


class DecodedCache:
    """
    The folder of a cache, opened.

    Args:
        folder (`Path`): A whole one.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        with safe_open(str(folder / _INDEX), "numpy") as file:
            self.made_of = dict(json.loads(file.metadata()["made_of"]))
            self.heights, self.widths = map(file.get_tensor, ("heights", "widths"))
        self.offsets = np.append(0, np.cumsum(3 * self.heights.astype(np.int64) * self.widths))

    @cached_property
    def _memory(self) -> np.ndarray:
        return np.memmap(self.folder / _PIXELS, np.uint8, "r") if self.offsets[-1] else np.zeros(0, np.uint8)

    def __getstate__(self) -> dict:
        # a process that does not share this one's memory maps the file itself
        return {name: value for name, value in self.__dict__.items() if name != "_memory"}

    def pixels(self, place: int) -> np.ndarray | None:
        """An image (H, W, 3) uint8, None if it could not be read; it may not be written to."""
        shape = int(self.heights[place]), int(self.widths[place]), 3
        return self._memory[self.offsets[place] : self.offsets[place + 1]].reshape(shape) if shape[0] else None


def with_cache(
    source: ImageSource, folder: str | Path, size: int, num_workers: int = 0, progress: bool = True
) -> ImageSource:
    """
    A source whose images are read from a cache, which the main process makes if it is not there; all call it.

    Args:
        source ([`ImageSource`]): Stored images.
        folder (`str` or `Path`): The cache's; made of these images in this size, or new.
        size (`int`): Pixels of the short side that a larger image is shrunk to.
        num_workers (`int`): Processes that decode; 0: the main process.
        progress (`bool`): Whether to show a bar.

    Returns:
        [`ImageSource`]: With the same labels and fingerprint.

    Raises:
        InputError: The images are in memory, the folder holds something else, or the disk has no room for them.
    """
    folder, images = user_path(folder, "--decoded_cache"), source.images
    if not isinstance(images, StoredImages):
        raise InputError(f"The images of {source.name} are decoded already; leave --decoded_cache out.")
    made_of = {"version": _VERSION, "size": size, "images": source.fingerprint()}
    if in_main_process(_is_there, folder, made_of, source.name):
        steps = _compare(folder, source, made_of, num_workers, progress)
    else:
        in_main_process(_check_room, folder, source, size)
        in_main_process(_check_place, folder)
        steps = _write(folder, source, made_of, num_workers, progress)
    while not in_main_process(_go_on, steps):
        pass
    if not folder.is_dir():
        raise InputError(f"--decoded_cache {folder} is not on this machine; name a folder that all machines share.")
    cache = DecodedCache(folder)
    return dataclasses.replace(source, images=CachedImages(images.column, images.indices, cache))


def _some(source: ImageSource) -> np.ndarray:
    """Positions of some images from all over a source."""
    return np.unique(np.linspace(0, len(source) - 1, min(len(source), _NUM_MEASURED)).astype(int))


def _is_there(folder: Path, made_of: dict, name: str) -> bool:
    """Whether a folder is a cache of what is given of its images; raises `InputError` if it is anything else."""
    if not os.path.exists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        cache = DecodedCache(folder)
        size = (folder / _PIXELS).stat().st_size
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"--decoded_cache {folder} holds no decoded images ({first_line(error)}); name a new folder."
        ) from error
    if size != cache.offsets[-1]:
        raise InputError(f"--decoded_cache {folder} is damaged ({_PIXELS} has {size:,} bytes); remove it.")
    others = f"other images than those of {name}"
    for key, what in (("version", "another version of cjepa"), ("images", others), ("contents", others)):
        if key in made_of and cache.made_of.get(key) != made_of[key]:
            raise InputError(f"--decoded_cache {folder} is of {what}; remove it, or name another folder.")
    if cache.made_of["size"] != made_of["size"]:
        raise InputError(
            f"--decoded_cache {folder} has images of {cache.made_of['size']} pixels, not of {made_of['size']}; set "
            "--decoded_size, or name another folder."
        )
    return True


def _check_place(folder: Path):
    """Raises `InputError` if a folder cannot be made there; what killed processes have begun there is removed."""
    if not folder.name or os.path.islink(folder):
        raise InputError(f"--decoded_cache {folder} is no folder that can be made; name a new one, such as decoded.")
    for killed in leftovers(folder):
        shutil.rmtree(killed, ignore_errors=True)
    make_place(folder, "--decoded_cache")


def _check_room(folder: Path, source: ImageSource, size: int):
    """Raises `InputError` if the disk has no room for the images, as some of them tell."""
    chosen = _some(source)
    num_bytes = [3 * height * width for height, width in (_stored_size(source.images[at], size) for at in chosen)]
    needed = sum(num_bytes) / len(chosen) * len(source)
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.exists(parent))
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"--decoded_cache {folder} needs about {needed / 1e9:.1f} GB for {len(source):,} images, and "
            f"{free / 1e9:.1f} GB are free; lower --decoded_size {size}, or name a folder on another disk."
        )


def _stored_size(item, size: int) -> tuple[int, int]:
    """Height and width of an image in a cache; zeros if it cannot be opened."""
    try:
        image = open_image(item)
    except UnreadableImage:
        return 0, 0
    return _shrunk_size(image, size)


def _shrunk_size(image, size: int) -> tuple[int, int]:
    share = min(size / min(image.height, image.width), 1)
    return max(round(image.height * share), 1), max(round(image.width * share), 1)


class _Encoded(torch.utils.data.Dataset):
    """Images' encoded bytes, as what is made of them; None stands for those that are not there."""

    def __init__(self, images: StoredImages, make: Callable):
        self.images, self.make = images, make

    def __getitem__(self, index: int):
        try:
            data = stored_bytes(self.images[index])
        except UnreadableImage:
            data = None
        return self.make(data)


def _hash_and_pixels(data: bytes | None, size: int) -> tuple[bytes, np.ndarray | None]:
    """The hash of an image, and its pixels (H, W, 3) as a cache holds them; None if it cannot be read."""
    try:
        image = open_image({"bytes": data, "path": None})
        whole = Box(0, 0, image.height, image.width)
        pixels = image.crop(whole, _shrunk_size(image, size)).permute(1, 2, 0).contiguous().numpy()
    except UnreadableImage:
        pixels = None
    return bytes_hash(data), pixels


def _batches(images: StoredImages, make: Callable, num_workers: int, doing: str, progress: bool) -> Iterator[list]:
    """What is made of the encoded bytes of all images, with a bar."""
    # a generator of its own: the loader draws a seed for its workers, and shall not draw it from the caller's
    loader = DataLoader(_Encoded(images, make), _BATCH_SIZE, sampler=range(len(images)),
                        num_workers=num_workers, collate_fn=list, generator=torch.Generator())  # fmt: skip
    with tqdm(total=len(images), desc=doing, unit="image", disable=not progress) as bar:
        for batch in loader:
            yield batch
            bar.update(len(batch))


def _compare(folder: Path, source: ImageSource, made_of: dict, num_workers: int, progress: bool) -> Iterator[None]:
    """Raises `InputError` if the images are not those of a cache, an item for each batch that is read for it."""
    stamps = file_stamps(source)
    if stamps is not None and stamps == DecodedCache(folder).made_of.get("stamps"):
        return
    contents = hashlib.sha256()
    for batch in _batches(source.images, bytes_hash, num_workers, "comparing images", progress):
        for digest in batch:
            contents.update(digest)
        yield
    _is_there(folder, made_of | {"contents": contents.hexdigest()}, source.name)


def _write(folder: Path, source: ImageSource, made_of: dict, num_workers: int, progress: bool) -> Iterator[None]:
    """Writes a cache, an item for each batch of images."""
    unfinished, make = unfinished_beside(folder), partial(_hash_and_pixels, size=made_of["size"])
    # before the files are read: what is written to them meanwhile is seen at the next start
    made_of, contents, sizes = made_of | {"stamps": file_stamps(source)}, hashlib.sha256(), []
    try:
        unfinished.mkdir(parents=True)
        with (unfinished / _PIXELS).open("wb") as file:
            for batch in _batches(source.images, make, num_workers, "decoding images", progress):
                for digest, pixels in batch:
                    contents.update(digest)
                    sizes.append((0, 0) if pixels is None else pixels.shape[:2])
                    file.write(b"" if pixels is None else pixels)
                yield
            file.flush()
            os.fsync(file.fileno())
        made_of["contents"] = contents.hexdigest()
        heights, widths = np.array(sizes, dtype=np.int32).T
        index = {"heights": heights.copy(), "widths": widths.copy()}
        # not by `save_file`, whose files no other user may read
        (unfinished / _INDEX).write_bytes(save(index, {"made_of": json.dumps(made_of)}))
        _put_in_place(unfinished, folder, made_of, source.name)
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise InputError(f"The disk is full ({first_line(error)}); make room for --decoded_cache {folder}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _put_in_place(unfinished: Path, folder: Path, made_of: dict, name: str):
    try:
        unfinished.rename(folder)
    except OSError:
        # another run has made it meanwhile
        if not _is_there(folder, made_of, name):
            raise


def _go_on(steps: Iterator[None]) -> bool:
    """Takes steps for a while; whether there are no more."""
    until = time.monotonic() + _SECONDS
    return all(time.monotonic() < until for _ in steps)
