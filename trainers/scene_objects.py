"""The drawings of the scene generator: twelve kinds of objects, each built from parts.

A drawing is a list of parts; a part is a paint (which of the object's random colours fills it) and a polygon in the
object's own plane (x to the right, y down, any scale: the renderer normalises it). Parts are listed back to front.
Every drawing varies its proportions with the generator it is given.
"""

from collections.abc import Callable

import numpy as np

Part = tuple[int, np.ndarray]
"""The index of a paint, and the corners of a polygon (n, 2)."""

MAIN, SECOND, THIRD, DETAIL = range(4)
NUM_PAINTS = 4

_TURN = np.linspace(0, 2 * np.pi, 24, endpoint=False)
_CIRCLE = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)


def rotate(points: np.ndarray, angle: float) -> np.ndarray:
    """Turns points (n, 2) by `angle` radians about the origin, clockwise on the screen."""
    cos, sin = np.cos(angle), np.sin(angle)
    return points @ np.array([[cos, sin], [-sin, cos]])


def polygon(*corners: tuple[float, float]) -> np.ndarray:
    """The polygon (n, 2) with these corners."""
    return np.array(corners, dtype=float)


def box(left: float, top: float, right: float, bottom: float) -> np.ndarray:
    """An upright rectangle."""
    return polygon((left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(x: float, y: float, radius_x: float, radius_y: float | None = None, angle: float = 0.0) -> np.ndarray:
    """An ellipse about (x, y), turned by `angle`; a circle if one radius is given."""
    points = _CIRCLE * (radius_x, radius_x if radius_y is None else radius_y)
    return (rotate(points, angle) if angle else points) + (x, y)


def limb(width: float, *joints: tuple[float, float]) -> np.ndarray:
    """A bent stroke of even width along the joints."""
    path = np.array(joints, dtype=float)
    along = np.gradient(path, axis=0)
    across = along[:, ::-1] * (-1, 1) * (width / 2 / np.hypot(*along.T))[:, None]
    return np.concatenate([path + across, (path - across)[::-1]])


def bird(rng: np.random.Generator) -> list[Part]:
    body, head, tail, leg = rng.uniform([0.55, 0.24, 0.4, 0.4], [0.7, 0.32, 0.65, 0.6])
    tilt = rng.uniform(0.2, 0.5)
    head_x, head_y = 0.6 * body + 0.15, -0.35 - head * 0.6
    return [
        (DETAIL, limb(0.1, (-0.1, 0.2), (-0.1, 0.3 + leg), (0.12, 0.3 + leg))),
        (DETAIL, limb(0.1, (0.15, 0.2), (0.15, 0.3 + leg), (0.37, 0.3 + leg))),
        (SECOND, polygon((-0.35, -0.1), (-0.5 - tail, -0.05), (-0.45 - tail, 0.35), (-0.3, 0.3))),
        (MAIN, ellipse(0, 0, body, 0.38, -tilt)),
        (
            DETAIL,
            polygon((head_x + 0.1, head_y - 0.14), (head_x + head + 0.35, head_y + 0.06), (head_x, head_y + 0.2)),
        ),
        (MAIN, ellipse(head_x, head_y, head)),
        (THIRD, ellipse(-0.15, 0, 0.62 * body, 0.2, -tilt + 0.1)),
        (DETAIL, ellipse(head_x + 0.08, head_y - 0.06, 0.09)),
    ]


def fish(rng: np.random.Generator) -> list[Part]:
    height, tail, fin = rng.uniform([0.36, 0.35, 0.2], [0.55, 0.55, 0.4])
    return [
        (SECOND, polygon((-0.6, 0), (-0.8 - tail, -0.5), (-0.75 - tail / 2, 0), (-0.8 - tail, 0.5))),
        (SECOND, polygon((0.3, -0.7 * height), (-0.2, -height - fin), (-0.5, -0.6 * height))),
        (SECOND, polygon((0.1, 0.8 * height), (-0.2, height + 0.7 * fin), (-0.4, 0.7 * height))),
        (MAIN, ellipse(0, 0, 0.8, height)),
        (THIRD, limb(0.13, (-0.2, -0.8 * height), (-0.1, 0), (-0.2, 0.8 * height))),
        (THIRD, limb(0.13, (0.15, -0.85 * height), (0.25, 0), (0.15, 0.85 * height))),
        (DETAIL, ellipse(0.52, -0.12, 0.12)),
    ]


def spider(rng: np.random.Generator) -> list[Part]:
    abdomen, head, reach, knee = rng.uniform([0.34, 0.2, 0.75, 0.3], [0.46, 0.28, 1.0, 0.5])
    parts = []
    for row, (hip, lift, foot) in enumerate(
        [(-0.2, -0.45, -0.9), (-0.08, -0.3, -0.3), (0.06, 0.2, 0.4), (0.2, 0.45, 1)]
    ):
        for side in (-1, 1):
            stretch = reach * (0.85 if row in (0, 3) else 1.1)
            joints = (side * 0.1, hip), (side * (0.15 + knee), hip + lift), (side * stretch, foot)
            parts.append((SECOND, limb(0.1, *joints)))
    return [
        *parts,
        (MAIN, ellipse(0, 0.15 + 0.6 * abdomen, 0.9 * abdomen, abdomen)),
        (THIRD, ellipse(0, 0.15 + 0.7 * abdomen, 0.35 * abdomen, 0.55 * abdomen)),
        (MAIN, ellipse(0, -0.15, head)),
        (DETAIL, ellipse(-0.1, -0.25, 0.08)),
        (DETAIL, ellipse(0.1, -0.25, 0.08)),
    ]


def car(rng: np.random.Generator) -> list[Part]:
    roof, front, back, wheel = rng.uniform([0.4, 0.35, 0.5, 0.2], [0.55, 0.5, 0.8, 0.27])
    return [
        (MAIN, polygon((-back, 0), (0.15 - back, -roof), (front - 0.1, -roof), (front + 0.2, 0))),
        (THIRD, polygon((0.1 - back, -0.02), (0.22 - back, 0.1 - roof), (-0.1, 0.1 - roof), (-0.1, -0.02))),
        (THIRD, polygon((0.02, -0.02), (0.02, 0.1 - roof), (front - 0.15, 0.1 - roof), (front + 0.05, -0.02))),
        (MAIN, polygon((-1, 0), (0.85, -0.02), (1, 0.12), (1, 0.42), (-1, 0.42))),
        (DETAIL, ellipse(0.9, 0.14, 0.1)),
        *[
            (paint, ellipse(x, 0.42, radius))
            for x in (-0.55, 0.55)
            for paint, radius in ((SECOND, wheel), (DETAIL, 0.1))
        ],
    ]


def boat(rng: np.random.Generator) -> list[Part]:
    mast, bow, sail, hull = rng.uniform([1.1, 0.75, 0.55, 0.3], [1.4, 0.95, 0.75, 0.42])
    return [
        (DETAIL, limb(0.09, (0, 0.1), (0, -mast))),
        (SECOND, polygon((0.06, -mast + 0.15), (0.06, -0.12), (sail, -0.12))),
        (THIRD, polygon((-0.06, -mast + 0.3), (-0.06, -0.12), (-sail * 0.75, -0.12))),
        (MAIN, polygon((-0.75, 0), (bow, 0), (0.5, hull), (-0.55, hull))),
        (DETAIL, limb(0.08, (-0.65, 0.1), (0.75, 0.1))),
        (DETAIL, polygon((0, -mast - 0.02), (-0.28, -mast + 0.08), (0, -mast + 0.18))),
    ]


def airplane(rng: np.random.Generator) -> list[Part]:
    sweep, span, width, tail = rng.uniform([0.25, 0.75, 0.14, 0.28], [0.55, 1.0, 0.19, 0.4])
    parts = []
    for side in (-1, 1):
        tip = side * span
        parts += [
            (SECOND, polygon((0.25, 0), (0.2 - sweep, tip), (-0.02 - sweep, tip), (-0.2, 0))),
            (THIRD, polygon((-0.65, 0), (-0.9, side * tail), (-1.05, side * tail), (-0.92, 0))),
            (DETAIL, ellipse(0.12 - 0.4 * sweep, 0.48 * tip, 0.15, 0.07)),
        ]
    windows = [(DETAIL, ellipse(x, 0, 0.06)) for x in (-0.4, -0.15, 0.1, 0.35)]
    return [*parts, (MAIN, ellipse(0, 0, 1, width)), (THIRD, ellipse(0.75, 0, 0.12, 0.6 * width)), *windows]


def flower(rng: np.random.Generator) -> list[Part]:
    petal, reach, bend, leaf = rng.uniform([0.17, 0.32, -0.15, 0.3], [0.22, 0.42, 0.15, 0.42])
    count = rng.integers(5, 8)
    angles = np.arange(count) * 2 * np.pi / count + rng.uniform(0, 2 * np.pi)
    return [
        (SECOND, limb(0.1, (0, -0.3), (bend, 0.4), (0, 1.1))),
        (SECOND, ellipse(-leaf, 0.55, leaf, 0.13, 0.5)),
        (SECOND, ellipse(leaf, 0.68, leaf, 0.13, -0.5)),
        *[(MAIN, ellipse(reach * np.cos(a), reach * np.sin(a) - 0.4, 0.26, petal * 5 / count, a)) for a in angles],
        (DETAIL, ellipse(0, -0.4, 0.18)),
    ]


def fir(rng: np.random.Generator) -> list[Part]:
    width, narrow, trunk = rng.uniform([0.6, 0.72, 0.09], [0.85, 0.85, 0.14])
    tiers = []
    for tier, bottom in enumerate((0.7, 0.2, -0.3)):
        reach = width * narrow**tier
        tiers.append(
            (MAIN if tier % 2 == 0 else THIRD, polygon((-reach, bottom), (reach, bottom), (0, bottom - 0.75)))
        )
    return [
        (SECOND, box(-trunk, 0.6, trunk, 1.1)),
        *tiers,
        *[(DETAIL, ellipse(x * width, y, 0.08)) for x, y in ((-0.4, 0.55), (0.45, 0.5), (0, 0.05), (-0.1, -0.5))],
    ]


def cactus(rng: np.random.Generator) -> list[Part]:
    left, right, arm, rise = rng.uniform([0.0, -0.3, 0.45, 0.4], [0.3, 0.1, 0.6, 0.6])
    return [
        *[
            (
                THIRD,
                limb(0.22, (0, y), (side * arm, y), (side * (arm + 0.03), y - 0.05), (side * (arm + 0.03), y - rise)),
            )
            for side, y in ((-1, left), (1, right))
        ],
        (MAIN, box(-0.21, -0.8, 0.21, 0.7)),
        (MAIN, ellipse(0, -0.8, 0.21)),
        (SECOND, polygon((-0.45, 0.6), (0.45, 0.6), (0.33, 1.05), (-0.33, 1.05))),
        (DETAIL, ellipse(0, -1, 0.14)),
        *[(DETAIL, ellipse(x, y, 0.05)) for x, y in ((-0.08, -0.55), (0.08, -0.2), (-0.08, 0.15), (0.08, 0.45))],
    ]


def house(rng: np.random.Generator) -> list[Part]:
    width, roof, eaves, door = rng.uniform([0.65, 0.5, 0.1, -0.1], [0.85, 0.75, 0.22, 0.1])
    return [
        (THIRD, box(0.35 * width, -roof, 0.65 * width, 0)),
        (MAIN, box(-width, 0, width, 0.9)),
        (SECOND, polygon((-width - eaves, 0.02), (0, -roof), (width + eaves, 0.02))),
        (THIRD, box(door - 0.14, 0.4, door + 0.14, 0.9)),
        *[(DETAIL, box(x - 0.14, 0.2, x + 0.14, 0.5)) for x in (door - 0.42, door + 0.42)],
    ]


def castle(rng: np.random.Generator) -> list[Part]:
    tower, height, wall = rng.uniform([0.24, 0.6, -0.1], [0.3, 0.9, 0.2])
    parts = [(MAIN, box(-0.7, wall, 0.7, 0.8))]
    parts += [(MAIN, box(x - 0.09, wall - 0.16, x + 0.09, wall)) for x in (-0.28, 0, 0.28)]
    for x in (-0.7, 0.7):
        parts.append((SECOND, box(x - tower, -height, x + tower, 0.8)))
        parts += [
            (SECOND, box(x + k * tower - 0.09, -height - 0.2, x + k * tower + 0.09, -height)) for k in (-0.7, 0.7)
        ]
        parts.append((DETAIL, box(x - 0.08, -height + 0.2, x + 0.08, -height + 0.5)))
    return [*parts, (THIRD, ellipse(0, 0.42, 0.2)), (THIRD, box(-0.2, 0.42, 0.2, 0.8))]


def windmill(rng: np.random.Generator) -> list[Part]:
    top, base, blade, turn = rng.uniform([0.2, 0.38, 0.75, 0], [0.28, 0.5, 0.95, np.pi / 2])
    sail = polygon((0.08, -0.03), (blade, -0.03), (blade, 0.24), (0.2, 0.24))
    return [
        (MAIN, polygon((-top, -0.3), (top, -0.3), (base, 1.1), (-base, 1.1))),
        (SECOND, polygon((-top - 0.08, -0.3), (0, -0.65), (top + 0.08, -0.3))),
        (DETAIL, box(-0.12, 0.75, 0.12, 1.1)),
        (DETAIL, box(-0.1, 0.25, 0.1, 0.45)),
        *[(THIRD, rotate(sail, turn + k * np.pi / 2) + (0, -0.3)) for k in range(4)],
        (DETAIL, ellipse(0, -0.3, 0.1)),
    ]


FAMILY_DRAWINGS: dict[str, tuple[Callable[[np.random.Generator], list[Part]], ...]] = {
    "creature": (bird, fish, spider),
    "vehicle": (car, boat, airplane),
    "plant": (flower, fir, cactus),
    "building": (house, castle, windmill),
}
