"""The pictures of `cjepa benchmark`: bars of medians with their quartiles, and shares of a whole as one bar."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from trainers.errors import InputError
from trainers.files import make_place, save_figure, user_path, write_json
from trainers.reports import machine_facts, software_facts

_DPI = 160
_WIDTH = 7.2
# inches of a bar, and of a panel's title and axis
_BAR, _FRAME = 0.34, 0.85
_COLUMNS = 3  # of the legend of shares
_COLORS = (
    "#7f7f7f", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#8c564b", "#17becf", "#e377c2", "#bcbd22", "#393b79",
)  # fmt: skip


@dataclass
class Bars:
    """
    A panel of one bar for each thing that was measured.

    Args:
        title (`str`): What is written above.
        unit (`str`): Of the values, below their axis.
        values (`dict`): By what each is called `low`, `median` and `high`, or a number without a spread.
    """

    title: str
    unit: str
    values: dict[str, dict[str, float] | float]


@dataclass
class Shares:
    """
    A panel of one bar, cut into the parts of a whole.

    Args:
        title (`str`): What is written above.
        shares (`dict[str, float]`): By what each is called; they add up to 1.
    """

    title: str
    shares: dict[str, float]


def write_costs(output: str, found: dict | list, panels: Sequence[Bars | Shares]):
    """
    Writes what was measured, and a picture of it beside.

    Args:
        output (`str`): The JSON file; the picture has the same name with `.png`. Of a link its file is written.
        found (`dict` or `list`): The measurements; a list is written as `rows`, and the facts of machine and software
            beside.
        panels (`Sequence` of [`Bars`] or [`Shares`]): What is drawn, from the top.
    """
    json_file, picture = _places(user_path(output, "--output"))
    facts = {"machine": machine_facts(), "software": software_facts()}
    write_json(json_file, (found if isinstance(found, dict) else {"rows": found}) | facts)
    draw_costs(panels, picture)


def check_output(output: str | None):
    """Refuses, before anything is measured, a file that its picture would replace, or that cannot be written."""
    if output is None:
        return
    path = user_path(output, "--output")
    if path.suffix.lower() == ".png" or os.path.isdir(path):
        raise InputError(f"--output {output} is no JSON file; name one, such as cost.json; a PNG goes beside it.")
    for place in _places(path):
        # a pipe or a device would be replaced by a file
        if os.path.lexists(place) and not place.is_file():
            raise InputError(f"--output {output}: {place} is there and is no file; name another.")
        make_place(place, "--output")


def _places(path: Path) -> list[Path]:
    """Where the figures and their picture are written: what is a link stays one."""
    return [Path(os.path.realpath(file)) for file in (path, path.with_suffix(".png"))]


def draw_costs(panels: Sequence[Bars | Shares], path: Path):
    """
    Draws panels below each other.

    Args:
        panels (`Sequence` of [`Bars`] or [`Shares`]): From the top.
        path (`Path`): The PNG to write.
    """
    sizes = [len(panel.values) if isinstance(panel, Bars) else _share_lines(panel) for panel in panels]
    heights = [_FRAME + _BAR * size for size in sizes]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        axes.set_title(panel.title, fontsize=10, loc="left", parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        (_draw_bars if isinstance(panel, Bars) else _draw_shares)(axes, panel)
    save_figure(figure, path, _DPI)


def _draw_bars(axes, panel: Bars):
    rows = [value if isinstance(value, dict) else dict.fromkeys(("low", "median", "high"), value)
            for value in panel.values.values()]  # fmt: skip
    longest = max(row["high"] for row in rows)
    for place, row in enumerate(rows):
        spread = [[row["median"] - row["low"]], [row["high"] - row["median"]]]
        axes.barh(place, row["median"], color=_COLORS[place % len(_COLORS)], height=0.7)
        if row["high"] > row["low"]:
            axes.errorbar(row["median"], place, xerr=spread, color="black", capsize=3, linewidth=1)
        axes.text(row["high"] + 0.015 * longest, place, _number(row["median"]), va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), list(panel.values), parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * longest)
    axes.set_xlabel(panel.unit, fontsize=8, parse_math=False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share_lines(panel: Shares) -> float:
    """How high a bar of shares is with the legend below it, in bars."""
    return 1 + 0.55 * -(-len(panel.shares) // _COLUMNS)


def _draw_shares(axes, panel: Shares):
    start = 0.0
    for place, (name, share) in enumerate(panel.shares.items()):
        color = _COLORS[place % len(_COLORS)]
        axes.barh(0, share, left=start, height=1, color=color, edgecolor="white", label=f"{name} {share:.1%}")
        start += share
    axes.set_xlim(0, 1)
    axes.set_ylim(0.5 - _share_lines(panel), 0.5)
    axes.set_axis_off()
    spacing = {"handlelength": 1.2, "columnspacing": 1, "borderaxespad": 0}
    axes.legend(loc="lower left", ncols=_COLUMNS, fontsize=8, frameon=False, **spacing)
