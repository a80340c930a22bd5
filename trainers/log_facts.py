"""What the log of a pre-training run says of all of it: time, speed, and the signs of collapse at its ends."""

import math
from itertools import count, takewhile

from modeling_cjepa.losses_cjepa import level_term


def log_facts(history: list[dict]) -> dict:
    """
    The facts of a run that its log holds.

    Args:
        history (`list[dict]`): `trainer.state.log_history`.

    Returns:
        `dict`: `seconds` of training, the parts before a resume included, `images_per_second` (median),
        `data_wait_share`, `loss_last` and, of each level at the first log and at the last, `rankme` and `feature_std`;
        empty if nothing was logged.
    """
    logged = [entry for entry in history if "rankme" in entry]
    if not logged:
        return {}
    speeds = sorted(entry["images_per_second"] for entry in logged)
    seen = [0, *(entry["images_seen"] for entry in logged)]
    seconds = math.fsum(
        (now - before) / entry["images_per_second"] for before, now, entry in zip(seen, seen[1:], logged, strict=False)
    )
    levels = takewhile(lambda level: level_term("rankme", level) in logged[0], count())
    num_levels = len(list(levels))
    ends = {
        sign: [[entry[level_term(sign, level)] for entry in (logged[0], logged[-1])] for level in range(num_levels)]
        for sign in ("rankme", "feature_std")
    }
    return {
        "seconds": round(seconds, 1),
        "images_per_second": round(speeds[len(speeds) // 2], 1),
        "data_wait_share": round(math.fsum(entry["data_wait_share"] for entry in logged) / len(logged), 4),
        **ends,
        "loss_last": logged[-1]["loss"],
    }
