"""Embeddings of many images: by an encoder, or by nothing but the pixels.

Shapes: B images, n images in all, D width of an embedding.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trainers.errors import InputError
from trainers.precision import probes_in_bf16
from trainers.transforms import normalize

MAX_RAW_PIXELS = 32


def extract_embeddings(
    encoder: nn.Module,
    dataset: torch.utils.data.Dataset,
    mean,
    std,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
    num_workers: int = 0,
    description: str = "embedding images",
    bf16: bool | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The embeddings of all images, in their order.

    Args:
        encoder (`nn.Module`): Gives a `pooler_output` (B, D), such as [`CJepaModel`].
        dataset (`Dataset`): Gives `pixel_values` (C, H, W) uint8 and, if there are any, `labels`.
        mean, std (`list[float]`): Of the channels, for pixels in [0, 1].
        batch_size (`int`): Images at once.
        device (`torch.device`, *optional*): Where to; the encoder is moved there. Where it is when not given.
        progress (`bool`): Whether to show a bar.
        num_workers (`int`): Processes that load images.
        description (`str`): What the bar says.
        bf16 (`bool`, *optional*): Whether arithmetic is in bfloat16; on a GPU alone when not given.

    Returns:
        The embeddings, float32 (n, D), and the labels, int64 (n,) or None; both on the CPU.
    """
    embeddings, labels = [], []
    options = (batch_size, device, progress, num_workers, description, bf16)
    batches = encode_batches(encoder, dataset, mean, std, *options)
    for outputs, batch_labels in batches:
        embeddings.append(outputs.pooler_output.float().cpu())
        labels.append(batch_labels)
    return torch.cat(embeddings), None if labels[0] is None else torch.cat(labels)


def encode_batches(
    encoder: nn.Module,
    dataset: torch.utils.data.Dataset,
    mean,
    std,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
    num_workers: int = 0,
    description: str = "encoding images",
    bf16: bool | None = None,
) -> Iterator[tuple]:
    """
    What an encoder makes of all images, batch by batch, without gradients.

    Args:
        encoder (`nn.Module`): Takes normalised images (B, C, H, W).
        dataset, mean, std, batch_size, device, progress, num_workers, description, bf16: As in [`extract_embeddings`].

    Yields:
        `(outputs, labels)`: The encoder's, where it is, and the labels (B,) int64 or None.
    """
    device = device_of(encoder) if device is None else torch.device(device)
    on_gpu = device.type == "cuda"
    # a generator of its own: the loader draws a seed for its workers, and shall not draw it from the caller's
    generator = torch.Generator()
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, pin_memory=on_gpu, generator=generator)
    with encoding(encoder, mean, std, device, bf16) as encode:
        for batch in tqdm(loader, desc=description, unit="batch", disable=not progress):
            yield encode(batch["pixel_values"]), batch.get("labels")


@contextmanager
def encoding(encoder: nn.Module, mean, std, device: torch.device, bf16: bool | None = None):
    """
    A function that encodes a batch without gradients; the encoder is in evaluation mode meanwhile.

    Args:
        encoder, mean, std, device, bf16: As in [`extract_embeddings`].

    Yields:
        `Callable`: From `pixel_values` (B, C, H, W) uint8 to the encoder's output, where it is.
    """
    enabled = probes_in_bf16(device) if bf16 is None else bf16
    was_training = encoder.training
    encoder.to(device).eval()

    def encode(pixel_values: torch.Tensor):
        # left before it returns: whoever takes the outputs may compute gradients
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=enabled):
            return encoder(normalize(pixel_values.to(device, non_blocking=True), mean, std))

    try:
        yield encode
    finally:
        encoder.train(was_training)


def device_of(encoder: nn.Module) -> torch.device:
    """Where an encoder's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))


def check_finite(embeddings: torch.Tensor, label: str):
    """Refuses embeddings that are not finite, of an encoder of that name."""
    if not embeddings.isfinite().all():
        raise InputError(f"The embeddings of the {label} are not finite; its training diverged, take an earlier one.")


class RawPixels(nn.Module):
    """An "encoder" whose embedding is the image itself, area-reduced to 32 pixels a side if it is larger."""

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Images (B, C, H, W) as embeddings (B, C * H * W)."""
        size = [min(side, MAX_RAW_PIXELS) for side in pixel_values.shape[-2:]]
        return BaseModelOutputWithPooling(pooler_output=F.interpolate(pixel_values, size, mode="area").flatten(1))
