"""How well frozen patch features segment images: a model beside a random encoder and raw pixels.

Shapes: H and W rows and columns of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from torch import nn
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from trainers.baselines import random_encoders
from trainers.embedding import device_of
from trainers.loading import load_with_statistics
from trainers.mask_sources import MaskDataset, MaskSource
from trainers.pooling import pooled_encoder
from trainers.precision import probes_in_bf16
from trainers.reports import markdown_table, with_interval
from trainers.segmentation import (
    FrozenMaps,
    LinearSegmenter,
    PixelPatches,
    SegmentationArguments,
    score_segmenter,
    train_segmenter,
)
from trainers.transforms import normalize


@dataclass
class Segmenter:
    """
    An encoder with its trained probe.

    Args:
        label (`str`): What it is called.
        encoder (`nn.Module`): Gives maps of features.
        head ([`LinearSegmenter`]): The probe.
        mean, std (`list[float]`): Of the channels of its images, for pixels in [0, 1].
    """

    label: str
    encoder: nn.Module
    head: LinearSegmenter
    mean: Sequence[float]
    std: Sequence[float]

    @torch.no_grad()
    def segment(self, image: PILImage.Image) -> np.ndarray:
        """The classes (H, W) uint8 of an RGB image's pixels, at the encoder's size."""
        height, width = self.head.image_size
        pixels = np.array(image.resize((width, height), PILImage.Resampling.BICUBIC))
        device = device_of(self.encoder)
        pixel_values = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=probes_in_bf16(device)):
            features = self.encoder(normalize(pixel_values, self.mean, self.std)).pooler_output
        return self.head(features.float())[0].argmax(dim=0).cpu().numpy().astype(np.uint8)


def evaluate_segmentation(
    model,
    train: MaskSource,
    test: MaskSource,
    names: list[str],
    arguments: SegmentationArguments | None = None,
    image_mean=IMAGENET_DEFAULT_MEAN,
    image_std=IMAGENET_DEFAULT_STD,
    level: int | None = None,
) -> tuple[dict, list[Segmenter]]:
    """
    The linear probe of segmentation of a model, of a random encoder of its kind and size, and of raw pixels.

    Args:
        model (`str`, `Path` or a model): A folder, the id of a model on the Hub, or a model, used where it is.
        train, test ([`~mask_sources.MaskSource`]): Images with masks to fit on and to test on.
        names (`list[str]`): Of the classes.
        arguments ([`SegmentationArguments`], *optional*): How the probe is trained; the defaults when not given.
        image_mean, image_std (`list[float]`): Of the channels, where the folder has no image processor to say.
        level (`int`, *optional*): Of a stack; that of its configuration when not given.

    Returns:
        The figures: `rows`, of [`~segmentation.score_segmenter`], with `encoder`, its label; and the settings. Then
        the [`Segmenter`] of each row.

    Raises:
        InputError: There is no whole model, no such level, or its features lie on no grid.
    """
    arguments = arguments or SegmentationArguments()
    model, *statistics = load_with_statistics(model, image_mean, image_std)
    encoder, size = model.base_model, pair(model.config.image_size)
    label = "target encoder" if isinstance(model, CJepaForPreTraining) else "encoder"
    random = random_encoders(encoder, arguments.num_random_encoders, arguments.seed)
    encoders = [
        (name, pooled_encoder(each.to(encoder.device), "patches", level), *statistics)
        for name, each in [(label, encoder), *random]
    ]
    pixels = PixelPatches(patch_size_of(encoders[0][1], size)).to(encoder.device)
    encoders.append(("raw pixels", pixels, [0.0] * 3, [1.0] * 3))
    datasets = [MaskDataset(source, size, len(names)) for source in (train, test)]
    rows, segmenters = [], []
    for label, each, *of_each in encoders:
        maps = [
            FrozenMaps(each, dataset, *of_each, arguments, f"{label}: {images} images")
            for dataset, images in zip(datasets, ("train", "test"), strict=True)
        ]
        head = train_segmenter(maps[0], arguments)
        rows.append({"encoder": label, **score_segmenter(head, maps[1], arguments.seed)})
        segmenters.append(Segmenter(label, each, head, *of_each))
    results = {
        "train_dataset": train.images.name,
        "test_dataset": test.images.name,
        "num_train_images": len(train),
        "num_test_images": len(test),
        "skipped": train.skipped + test.skipped,
        "classes": names,
        "image_size": list(size),
        "num_probe_epochs": arguments.num_probe_epochs,
        "probe_batch_size": arguments.probe_batch_size,
        "probe_learning_rate": arguments.probe_learning_rate,
        "probe_weight_decay": arguments.probe_weight_decay,
        "seed": arguments.seed,
        "rows": rows,
    }
    return results, segmenters


@torch.no_grad()
def patch_size_of(encoder: nn.Module, size: tuple[int, int]) -> tuple[int, int]:
    """Pixels, high and wide, of what a feature of an encoder's map stands for, for images of its own size."""
    channels = torch.zeros(1, 3, *size, device=device_of(encoder))
    rows, columns = encoder.eval()(channels).pooler_output.shape[1:3]
    return size[0] // rows, size[1] // columns


def format_segmentation(results: dict) -> str:
    """The results as text that is valid Markdown, too: a line with sizes and settings, then the table."""
    height, width = results["image_size"]
    cells = [["encoder", "mIoU % (95 % interval)", "pixels right % (95 % interval)"]]
    for row in results["rows"]:
        cells.append([row["encoder"]] + [
            with_interval(row, name) for name in ("miou", "pixel_accuracy")
        ])  # fmt: skip
    settings = (
        f"{results['num_test_images']:,} images of {results['test_dataset']}, {len(results['classes'])} classes, "
        f"{height}x{width} pixels; linear probe on frozen patch features, {results['num_probe_epochs']} epochs of "
        f"{results['num_train_images']:,} of {results['train_dataset']}; intervals by bootstrap over the images; seed "
        f"{results['seed']}."
    )
    return "\n".join([settings, "", *markdown_table(cells)])
