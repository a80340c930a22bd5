"""Train images streamed from shards (parquet files, webdataset's tars, the Hub), at any position and without a copy.

The shards are dealt to V lanes, and sample i of the run is of lane i mod V, so that each of W processes (V a multiple
of W) reads lanes of its own. The position alone tells what comes next: no buffer has to be saved.
"""

import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch.utils.data import Dataset

from trainers.datasets import sample_seed, seeded
from trainers.decoding import UnreadableImage, open_image
from trainers.errors import InputError, first_line
from trainers.lanes import Lane, Row, choose_lanes
from trainers.run_order import shares
from trainers.train_data import Sample

_ROWS_AT_ONCE = 64
# tells the seeds of crops from those of lanes
_OF_CROP = 2


class Shards:
    """
    Images that can be read shard by shard.

    Args:
        rows (`IterableDataset`): Undecoded rows.
        image_column (`str`): The column of images.
        name (`str`): What an error calls the data set.
        files (`list[str]`, *optional*): The shards' files, where they are here.
        num_images (`int`, *optional*): Rows of all shards, where that is known.
        shard_rows (`dict[int, int]`, *optional*): Rows of single shards, where that is known.
    """

    def __init__(
        self,
        rows: IterableDataset,
        image_column: str,
        name: str,
        files: list[str] | None = None,
        num_images: int | None = None,
        shard_rows: dict[int, int] | None = None,
    ):
        self.rows = rows.select_columns([image_column]).with_format("arrow")
        self.image_column, self.name, self.files, self.num_images = image_column, name, files, num_images
        self.num_shards, self.shard_rows = rows.num_shards, shard_rows or {}

    def read(self, shard: int, first: int, counted: Callable[[int, int], None]) -> Iterator[Row]:
        """The rows of a shard from the first one wanted on; at its end, `counted` is told how many it has."""
        offset = 0
        for batch in self._batches(shard):
            skipped = min(max(first - offset, 0), batch.num_rows)
            images = batch[self.image_column].slice(skipped).to_pylist()
            for place, image in enumerate(images, offset + skipped):
                yield Row(shard, place, image)
            offset += batch.num_rows
        counted(shard, offset)

    def _batches(self, shard: int):
        try:
            yield from self.rows.shard(self.num_shards, shard).iter(_ROWS_AT_ONCE)
        except (OSError, ValueError, RuntimeError, EOFError, tarfile.TarError, zlib.error) as error:
            raise InputError(f"{self.where(shard)} cannot be read ({first_line(error)}); repair it, or check the "
                             "network, and go on with --resume_from_checkpoint last.") from error  # fmt: skip

    def where(self, shard: int) -> str:
        """The file of a shard, or its number."""
        return self.files[shard] if self.files else f"shard {shard} of {self.name}"

    def fingerprint(self) -> str:
        """How many shards, and a hash of what is known of them: names and sizes of files, or the number of images."""
        files = [(Path(file).name, Path(file).stat().st_size) for file in self.files or []]
        digest = hashlib.sha256(json.dumps([files or self.name, self.num_images]).encode()).hexdigest()
        return f"{self.num_shards} shards, {digest[:16]}"


class StreamedTrainData:
    """
    Train images of shards, as [`~train_data.TrainLoader`] reads them.

    Args:
        images ([`StreamedImages`]): The images.
        seed (`int`): Of their order.
        num_ranks (`int`): Processes.
        num_lanes (`int`, *optional*): Lanes of the run that is gone on with.
        shard_rows (`dict[int, int]`, *optional*): What it knew of the shards.

    Raises:
        InputError: The processes are more than the shards, or cannot share the lanes.
    """

    def __init__(self, images: "StreamedImages", seed: int, num_ranks: int, num_lanes=None, shard_rows=None):
        shards = images.shards
        self.num_lanes = num_lanes or choose_lanes(shards.num_shards, num_ranks, shards.name)
        if self.num_lanes % num_ranks:
            possible = ", ".join(str(n) for n in range(1, self.num_lanes + 1) if self.num_lanes % n == 0)
            raise InputError(
                f"The stream of this run has {self.num_lanes} lanes, which {num_ranks} processes cannot share evenly; "
                f"go on with {possible} processes."
            )
        self.shard_rows = shards.shard_rows | (shard_rows or {})
        self._fingerprint = f"{shards.fingerprint()}, shuffled by {images.shuffle_buffer}"
        window = -(-images.shuffle_buffer // self.num_lanes)
        self.lanes = [
            Lane(
                lane, list(range(lane, shards.num_shards, self.num_lanes)), shards.read, window, seed, self.shard_rows
            )
            for lane in range(self.num_lanes)
        ]
        self.decoder = _Decoder(images, seed)

    def fingerprint(self) -> str:
        """What tells whether the images, and their order, are those of another run."""
        return self._fingerprint

    def share_facts(self, num_ranks: int):
        """Tells all processes how many rows the shards have that one of them has read to their ends."""
        if num_ranks > 1:
            for shard_rows in gather_object([self.shard_rows]):
                self.shard_rows.update(shard_rows)

    def batches(self, start: int, batch_size: int, rank: int, num_ranks: int) -> Iterator[list[tuple[int, Row]]]:
        """Of each batch the positions and undecoded images of a process; see [`~run_order.shares`]."""
        samples: dict[int, Iterator[Row]] = {}

        def sample(position: int) -> Row:
            turn, lane = divmod(position, self.num_lanes)
            if lane not in samples:
                samples[lane] = self.lanes[lane].samples(turn)
            return next(samples[lane])

        for positions in shares(start, batch_size, rank, num_ranks):
            yield [(position, sample(position)) for position in positions]


class _Decoder(Dataset):
    """The samples of a batch of undecoded images, which workers are given."""

    def __init__(self, images: "StreamedImages", seed: int):
        self.transform, self.shards, self.seed = images.transform, images.shards, seed

    def __getitems__(self, batch: list[tuple[int, Row]]) -> list[Sample]:
        return [self._sample(position, row) for position, row in batch]

    def _sample(self, position: int, row: Row) -> Sample:
        """An image, or the next one that can be read, cropped as that in whose place it is."""
        unreadable = []
        for other in chain([row], self._next_rows(row)):
            try:
                image = open_image(other.image)
                with seeded(sample_seed(self.seed, _OF_CROP, position)):
                    view = self.transform(image)
            except UnreadableImage as error:
                # the others are told of when it is their turn
                unreadable = unreadable or [self._entry(row, str(error))]
                continue
            return Sample({"pixel_values": view}, self._sample_id(other), unreadable)
        reason = "row {offset} of {file}: {reason}".format(**unreadable[0])
        raise InputError(f"None of the images of {self.shards.name} can be read ({reason}); repair or remove them.")

    def _next_rows(self, row: Row) -> Iterator[Row]:
        """All rows that follow one in the order of the shards, up to it; its own shard is read once more for them."""
        read, num_shards = partial(self.shards.read, counted=lambda shard, num_rows: None), self.shards.num_shards
        yield from read(row.shard, row.offset + 1)
        for shard in range(row.shard + 1, row.shard + num_shards):
            yield from read(shard % num_shards, 0)
        yield from islice(read(row.shard, 0), row.offset)

    def _sample_id(self, row: Row) -> dict:
        files = self.shards.files
        return {"shard": row.shard, "offset": row.offset} | ({"file": files[row.shard]} if files else {})

    def _entry(self, row: Row, reason: str) -> dict:
        inside, files = (row.image or {}).get("path"), self.shards.files
        file = files[row.shard] if files else f"shard {row.shard}"
        told = f"{inside}: {reason}" if inside else reason
        return {"dataset": self.shards.name, "file": file, "offset": row.offset, "reason": told}


class StreamedImages:
    """
    What a trainer is given in the place of a data set, to stream its images.

    Args:
        shards ([`Shards`]): The images.
        transform (`Callable`): Image that is opened to uint8 tensor.
        shuffle_buffer (`int`): Images of all processes that are shuffled together, 1 or more.
    """

    def __init__(self, shards: Shards, transform: Callable[..., torch.Tensor], shuffle_buffer: int):
        self.shards, self.transform, self.shuffle_buffer = shards, transform, shuffle_buffer

    def __len__(self) -> int:
        if self.shards.num_images is None:
            raise TypeError(f"{self.shards.name} does not tell how many images it has.")
        return self.shards.num_images
