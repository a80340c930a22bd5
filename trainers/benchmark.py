"""Speed of parts, measured on this machine: medians of repeated rounds, with their spread."""

import statistics
import time

import torch

from modeling_cjepa.masking_cjepa import sample_block_masks
from trainers.errors import InputError

GRIDS = (8, 14, 16)


def benchmark_masks(batch_size: int = 256, num_rounds: int = 20) -> list[dict]:
    """
    Times the mask sampler on one thread.

    Args:
        batch_size (`int`): Images of a draw.
        num_rounds (`int`): Timed draws for each grid.

    Returns:
        One `dict` a grid: `grid`, `batch_size`, `median` and `low`, `high` (the quartiles) in microseconds an image.
    """
    if batch_size < 1 or num_rounds < 2:
        raise InputError(f"--batch_size {batch_size} must be 1 or more and --rounds {num_rounds} 2 or more.")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_time_masks(grid, batch_size, num_rounds) for grid in GRIDS]
    finally:
        torch.set_num_threads(threads)


def _time_masks(grid: int, batch_size: int, num_rounds: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    times = []
    for _ in range(num_rounds + 3):
        started = time.perf_counter()
        sample_block_masks(batch_size, grid, generator=generator)
        times.append((time.perf_counter() - started) / batch_size * 1e6)
    low, median, high = statistics.quantiles(times[3:], n=4)
    return {"grid": f"{grid}x{grid}", "batch_size": batch_size, "median": median, "low": low, "high": high}


def format_benchmark(rows: list[dict]) -> str:
    """The measurements as a table."""
    lines = ["| masks | batch | us an image (quartiles) | images/s |", "|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row['grid']} | {row['batch_size']} | {row['median']:.1f} ({row['low']:.1f} - {row['high']:.1f}) "
            f"| {1e6 / row['median']:,.0f} |"
        )
    return "\n".join(lines)
