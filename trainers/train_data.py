"""The images of a run in its order: batches of a process from any position on, decoded by workers.

An item is what a data set gives for an image; a batch hides from the model which images are in it (`sample_ids`).
"""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from trainers.datasets import ImageDataset, sample_seed, seeded
from trainers.run_order import RunOrder, shares

SAMPLE_IDS = "sample_ids"


class StoredTrainData:
    """
    Train images by position, such as an [`ImageDataset`] or any other data set of dictionaries.

    Args:
        dataset (`Dataset`): Items by index, with a length.
        seed (`int`): Of their order.
    """

    num_lanes = shard_rows = None

    def __init__(self, dataset: Dataset, seed: int):
        self.num_images, self.seed = len(dataset), seed
        self.decoder = _Items(dataset, seed)
        self._dataset, self._fingerprint = dataset, None

    def fingerprint(self) -> str:
        """What tells whether the images are those of another run."""
        if self._fingerprint is None:
            is_ours = isinstance(self._dataset, ImageDataset)
            self._fingerprint = self._dataset.source.fingerprint() if is_ours else f"{self.num_images} images"
        return self._fingerprint

    def batches(self, start: int, batch_size: int, rank: int, num_ranks: int) -> Iterator[list[tuple[int, int]]]:
        """Of each batch the places (epoch, index) that a process decodes; see [`~run_order.shares`]."""
        order = RunOrder(self.num_images, self.seed)
        for positions in shares(start, batch_size, rank, num_ranks):
            yield [order.place(position) for position in positions]


class _Items(Dataset):
    """The items of places (epoch, index), each with its id."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitems__(self, places: list[tuple[int, int]]) -> list[tuple[dict, dict]]:
        return [(self._item(epoch, index), {"index": index}) for epoch, index in places]

    def _item(self, epoch: int, index: int) -> dict:
        if isinstance(self.dataset, ImageDataset):
            return self.dataset.view(epoch, index)
        with seeded(sample_seed(self.seed, epoch, index)):
            return self.dataset[index]


class TrainLoader:
    """
    The batches of a process from a position on, on its device, without end and so without a length.

    Args:
        data ([`StoredTrainData`]): The images.
        collate (`Callable`): A list of items to a batch, a dictionary.
        args (`TrainingArguments`): Device, processes and the fields `dataloader_*`.
        batch_size (`int`): Images of a process in a batch.
        start (`int`): Position of the first batch.
    """

    def __init__(self, data, collate: Callable, args, batch_size: int, start: int):
        self.dataset, self.device, self.collate = data.decoder, args.device, collate
        places = data.batches(start, batch_size, args.process_index, args.world_size)
        self._loader = DataLoader(
            self.dataset,
            batch_sampler=places,
            num_workers=args.dataloader_num_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            persistent_workers=args.dataloader_persistent_workers,
            pin_memory=args.dataloader_pin_memory,
            collate_fn=self._collated,
            # the seed that it draws for its workers shall not be drawn from the model's randomness
            generator=torch.Generator(),
        )

    def _collated(self, items: list[tuple[dict, dict]]) -> dict:
        return self.collate([item for item, _ in items]) | {SAMPLE_IDS: [sample_id for _, sample_id in items]}

    def __iter__(self) -> Iterator[dict]:
        for batch in self._loader:
            yield {
                name: value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
