"""Views of an image, with the augmentation of VICReg and S-JEA: crop, flip, colour jitter, gray, blur, solarise.

The crop and the flip are made where the image is decoded, since images differ in size. The colours are changed there,
too, or, on a GPU and of small images, for the whole batch by kornia: every view with parameters of its own, of the
same distribution.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torchvision.transforms import v2

from trainers.errors import InputError
from trainers.stream_sources import PretrainDataArguments
from trainers.transforms import train_transform

WHERE = ("auto", "workers", "device")
_BLUR_SIGMA = (0.1, 2.0)
_SOLARIZE_THRESHOLD = 128
_CHANGES = ("color_jitter", "grayscale", "blur", "solarize")
# up to which kornia changes a batch on a CPU faster than workers do view by view: a third of the time at 32x32, half
# as much again at 64x64
_FEW_PIXELS = 32 * 32


@dataclass
class ViewDataArguments(PretrainDataArguments):
    """Which images, and how their views are made; the defaults are I-JEPA's, crops alone."""

    color_jitter: list[float] = field(
        default_factory=lambda: [0.4, 0.4, 0.4, 0.1],
        metadata={"help": "largest change of brightness, contrast, saturation (shares) and hue (turns, up to 0.5)"},
    )
    color_jitter_probability: float = field(default=0.0, metadata={"help": "share of views with jittered colours"})
    grayscale_probability: float = field(default=0.0, metadata={"help": "share of views in gray"})
    blur_probability: float = field(default=0.0, metadata={"help": "share of blurred views, sigma 0.1 to 2 pixels"})
    solarize_probability: float = field(default=0.0, metadata={"help": "share of views whose bright half is inverted"})
    color_augmentation: str = field(
        default="auto",
        metadata={"help": "where colours are changed: `workers`, `device`, the whole batch at once, or `auto`: on the "
                          "device if that is a GPU or views have no more than 32x32 pixels"},
    )  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if len(self.color_jitter) != 4 or min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise InputError(
                f"color_jitter={self.color_jitter} must be four numbers from 0 up, of brightness, contrast, "
                "saturation and hue, the last up to 0.5."
            )
        for name in _CHANGES:
            value = getattr(self, f"{name}_probability")
            if not 0 <= value <= 1:
                raise InputError(f"{name}_probability={value} is not in [0, 1].")
        if self.color_augmentation not in WHERE:
            raise InputError(
                f"color_augmentation={self.color_augmentation!r} is not known; choose one of {', '.join(WHERE)}."
            )

    def colors_on(self, device: torch.device, image_size: tuple[int, int]) -> bool:
        """Whether colours of views (height, width) are changed on the device the model trains on."""
        if max(getattr(self, f"{name}_probability") for name in _CHANGES) == 0:
            return False
        if self.color_augmentation == "auto":
            return device.type == "cuda" or math.prod(image_size) <= _FEW_PIXELS
        return self.color_augmentation == "device"


@dataclass
class TwoViewDataArguments(ViewDataArguments):
    """The same with the defaults of S-JEA for images of 32 pixels."""

    horizontal_flip: bool = field(default=True, metadata={"help": "mirror half of the views"})
    color_jitter_probability: float = field(default=0.8, metadata={"help": "share of views with jittered colours"})
    grayscale_probability: float = field(default=0.2, metadata={"help": "share of views in gray"})


class Views:
    """
    A random transform, applied several times.

    Args:
        transform (`Callable`): Image to uint8 tensor (3, height, width).
        num_views (`int`): How often, V.
    """

    def __init__(self, transform: Callable, num_views: int):
        self.transform, self.num_views = transform, num_views

    def __call__(self, image) -> torch.Tensor:
        """Views of an image: (V, 3, height, width)."""
        return torch.stack([self.transform(image) for _ in range(self.num_views)])


def view_transform(
    image_size: tuple[int, int], data: ViewDataArguments, num_views: int = 1, with_colors: bool = True
) -> Callable:
    """
    The random views of pre-training.

    Args:
        image_size (`(height, width)`): Pixels of a view.
        data ([`ViewDataArguments`]): Crop, flip and colours.
        num_views (`int`): How many are made of an image, V.
        with_colors (`bool`): Whether colours are changed here, and not on the device.

    Returns:
        `Callable`: Image, as [`~transforms.RandomCrop`] takes it, to uint8 tensor (V, 3, height, width), or
        (3, height, width) for one.
    """
    steps = [train_transform(image_size, data.crop_scale, data.horizontal_flip)]
    if with_colors:
        jitter, blur = v2.ColorJitter(*data.color_jitter), v2.GaussianBlur(blur_kernel(image_size), _BLUR_SIGMA)
        changes = [
            (v2.RandomApply([jitter], p=data.color_jitter_probability), data.color_jitter_probability),
            (v2.RandomGrayscale(data.grayscale_probability), data.grayscale_probability),
            (v2.RandomApply([blur], p=data.blur_probability), data.blur_probability),
            (v2.RandomSolarize(_SOLARIZE_THRESHOLD, data.solarize_probability), data.solarize_probability),
        ]
        # on small images a step that never changes one costs as much as one that does
        chosen = [change for change, probability in changes if probability > 0]
        steps += [v2.ToPILImage(), *chosen, v2.PILToTensor()] if chosen else []
    return v2.Compose(steps) if num_views == 1 else Views(v2.Compose(steps), num_views)


def blur_kernel(image_size: tuple[int, int]) -> int:
    """Pixels of the blur's kernel: an odd number, about a tenth of the image."""
    return max(min(image_size) // 20 * 2 + 1, 3)


class DeviceColors:
    """
    The colours of [`view_transform`] for a batch where it is, by kornia, with parameters drawn for each view.

    In which order brightness, contrast, saturation and hue change is drawn once a batch. No module, so that it stays
    where it is when a model is moved: kornia draws where its steps are, and only the CPU's generator is seeded.

    Args:
        image_size (`(height, width)`): Pixels of a view.
        data ([`ViewDataArguments`]): The colours.
    """

    def __init__(self, image_size: tuple[int, int], data: ViewDataArguments):
        import kornia.augmentation as K  # which takes a second

        kernel = blur_kernel(image_size)
        # kornia draws the threshold between two values, and an addition to the brightness
        threshold, addition = (_SOLARIZE_THRESHOLD / 255,) * 2, (0.0, 0.0)
        steps = [
            K.ColorJitter(*data.color_jitter, p=data.color_jitter_probability),
            K.RandomGrayscale(p=data.grayscale_probability),
            K.RandomGaussianBlur((kernel, kernel), _BLUR_SIGMA, p=data.blur_probability),
            K.RandomSolarize(threshold, addition, p=data.solarize_probability),
        ]
        self.steps = nn.Sequential(*(step for step in steps if step.p > 0))

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) uint8 with changed colours, uint8."""
        with torch.autocast(images.device.type, enabled=False):
            changed = self.steps(images.float() / 255)
        return (changed * 255).round().clamp(0, 255).to(torch.uint8)
