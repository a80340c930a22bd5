"""Images by position, and their transformed views.

Whatever the source, an [`ImageDataset`] gives `{"pixel_values": (C, H, W) uint8, "labels": int}`; the randomness of
its crops is a function of (seed, epoch, index), so that workers, processes and resumed runs all see the same crops.
"""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Image
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from trainers.errors import InputError, first_line


@dataclass
class ImageSource:
    """
    Images by position, undecoded, with their labels if there are any.

    Args:
        images (`np.ndarray` (n, H, W, 3) uint8, or [`StoredImages`]): The images.
        labels (`np.ndarray` of shape `(n,)`, *optional*): Class indices.
        label_names (`list[str]`, *optional*): Their names.
        name (`str`): What an error calls the data set.
        without_labels (`str`, *optional*): Why it has no labels and what to do, in a sentence, where that is known.
        chosen_by (`str`, *optional*): The flag by which these are some of a data set's images only.
    """

    images: "np.ndarray | StoredImages"
    labels: np.ndarray | None = None
    label_names: list[str] | None = None
    name: str = "data set"
    without_labels: str | None = None
    chosen_by: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> PILImage.Image:
        """The image at a position as RGB; raises `InputError` naming the file if it cannot be read."""
        return self.read(index, upright_rgb)

    def read(self, index: int, convert: Callable):
        """What `convert` makes of the stored image at a position, with the errors of [`~ImageSource.image`]."""
        item = self.images[index]
        try:
            return decode_image(item, convert)
        except UnreadableImage as error:
            where = (isinstance(item, dict) and item.get("path")) or f"number {index}"
            if error.is_missing:
                raise InputError(f"Image {where} of {self.name} is missing; remove its row.") from error
            raise InputError(f"Image {where} of {self.name} cannot be read ({error}); repair or remove it.") from error

    def fingerprint(self) -> str:
        """
        Their number, and a hash of which images they are: by row, file and folder name, and label; no image is read.
        Rendered scenes, the same at every call, are known by their labels alone.
        """
        places = []
        if isinstance(self.images, StoredImages):
            names = (path and os.path.join(*Path(path).parts[-2:]) for path in self.images.paths())
            places = list(zip(self.images.indices.tolist(), names, strict=True))
        labels = None if self.labels is None else self.labels.tolist()
        digest = hashlib.sha256(json.dumps([places, labels]).encode()).hexdigest()
        return f"{len(self)} images, {digest[:16]}"

    def take(self, indices: np.ndarray) -> "ImageSource":
        """The images at some positions."""
        labels = None if self.labels is None else self.labels[indices]
        return dataclasses.replace(self, images=self.images[indices], labels=labels)


class StoredImages(Sequence):
    """Undecoded images of an arrow column, or some of them: dictionaries with `bytes` or `path`."""

    def __init__(self, column, indices: np.ndarray | None = None):
        # the arrow column itself: indexing a `datasets` column costs more than decoding a small image
        self.column = column
        self.indices = np.arange(len(column)) if indices is None else indices

    @classmethod
    def of_files(cls, files) -> "StoredImages":
        """The images of files, by their paths."""
        rows = pa.array([{"bytes": None, "path": str(file)} for file in files], Image().pa_type)
        return cls(pa.chunked_array([rows]))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, np.ndarray):
            return StoredImages(self.column, self.indices[index])
        return self.column[int(self.indices[index])].as_py()

    def paths(self) -> list[str | None]:
        """The files' paths, None of images that are in no file of their own; no image is read."""
        return pc.struct_field(self.column, "path").take(pa.array(self.indices)).to_pylist()

    def place(self, index: int) -> dict:
        """Where an image is: `index`, its row in the column, and `path`, its file's, or None."""
        item = self[index]
        return {"index": int(self.indices[index]), "path": item and item.get("path")}


class ImageDataset(torch.utils.data.Dataset):
    """
    Transformed images, with randomness from (seed, epoch, index) alone.

    Args:
        source ([`ImageSource`]): The images.
        transform (`Callable`): PIL image to uint8 tensor (C, H, W); may use torch's default generator.
        seed (`int`): First part of each image's seed.
    """

    def __init__(self, source: ImageSource, transform: Callable, seed: int = 0):
        self.source, self.transform, self.seed = source, transform, seed
        # shared with the workers, which may outlive an epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int):
        """Chooses the crops of an epoch for those who ask by index alone."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        item = {"pixel_values": self.view(self.source.image(index), int(self.epoch), index)}
        if self.source.labels is not None:
            item["labels"] = int(self.source.labels[index])
        return item

    def view(self, image: PILImage.Image, epoch: int, index: int) -> torch.Tensor:
        """An image transformed as that at a position is in an epoch."""
        with seeded(sample_seed(self.seed, epoch, index)):
            return self.transform(image)


@contextmanager
def seeded(seed: int):
    """Torch's default CPU generator with a seed of its own for a while; as it was afterwards."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def sample_seed(*numbers: int) -> int:
    """One 64-bit seed from several whole numbers, such as (seed, epoch, index) or (seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


class UnreadableImage(ValueError):
    """
    An image that cannot be read.

    Args:
        reason (`str`): Why.
        is_missing (`bool`): Whether there is no image at all.
    """

    def __init__(self, reason: str, is_missing: bool = False):
        super().__init__(reason)
        self.is_missing = is_missing


def upright_rgb(image: PILImage.Image) -> PILImage.Image:
    """An image as RGB, turned as its camera was held."""
    return to_rgb(ImageOps.exif_transpose(image))


def decode_image(item: "np.ndarray | dict | None", convert: Callable = upright_rgb):
    """
    A stored image.

    Args:
        item (`np.ndarray` of shape `(H, W, 3)`, uint8, or `dict`): Pixels, which are taken as they are, or undecoded
            `bytes` or `path`.
        convert (`Callable`): What is made of the opened image while its file is open; it is made RGB when not given.

    Returns:
        `PIL.Image.Image`, or what `convert` gives.

    Raises:
        UnreadableImage: There is none, or it is broken.
        OSError: The disk or the network failed, which says nothing of the image.
    """
    if isinstance(item, np.ndarray):
        return PILImage.fromarray(item)
    if item is None or (item.get("bytes") is None and item.get("path") is None):
        raise UnreadableImage("missing", is_missing=True)
    data = item["bytes"] if item.get("bytes") is not None else _stored_bytes(item["path"])
    try:
        with PILImage.open(io.BytesIO(data)) as image:
            return convert(image)
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image") from error
    except Exception as error:  # Pillow's decoders raise of every kind, and the bytes are there
        raise UnreadableImage(first_line(error)) from error


def _stored_bytes(path: str | Path) -> bytes:
    """What is in an image's file; errors that are no fault of the image's, such as those of a disk, pass."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError) as error:
        raise UnreadableImage(str(error)) from error


def read_image(file: str | Path) -> PILImage.Image:
    """The image of a file of the user's as RGB; raises `InputError` naming the file if it cannot be read."""
    try:
        return decode_image({"bytes": None, "path": file})
    except (UnreadableImage, OSError) as error:
        raise InputError(f"Image {file} cannot be read ({error}); give a file with an image.") from error


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Any image as RGB: gray, palette, 16-bit and 32-bit converted, transparency laid on white."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        pixels = np.asarray(image, dtype=np.float64)
        # what white is in a file of 32 bits is not said in it: the smallest usual one that holds its values
        tops = {"I": (255, 65535), "F": (1,)}.get(image.mode, (65535,))
        top = next((top for top in tops if pixels.max() <= top), pixels.max())
        image = PILImage.fromarray((pixels / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, "white")
        image = PILImage.alpha_composite(white, image)
    return image.convert("RGB")
