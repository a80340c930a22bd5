"""The curve of a figure of a run's log: its best, what is left of it, and whether it has sunk."""

import math

# of the largest so far: features that were lost are there again only with as much
RECOVERED = 0.9


class Curve:
    """The finite values of a figure, and whether the last one logged was finite."""

    def __init__(self, entries: list[dict], key: str):
        logged = [(entry.get("step", 0), entry[key]) for entry in entries if key in entry]
        self.points = [(step, value) for step, value in logged if _is_finite(value)]
        self.is_broken = bool(logged) and not _is_finite(logged[-1][1])

    def __bool__(self) -> bool:
        return bool(self.points)

    def left(self, floor: float = 0.0) -> float:
        """What share of its highest value is left, both above a floor; 1 of a figure that was never above it."""
        return _share(self.last, self.highest()[1], floor)

    def has_sunk(self, share: float, since: int, floor: float = 0.0) -> bool:
        """
        Whether it has fallen below a share of its highest value so far, and not come back to it from there.

        Args:
            share (`float`): Of what is above the floor.
            since (`int`): Falls before this step do not count.
            floor (`float`): The lowest value that it can have.
        """
        highest, sunk = floor, False
        for step, value in self.points:
            highest = max(highest, value)
            left = _share(value, highest, floor)
            sunk = step >= since and (left < share or (sunk and left < RECOVERED))
        return sunk

    @property
    def first(self) -> float:
        """The first value."""
        return self.points[0][1]

    @property
    def last(self) -> float:
        """The last value."""
        return self.points[-1][1]

    def highest(self) -> tuple[int, float]:
        """Step and value of the highest point."""
        return max(self.points, key=lambda point: point[1])

    def lowest(self) -> tuple[int, float]:
        """Step and value of the lowest point."""
        return min(self.points, key=lambda point: point[1])

    def dip(self, step: int) -> str:
        """In words how low it was since a step, if it has risen by half from there."""
        lowest, value = min((p for p in self.points if p[0] >= step), key=lambda point: point[1])
        return f" (it was {value:.3g} at step {lowest})" if self.last > 1.5 * value else ""

    def at(self, step: int) -> float:
        """The value at a step, or at the last one before it; else the first one."""
        return [self.first, *(value for at, value in self.points if at <= step)][-1]


def _share(value: float, highest: float, floor: float) -> float:
    return (value - floor) / (highest - floor) if highest > floor else 1.0


def _is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
