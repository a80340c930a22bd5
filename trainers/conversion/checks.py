"""What every way in gives and every way in or out is checked by: numbers of the original beside ours."""

import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from trainers.errors import InputError

# of features whose largest is 1 or less, and in proportion of larger ones, by their precision: in float64 two ways to
# the same numbers differ by 1e-14, a layer norm's eps of 1e-5 for 1e-6 by 1e-6 and more, and another approximation of
# an activation by 1e-4; in float32 the 32 layers of a ViT-H with random weights alone differ by 2e-6
FEATURE_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class Check:
    """
    A comparison of features by two ways.

    Args:
        what (`str`): What was compared, as in "transformers' IJepaModel on 2 random images".
        difference (`float`): The largest absolute difference of features.
        limit (`float`): The largest that is allowed.
        precision (`str`, *optional*): What was computed in, to be said.
    """

    what: str
    difference: float
    limit: float
    precision: str = ""

    def sentence(self) -> str:
        """What was found, for the screen and for a model card."""
        precision = f" in {self.precision}" if self.precision else ""
        return (
            f"checked against {self.what}{precision}: largest difference of features {self.difference:.1e} "
            f"(allowed {self.limit:.1e})"
        )

    def raise_if_too_large(self):
        """
        Refuses what differs.

        Raises:
            InputError: The difference is above the limit, or no finite number.
        """
        if not (math.isfinite(self.difference) and self.difference <= self.limit):
            raise InputError(
                f"The conversion does not hold: {self.sentence()}; nothing was written, as it would be another model."
            )


@dataclass(frozen=True)
class Converted:
    """
    A model that came in.

    Args:
        model (`PreTrainedModel`): Ours: of pre-training where the source has all of its parts, else the encoder.
        notes (`list[str]`): What did not map or starts anew, a sentence each.
        check ([`Check`], *optional*): The comparison with the original; none of a model that is ours already.
        processor (*optional*): The image processor that the source has or tells of.
        anew (`tuple` of `str`): Beginnings of the names of the model's weights that the source has not.
    """

    model: PreTrainedModel
    notes: list[str]
    check: Check | None = None
    processor: object | None = None
    anew: tuple[str, ...] = ()

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors by name, those alone that the source has."""
        return {name: each for name, each in self.model.state_dict().items() if not name.startswith(self.anew)}


@dataclass(frozen=True)
class Written:
    """
    A model that went out.

    Args:
        check ([`Check`]): What was written, read again, beside the model.
        notes (`list[str]`): Sentences on what it holds and how it is to be read.
    """

    check: Check
    notes: list[str] = field(default_factory=list)


def compare(what: str, ours: list[torch.Tensor], theirs: list[torch.Tensor], limit: float | None = None) -> Check:
    """
    Compares outputs by two ways.

    Args:
        what (`str`): As in [`Check`].
        ours, theirs (`list` of `torch.Tensor`): Outputs, pair by pair of one shape.
        limit (`float`, *optional*): The difference that is allowed, of their precision's [`FEATURE_LIMITS`] when not
            given.

    Returns:
        [`Check`]: Of the pair that differs most, whose limit is in proportion to its largest feature.

    Raises:
        InputError: The shapes differ, or the difference is too large or not finite.
    """
    for our, their in zip(ours, theirs, strict=True):
        if our.shape != their.shape:
            raise InputError(
                f"The conversion does not hold: against {what} features have shape {tuple(our.shape)}, not "
                f"{tuple(their.shape)}; nothing was written."
            )
    pairs = [_pair(what, our, their, limit) for our, their in zip(ours, theirs, strict=True)]
    check = max(pairs, key=lambda pair: math.inf if math.isnan(pair.difference) else pair.difference / pair.limit)
    check.raise_if_too_large()
    return check


def _pair(what: str, our: torch.Tensor, their: torch.Tensor, limit: float | None) -> Check:
    precision = str(our.dtype).removeprefix("torch.")
    limit = FEATURE_LIMITS[our.dtype] if limit is None else limit
    return Check(what, (our - their).abs().max().item(), limit * max(1.0, their.abs().max().item()), precision)


@contextmanager
def in_float64(module: nn.Module):
    """
    A module that computes in float64, in which a wrong setting shows beside the rounding of numbers.

    Args:
        module (`nn.Module`): In float32; it is again, to the bit, after the block. One at a time takes less memory.
    """
    module.double()
    try:
        yield
    finally:
        module.float()


def random_images(config, count: int = 2, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normalised images `(count, C, H, W)` of a configuration's size, the same numbers at every call."""
    height, width = size if isinstance(size := config.image_size, list | tuple) else (size, size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, config.num_channels, height, width, generator=generator).to(dtype)
