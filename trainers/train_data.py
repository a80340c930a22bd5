"""The images of a run in its order: batches of a process from any position on, decoded by workers.

Beside what a model reads a batch holds which images are in it (`sample_ids`), and which could not be read and were
replaced (`unreadable`).
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from trainers.datasets import ImageDataset, StoredImages, sample_seed, seeded
from trainers.decoding import UnreadableImage, open_image
from trainers.errors import InputError
from trainers.run_order import RunOrder, shares

SAMPLE_IDS, UNREADABLE = "sample_ids", "unreadable"


class Sample(NamedTuple):
    """
    What is made of an image.

    Args:
        item (`dict`): What the model reads.
        sample_id (`dict`): Which image it is.
        unreadable (`list[dict]`): Those that it stands for, as entries of [`~quarantine.Quarantine`].
    """

    item: dict
    sample_id: dict
    unreadable: list[dict]


class StoredTrainData:
    """
    Train images by position, such as an [`ImageDataset`] or any other data set of dictionaries.

    Args:
        dataset (`Dataset`): Items by index, with a length.
        seed (`int`): Of their order.
    """

    num_lanes = shard_rows = None

    def __init__(self, dataset: Dataset, seed: int):
        self._num_images, self.seed = len(dataset), seed
        self.decoder = _Items(dataset, seed)
        self._dataset, self._fingerprint = dataset, None

    def fingerprint(self) -> str:
        """What tells whether the images are those of another run."""
        if self._fingerprint is None:
            is_ours = isinstance(self._dataset, ImageDataset)
            self._fingerprint = self._dataset.source.fingerprint() if is_ours else f"{self._num_images} images"
        return self._fingerprint

    def share_facts(self, num_ranks: int):
        """Nothing that one process alone has learned is needed to go on."""

    def batches(self, start: int, batch_size: int, rank: int, num_ranks: int) -> Iterator[list[tuple[int, int]]]:
        """Of each batch the places (epoch, index) that a process decodes; see [`~run_order.shares`]."""
        order = RunOrder(self._num_images, self.seed)
        for positions in shares(start, batch_size, rank, num_ranks):
            yield [order.place(position) for position in positions]


class _Items(Dataset):
    """The samples of places (epoch, index)."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, places: list[tuple[int, int]]) -> list[Sample]:
        read = self._readable if isinstance(self.dataset, ImageDataset) else self._plain
        return [read(epoch, index) for epoch, index in places]

    def _plain(self, epoch: int, index: int) -> Sample:
        with seeded(sample_seed(self.seed, epoch, index)):
            return Sample(self.dataset[index], {"index": index}, [])

    def _readable(self, epoch: int, index: int) -> Sample:
        """An image, or the next one in the source's order that can be read, cropped as that in whose place it is."""
        source, unreadable = self.dataset.source, []
        for position in chain(range(index, len(source)), range(index)):
            path = source.images.path(position) if isinstance(source.images, StoredImages) else None
            try:
                view = self.dataset.view(open_image(source.images[position]), epoch, index)
            except UnreadableImage as error:
                row = int(source.images.indices[position])
                unreadable.append({"dataset": source.name, "file": path, "offset": row, "reason": str(error)})
                continue
            sample_id = {"index": position} | ({"file": path} if path else {})
            return Sample({"pixel_values": view}, sample_id, unreadable)
        raise InputError(f"None of the {len(source)} images of {source.name} can be read; repair or remove them.")


class _Collate:
    """Batches of samples, with what no model reads."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, samples: list[Sample]) -> dict:
        return self.collate([sample.item for sample in samples]) | {
            SAMPLE_IDS: [sample.sample_id for sample in samples],
            UNREADABLE: [entry for sample in samples for entry in sample.unreadable],
        }


class TrainLoader:
    """
    The batches of a process from a position on, on its device, without end and so without a length.

    Args:
        data ([`StoredTrainData`] or [`~streams.StreamedTrainData`]): The images.
        collate (`Callable`): A list of items to a batch, a dictionary.
        args (`TrainingArguments`): Device, processes and the fields `dataloader_*`.
        batch_size (`int`): Images of a process in a batch.
        start (`int`): Position of the first batch.
    """

    def __init__(self, data, collate: Callable, args, batch_size: int, start: int):
        self.device = args.device
        places = data.batches(start, batch_size, args.process_index, args.world_size)
        self.base_dataloader = DataLoader(
            data.decoder,
            batch_sampler=places,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
            collate_fn=_Collate(collate),
            # the seed that it draws for its workers shall not be drawn from the model's randomness
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[dict]:
        for batch in self.base_dataloader:
            yield {
                name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
