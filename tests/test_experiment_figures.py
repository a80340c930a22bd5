"""Pictures of experiments: that every line, point, cell and name is of its method, its metric and its place."""

import numpy as np
import pytest
from experiments import a_run, measured, of_400, written
from matplotlib.colors import to_hex
from PIL import Image

from trainers import experiment_figures
from trainers.experiment_figures import draw_experiment
from trainers.experiment_file import read_experiment
from trainers.experiment_results import summarise
from trainers.experiment_store import Found
from trainers.probes import mean_interval

PIXELS = measured(31.0)
SWEEP = {"ema_momentum": [0.0, 0.9], "learning_rate": [0.001, 0.01, 0.1]}
TITLES = {
    "knn": "kNN", "linear": "linear probe", "rankme": "effective rank", "lidar": "LiDAR", "feature_std": "spread",
}  # fmt: skip


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws an experiment, and gives its figure."""

    def draw(experiment, found, pixels=PIXELS):
        figures = []
        monkeypatch.setattr(experiment_figures, "save_figure", lambda figure, path, dpi: figures.append(figure))
        rows = summarise(experiment, Found(found, pixels=pixels), "")
        draw_experiment(experiment, found, rows, tmp_path / "drawn.png")
        (figure,) = figures
        assert figure.get_suptitle() == experiment.title == "With and without"
        return figure

    return draw


def panels(figure, *metrics):
    """The panels of a figure by metric, whose titles say so."""
    for axes, metric in zip(figure.axes, metrics, strict=True):
        assert axes.get_title().startswith(TITLES[metric])
    return dict(zip(metrics, figure.axes, strict=True))


def test_no_two_methods_have_the_same_line(tmp_path, drawn):
    found = [a_run(str(number), 1, 40.0) for number in range(15)]
    axes, _ = drawn(read_experiment(written(tmp_path, figure="curves")), found).axes
    looks = [(to_hex(line.get_color()), line.get_linestyle()) for line in axes.lines]
    assert len(set(looks)) == 15 + 1  # and that of pixels
    assert len({color for color, _ in looks}) == 12 + 1


def test_curves_are_means_over_seeds_with_bands(tmp_path, drawn):
    experiment = read_experiment(written(tmp_path, figure="curves"))
    found = [a_run("c-jepa", 1, 40.0, 30.0), a_run("c-jepa", 2, 46.0, 32.0), a_run("i-jepa", 1, 30.0, 20.0)]
    figure = drawn(experiment, found)
    (legend,) = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    names = {to_hex(line.get_color()): name for line, name in zip(legend.get_lines(), texts, strict=True)}
    for metric, axes in panels(figure, "knn", "linear").items():
        lines = {names[to_hex(line.get_color())]: line for line in axes.lines}
        of_two, of_one = lines["c-jepa"], lines["i-jepa"]
        # seeds of 1 and 2 minutes, from a random encoder on
        assert list(of_two.get_xdata()) == pytest.approx([0, 0.75, 1.5])
        assert list(of_two.get_ydata()) == [measured(value)[metric] for value in (10.0, 31.0, 43.0)]
        assert list(of_one.get_ydata()) == [measured(value)[metric] for value in (10.0, 20.0, 30.0)]
        assert set(lines["raw pixels"].get_ydata()) == {PIXELS[metric]} and len(lines) == 3
        (band,) = axes.collections
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)}
        for x, values in ((0.75, [30.0, 32.0]), (1.5, [40.0, 46.0])):
            ends = mean_interval([measured(value)[metric] for value in values])
            assert {(x, round(end, 6)) for end in ends} <= corners
        assert to_hex(band.get_facecolor()[0]) == to_hex(of_two.get_color())
    assert "bands are 95 % intervals" in legend.get_title().get_text()
    assert drawn(experiment, found[1:]).legends[0].get_title().get_text() == ""


def test_minutes_of_unlike_machines_are_not_compared(tmp_path, drawn):
    experiment = read_experiment(written(tmp_path, figure="curves"))
    found = [a_run("c-jepa", 1, 40.0), a_run("i-jepa", 1, 30.0)]
    for axes in drawn(experiment, found).axes:
        assert axes.get_xlabel().startswith("minutes") and list(axes.lines[0].get_xdata()) == [0.0, 1.0]
    found.append(a_run("i-jepa", 2, 30.0, machine={"processor": "Q", "threads": 2}))
    for axes in drawn(experiment, found).axes:
        assert axes.get_xlabel().startswith("images") and list(axes.lines[0].get_xdata()) == [0, 100]


def test_bars_are_of_the_rows(tmp_path, drawn):
    experiment = read_experiment(written(tmp_path, figure="bars"))
    figure = drawn(experiment, [a_run("c-jepa", 1, 40.0), a_run("i-jepa", 1, 30.0)])
    told = {"c-jepa": 40.0, "i-jepa": 30.0, "random encoder": 10.0, "raw pixels": 31.0}
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for metric, axes in panels(figure, "knn", "linear", "rankme").items():
        assert axes.yaxis_inverted() and list(axes.get_yticks()) == [0, 1, 2, 3]
        points = {names[line.get_ydata()[0]]: line for line in axes.lines if line.get_marker() == "o"}
        shown = [name for name in told if metric != "rankme" or name != "raw pixels"]
        values = {name: line.get_xdata()[0] for name, line in points.items()}
        assert values == {name: measured(told[name])[metric] for name in shown}
        ends = {names[line.get_ydata()[0]]: list(line.get_xdata()) for line in axes.lines if line.get_marker() != "o"}
        assert ends == ({name: of_400(value) for name, value in values.items()} if metric != "rankme" else {})
        is_gray = {name for name, line in points.items() if line.get_color() == "gray"}
        assert is_gray == {"random encoder", "raw pixels"} & set(shown)


def test_a_map_has_every_run_in_its_place(tmp_path, drawn):
    experiment = read_experiment(written(tmp_path, sweep=SWEEP, figure="map", seeds=[1]))
    runs = experiment.runs()
    told = {run.method: 40.0 + number for number, run in enumerate(runs)}
    missing = runs[-1].method  # one that failed, a hole in the map
    found = [a_run(run.method, 1, told[run.method]) for run in runs if run.method != missing]
    grid = np.array(drawn(experiment, found).axes).reshape(2, len(TITLES))
    for column, (metric, title) in enumerate(TITLES.items()):
        assert grid[0, column].get_title().startswith(title)
        assert grid[0, column].get_title().endswith(f"\nrandom encoder {measured(10.0)[metric]:.3g}")
        assert grid[1, column].get_xlabel() == "learning_rate"
        for line, method in enumerate(("c-jepa", "i-jepa")):
            axes = grid[line, column]
            ups, rights = (
                [float(label.get_text()) for label in labels]
                for labels in (axes.get_yticklabels(), axes.get_xticklabels())
            )
            assert (ups, rights) == ([0.9, 0.0], [0.001, 0.01, 0.1])  # the momentum goes up, the rate to the right
            cells = {text.get_position(): text.get_text() for text in axes.texts}
            colours = axes.images[0].get_array()
            for y, up in enumerate(ups):
                for x, right in enumerate(rights):
                    name = f"{method}, ema_momentum {up}, learning_rate {right}"
                    value = measured(told[name])[metric]
                    is_there = name != missing
                    assert colours[y, x] == value if is_there else colours[y, x] is np.ma.masked
                    assert cells.pop((x, y)) == (f"{value:.3g}" if is_there else "-")
            assert not cells
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["c-jepa\nema_momentum", "i-jepa\nema_momentum"]


@pytest.mark.parametrize("figure", ["bars", "curves", "map"])
def test_every_figure_is_written(tmp_path, figure):
    experiment = read_experiment(written(tmp_path, sweep=SWEEP, figure=figure))
    found = [a_run(run.method, run.seed, 40.0 + number, 35.0) for number, run in enumerate(experiment.runs())][:-1]
    rows = summarise(experiment, Found(found, pixels=PIXELS), "")
    draw_experiment(experiment, found, rows, tmp_path / "drawn.png")
    assert Image.open(tmp_path / "drawn.png").width > 500
