"""What a conversion hands back, and the number that says how far its model is from the one it came from."""

import importlib
import math
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from trainers.errors import InputError


@dataclass(frozen=True)
class Check:
    """
    How far two models' outputs on the same images are from each other.

    Args:
        what (`str`): What was compared on which images, such as `"ONNX Runtime on 6 batches of 3 sizes"`.
        difference (`float`): The largest absolute difference of their outputs.
        limit (`float`): The largest one that rounding explains.
    """

    what: str
    difference: float
    limit: float

    def sentence(self) -> str:
        """What is printed, such as `"...: largest difference 1.2e-06, limit 3.1e-04"`."""
        return f"{self.what}: largest difference {self.difference:.1e}, limit {self.limit:.1e}"

    def raise_if_too_large(self):
        """Refuses, by an [`InputError`], a difference that is not finite or exceeds the limit."""
        if not (math.isfinite(self.difference) and self.difference <= self.limit):
            raise InputError(f"The converted model differs from its source ({self.sentence()}), so it is not kept.")


@dataclass
class Converted:
    """
    A model read from another layout.

    Args:
        model (`PreTrainedModel`): In evaluation mode.
        notes (`list[str]`): Sentences that say what starts anew or has no counterpart.
        check ([`Check`]): Against the other layout's own class.
    """

    model: PreTrainedModel
    notes: list[str]
    check: Check


@dataclass
class Written:
    """
    A folder written in another format.

    Args:
        notes (`list[str]`): Sentences that say what the files hold and how they are to be read.
        check ([`Check`]): What the files give, read again, against the model.
    """

    check: Check
    notes: list[str] = field(default_factory=list)


def compare(what: str, pairs: list[tuple[torch.Tensor, torch.Tensor]], tolerance: float = 1e-4) -> Check:
    """
    A check of outputs by their largest difference.

    Args:
        what (`str`): As in [`Check`].
        pairs (`list` of two `torch.Tensor` of one shape): What the converted model gives, and its source.
        tolerance (`float`, defaults to 1e-4): The limit as a share of the source's largest output.

    Returns:
        [`Check`].

    Raises:
        InputError: The outputs have other shapes.
    """
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise InputError(
                f"The converted model gives {tuple(ours.shape)} and its source {tuple(theirs.shape)} ({what}), so it "
                "is not kept."
            )
    differences = torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs])
    largest = torch.stack([theirs.abs().max() for _, theirs in pairs]).max()
    return Check(what, differences.max().item(), tolerance * largest.item())


def random_images(channels: int, sizes: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Batches of normal noise (B, C, H, W) of the given `(B, H, W)`, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, channels, height, width, generator=generator) for batch, height, width in sizes]


def require(extra: str, *modules: str):
    """
    Imports what an extra of the package installs.

    Args:
        extra (`str`): Its name in setup.cfg.
        modules (`str`): Modules it brings.

    Returns:
        `list` of the modules.

    Raises:
        InputError: One is not installed; the message says how to install it.
    """
    imported = []
    for module in modules:
        try:
            imported.append(importlib.import_module(module))
        except ModuleNotFoundError as error:
            raise InputError(f'This needs {module}, which is not installed: pip install "cjepa[{extra}]".') from error
    return imported
