"""Label propagation: the masks of a video's first frame carried on by the likeness of frozen patch features.

The protocol of DINO (Caron et al. 2021, arXiv 2104.14294), after Jabri et al. (2020, arXiv 2006.14613): a patch takes
its label from the patches most like it in the first frame and in those just before, not far from its own place.
Nothing is trained.

Shapes: T frames, h and w rows and columns of patches, D width of their features, K objects and the background, H and W
rows and columns of a frame.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image as PILImage
from torch import nn
from torchvision.transforms import v2

from trainers.clips import objects_of
from trainers.embedding import check_finite, device_of
from trainers.errors import InputError
from trainers.mask_sources import MaskSource
from trainers.precision import probes_in_bf16
from trainers.transforms import normalize


@dataclass
class PropagationArguments:
    """How masks are carried on; the defaults are DINO's."""

    frame_size: int | None = field(
        default=None,
        metadata={"help": "pixels of a frame's shorter side for the encoder; when not given 480, of rendered clips "
                          "the size of its training"},
    )  # fmt: skip
    num_context_frames: int = field(
        default=7, metadata={"help": "frames just before, beside the first one, that labels are taken from"}
    )
    neighbourhood: int = field(
        default=12, metadata={"help": "patches up, down and to each side where they are sought"}
    )
    top_k: int = field(default=5, metadata={"help": "patches that a label is made of"})
    temperature: float = field(default=0.1, metadata={"help": "of their weights, a softmax of cosine similarities"})
    num_random_encoders: int = field(
        default=1, metadata={"help": "randomly initialised encoders of the same size to compare with"}
    )
    seed: int = field(default=0, metadata={"help": "seed of random encoders and of the intervals"})
    disable_tqdm: bool | None = field(default=None, metadata={"help": "show no progress bars"})

    def __post_init__(self):
        for name, least in (("frame_size", 16), ("num_context_frames", 0), ("neighbourhood", 0), ("top_k", 1),
                            ("num_random_encoders", 0), ("seed", 0)):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}={value} is too small; set it to {least} or more.")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature} must be above 0.")


@dataclass
class Propagator:
    """
    An encoder that carries masks on.

    Args:
        label (`str`): What it is called.
        encoder (`nn.Module`): Gives maps (B, h, w, D) as `pooler_output`, such as [`~pooling.PatchMap`].
        patch_size (`(height, width)`): Pixels that a feature of the map stands for.
        mean, std (`list[float]`): Of the channels, for pixels in [0, 1].
    """

    label: str
    encoder: nn.Module
    patch_size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    @torch.no_grad()
    def masks(self, clip: MaskSource, arguments: PropagationArguments, frame_size: int) -> Iterator[np.ndarray]:
        """
        The masks of a video's frames from the second on, made of the first one's mask.

        Args:
            clip ([`~mask_sources.MaskSource`]): The video; of its masks the first one is read.
            arguments ([`PropagationArguments`]): How.
            frame_size (`int`): Pixels of a frame's shorter side, before it is rounded to whole patches.

        Yields:
            `np.ndarray` of shape `(H, W)`, uint8: The number of the object, or 0, at each pixel.

        Raises:
            InputError: The features are not finite.
        """
        numbers = np.concatenate([[0], objects_of(clip)]).astype(np.uint8)
        size = self._size(clip.images.image(0).size, frame_size)
        grid_size = size[0] // self.patch_size[0], size[1] // self.patch_size[1]
        first = self._features(clip, 0, size), self._labels(clip.mask(0), numbers, grid_size)
        before = deque(maxlen=arguments.num_context_frames)
        for index in range(1, len(clip)):
            features = self._features(clip, index, size)
            context, labels = zip(first, *before, strict=True)
            carried = carry_labels(features, torch.stack(context), torch.stack(labels), arguments)
            before.append((features, carried))
            yield numbers[hard_labels(carried, size, clip.images.image(index).size[::-1])]

    def _size(self, size: tuple[int, int], frame_size: int) -> tuple[int, int]:
        """Rows and columns of a frame for the encoder: whole patches, one or more."""
        width, height = size
        scale = frame_size / min(size)
        rows, columns = (
            max(round(scale * side / patch), 1) for side, patch in zip((height, width), self.patch_size, strict=True)
        )
        return rows * self.patch_size[0], columns * self.patch_size[1]

    def _features(self, clip: MaskSource, index: int, size: tuple[int, int]) -> torch.Tensor:
        """The features (h, w, D) of a frame, of length 1."""
        device = device_of(self.encoder)
        frame = clip.images.image(index).resize(size[::-1], PILImage.Resampling.BICUBIC)
        pixel_values = normalize(v2.functional.pil_to_tensor(frame).unsqueeze(0).to(device), self.mean, self.std)
        with torch.autocast(device.type, torch.bfloat16, enabled=probes_in_bf16(device)):
            features = self.encoder(pixel_values).pooler_output[0]
        check_finite(features, self.label)
        return F.normalize(features.float(), dim=-1)

    def _labels(self, mask: np.ndarray, numbers: np.ndarray, grid_size: tuple[int, int]) -> torch.Tensor:
        """The label (h, w, K) of the pixel in the middle of each patch."""
        small = np.array(PILImage.fromarray(mask).resize(grid_size[::-1], PILImage.Resampling.NEAREST))
        return torch.from_numpy((small[..., None] == numbers).astype(np.float32)).to(device_of(self.encoder))


def carry_labels(
    features: torch.Tensor, context: torch.Tensor, labels: torch.Tensor, arguments: PropagationArguments
) -> torch.Tensor:
    """
    The labels of a frame's patches, of those of the patches most like them.

    Args:
        features (`torch.Tensor` of shape `(h, w, D)`): Of the frame, of length 1.
        context (`torch.Tensor` of shape `(T, h, w, D)`): Of the frames that labels are taken from.
        labels (`torch.Tensor` of shape `(T, h, w, K)`): Of their patches, 0 to 1.
        arguments ([`PropagationArguments`]): Neighbourhood, number and temperature.

    Returns:
        `torch.Tensor` of shape `(h, w, K)`: Mean labels, 0 to 1.
    """
    height, width, _ = features.shape
    reach, columns = arguments.neighbourhood, torch.arange(width, device=features.device)
    too_far = (columns[:, None] - columns).abs() > reach
    carried = []
    # a row of patches at a time: only the rows near it are looked at, and all pairs of a large frame fill the memory
    for row, of_row in enumerate(features):
        near = slice(max(row - reach, 0), row + reach + 1)
        similarities = torch.einsum("wd,trvd->wtrv", of_row, context[:, near])
        similarities.masked_fill_(too_far[:, None, None], -math.inf)
        similarities = similarities.flatten(1)
        greatest, chosen = similarities.topk(min(arguments.top_k, similarities.shape[1]))
        weights = (greatest / arguments.temperature).softmax(dim=1)
        carried.append(torch.einsum("wn,wnk->wk", weights, labels[:, near].flatten(0, 2)[chosen]))
    return torch.stack(carried)


def hard_labels(labels: torch.Tensor, size: tuple[int, int], frame_size: tuple[int, int]) -> np.ndarray:
    """
    One label for each pixel.

    Args:
        labels (`torch.Tensor` of shape `(h, w, K)`): Of the patches.
        size (`(height, width)`): Of the frame that the encoder has seen; labels are enlarged to it, and of each then
            the least becomes 0 and the greatest 1, lest an object be lost that is small or has become faint.
        frame_size (`(height, width)`): Of the frame itself.

    Returns:
        `np.ndarray` of shape `(H, W)`: The number of the greatest label, int64.
    """
    large = F.interpolate(labels.permute(2, 0, 1).unsqueeze(0), size, mode="bilinear", align_corners=False)[0]
    low, high = large.amin(dim=(1, 2), keepdim=True), large.amax(dim=(1, 2), keepdim=True)
    large = torch.where(high > low, (large - low) / (high - low), large)
    chosen = large.argmax(dim=0).to(torch.uint8).cpu().numpy()
    return np.array(PILImage.fromarray(chosen).resize(frame_size[::-1], PILImage.Resampling.NEAREST)).astype(int)
