"""Batches of rows and the views of their images, decoded beside the reading; broken images are told, not raised.

Shapes: B images of a batch that could be read, H and W height and width of a view.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader

from trainers.decoding import UnreadableImage, decode_image
from trainers.tables import RowBatch


@dataclass
class DecodedViews:
    """
    The images of a batch that could be read.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`, uint8, *optional*): None if there is no such image.
        unreadable (`dict[int, str]`): Why the others could not, by their place in the batch.
    """

    pixel_values: torch.Tensor | None
    unreadable: dict[int, str]

    def pin_memory(self) -> "DecodedViews":
        """For the data loader: pixels where a GPU fetches them from."""
        return self if self.pixel_values is None else DecodedViews(self.pixel_values.pin_memory(), self.unreadable)


class _Decoder(torch.utils.data.Dataset):
    """Gives the view of an undecoded image, or why there is none: what it is asked for is the image itself."""

    def __init__(self, transform):
        self.transform = transform

    def __getitem__(self, item: dict | None) -> torch.Tensor | str:
        try:
            return self.transform(decode_image(item))
        except UnreadableImage as error:
            return str(error)


def _collate(views: list[torch.Tensor | str]) -> DecodedViews:
    readable = [view for view in views if not isinstance(view, str)]
    unreadable = {position: view for position, view in enumerate(views) if isinstance(view, str)}
    return DecodedViews(torch.stack(readable) if readable else None, unreadable)


def decoded(
    batches: Iterable[RowBatch], image_column: str, transform: Callable, num_workers: int, pin_memory: bool
) -> Iterator[tuple[RowBatch, DecodedViews]]:
    """
    Batches with the views of their images, which other processes decode ahead; this one alone reads rows.

    Args:
        batches (iterable of [`RowBatch`]): What to decode.
        image_column (`str`): Their column of images.
        transform (`Callable`): PIL image to uint8 tensor (3, H, W).
        num_workers (`int`): Processes that decode; 0: this one.
        pin_memory (`bool`): Whether a GPU will fetch the pixels.

    Returns:
        An iterator of pairs of [`RowBatch`] and [`DecodedViews`], in order.
    """
    ahead: deque[RowBatch] = deque()

    def images():
        for batch in batches:
            ahead.append(batch)
            yield batch.rows[image_column].to_pylist()

    loader = DataLoader(
        _Decoder(transform),
        batch_sampler=images(),
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=torch.Generator(),
    )
    for views in loader:
        yield ahead.popleft(), views
