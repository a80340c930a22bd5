"""Schedules of I-JEPA's recipe as pure functions of the step."""

import math


def warmup_cosine(
    step: float, num_steps: float, num_warmup_steps: int, start: float, peak: float, final: float
) -> float:
    """
    Linear from `start` to `peak` over the warm-up, then a half cosine to `final`.

    Args:
        step (`float`): Optimizer steps done, from 0.
        num_steps (`float`): Length of the schedule; beyond it the value stays `final`.
        num_warmup_steps (`int`): Length of the warm-up.
        start, peak, final (`float`): Values at its beginning, after the warm-up and at its end.

    Returns:
        `float`: The value at the step.
    """
    if step < num_warmup_steps:
        return start + (peak - start) * step / num_warmup_steps
    return cosine(step - num_warmup_steps, num_steps - num_warmup_steps, peak, final)


def cosine(step: float, num_steps: float, start: float, final: float) -> float:
    """Half a cosine from `start` at step 0 to `final` at `num_steps`, which stays."""
    progress = min(step / max(num_steps, 1), 1.0)
    return final + (start - final) * (1 + math.cos(math.pi * progress)) / 2


def linear(step: float, num_steps: float, start: float, final: float) -> float:
    """A line from `start` at step 0 to `final` at `num_steps`, which stays."""
    return start + (final - start) * min(step / max(num_steps, 1), 1.0)
