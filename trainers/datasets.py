"""Images by position, and their transformed views.

Whatever the source, an [`ImageDataset`] gives `{"pixel_values": (C, H, W) uint8, "labels": int}`; the randomness of
its crops is a function of (seed, epoch, index), so that workers, processes and resumed runs all see the same crops.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Image
from PIL import Image as PILImage

from trainers.decoding import DecodedImage, EncodedJpeg, UnreadableImage, decode_image, open_image
from trainers.errors import InputError


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
        tables (`tuple[str, ...]`): The files on the disk that hold the rows, none if they are in memory.
        table_column (`str`, *optional*): The images' column there.
    """

    images: "np.ndarray | StoredImages"
    labels: np.ndarray | None = None
    label_names: list[str] | None = None
    name: str = "data set"
    without_labels: str | None = None
    chosen_by: str | None = None
    tables: tuple[str, ...] = ()
    table_column: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> PILImage.Image:
        """The image at a position as RGB; raises `InputError` naming the file if it cannot be read."""
        return self.read(index)

    def read(self, index: int, convert: Callable | None = None):
        """What `convert` makes of the stored image at a position, with the errors of [`~ImageSource.image`]."""
        return self._naming(index, partial(decode_image, convert=convert))

    def view(self, index: int, transform: Callable):
        """The transform of the image at a position, which is only opened; errors as in [`~ImageSource.image`]."""
        return self._naming(index, lambda item: transform(open_image(item)))

    def _naming(self, index: int, use: Callable):
        """What is made of the item at a position, with errors that name it."""
        item = self.images[index]
        try:
            return use(item)
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

    def path(self, index: int) -> str | None:
        """The file's path of an image, None if it is in no file of its own; no image is read."""
        item = self.column[int(self.indices[index])]
        return item["path"].as_py() if item.is_valid else None

    def place(self, index: int) -> dict:
        """Where an image is: `index`, its row in the column, and `path`, its file's, or None."""
        return {"index": int(self.indices[index]), "path": self.path(index)}


class ImageDataset(torch.utils.data.Dataset):
    """
    Transformed images, with randomness from (seed, epoch, index) alone.

    Args:
        source ([`ImageSource`]): The images.
        transform (`Callable`): What [`~decoding.open_image`] gives to a uint8 tensor (C, H, W); may use torch's
            default generator.
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
        view = partial(self.view, epoch=int(self.epoch), index=index)
        item = {"pixel_values": self.source.view(index, view)}
        if self.source.labels is not None:
            item["labels"] = int(self.source.labels[index])
        return item

    def view(self, image: DecodedImage | EncodedJpeg, epoch: int, index: int) -> torch.Tensor:
        """An opened image transformed as that at a position is in an epoch."""
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
