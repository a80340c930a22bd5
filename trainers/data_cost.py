"""What train crops cost: those of I-JEPA's authors, and ours of JPEGs and of decoded images, in turns.

The pictures are drawn: scenes with a texture of all sizes laid on, so that a JPEG of 500 x 375 pixels in quality 90
has about 62 kB, as photographs of ImageNet have that are stored so.
"""

import io
import tempfile
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image as PILImage
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from trainers.benchmark import quartiles, shown
from trainers.datasets import ImageDataset, ImageSource, StoredImages
from trainers.decoded_cache import with_cache
from trainers.decoding import decode_image, simplejpeg
from trainers.errors import InputError
from trainers.reports import markdown_table
from trainers.scenes import render_scene
from trainers.threads import threads
from trainers.transforms import normalize, train_transform

WHAT = {
    "reference": "the authors'",
    "bicubic": "the authors', bicubic as ours are",
    "stored": "ours, of JPEGs",
    "cached": "ours, of decoded images",
}
_WIDTH, _HEIGHT, _QUALITY = 500, 375, 90
_VIEW, _CROP_SCALE = (224, 224), (0.3, 1.0)
_BATCH_SIZE = 16
# gray levels of the texture, for the bytes of a photograph
_TEXTURE = 3.0


def benchmark_data(num_images: int = 64, num_rounds: int = 9, num_workers: int = 0) -> dict:
    """
    Times batches of crops of 224 pixels from 500 x 375: by the authors' transforms (Pillow decodes all, crops, resizes
    bilinearly; float32, normalised) and by ours (bicubically; uint8) of JPEGs and of a [`DecodedCache`] with a short
    side of 256.

    Args:
        num_images (`int`): Images of a round.
        num_rounds (`int`): Timed rounds of each; one more comes before them.
        num_workers (`int`): Processes that make crops; 0: this one, on one thread.

    Returns:
        `dict`: `num_images`, `workers`, `decoder`, `jpeg_bytes` (of an image, on average); of each of [`WHAT`] the
        quartiles of its images a second, and `bytes` of an image as it goes to the device; `factor`, of each but the
        first the quartiles of its speed over the reference's, round by round, and `factor_bicubic`, of ours over the
        authors' with the filter of ours; `normalize_us`, what ours add an image where the device is this CPU.

    Raises:
        InputError: The numbers are too small to measure with.
    """
    if num_images < _BATCH_SIZE or num_rounds < 2 or num_workers < 0:
        raise InputError(
            f"--num_images {num_images} must be {_BATCH_SIZE} or more, --rounds {num_rounds} 2 or more and --workers "
            f"{num_workers} 0 or more."
        )
    with tempfile.TemporaryDirectory() as folder, threads(1):
        source = _pictures(num_images)
        crop = train_transform(_VIEW, _CROP_SCALE)
        cached = with_cache(source, Path(folder, "decoded"), 256, progress=False)
        crops = {
            "reference": _AuthorsCrops(source, transforms.InterpolationMode.BILINEAR),
            "bicubic": _AuthorsCrops(source, transforms.InterpolationMode.BICUBIC),
            "stored": ImageDataset(source, crop),
            "cached": ImageDataset(cached, crop),
        }
        passes = {name: _Passes(dataset, num_workers) for name, dataset in crops.items()}
        rounds = [{name: each.seconds() for name, each in passes.items()} for _ in shown(num_rounds, "crops")][1:]
        found = {name: quartiles([num_images / each[name] for each in rounds]) for name in passes}
        for name, dataset in crops.items():
            found[name]["bytes"] = dataset[0]["pixel_values"].nbytes
        normalize_us = _normalize_us(crops["stored"], num_rounds)
    sizes = [len(item["bytes"]) for item in source.images]

    def factors(base: str, names: tuple[str, ...]) -> dict:
        return {name: quartiles([each[base] / each[name] for each in rounds]) for name in names}

    return {
        "num_images": num_images, "workers": num_workers, "jpeg_bytes": sum(sizes) / len(sizes),
        "decoder": "Pillow" if simplejpeg is None else "simplejpeg",
        **found, "factor": factors("reference", ("bicubic", "stored", "cached")),
        "factor_bicubic": factors("bicubic", ("stored", "cached")), "normalize_us": normalize_us,
    }  # fmt: skip


class _AuthorsCrops(torch.utils.data.Dataset):
    """Crops as in I-JEPA's published code, where the filter is bilinear: float32 and normalised."""

    def __init__(self, source: ImageSource, interpolation: transforms.InterpolationMode):
        self.source = source
        crop = transforms.RandomResizedCrop(_VIEW, _CROP_SCALE, interpolation=interpolation)
        self.transform = transforms.Compose(
            [crop, transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
        )

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        image = decode_image(self.source.images[index], lambda image: image.convert("RGB"))
        return {"pixel_values": self.transform(image)}


class _Passes:
    """Passes over a data set by a loader whose workers, if any, live on."""

    def __init__(self, dataset, num_workers: int):
        self.loader = DataLoader(dataset, _BATCH_SIZE, num_workers=num_workers, persistent_workers=num_workers > 0)

    def seconds(self) -> float:
        """Of one pass."""
        started = time.perf_counter()
        for _ in self.loader:
            pass
        return time.perf_counter() - started


def _normalize_us(dataset: ImageDataset, num_rounds: int) -> float:
    batch = torch.stack([dataset[index]["pixel_values"] for index in range(_BATCH_SIZE)])
    times = []
    for _ in range(num_rounds + 1):
        started = time.perf_counter()
        normalize(batch, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        times.append((time.perf_counter() - started) / _BATCH_SIZE * 1e6)
    return quartiles(times[1:])["median"]


def _pictures(number: int) -> ImageSource:
    """JPEGs in memory."""
    rows = []
    for index in range(number):
        scene = PILImage.fromarray(render_scene(0, index, _WIDTH // 2).image).resize((_WIDTH, _WIDTH))
        pixels = np.asarray(scene)[:_HEIGHT] + _texture(np.random.default_rng(index))
        file = io.BytesIO()
        PILImage.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=_QUALITY)
        rows.append({"bytes": file.getvalue(), "path": None})
    return ImageSource(StoredImages(pa.chunked_array([pa.array(rows, datasets.Image().pa_type)])), name="pictures")


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Noise (H, W, 1) of cells of all sizes, the larger the stronger, as surfaces have it."""
    layers = []
    for cell in (1, 2, 4, 8, 16):
        noise = rng.standard_normal((-(-_HEIGHT // cell), -(-_WIDTH // cell)), dtype=np.float32)
        layers.append(cell**0.5 * np.asarray(PILImage.fromarray(noise).resize((_WIDTH, _HEIGHT))))
    return _TEXTURE * sum(layers)[..., None]


def format_data_cost(found: dict) -> str:
    """The measurements as a table."""
    cells = [
        ["crops of 224 pixels", "images/s (quartiles)", "times the authors'", "times bicubic", "kB to the device"]
    ]
    for name, title in WHAT.items():
        speed = "{median:,.0f} ({low:,.0f} - {high:,.0f})".format(**found[name])
        times = [
            "{median:.2f} ({low:.2f} - {high:.2f})".format(**found[factor][name]) if name in found[factor] else ""
            for factor in ("factor", "factor_bicubic")
        ]
        cells.append([title, speed, *times, f"{found[name]['bytes'] / 1e3:.1f}"])
    makers = f"workers: {found['workers']}" if found["workers"] else "this process, one thread"
    return "\n".join(
        [
            f"{found['num_images']} images of {_WIDTH} x {_HEIGHT}, {found['jpeg_bytes'] / 1e3:.1f} kB, {makers}, "
            f"decoded by {found['decoder']}",
            *markdown_table(cells),
            f"\nours are normalised on the device: {found['normalize_us']:.0f} us an image where that is this CPU",
        ]
    )
