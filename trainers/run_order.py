"""The order of a whole run's images: pass after pass, without a break, whatever the number of processes.

A position counts the images of all processes. Image i of a batch over W processes is read by process i mod W, so that
each number of processes sees the same global batches.
"""

from collections.abc import Iterator

import numpy as np

from trainers.datasets import sample_seed


class RunOrder:
    """
    Which image is at which position: each pass over the images has an order of its own, drawn from (seed, epoch).

    Args:
        num_images (`int`): Images of a pass, 1 or more.
        seed (`int`): Of the orders.
    """

    def __init__(self, num_images: int, seed: int):
        self.num_images, self.seed = num_images, seed
        # a batch may reach from one pass into the next: both orders are kept
        self._orders: dict[int, np.ndarray] = {}

    def place(self, position: int) -> tuple[int, int]:
        """The epoch of a position, and the index of its image."""
        epoch, place = divmod(position, self.num_images)
        return epoch, int(self._order(epoch)[place])

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders = {number: order for number, order in self._orders.items() if abs(number - epoch) <= 1}
            self._orders[epoch] = np.random.default_rng(sample_seed(self.seed, epoch)).permutation(self.num_images)
        return self._orders[epoch]


def shares(start: int, batch_size: int, rank: int, num_ranks: int) -> Iterator[range]:
    """
    The positions that a process reads: of each batch over all processes its share, without end.

    Args:
        start (`int`): Position of the first batch.
        batch_size (`int`): Images of a process in a batch.
        rank, num_ranks (`int`): Which process of how many.

    Returns:
        An iterator of ranges of `batch_size` positions, `num_ranks` apart.
    """
    while True:
        yield range(start + rank, start + batch_size * num_ranks, num_ranks)
        start += batch_size * num_ranks
