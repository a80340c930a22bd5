"""Lanes of a stream: endless samples of some of its shards, at any position, shuffled in windows.

A lane reads its shards one after the other, pass after pass, in an order drawn from (seed, lane, epoch). Its rows are
cut into windows, each shuffled by (seed, lane, epoch, window): the position alone tells what comes next.
"""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np

from trainers.datasets import sample_seed
from trainers.errors import InputError

# fewer mix the shards less, more hold more of them in memory
_FEWEST, _MOST = 16, 64
# what tells the seeds of a pass' shards and of a window's rows apart
_OF_SHARDS, _OF_WINDOW = 0, 1
# lanes as long as this beside the shortest are told of
_UNEVEN = 1.1


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


class Lane:
    """
    The endless samples of some shards.

    Args:
        number (`int`): Which lane.
        shards (`list[int]`): Which shards it reads.
        read (`Callable`): The rows of a shard from one on: of its number, the first row wanted, and what is called at
            its end with its number and its length.
        window (`int`): Rows that are shuffled together.
        seed (`int`): Of all orders.
        shard_rows (`dict[int, int]`): Rows of single shards, as far as is known; reading adds to it.
    """

    def __init__(
        self, number: int, shards: list[int], read: Callable, window: int, seed: int, shard_rows: dict[int, int]
    ):
        self.number, self.shards, self.read, self.window, self.seed = number, shards, read, window, seed
        self.shard_rows = shard_rows

    def samples(self, start: int) -> Iterator[Row]:
        """The samples from one on, counted in the lane."""
        epoch = 0
        while True:
            num_rows = self._num_rows()
            if num_rows == 0:
                raise InputError(
                    f"Shards {', '.join(map(str, self.shards))} (from 0) hold no image; remove their files."
                )
            if num_rows is not None:
                epoch, start = epoch + start // num_rows, start % num_rows
            for row in self._pass(epoch, start):
                start += 1
                yield row

    def _num_rows(self) -> int | None:
        """Rows of a pass; None as long as a shard has not been read to its end."""
        counts = [self.shard_rows.get(shard) for shard in self.shards]
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
        for place in self._permutation(len(self.shards), _OF_SHARDS, epoch):
            shard = self.shards[place]
            if first >= self.shard_rows.get(shard, first + 1):
                first -= self.shard_rows[shard]
                continue
            yield from self.read(shard, first, self.shard_rows.__setitem__)
            first = max(first - self.shard_rows[shard], 0)

    def _permutation(self, length: int, *numbers: int) -> np.ndarray:
        return np.random.default_rng(sample_seed(self.seed, self.number, *numbers)).permutation(length)


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
    possible = range(num_ranks, min(num_shards, max(_MOST, num_ranks)) + 1, num_ranks)

    def rank(lanes: int) -> tuple:
        unevenness = -(-num_shards // lanes) / (num_shards // lanes)
        return unevenness, lanes < _FEWEST, lanes if lanes >= _FEWEST else -lanes

    return min(possible, key=rank)


def uneven_lanes(num_shards: int, num_lanes: int, shard_rows: dict[int, int]) -> str | None:
    """
    What a user should know of lanes of unequal length, in a sentence; None if they are about equal.

    Args:
        num_shards, num_lanes (`int`): Shards and lanes.
        shard_rows (`dict[int, int]`): Rows of the shards, where that is known; else each counts the same.
    """
    lengths = [
        sum(shard_rows.get(shard, 1) for shard in range(lane, num_shards, num_lanes)) for lane in range(num_lanes)
    ]
    if max(lengths) <= _UNEVEN * max(min(lengths), 1):
        return None
    return (
        f"The {num_shards} shards make {num_lanes} lanes of unequal length: in several passes images of the shortest "
        f"are seen {max(lengths) / max(min(lengths), 1):.1f} times as often as those of the longest; cut the data set "
        f"into files of equal length, a multiple of {num_lanes}, to see all alike."
    )
