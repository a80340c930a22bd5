"""The linear probe of segmentation: a linear classifier on frozen patch features, its logits enlarged to the image.

The protocol of DINOv2's linear segmentation (arXiv 2304.07193): standardised features of the last layer, one linear
layer, AdamW on the cross-entropy of every pixel; mean intersection over union (mIoU) on images it has not seen. Images
and masks are resized to the encoder's size.

Shapes: n images, h and w rows and columns of patches, D width of their features, S the image size, K classes.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trainers.datasets import seeded
from trainers.embedding import device_of
from trainers.errors import InputError
from trainers.mask_sources import IGNORED, MaskDataset
from trainers.precision import probes_in_bf16
from trainers.probes import times_drawn
from trainers.transforms import normalize

# Features up to so many bytes, in half precision, are kept in memory; more are computed anew in each epoch.
_MAX_KEPT = 4 * 2**30


@dataclass
class SegmentationArguments:
    """How the linear probe of segmentation is trained."""

    num_probe_epochs: int = field(default=10, metadata={"help": "passes of the probe over the train images"})
    probe_batch_size: int = field(default=32, metadata={"help": "images of a batch"})
    probe_learning_rate: float = field(default=1.0e-3, metadata={"help": "AdamW's, falling to 0 by a cosine"})
    probe_weight_decay: float = field(default=1.0e-4, metadata={"help": "AdamW's"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that load images; 0: the main one"})
    num_random_encoders: int = field(
        default=1, metadata={"help": "randomly initialised encoders of the same size to compare with"}
    )
    seed: int = field(default=0, metadata={"help": "seed of random encoders, of the probe and of the intervals"})
    disable_tqdm: bool | None = field(default=None, metadata={"help": "show no progress bars"})

    def __post_init__(self):
        for name, least in (("num_probe_epochs", 1), ("probe_batch_size", 1), ("dataloader_num_workers", 0),
                            ("num_random_encoders", 0), ("seed", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)} is too small; set it to {least} or more.")
        if not 0 < self.probe_learning_rate < math.inf or not 0 <= self.probe_weight_decay < math.inf:
            raise InputError(
                f"probe_learning_rate={self.probe_learning_rate} must be above 0 and "
                f"probe_weight_decay={self.probe_weight_decay} 0 or more."
            )


class PixelPatches(nn.Module):
    """
    An "encoder" whose features of a patch are its pixels.

    Args:
        patch_size (`(height, width)`): Pixels of a patch; what is left at an image's right and lower end is not seen.
    """

    def __init__(self, patch_size: tuple[int, int]):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Images (B, C, H, W) as maps (B, h, w, C * pixels of a patch)."""
        height, width = self.patch_size
        patches = pixel_values.unfold(2, height, height).unfold(3, width, width)
        return BaseModelOutputWithPooling(pooler_output=patches.permute(0, 2, 3, 1, 4, 5).flatten(3))


class FrozenMaps:
    """
    The patch features of images, in half precision, kept in memory where they fit.

    Args:
        encoder (`nn.Module`): Gives maps (B, h, w, D) as `pooler_output`, such as [`~pooling.PatchMap`].
        dataset ([`~mask_sources.MaskDataset`]): The images and their masks.
        mean, std (`list[float]`): Of the channels, for pixels in [0, 1].
        arguments ([`SegmentationArguments`]): Batch size and workers.
        description (`str`): What the bar says.
    """

    def __init__(self, encoder: nn.Module, dataset: MaskDataset, mean, std, arguments, description: str):
        self.encoder, self.dataset, self.statistics, self.arguments = encoder.eval(), dataset, (mean, std), arguments
        self.device, self.description = device_of(encoder), description
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def batches(self, order: torch.Tensor | None = None):
        """Features (B, h, w, D) float32 and masks (B, S, S) int64 where the encoder is, in an order or as they lie."""
        size = self.arguments.probe_batch_size
        order = torch.arange(len(self.dataset)) if order is None else order
        if self.kept is None:
            loader = self._loader(torch.utils.data.Subset(self.dataset, order.tolist()))
            yield from (self._encode(batch) for batch in loader)
        else:
            features, masks = self.kept
            for rows in order.split(size):
                yield features[rows].to(self.device).float(), masks[rows].to(self.device).long()

    def keep(self):
        """Encodes all images once, unless their features are more than there is room for."""
        features, masks = [], []
        for batch in tqdm(self._loader(self.dataset), desc=self.description, unit="batch",
                          disable=self.arguments.disable_tqdm):  # fmt: skip
            of_batch, _ = self._encode(batch)
            if 2 * of_batch[0].numel() * len(self.dataset) > _MAX_KEPT:
                return
            features.append(of_batch.half().cpu())
            masks.append(batch["masks"])
        self.kept = torch.cat(features), torch.cat(masks)

    def _loader(self, dataset) -> DataLoader:
        workers, generator = self.arguments.dataloader_num_workers, torch.Generator()
        return DataLoader(dataset, self.arguments.probe_batch_size, num_workers=workers, generator=generator)

    @torch.no_grad()
    def _encode(self, batch) -> tuple[torch.Tensor, torch.Tensor]:
        pixel_values = normalize(batch["pixel_values"].to(self.device), *self.statistics)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=probes_in_bf16(self.device)):
            features = self.encoder(pixel_values).pooler_output
        return features.half().float(), batch["masks"].to(self.device).long()


class LinearSegmenter(nn.Module):
    """
    A linear layer on standardised features.

    Args:
        mean, std (`torch.Tensor` of shape `(D,)`): Of the train features.
        num_classes (`int`): K.
        image_size (`(height, width)`): S.
    """

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, num_classes: int, image_size: tuple[int, int]):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.classifier = nn.Linear(len(mean), num_classes, device=mean.device)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.image_size = image_size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, K, S, S) of maps (B, h, w, D)."""
        logits = self.classifier((features - self.mean) / self.std).permute(0, 3, 1, 2)
        return F.interpolate(logits, self.image_size, mode="bilinear", align_corners=False)


def train_segmenter(maps: FrozenMaps, arguments: SegmentationArguments) -> LinearSegmenter:
    """
    Fits the linear probe.

    Args:
        maps ([`FrozenMaps`]): Features and masks of the train images.
        arguments ([`SegmentationArguments`]): How long, in which steps.

    Returns:
        [`LinearSegmenter`].

    Raises:
        InputError: The features are not finite.
    """
    maps.keep()
    count, total, squares = 0, 0.0, 0.0
    for features, _ in maps.batches():
        rows = features.flatten(0, 2).double()
        count, total, squares = count + len(rows), total + rows.sum(dim=0), squares + rows.square().sum(dim=0)
    mean = total / count
    if not mean.isfinite().all():
        raise InputError("The encoder's features are not finite; its training diverged, take an earlier one.")
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    with seeded(arguments.seed):
        std = std.where(std > 0, 1).float()
        head = LinearSegmenter(mean.float(), std, maps.dataset.num_classes, maps.dataset.size)
        _fit(head, maps, arguments)
    return head


def _fit(head: LinearSegmenter, maps: FrozenMaps, arguments: SegmentationArguments):
    """Trains the linear layer, with batches drawn by torch's default generator."""
    options = {"lr": arguments.probe_learning_rate, "weight_decay": arguments.probe_weight_decay}
    optimizer = torch.optim.AdamW(head.parameters(), **options)
    num_steps = arguments.num_probe_epochs * math.ceil(len(maps.dataset) / arguments.probe_batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    with tqdm(total=num_steps, desc="segmentation probe", unit="step", disable=arguments.disable_tqdm) as bar:
        for _ in range(arguments.num_probe_epochs):
            for features, masks in maps.batches(torch.randperm(len(maps.dataset))):
                if (masks != IGNORED).any():
                    F.cross_entropy(head(features), masks, ignore_index=IGNORED).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                schedule.step()
                bar.update()


@torch.no_grad()
def score_segmenter(head: LinearSegmenter, maps: FrozenMaps, seed: int = 0) -> dict:
    """
    How well a probe segments images.

    Args:
        head ([`LinearSegmenter`]): The probe.
        maps ([`FrozenMaps`]): Features and masks of the evaluation images.
        seed (`int`): Of the intervals' resamples.

    Returns:
        `dict`: As [`score_counts`].
    """
    counts = []
    for features, masks in maps.batches():
        predictions = head(features).argmax(dim=1)
        counts += [confusion(*pair, maps.dataset.num_classes) for pair in zip(masks, predictions, strict=True)]
    return score_counts(np.stack(counts), seed)


def score_counts(counts: np.ndarray, seed: int = 0) -> dict:
    """
    The figures of what is counted in each image.

    The classes are those that pixels of all images together have, the same ones for every encoder: to say another
    costs the class that is right, and has no IoU of its own. A class that a resample has lost with its last image
    keeps there the IoU of all images: left out, it would move the mean, and upwards, for rare classes are hard ones.

    Args:
        counts (`np.ndarray` of shape `(n, 3, K)`): Of each image what [`confusion`] counts.
        seed (`int`): Of the intervals' resamples.

    Returns:
        `dict`: `miou` and `pixel_accuracy`, percent, with 95 % intervals `miou_interval` and
        `pixel_accuracy_interval` by bootstrap over the images; `iou`, percent, of each class, None where no pixel has
        it.
    """
    num_images, total = len(counts), counts.sum(axis=0)
    of_classes = ious(total)
    resampled = (times_drawn(num_images, seed) @ counts.reshape(num_images, -1)).reshape(-1, *counts.shape[1:])
    whole, samples = mean_scores(total), [mean_scores(sample, of_classes) for sample in resampled]
    row = {"iou": [None if math.isnan(iou) else 100 * iou for iou in of_classes]}
    for name, value, values in zip(("miou", "pixel_accuracy"), whole, zip(*samples, strict=True), strict=True):
        row[name] = 100 * value
        row[f"{name}_interval"] = [100 * end for end in np.nanquantile(values, (0.025, 0.975)).tolist()]
    return row


def confusion(mask: torch.Tensor, prediction: torch.Tensor, num_classes: int) -> np.ndarray:
    """
    Of each class the pixels that have it and are given it, that have it, and that are given it.

    Args:
        mask, prediction (`torch.Tensor` of shape `(H, W)`): Classes, int64; pixels of the mask's class 255 do not
            count.
        num_classes (`int`): K.

    Returns:
        `np.ndarray` of shape `(3, K)`: The numbers of pixels, int64.
    """
    counted = mask != IGNORED
    mask, prediction = mask[counted], prediction[counted]
    sets = (mask[mask == prediction], mask, prediction)
    return torch.stack([torch.bincount(pixels, minlength=num_classes) for pixels in sets]).cpu().numpy()


def ious(counts: np.ndarray) -> np.ndarray:
    """The intersection over union (K,) of each class of what [`confusion`] counts (3, K); NaN of one no pixel has."""
    both, true, given = counts
    with np.errstate(invalid="ignore"):
        return np.where(true > 0, both / (true + given - both), np.nan)


def mean_scores(counts: np.ndarray, of_absent: np.ndarray | float = math.nan) -> tuple[float, float]:
    """The mean IoU of classes that pixels have and of others whose IoU (K,) is given; the share of right pixels."""
    both, true, _ = counts
    if true.sum() == 0:
        return math.nan, math.nan
    found = np.where(true > 0, ious(counts), of_absent)
    return float(np.nanmean(found)), float(both.sum() / true.sum())
