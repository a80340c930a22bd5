"""How many threads torch computes with on the CPU."""

from contextlib import contextmanager

import torch


@contextmanager
def threads(number: int):
    """So many threads for a while; as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
