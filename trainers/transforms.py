"""Views of an image: the random crop of pre-training, the fixed one of evaluation, normalisation on the device."""

import numpy as np
import torch
from PIL import Image as PILImage
from torchvision.transforms import InterpolationMode, v2
from transformers import ViTImageProcessor

from trainers.decoding import Box, DecodedImage, EncodedJpeg

# Evaluation resizes the short side to 8/7 of the crop from this size on (224: 256); smaller images are taken whole.
_SMALLEST_CENTRE_CROP = 96


class RandomCrop:
    """
    The crop that `v2.RandomResizedCrop` draws, of an image of which no more is decoded than it needs.

    Args:
        image_size (`(height, width)`): Pixels of the crop.
        crop_scale (`(float, float)`): Share of the image it covers.
    """

    def __init__(self, image_size: tuple[int, int], crop_scale):
        self.size, self.law = tuple(image_size), v2.RandomResizedCrop(image_size, scale=tuple(crop_scale))

    def __call__(self, image: DecodedImage | EncodedJpeg | PILImage.Image) -> torch.Tensor:
        """A crop (3, height, width) uint8 of an image that is opened, or RGB and decoded by Pillow."""
        if isinstance(image, PILImage.Image):
            image = DecodedImage(np.asarray(image))
        # the law asks for the size alone
        box = self.law.make_params([torch.empty(3, image.height, image.width, device="meta")])
        return image.crop(Box(**box), self.size)


def train_transform(image_size: tuple[int, int], crop_scale=(0.3, 1.0), horizontal_flip: bool = False):
    """
    The random crop of pre-training.

    Args:
        image_size (`(height, width)`): Pixels of the crop.
        crop_scale (`(float, float)`): Share of the image it covers.
        horizontal_flip (`bool`): Whether half of the crops are mirrored.

    Returns:
        `Callable`: Image, as [`RandomCrop`] takes it, to uint8 tensor (3, height, width).
    """
    flip = [v2.RandomHorizontalFlip()] if horizontal_flip else []
    return v2.Compose([RandomCrop(image_size, crop_scale), *flip])


def eval_transform(image_size: tuple[int, int]):
    """
    The view of evaluation: short side to 8/7 of the crop (224: 256) and the centre of it; whole images below 96 px.

    Args:
        image_size (`(height, width)`): Pixels of the view.

    Returns:
        `Callable`: Image that is opened, or RGB and decoded by Pillow, to uint8 tensor (3, height, width).
    """
    if has_centre_crop(image_size):
        steps = [v2.Resize(shortest_edge(image_size), interpolation=InterpolationMode.BICUBIC)]
        steps.append(v2.CenterCrop(image_size))
    else:
        steps = [v2.Resize(image_size, interpolation=InterpolationMode.BICUBIC)]
    return v2.Compose([_by_pillow, *steps, v2.PILToTensor()])


def _by_pillow(image: DecodedImage | EncodedJpeg | PILImage.Image) -> PILImage.Image:
    return image if isinstance(image, PILImage.Image) else image.pil()


def image_processor(image_size: tuple[int, int], mean, std) -> ViTImageProcessor:
    """The processor that is saved beside a model: the view of evaluation, with the training's mean and std."""
    height, width = image_size
    crop = has_centre_crop(image_size)
    return ViTImageProcessor(
        size={"shortest_edge": shortest_edge(image_size)} if crop else {"height": height, "width": width},
        do_center_crop=crop,
        crop_size={"height": height, "width": width},
        resample=3,
        image_mean=list(mean),
        image_std=list(std),
        do_convert_rgb=True,
    )


def has_centre_crop(image_size: tuple[int, int]) -> bool:
    """Whether evaluation crops the centre of a resized image."""
    return min(image_size) >= _SMALLEST_CENTRE_CROP and image_size[0] == image_size[1]


def shortest_edge(image_size: tuple[int, int]) -> int:
    """Pixels of the short side before the centre crop."""
    return round(min(image_size) * 8 / 7)


def normalize(pixel_values: torch.Tensor, mean, std) -> torch.Tensor:
    """Images (B, C, H, W) uint8 to float32 with the channels' mean and std; float images are taken as they are."""
    if pixel_values.dtype != torch.uint8:
        return pixel_values
    mean, std = (
        torch.as_tensor(values, dtype=torch.float32, device=pixel_values.device).view(1, -1, 1, 1)
        for values in (mean, std)
    )
    # one multiplication and one subtraction, in place
    return pixel_values.float().mul_(1 / (255 * std)).sub_(mean / std)
