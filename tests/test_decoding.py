"""Images that are decoded as far as a crop needs: the same boxes, pixels and errors as with Pillow's whole images."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

from trainers import decoding
from trainers.datasets import ImageDataset, ImageSource, StoredImages, seeded
from trainers.decoding import Box, DecodedImage, EncodedJpeg, UnreadableImage, decode_image, open_image
from trainers.errors import InputError
from trainers.transforms import RandomCrop, eval_transform, train_transform
from trainers.views import TwoViewDataArguments, view_transform

WIDTH, HEIGHT = 331, 250


def smooth() -> Image.Image:
    coarse = np.random.default_rng(1).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def textured() -> Image.Image:
    """A smooth picture with grain, as a photograph has it."""
    grain = np.random.default_rng(2).normal(0, 20, (HEIGHT, WIDTH, 1))
    return Image.fromarray((np.asarray(smooth()) + grain).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> dict:
    file = io.BytesIO()
    image.save(file, options.pop("format", "JPEG"), **({"quality": 90} | options))
    return {"bytes": file.getvalue(), "path": None}


def by_pillow(item, box: Box, size: tuple[int, int]) -> torch.Tensor:
    edges = box.left, box.top, box.left + box.width, box.top + box.height
    crop = decode_image(item).crop(edges).resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(crop)).permute(2, 0, 1)


def apart(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first.int() - second.int()).abs().float()


def rounded_otherwise(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of pixels differ by rounding alone."""
    return bool(apart(first, second).max() <= 2 and apart(first, second).mean() < 0.02)


class Asked:
    """Stands for an image, and gives the box that it is asked for."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width

    def crop(self, box, size):
        return box


@pytest.mark.parametrize(("height", "width"), [(250, 331), (500, 375), (32, 32), (20, 900), (900, 20)])
def test_boxes_are_those_of_random_resized_crop(height, width):
    crop = RandomCrop((24, 48), (0.2, 0.9))
    for seed in range(50):
        with seeded(seed):
            box, after = crop(Asked(height, width)), torch.rand(1)
        with seeded(seed):
            expected = RandomResizedCrop.get_params(torch.empty(3, height, width), [0.2, 0.9], [3 / 4, 4 / 3])
            assert tuple(box) == tuple(expected) and torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}, {"format": "PNG"}])
@pytest.mark.parametrize("make", [smooth, textured])
def test_train_crops_are_those_of_pillow_and_torchvision(make, options):
    item = jpeg(make(), **options)
    ours = train_transform((160, 200), (0.3, 1.0), horizontal_flip=True)
    crop = v2.RandomResizedCrop((160, 200), scale=(0.3, 1.0), interpolation=InterpolationMode.BICUBIC)
    theirs = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    for seed in range(6):
        with seeded(seed):
            found = ours(open_image(item))
        with seeded(seed):
            expected = theirs(decode_image(item))
        assert found.dtype == torch.uint8 and found.shape == expected.shape == (3, 160, 200)
        assert rounded_otherwise(found, expected)


BOXES = {
    "whole": Box(0, 0, HEIGHT, WIDTH),
    "first corner": Box(0, 0, 131, 153),
    "last corner": Box(HEIGHT - 131, WIDTH - 153, 131, 153),
    "inside": Box(57, 81, 129, 161),
    "first columns": Box(3, 0, 240, 130),
    "last rows": Box(HEIGHT - 130, 5, 130, 300),
}


@pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize(("make", "most"), [(smooth, 0.7), (textured, 3.0)])
@pytest.mark.parametrize("size", [(300, 280), (129, 130), (60, 63), (31, 30), (13, 14)])
def test_crops_of_all_scales_are_as_pillow_s(make, most, box, size):
    item = jpeg(make(), subsampling=2)
    found, expected = open_image(item).crop(box, size), by_pillow(item, box, size)
    if min(box.height // size[0], box.width // size[1]) < 2:
        assert rounded_otherwise(found, expected)
    difference = apart(found, expected)
    assert difference.mean() < most
    # the borders of a box are as good as what it holds
    for border in (difference[:, :2], difference[:, -2:], difference[..., :2], difference[..., -2:]):
        assert border.mean() < 1.6 * most


@pytest.mark.parametrize(
    ("size", "shape"), [((126, 250), (250, 331)), ((125, 165), (125, 166)), ((40, 50), (63, 83)), ((20, 20), (32, 42))]
)
def test_pixels_are_decoded_at_the_scale_of_the_crop(monkeypatch, size, shape):
    shapes, decode = [], decoding._by_pillow
    monkeypatch.setattr(decoding, "simplejpeg", None)
    monkeypatch.setattr(decoding, "_by_pillow", lambda *of: shapes.append((found := decode(*of)).shape[:2]) or found)
    image = open_image(jpeg(textured()))
    assert isinstance(image, EncodedJpeg) and shapes == []
    for _ in range(2):
        assert image.crop(BOXES["whole"], size).shape == (3, *size)
    assert shapes == [shape]


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2, "progressive": True}])
def test_without_simplejpeg_the_pixels_are_the_same(monkeypatch, options):
    pytest.importorskip("simplejpeg")
    item = jpeg(textured(), **options)

    def crops():
        return [open_image(item).crop(BOXES["whole"], size) for size in ((200, 200), (100, 120), (50, 60), (20, 20))]

    fast = crops()
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert all(torch.equal(one, other) for one, other in zip(fast, crops(), strict=True))


def turned() -> dict:
    exif = Image.Exif()
    exif[274] = 6
    return jpeg(textured(), exif=exif)


def turned_behind_a_look_alike() -> dict:
    """With a segment of Photoshop's before, in which the mark of a scan stands."""
    data = turned()["bytes"]
    segment = b"Photoshop 3.0\0\xff\xda\xff"
    return {"bytes": data[:2] + b"\xff\xed" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:], "path": None}


def turned_behind(header: bytes) -> dict:
    data = turned()["bytes"]
    return {"bytes": data[:20] + header + data[20:], "path": None}


def turned_behind_a_filled_mark() -> dict:
    """With a segment whose mark is filled up; if the filling is taken for a mark, the next one looks like a scan."""
    content, length = bytearray(0xFFFE - 2), 0xE2FF  # as the bytes behind the filling are read then
    content[length - 3 : length - 1] = b"\xff\xda"
    return turned_behind(b"\xff\xff\xe2\xff\xfe" + content)


def turned_by_xmp() -> dict:
    words = '<x:xmpmeta><rdf:Description tiff:Orientation="8" /></x:xmpmeta>'
    return jpeg(textured(), xmp=words.encode())


UNUSUAL = {
    "turned behind a look-alike": turned_behind_a_look_alike,
    "turned behind a segment of no length": lambda: turned_behind(b"\xff\xe5\0\0"),
    "turned behind a segment of length 1": lambda: turned_behind(b"\xff\xe5\0\1"),
    "turned behind a filled mark": turned_behind_a_filled_mark,
    "turned": turned,
    "turned by XMP": turned_by_xmp,
    "gray": lambda: jpeg(textured().convert("L")),
    "CMYK": lambda: jpeg(textured().convert("CMYK")),
    "two in a file": lambda: jpeg(textured(), format="MPO", save_all=True, append_images=[smooth()]),
    "PNG": lambda: jpeg(textured(), format="PNG"),
    "palette": lambda: jpeg(textured().quantize(16), format="PNG"),
    "pixels": lambda: np.asarray(textured()).copy(),
}


@pytest.mark.parametrize("make", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_no_upright_jpeg_in_colour_is_read_as_ever(make):
    item = make()
    image, whole = open_image(item), decode_image(item)
    assert isinstance(image, DecodedImage) and (image.width, image.height) == whole.size
    assert np.array_equal(np.asarray(image.pil()), np.asarray(whole))
    assert rounded_otherwise(image.crop(BOXES["inside"], (60, 70)), by_pillow(item, BOXES["inside"], (60, 70)))


def test_a_camera_held_upright_makes_a_plain_jpeg():
    exif = Image.Exif()
    exif[274], exif[271] = 1, "maker"
    item = jpeg(textured(), exif=exif)
    assert isinstance(open_image(item), EncodedJpeg) and isinstance(open_image(jpeg(smooth())), EncodedJpeg)
    assert np.array_equal(np.asarray(open_image(item).pil()), np.asarray(decode_image(item)))


def test_a_picture_too_large_for_pillow_is_refused_unseen(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT // 2 - 1)
    for read in (open_image, decode_image):
        with pytest.raises(UnreadableImage, match="decompression bomb"):
            read(jpeg(textured()))


def outcome(read, item):
    """The pixels that are read, or why there are none."""
    try:
        return np.asarray(read(item)).tolist()
    except UnreadableImage as error:
        return str(error), error.is_missing


def read_whole(item):
    return open_image(item).pil()


def test_broken_files_are_read_or_refused_with_the_same_words():
    """Cut anywhere, bytes changed, taken out: where Pillow reads something of a file the same pixels are read."""
    draw, small = np.random.default_rng(3), textured().resize((48, 40))
    refused = 0
    for options in ({}, {"progressive": True}):
        whole = jpeg(small, **options)["bytes"]
        for number in range(120):
            at = int(draw.integers(2, len(whole)))
            changed = bytes(draw.integers(0, 256, 3, dtype=np.uint8)) + whole[at + 3 :]
            item = {"bytes": whole[:at] + (b"", changed, whole[at + 5 :])[number % 3], "path": None}
            expected = outcome(decode_image, item)
            assert outcome(read_whole, item) == expected
            refused += isinstance(expected, tuple)
    assert 40 < refused < 200
    for item in (None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}, {"bytes": b"text", "path": None}):
        assert outcome(read_whole, item) == outcome(decode_image, item)


def test_an_image_that_breaks_when_it_is_decoded_is_named(tmp_path):
    file = tmp_path / "half.jpg"
    data = jpeg(textured())["bytes"]
    file.write_bytes(data[: len(data) // 2])
    dataset = ImageDataset(ImageSource(StoredImages.of_files([file]), name="photos"), train_transform((32, 32)))
    with pytest.raises(InputError, match=f"Image {file} of photos cannot be read .*truncated.*; repair or remove it"):
        dataset[0]


def test_views_of_evaluation_are_those_of_the_whole_image():
    item, view = jpeg(textured()), eval_transform((96, 96))
    assert torch.equal(view(open_image(item)), view(decode_image(item)))


def test_two_views_of_one_scale_decode_an_image_once(monkeypatch):
    shapes, decode = [], decoding._by_pillow
    monkeypatch.setattr(decoding, "simplejpeg", None)
    monkeypatch.setattr(decoding, "_by_pillow", lambda *of: shapes.append((found := decode(*of)).shape) or found)
    views = view_transform((224, 224), TwoViewDataArguments(), 2)(open_image(jpeg(textured())))
    assert views.shape == (2, 3, 224, 224) and len(shapes) == 1
