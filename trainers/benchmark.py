"""Speed of parts, measured on this machine: medians of rounds that take turns, with their quartiles."""

import itertools
import statistics
import time
from collections.abc import Iterable, Sequence

import torch
from tqdm import tqdm

from modeling_cjepa.masking_cjepa import sample_block_masks
from trainers.errors import InputError
from trainers.threads import threads

GRIDS = (8, 14, 16)


def benchmark_masks(batch_size: int = 256, num_rounds: int = 20) -> list[dict]:
    """
    Times the mask sampler on one thread, beside a loop over the images as in I-JEPA's published code.

    Args:
        batch_size (`int`): Images of a draw.
        num_rounds (`int`): Timed draws for each grid.

    Returns:
        One `dict` a grid: `grid`, `batch_size`, and in microseconds an image `median`, `low`, `high` (quartiles) and
        `loop` (the loop's median); `factor` is `loop / median`.

    Raises:
        InputError: A number is too small to measure with.
    """
    if batch_size < 1 or num_rounds < 2:
        raise InputError(f"--batch_size {batch_size} must be 1 or more and --rounds {num_rounds} 2 or more.")
    with threads(1):
        return [_time_masks(grid, batch_size, num_rounds) for grid in GRIDS]


def shown(num_rounds: int, what: str) -> Iterable[int]:
    """Numbers of rounds, 0 for the one that sets things up and is not counted, while a bar says how far they are."""
    return tqdm(range(num_rounds + 1), desc=what, unit="round")


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """`low`, `median` and `high` of measurements, of which there are two or more."""
    return dict(zip(("low", "median", "high"), statistics.quantiles(values, n=4), strict=True))


def step_rows(found: dict, called: dict[str, str]) -> list[list[str]]:
    """A table of steps by what each is called: `found` has the [`quartiles`] of their seconds, and `batch_size`."""
    rows = [["a step", "ms (quartiles)", "images/s"]]
    for name, title in called.items():
        low, median, high = (found[name][place] * 1e3 for place in ("low", "median", "high"))
        rows.append([title, f"{median:.1f} ({low:.1f} - {high:.1f})", f"{found['batch_size'] / median * 1e3:.1f}"])
    return rows


def decay_groups(parameters: Iterable[torch.Tensor], weight_decay: float) -> list[dict]:
    """What an optimizer is given: the matrices, which decay, and all of one dimension, which do not."""
    parameters = list(parameters)
    return [
        {"params": [each for each in parameters if (each.ndim > 1) == decays], "weight_decay": weight_decay * decays}
        for decays in (True, False)
    ]


def loop_masks(batch_size: int, grid: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Masks of I-JEPA's default geometry drawn one image at a time, the way of the authors' code (arXiv 2301.08243).

    Its law is that code's: the last row and column are never used, and contexts are cut to the batch's shortest from
    their ends. For comparison only; models use [`~masking_cjepa.sample_block_masks`].

    Args:
        batch_size (`int`): Number of images B.
        grid (`int`): Rows and columns of the square grid.
        generator (`torch.Generator`): The source of randomness.

    Returns:
        `context_ids` (B, Nc) and `target_ids` (B, 4, K).
    """

    def size(low, high, aspects=(1.0, 1.0)):
        draw = torch.rand(1, generator=generator).item()
        area = int(grid * grid * (low + draw * (high - low)))
        aspect = aspects[0] + draw * (aspects[1] - aspects[0])
        return [min(round((area * ratio) ** 0.5), grid - 1) for ratio in (aspect, 1 / aspect)]

    def block(height, width):
        top = torch.randint(0, grid - height, (1,), generator=generator)
        left = torch.randint(0, grid - width, (1,), generator=generator)
        mask = torch.zeros((grid, grid), dtype=torch.int32)
        mask[top : top + height, left : left + width] = 1
        return mask

    def context_outside(blocks):
        # a target block less keeps the context free of targets for every 20 tries that leave too little of it
        for num_tries in itertools.count():
            mask = block(*context_size)
            for target in blocks[: max(len(blocks) - num_tries // 20, 0)]:
                mask *= 1 - target
            context = torch.nonzero(mask.flatten()).squeeze(1)
            if len(context) > 10:
                return context

    target_size, context_size = size(0.15, 0.2, (0.75, 1.5)), size(0.85, 1.0)
    contexts, targets = [], []
    for _ in range(batch_size):
        blocks = [block(*target_size) for _ in range(4)]
        contexts.append(context_outside(blocks))
        targets.append(torch.stack([torch.nonzero(target.flatten()).squeeze(1) for target in blocks]))
    shortest = min(map(len, contexts))
    return torch.stack([context[:shortest] for context in contexts]), torch.stack(targets)


def _time_masks(grid: int, batch_size: int, num_rounds: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    samplers = {"ours": sample_block_masks, "loop": loop_masks}
    times = {name: [] for name in samplers}
    for _ in shown(num_rounds, f"masks, grid {grid}x{grid}"):
        for name, sample in samplers.items():
            # what the other sampler left in the caches is not this one's cost
            sample(min(batch_size, 8), grid, generator=generator)
            started = time.perf_counter()
            sample(batch_size, grid, generator=generator)
            times[name].append((time.perf_counter() - started) / batch_size * 1e6)
    found = quartiles(times["ours"][1:])
    loop = statistics.median(times["loop"][1:])
    row = {"grid": f"{grid}x{grid}", "batch_size": batch_size} | found
    return row | {"loop": loop, "factor": loop / found["median"]}


def format_benchmark(rows: list[dict]) -> str:
    """The measurements as a table."""
    lines = [
        "| masks | batch | us an image (quartiles) | loop over images, us | times faster |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['grid']} | {row['batch_size']} | {row['median']:.1f} ({row['low']:.1f} - {row['high']:.1f}) "
            f"| {row['loop']:.0f} | {row['factor']:.0f} |"
        )
    return "\n".join(lines)
