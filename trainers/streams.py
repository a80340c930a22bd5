"""Train images streamed from shards (parquet files, webdataset's tars, the Hub), at any position and without a copy.

The shards are dealt to V lanes, and sample i of the run is of lane i mod V, so that each of W processes (V a multiple
of W) reads lanes of its own. A lane reads its shards one after the other, pass after pass, in an order drawn from
(seed, lane, epoch). Its rows are cut into windows, each shuffled by (seed, lane, epoch, window): the position alone
tells what comes next, and no buffer has to be saved.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import IterableDataset
from torch.utils.data import Dataset

from trainers.datasets import UnreadableImage, decode_image, sample_seed, seeded
from trainers.errors import InputError, first_line
from trainers.run_order import shares
from trainers.train_data import Sample

# fewer mix the shards less, more hold more of them in memory
_FEWEST_LANES, _MOST_LANES = 16, 64
_ROWS_AT_ONCE = 64
# what tells the seeds of shards, of windows and of crops apart
_OF_SHARDS, _OF_WINDOW, _OF_CROP = 0, 1, 2


class Row(NamedTuple):
    """
    An undecoded image.

    Args:
        shard (`int`): Which shard it is in.
        offset (`int`): Its row there.
        image (`dict`, *optional*): `bytes` and `path`.
    """

    shard: int
    offset: int
    image: dict | None


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
        except (OSError, ValueError, RuntimeError) as error:
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


class Lane:
    """
    The endless samples of some shards.

    Args:
        number (`int`): Which lane.
        shards ([`Shards`]): Of which it reads those of its numbers.
        numbers (`list[int]`): Which.
        window (`int`): Rows that are shuffled together.
        seed (`int`): Of all orders.
        shard_rows (`dict[int, int]`): Rows of single shards, as far as is known; reading adds to it.
    """

    def __init__(self, number: int, shards: Shards, numbers: list[int], window: int, seed: int, shard_rows: dict):
        self.number, self.shards, self.numbers, self.window, self.seed = number, shards, numbers, window, seed
        self.shard_rows = shard_rows

    def samples(self, start: int) -> Iterator[Row]:
        """The samples from one on, counted in the lane."""
        epoch = 0
        while True:
            num_rows = self._num_rows()
            if num_rows == 0:
                raise InputError(f"{self.shards.where(self.numbers[0])} and others hold no image; remove them.")
            if num_rows is not None:
                epoch, start = epoch + start // num_rows, start % num_rows
            for row in self._pass(epoch, start):
                start += 1
                yield row

    def _num_rows(self) -> int | None:
        """Rows of a pass; None as long as a shard has not been read to its end."""
        counts = [self.shard_rows.get(shard) for shard in self.numbers]
        return None if None in counts else sum(counts)

    def _pass(self, epoch: int, start: int) -> Iterator[Row]:
        """The samples of a pass from one on."""
        number, skipped = divmod(start, self.window)
        rows = self._rows(epoch, number * self.window)
        while window := list(islice(rows, self.window)):
            order = self._permutation(len(window), _OF_WINDOW, epoch, number)
            yield from (window[place] for place in order[skipped:])
            number, skipped = number + 1, 0

    def _rows(self, epoch: int, first: int) -> Iterator[Row]:
        """The rows of a pass from one on, in the order of the pass' shards."""
        for place in self._permutation(len(self.numbers), _OF_SHARDS, epoch):
            shard = self.numbers[place]
            if first >= self.shard_rows.get(shard, first + 1):
                first -= self.shard_rows[shard]
                continue
            yield from self.shards.read(shard, first, self.shard_rows.__setitem__)
            first = max(first - self.shard_rows[shard], 0)

    def _permutation(self, length: int, *numbers: int) -> np.ndarray:
        return np.random.default_rng(sample_seed(self.seed, self.number, *numbers)).permutation(length)


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
            Lane(number, shards, list(range(number, shards.num_shards, self.num_lanes)), window, seed, self.shard_rows)
            for number in range(self.num_lanes)
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
        self.transform, self.seed = images.transform, seed
        self.name, self.files = images.shards.name, images.shards.files

    def __getitems__(self, batch: list[tuple[int, Row]]) -> list[Sample]:
        decoded, unreadable = [], []
        for _, row in batch:
            try:
                decoded.append(decode_image(row.image))
            except UnreadableImage as error:
                decoded.append(None)
                unreadable.append(self._entry(row, str(error)))
        if not any(decoded):
            raise InputError(
                f"None of the {len(batch)} images of a batch of {self.name} can be read, such as row "
                f"{batch[0][1].offset} of shard {batch[0][1].shard}; repair or remove them."
            )
        samples = []
        for place, (position, _) in enumerate(batch):
            # the next one of the batch that can be read stands for one that cannot
            place = next(
                place % len(batch) for place in range(place, place + len(batch)) if decoded[place % len(batch)]
            )
            with seeded(sample_seed(self.seed, _OF_CROP, position)):
                item = {"pixel_values": self.transform(decoded[place])}
            samples.append(Sample(item, self._sample_id(batch[place][1]), []))
        samples[0].unreadable.extend(unreadable)
        return samples

    def _sample_id(self, row: Row) -> dict:
        return {"shard": row.shard, "offset": row.offset} | ({"file": self.files[row.shard]} if self.files else {})

    def _entry(self, row: Row, reason: str) -> dict:
        inside = (row.image or {}).get("path")
        file = self.files[row.shard] if self.files else f"shard {row.shard}"
        told = f"{inside}: {reason}" if inside else reason
        return {"dataset": self.name, "file": file, "offset": row.offset, "reason": told}


class StreamedImages:
    """
    What a trainer is given in the place of a data set, to stream its images.

    Args:
        shards ([`Shards`]): The images.
        transform (`Callable`): PIL image to uint8 tensor.
        shuffle_buffer (`int`): Images of all processes that are shuffled together, 1 or more.
    """

    def __init__(self, shards: Shards, transform: Callable[..., torch.Tensor], shuffle_buffer: int):
        self.shards, self.transform, self.shuffle_buffer = shards, transform, shuffle_buffer

    def __len__(self) -> int:
        if self.shards.num_images is None:
            raise TypeError(f"{self.shards.name} does not tell how many images it has.")
        return self.shards.num_images


def choose_lanes(num_shards: int, num_ranks: int, name: str = "the data set") -> int:
    """
    How many lanes a stream is read in: the multiple of the processes that deals the shards most evenly, and of those
    with 16 or more the least.

    Args:
        num_shards, num_ranks (`int`): Shards and processes.
        name (`str`): What an error calls the data set.

    Raises:
        InputError: There are fewer shards than processes.
    """
    if num_shards < num_ranks:
        raise InputError(
            f"{name} has {num_shards} shard{'s' * (num_shards > 1)}, fewer than the {num_ranks} processes; start as "
            "many or fewer, cut it into more files, or leave --streaming out."
        )
    possible = range(num_ranks, min(num_shards, max(_MOST_LANES, num_ranks)) + 1, num_ranks)

    def rank(lanes: int) -> tuple:
        unevenness = -(-num_shards // lanes) / (num_shards // lanes)
        return unevenness, lanes < _FEWEST_LANES, lanes if lanes >= _FEWEST_LANES else -lanes

    return min(possible, key=rank)
