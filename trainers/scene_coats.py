"""The coats of the scene generator: the pattern on the surface of an object, one for each of the twelve kinds.

A coat is one of six patterns, fine or coarse, with a random direction, phase and period: it lies nowhere in two scenes
alike. Each covers half of a surface, so that no brightness tells the kind.
"""

import numpy as np
from PIL import Image

_PERIODS = (0.14, 0.28)
"""Of a fine and a coarse coat, in units of the image's side."""
_PERIOD_RANGE = (0.85, 1.15)


def stripes(u, v, rng) -> np.ndarray:
    return u % 1 < 0.5


def checks(u, v, rng) -> np.ndarray:
    return (u % 1 < 0.5) ^ (v % 1 < 0.5)


def dots(u, v, rng) -> np.ndarray:
    return np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.4


def mesh(u, v, rng) -> np.ndarray:
    return (u % 1 < 0.29) | (v % 1 < 0.29)


def rings(u, v, rng) -> np.ndarray:
    centre = rng.uniform([u.min(), v.min()], [u.max(), v.max()])
    return np.hypot(u - centre[0], v - centre[1]) % 1 < 0.5


def blotches(u, v, rng) -> np.ndarray:
    cells = int(np.ceil(np.ptp(u))) + 1
    field = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(field.resize(u.shape[::-1], Image.Resampling.BICUBIC)) > 0.5


_PATTERNS = (stripes, checks, dots, mesh, rings, blotches)


def draw_coat(kind: int, points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """
    Where the coat of a kind shows its second colour.

    Args:
        kind (`int`): The kind, from 0 to 11.
        points (`np.ndarray` of shape `(H, W, 2)`): Places in units of the image's side.
        rng (`np.random.Generator`): Gives direction, phase and period.

    Returns:
        `np.ndarray` of shape `(H, W)`, bool.
    """
    pattern, period = _PATTERNS[kind % len(_PATTERNS)], _PERIODS[kind // len(_PATTERNS)]
    angle, phase_u, phase_v = rng.uniform(0, [np.pi, 1, 1])
    period = period * rng.uniform(*_PERIOD_RANGE)
    x, y = points[..., 0], points[..., 1]
    u = (x * np.cos(angle) + y * np.sin(angle)) / period + phase_u
    v = (y * np.cos(angle) - x * np.sin(angle)) / period + phase_v
    return pattern(u, v, rng)
