"""Labelled images for fine-tuning: the share whose labels are used, what is held out of it, and batches of both.

Shapes: B images, C classes.
"""

from typing import NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torchvision.transforms import v2

from trainers.datasets import ImageDataset, ImageSource, sample_seed, seeded
from trainers.errors import InputError
from trainers.finetune_args import FinetuneDataArguments
from trainers.probes import share_of_each_class, spare_positions
from trainers.readable import readable_splits
from trainers.sources import load_sources
from trainers.subsets import with_common_classes
from trainers.transforms import normalize, train_transform

# of the images whose labels are used, and of those held out
_CHOICE_SEED = 0


class Splits(NamedTuple):
    """
    The images of a run, their classes numbered alike.

    Args:
        train ([`ImageSource`]): To train on.
        validation ([`ImageSource`], *optional*): Held out, to choose the best checkpoint on.
        test ([`ImageSource`]): To report the accuracy on.
        skipped (`list[dict]`): Left out, of [`~readable.readable_positions`].
    """

    train: ImageSource
    validation: ImageSource | None
    test: ImageSource
    skipped: list[dict]

    def fingerprints(self) -> dict[str, str]:
        """What tells whether the images are those of another run, by what they are for."""
        named = {"train": self.train, "held-out": self.validation, "test": self.test}
        return {name: source.fingerprint() for name, source in named.items() if source is not None}


def load_labelled_splits(
    arguments: FinetuneDataArguments,
    image_size: int,
    progress: bool = True,
    num_workers: int = 0,
    state: PartialState | None = None,
) -> Splits:
    """
    Loads the images of a run and leaves out those that cannot be read.

    Args:
        arguments ([`FinetuneDataArguments`]): Which.
        image_size (`int`): Pixels of a rendered scene's side.
        progress (`bool`): Whether to show bars.
        num_workers, state: As in [`~readable.readable_positions`].

    Returns:
        [`Splits`]; with `validation_share` 0 nothing is held out.

    Raises:
        InputError: There are no labels, a test class is not in the train images, no class has a second image to hold
            out, or too many images cannot be read.
    """
    train, test = with_common_classes(*load_sources(arguments, image_size, progress))
    train = share_of_labels(train, arguments.label_share)
    train, test, skipped = readable_splits(train, test, num_workers, progress, state)
    if len(train.label_names) < 2:
        raise InputError(f"{train.name} has one class only, {train.label_names[0]!r}; give images of two or more.")
    validation = None
    if arguments.validation_share > 0:
        train, validation = hold_out_share(train, arguments.validation_share)
    return Splits(train, validation, test, skipped)


def share_of_labels(source: ImageSource, share: float) -> ImageSource:
    """
    A fixed choice of a source's images: of each class so large a share, at least one; a smaller share is part of a
    larger one.

    Args:
        source ([`ImageSource`]): Labelled images.
        share (`float`): In (0, 1].
    """
    return source.take(share_of_each_class(source.labels, share, _CHOICE_SEED))


def hold_out_share(source: ImageSource, share: float) -> tuple[ImageSource, ImageSource]:
    """
    A fixed random share held out, at least one image; of each class at least one image stays.

    Args:
        source ([`ImageSource`]): Labelled images.
        share (`float`): In (0, 1).

    Returns:
        The images that stay, and those held out, each in their own order.

    Raises:
        InputError: No class has a second image.
    """
    spare, needed = spare_positions(source.labels, _CHOICE_SEED)
    if len(spare) == 0:
        raise InputError(
            f"{source.name} has one image of each class to train on, none to choose the best checkpoint on; give more "
            "(--label_share), or set --validation_share 0, which takes the last checkpoint."
        )
    num_held_out = max(round(share * len(source)), 1)
    held_out, kept = spare[:num_held_out], np.concatenate([spare[num_held_out:], needed])
    return source.take(np.sort(kept)), source.take(np.sort(held_out))


class TrainImages(ImageDataset):
    """An [`ImageDataset`] whose items say with which seed a batch that begins with them is mixed."""

    def __getitem__(self, index: int) -> dict:
        # the third number tells it from the seed of the image's crop
        return super().__getitem__(index) | {"mix_seed": sample_seed(self.seed, int(self.epoch), index, 1)}


def finetune_transform(image_size: tuple[int, int], arguments: FinetuneDataArguments):
    """PIL image to the uint8 tensor (3, H, W) of a random crop, mirrored and augmented as the arguments say."""
    crop = train_transform(image_size, arguments.crop_scale, arguments.horizontal_flip)
    if arguments.rand_augment == 0:
        return crop
    return v2.Compose([crop, v2.RandAugment(magnitude=arguments.rand_augment)])


class ClassificationCollator:
    """
    Batches of normalised images with their labels; those of [`TrainImages`] are mixed by MixUp or CutMix in turn.

    Args:
        mean, std (`list[float]`): Of the channels, for pixels in [0, 1].
        num_classes (`int`): Classes C.
        mixup, cutmix (`float`): Their alphas; 0 leaves one out.
    """

    def __init__(self, mean, std, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0):
        self.mean, self.std = list(mean), list(std)
        kinds = ((v2.MixUp, mixup), (v2.CutMix, cutmix))
        mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
        self.mix = v2.RandomChoice(mixers) if mixers else None

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, 3, H, W) float32 and `labels`, (B,) class indices, or (B, C) shares of the mixed."""
        pixel_values = normalize(torch.stack([item["pixel_values"] for item in items]), self.mean, self.std)
        labels = torch.tensor([item["labels"] for item in items])
        if self.mix is not None and "mix_seed" in items[0]:
            with seeded(items[0]["mix_seed"]):
                pixel_values, labels = self.mix(pixel_values, labels)
        return {"pixel_values": pixel_values, "labels": labels}


class ClassificationLoss:
    """
    Cross-entropy as `compute_loss_func` of transformers' `Trainer`: the mean over the images of an optimizer step.

    Args:
        label_smoothing (`float`): Share of each label that is spread over all classes, in [0, 1).
    """

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(self, outputs, labels: torch.Tensor, num_items_in_batch=None) -> torch.Tensor:
        """The loss of logits (B, C) and labels (B,) or (B, C); `num_items_in_batch` counts the latters' entries."""
        entries = 1 if labels.ndim == 1 else labels.shape[1]
        num_images = len(labels) if num_items_in_batch is None else num_items_in_batch / entries
        total = torch.nn.functional.cross_entropy(
            outputs.logits.float(), labels, reduction="sum", label_smoothing=self.label_smoothing
        )
        return total / num_images
