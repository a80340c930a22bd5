"""Stored images: opened by their headers, decoded only as far and as finely as what is asked of them needs.

Shapes: H and W height and width of an image, h and w those of a crop of it as it is given.
"""

import io
import math
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, ImageOps, UnidentifiedImageError
from PIL import Image as PILImage
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import pil_to_tensor

from trainers.errors import InputError, first_line

try:
    import simplejpeg
except ImportError:  # Pillow decodes then, slower
    simplejpeg = None

# by how much a JPEG's pixels can be shrunk where they are decoded
_SHRINKS = (8, 4, 2)
_FIRST_SCAN = b"\xff\xda"
# marks of what may turn an image (EXIF, XMP), and of files with several
_FOR_PILLOW = (b"Exif\0\0", b"http://ns.adobe.com/xap/", b"MPF\0")


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


class Box(NamedTuple):
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


class DecodedImage:
    """
    An image whose pixels are there.

    Args:
        pixels (`np.ndarray` of shape `(H, W, 3)`, uint8): They; nothing is written to them.
    """

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def crop(self, box: Box, size: tuple[int, int]) -> torch.Tensor:
        """A part (3, h, w) uint8, resized to `size`, (h, w), bicubically and with antialiasing."""
        # a copy, since torch warns of memory that cannot be written to
        part = np.array(self.pixels[box.top : box.top + box.height, box.left : box.left + box.width])
        return interpolate(torch.from_numpy(part).permute(2, 0, 1)[None], size, mode="bicubic", antialias=True)[0]

    def pil(self) -> PILImage.Image:
        """All of it as an RGB image."""
        return PILImage.fromarray(self.pixels)


class EncodedJpeg:
    """
    An upright JPEG in colour, decoded when it is asked for.

    Of a crop that is twice as large as it is wanted, or larger, the pixels are decoded at a half, a quarter or an
    eighth of their number a side: gray levels differ from those of all pixels resized, on average by one or two where
    there is a fine texture. What was decoded for a crop is kept for the next one.

    Args:
        data (`bytes`): The whole file.
        width, height (`int`): As its header says.
    """

    def __init__(self, data: bytes, width: int, height: int):
        self.data, self.width, self.height = data, width, height
        self._decoded: dict[int, np.ndarray] = {}

    def crop(self, box: Box, size: tuple[int, int]) -> torch.Tensor:
        """As [`DecodedImage.crop`]; raises `UnreadableImage` if the data are broken."""
        at_most = min(box.height // size[0], box.width // size[1])
        shrink = next((shrink for shrink in _SHRINKS if shrink <= at_most), 1)
        if shrink == 1:
            return DecodedImage(self._pixels()).crop(box, size)
        # the edges of the box lie between shrunk pixels, which Pillow's resize alone can do
        edges = box.left, box.top, box.left + box.width, box.top + box.height
        part, bicubic = tuple(edge / shrink for edge in edges), PILImage.Resampling.BICUBIC
        shrunk = PILImage.fromarray(self._pixels(shrink))
        return pil_to_tensor(shrunk.resize(size[::-1], bicubic, box=part))

    def pil(self) -> PILImage.Image:
        """All of it as an RGB image; raises `UnreadableImage` if the data are broken."""
        return PILImage.fromarray(self._pixels())

    def _pixels(self, shrink: int = 1) -> np.ndarray:
        """Its pixels (H / shrink, W / shrink, 3), both rounded up."""
        if shrink not in self._decoded:
            decode = _by_pillow if simplejpeg is None else _by_simplejpeg
            self._decoded[shrink] = decode(self.data, self.width, self.height, shrink)
        return self._decoded[shrink]


def _by_simplejpeg(data: bytes, width: int, height: int, shrink: int) -> np.ndarray:
    try:
        return simplejpeg.decode_jpeg(data, min_width=-(-width // shrink), min_height=-(-height // shrink))
    except ValueError:
        # what one decoder refuses another may read; where neither can, Pillow says why
        return _by_pillow(data, width, height, shrink)


def _by_pillow(data: bytes, width: int, height: int, shrink: int) -> np.ndarray:
    """The same pixels, of the same library of C, in half as much time again."""
    with _told_as_unreadable(), PILImage.open(io.BytesIO(data)) as image:
        image.draft("RGB", (width // shrink, height // shrink))
        return np.asarray(image)


def open_image(item: "np.ndarray | dict | None") -> DecodedImage | EncodedJpeg:
    """
    A stored image, of which no more is decoded than what tells its size, if it is a plain JPEG.

    Args:
        item: As in [`decode_image`].

    Returns:
        [`DecodedImage`] or [`EncodedJpeg`].

    Raises:
        UnreadableImage: There is none, or it is broken; of a JPEG this may show only when it is decoded.
        OSError: The disk or the network failed, which says nothing of the image.
    """
    if isinstance(item, np.ndarray):
        return DecodedImage(item)
    data = stored_bytes(item)
    if (usual := _usual_jpeg(data)) is not None:
        return usual
    with _told_as_unreadable(), PILImage.open(io.BytesIO(data)) as image:
        is_jpeg = image.format == "JPEG" and image.mode == "RGB"
        if is_jpeg and image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return EncodedJpeg(data, *image.size)
        return DecodedImage(np.asarray(upright_rgb(image)))


def decode_image(item: "np.ndarray | dict | None", convert: Callable | None = None):
    """
    A stored image.

    Args:
        item (`np.ndarray` of shape `(H, W, 3)`, uint8, or `dict`): Pixels, which are taken as they are, or undecoded
            `bytes` or `path`.
        convert (`Callable`, *optional*): What is made of the opened image while its file is open; it is made RGB when
            not given.

    Returns:
        `PIL.Image.Image`, or what `convert` gives.

    Raises:
        UnreadableImage: There is none, or it is broken.
        OSError: The disk or the network failed, which says nothing of the image.
    """
    if isinstance(item, np.ndarray):
        return PILImage.fromarray(item)
    data = stored_bytes(item)
    with _told_as_unreadable(), PILImage.open(io.BytesIO(data)) as image:
        return (convert or upright_rgb)(image)


def read_image(file: str | Path) -> PILImage.Image:
    """The image of a file of the user's as RGB; raises `InputError` naming the file if it cannot be read."""
    try:
        return decode_image({"bytes": None, "path": file})
    except (UnreadableImage, OSError) as error:
        raise InputError(f"Image {file} cannot be read ({error}); give a file with an image.") from error


def upright_rgb(image: PILImage.Image) -> PILImage.Image:
    """An image as RGB, turned as its camera was held."""
    return to_rgb(ImageOps.exif_transpose(image))


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


def _usual_jpeg(data: bytes) -> EncodedJpeg | None:
    """A JPEG in colour of whose header Pillow need not be asked, which takes five times as long; None of all else."""
    if simplejpeg is None or not data.startswith(b"\xff\xd8\xff"):
        return None
    header = _header(data)
    if header is None or any(mark in header for mark in _FOR_PILLOW):
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    is_usual = colorspace == "YCbCr" and height * width <= (PILImage.MAX_IMAGE_PIXELS or math.inf)
    return EncodedJpeg(data, width, height) if is_usual else None


def _header(data: bytes) -> bytes | None:
    """
    A JPEG up to its first scan: segment by segment, as their contents may look like a mark. None if something else
    stands between them, of which decoders make what they like; a length below 2 leads into itself, where no mark is.
    """
    at = 2
    while (mark := data[at : at + 2]) != _FIRST_SCAN:
        if mark[:1] != b"\xff" or mark == b"\xff\xff":
            return None
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return data[:at]


@contextmanager
def _told_as_unreadable():
    """Errors of Pillow's as `UnreadableImage`: its decoders raise of every kind, and the bytes are there."""
    try:
        yield
    except UnidentifiedImageError as error:
        raise UnreadableImage("not an image") from error
    except Exception as error:
        raise UnreadableImage(first_line(error)) from error


def stored_bytes(item: dict | None) -> bytes:
    """The encoded bytes of an item; errors that are no fault of the image's, such as those of a disk, pass."""
    if item is None or (item.get("bytes") is None and item.get("path") is None):
        raise UnreadableImage("missing", is_missing=True)
    if item.get("bytes") is not None:
        return item["bytes"]
    try:
        with open(item["path"], "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError, ValueError) as error:
        raise UnreadableImage(str(error)) from error
