"""What the runs of an experiment say together: rows, table, pictures, and what is kept of earlier results."""

import json
import math
import re

import numpy as np
import pytest
from experiments import a_run, digests, of_400, written
from PIL import Image

from trainers.cli import main
from trainers.errors import InputError
from trainers.experiment_differences import differences, format_differences
from trainers.experiment_figures import _bars, _curves, _maps, draw_experiment
from trainers.experiment_file import read_experiment
from trainers.experiment_report import report
from trainers.experiment_results import format_rows, summarise
from trainers.experiment_runs import Call, settings_text
from trainers.experiment_store import Found, find, write_results
from trainers.probes import mean_interval


def test_interval_of_a_mean_is_students():
    values = [50.0, 52.0, 54.0]
    half = 4.302653 * 2.0 / math.sqrt(3)
    assert mean_interval(values) == pytest.approx([52 - half, 52 + half])
    assert mean_interval([50.0]) is None


def test_rows_are_means_over_seeds(tmp_path):
    experiment = read_experiment(written(tmp_path))
    found = [a_run("c-jepa", 1, 40.0), a_run("c-jepa", 2, 44.0), a_run("i-jepa", 1, 30.0)]
    rows = {(row["method"], row["metric"]): row for row in summarise(experiment, Found(found), "the command")}
    knn = rows["c-jepa", "knn"]
    assert knn["experiment"] == "small" and read_experiment("cpu_15min").label == "cpu-15min"
    assert knn["value"] == 42.0 and knn["ci95"] == pytest.approx(mean_interval([40.0, 44.0]))
    assert (knn["seeds"], knn["seconds"], knn["images_seen"]) == ([1, 2], 90.0, 100)
    assert (knn["machine"], knn["commit"], knn["command"]) == ("P, 2 threads", "c1, c2, e", "the command")
    assert rows["i-jepa", "knn"]["command"] == "the command --seeds 1"
    of_pixels = summarise(experiment, Found(found, pixels={"knn": 31.0}), "the command")[-1]
    assert of_pixels["method"] == "raw pixels" and of_pixels["command"] == "the command" and of_pixels["seeds"] == [1]
    found[1]["training"]["images_seen"] = 300
    assert summarise(experiment, Found(found), "")[0]["images_seen"] == 200
    low, high = rows["i-jepa", "knn"]["ci95"]
    assert low < 30 < high and high - low == pytest.approx(2 * 1.96 * 100 * math.sqrt(0.3 * 0.7 / 400), rel=0.05)
    assert rows["i-jepa", "rankme"]["ci95"] is None
    assert rows["c-jepa", "lidar"]["value"] == 3.0


def test_one_random_encoder_stands_for_all_methods_that_have_it(tmp_path):
    experiment = read_experiment(written(tmp_path))
    alike = [a_run("c-jepa", 1, 40.0), a_run("i-jepa", 1, 30.0)]
    methods = [row["method"] for row in summarise(experiment, Found(alike), "")]
    assert methods.count("random encoder") == methods.count("c-jepa") == 5
    later = [*alike, a_run("c-jepa", 2, 40.0, begin=11.0), a_run("without the first seed", 2, 40.0, begin=11.0)]
    assert [row["method"] for row in summarise(experiment, Found(later), "") if "random" in row["method"]][0] == (
        "random encoder"
    )
    unlike = [*alike, a_run("s-jea", 1, 30.0, begin=20.0)]
    named = {row["method"] for row in summarise(experiment, Found(unlike), "")}
    assert {"random encoder of c-jepa; i-jepa", "random encoder of s-jea"} <= named
    (untrained,) = [
        row for row in summarise(experiment, Found(later), "")
        if row["method"] == "random encoder" and row["metric"] == "knn"
    ]  # fmt: skip
    assert untrained["seeds"] == [1, 2] and untrained["value"] == 10.5  # of the method that has most seeds
    untrained = [row for row in summarise(experiment, Found(alike), "") if row["method"] == "random encoder"]
    assert {(row["images_seen"], row["seconds"]) for row in untrained} == {(0, 0.0)}


def test_an_accuracy_is_reached_where_an_evaluation_found_it(tmp_path):
    experiment = read_experiment(written(tmp_path, reach={"knn": 35.0}))
    found = [
        a_run("c-jepa", 1, 40.0, 20.0, 35.0), a_run("c-jepa", 2, 40.0, 20.0, 30.0),
        a_run("i-jepa", 1, 34.0), a_run("i-jepa", 2, 36.0),
    ]  # fmt: skip
    rows = summarise(experiment, Found(found), "")
    reached = {(row["method"], row["metric"]): row["value"] for row in rows if "_to_knn_35" in row["metric"]}
    # a seed of 1 minute at 200 of 300 images, one of 2 at the last
    assert reached["c-jepa", "images_to_knn_35"] == (200 + 300) / 2
    assert reached["c-jepa", "minutes_to_knn_35"] == pytest.approx((2 / 3 + 2) / 2)
    assert reached["i-jepa", "images_to_knn_35"] is reached["i-jepa", "minutes_to_knn_35"] is None
    table = format_rows(experiment, rows)
    assert "| images to 35 % knn | minutes to 35 % knn |" in re.sub(" +", " ", table)
    assert "| 250 |" in re.sub(" +", " ", table) and "not reached" in table


def test_minutes_of_unlike_machines_are_told_apart(tmp_path):
    experiment = read_experiment(written(tmp_path))
    found = [a_run("c-jepa", 1, 40.0), a_run("i-jepa", 1, 30.0)]
    table = format_rows(experiment, summarise(experiment, Found(found), ""))
    assert "; P, 2 threads; commit" in table and "machine" not in table
    (axes, _) = _curves(experiment, found, []).axes
    assert axes.get_xlabel().startswith("minutes") and list(axes.lines[0].get_xdata()) == [0.0, 1.0]
    found.append(a_run("i-jepa", 2, 30.0, machine={"processor": "Q", "threads": 2}))
    table = re.sub(" +", " ", format_rows(experiment, summarise(experiment, Found(found), "")))
    assert "; A: P, 2 threads; B: Q, 2 threads; commit" in table and "| minutes | machine | seeds |" in table
    assert "| 1.0 | A | 1 |" in table and "| 1.5 | A, B | 1, 2 |" in table
    (axes, _) = _curves(experiment, found, []).axes
    assert axes.get_xlabel().startswith("images") and list(axes.lines[0].get_xdata()) == [0, 100]


def test_differences_are_of_the_same_seed(tmp_path):
    experiment = read_experiment(written(tmp_path, seeds=[1, 2, 3]))
    # the means' intervals overlap, and yet the second method is better in each run
    found = [a_run("c-jepa", 1, 40.0), a_run("i-jepa", 1, 41.0), a_run("c-jepa", 2, 60.0), a_run("i-jepa", 2, 63.0)]
    (knn, linear) = differences(experiment, found)
    assert knn == {
        "method": "i-jepa", "less": "c-jepa", "metric": "knn", "value": 2.0, "seeds": [1, 2],
        "ci95": pytest.approx([2 - 12.706, 2 + 12.706], abs=1e-3),
    }  # fmt: skip
    assert (linear["metric"], linear["value"], linear["ci95"]) == ("linear", 0.0, [0.0, 0.0])
    assert "| i-jepa | 2.0 (-10.7 to 14.7) | 0.0 (0.0 to 0.0) | 1, 2  |" in format_differences([knn, linear])
    assert "Less `c-jepa` of the same seed" in format_differences([knn, linear])
    # a seed that one of them lacks counts for nothing, and one seed has no interval
    assert differences(experiment, [*found, a_run("i-jepa", 3, 0.0)]) == [knn, linear]
    assert differences(experiment, found[:2]) == differences(experiment, found[1:2]) == []
    assert format_differences([]) == ""


def test_levels_and_encoders_have_differences_of_their_own(tmp_path):
    experiment, found = read_experiment(written(tmp_path)), []
    for seed in (1, 2):
        found += [a_run("c-jepa", seed, 40.0), a_run("i-jepa", seed, 50.0)]
        for run in found[-2:]:
            (point,) = run["points"]
            point["rows"].append(point["rows"][0] | {"encoder": "context encoder", "knn": 45.0})
    values = {row["method"]: row["value"] for row in differences(experiment, found) if row["metric"] == "knn"}
    assert values == {"c-jepa, context encoder": 5.0, "i-jepa": 10.0, "i-jepa, context encoder": 5.0}
    sweep = read_experiment(written(tmp_path, sweep={"learning_rate": [0.1, 0.2]}))
    assert differences(sweep, found) == []


def test_skipped_steps_are_told(tmp_path):
    experiment = read_experiment(written(tmp_path))
    found = [a_run("c-jepa", 1, 40.0), a_run("i-jepa", 1, 30.0)]
    assert "skipped" not in format_rows(experiment, summarise(experiment, Found(found), ""))
    found[1]["training"]["skipped_steps"] = 5
    rows = summarise(experiment, Found(found), "")
    skipped = {row["method"]: row["value"] for row in rows if row["metric"] == "skipped_steps"}
    assert skipped == {"c-jepa": 0, "i-jepa": 50}


def test_results_of_runs_that_are_elsewhere_are_kept(tmp_path):
    experiment = read_experiment(written(tmp_path))
    (first, *_, last), asked = experiment.runs(), digests(experiment)
    there = Found(
        [a_run(*place, 40.0, asked=digest) for place, digest in asked.items()][:-1],
        [{"method": last.method, "seed": last.seed, "asked": asked[last.method, last.seed], "why": "It diverged."}],
        {"knn": 31.0},
    )
    write_results(tmp_path, experiment, [], [], "the table", there)
    here = tmp_path / "runs"
    assert find(experiment, here, tmp_path) == there and find(experiment, here) == Found()

    for run, name, told in (
        (first, "evaluation", a_run("c-jepa", 1, 50.0)), (last, "failure", {"method": "x", "seed": 0, "why": "here"}),
    ):  # fmt: skip
        (here / run.place).mkdir(parents=True)
        (here / run.place / f"{name}.json").write_text(json.dumps(told))
    (here / first.place / "settings.yaml").write_text(settings_text(experiment, first))
    found = find(experiment, here, tmp_path)
    assert [run["points"][-1]["rows"][0]["knn"] for run in found.runs] == [50.0, 40.0, 40.0]
    assert found.format_failures() == "- Failed: x, seed 0: here\n"

    # on other test images, or with other settings, they are of no use
    (here / first.place / "evaluation.json").write_text(
        json.dumps(a_run("c-jepa", 1, 50.0, images={"fingerprint": "b"}))
    )
    of_others = find(experiment, here, tmp_path)
    assert len(of_others.runs) == 1 and of_others.pixels is None
    assert find(read_experiment(written(tmp_path), {"max_steps": 5}), tmp_path / "none", tmp_path).runs == []


def test_figures_on_other_test_images_are_not_lost(tmp_path):
    given = written(tmp_path, baselines=False)
    experiment, here = read_experiment(given), tmp_path / "runs"
    earlier = [a_run(*place, 40.0, asked=digest) for place, digest in digests(experiment).items()]
    write_results(tmp_path, experiment, [], [], "the table", Found(earlier))
    before = {path.name: path.read_text() for path in tmp_path.glob("*.json")}
    first = experiment.runs()[0]
    (here / first.place).mkdir(parents=True)
    (here / first.place / "settings.yaml").write_text(settings_text(experiment, first))
    of_others = a_run("c-jepa", 1, 50.0, images={"fingerprint": "b"})
    (here / first.place / "evaluation.json").write_text(json.dumps(of_others))
    with pytest.raises(InputError, match="small.json has figures on other test images, and nothing was written there"):
        report(experiment, Call(given, {}, str(here), "the command"), tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.glob("*.json")} == before
    assert len(json.loads((here / "small.json").read_text())["runs"]) == 1


def test_figures_of_other_settings_are_named_before_new_ones_replace_them(tmp_path, monkeypatch, capsys):
    given = written(tmp_path)
    experiment = read_experiment(given)
    runs = [a_run(*place, 40.0, asked=digest) for place, digest in digests(experiment).items()]
    write_results(tmp_path, experiment, [], [], "the table", Found(runs))
    monkeypatch.setattr("trainers.experiment_runs.carry_out", lambda *_: [])
    arguments = ["experiment", given, "--output", str(tmp_path / "runs"), "--results", str(tmp_path)]
    assert main(arguments) == 0 and capsys.readouterr().err == ""
    changed = written(tmp_path, methods={"c-jepa": {}, "i-jepa": {"regularizer_weight": 0.0, "max_steps": 3}})
    assert main(["experiment", changed, *arguments[2:]]) == 0
    told = capsys.readouterr().err
    assert "small.json has figures of other settings than small has now (i-jepa, seed 1; i-jepa, seed 2)" in told


@pytest.mark.parametrize(("text", "words"), [("{", "summary.json is broken"), ("[1]", "is no list of rows")])
def test_a_broken_summary_is_not_replaced(tmp_path, text, words):
    experiment = read_experiment(written(tmp_path))
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(InputError, match=words):
        write_results(tmp_path, experiment, [], [], "", Found())
    assert (tmp_path / "summary.json").read_text() == text


def test_no_two_methods_have_the_same_line(tmp_path):
    found = [a_run(str(number), 1, 40.0) for number in range(12)]
    (axes, _) = _curves(read_experiment(written(tmp_path)), found, []).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12


def test_curves_are_means_over_seeds_with_bands(tmp_path):
    experiment = read_experiment(written(tmp_path))
    found = [a_run("c-jepa", 1, 40.0, 30.0), a_run("c-jepa", 2, 46.0, 32.0), a_run("i-jepa", 1, 30.0, 20.0)]
    figure = _curves(experiment, found, [])
    knn, _ = figure.axes
    of_two, of_one = knn.lines
    # seeds of 1 and 2 minutes, from a random encoder of 10 percent on
    assert list(of_two.get_xdata()) == pytest.approx([0, 0.75, 1.5]) and list(of_two.get_ydata()) == [10, 31, 43]
    assert list(of_one.get_ydata()) == [10, 20, 30]
    (band,) = knn.collections
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6)}
    for x, values in ((0.75, [30.0, 32.0]), (1.5, [40.0, 46.0])):
        assert {(x, round(end, 6)) for end in mean_interval(values)} <= corners
    assert "bands are 95 % intervals" in figure.legends[0].get_title().get_text()
    assert _curves(experiment, found[1:], []).legends[0].get_title().get_text() == ""


@pytest.mark.parametrize("figure", ["bars", "curves", "map"])
def test_every_figure_shows_what_it_is_given(tmp_path, figure):
    sweep = {"ema_momentum": [0.0, 0.9], "learning_rate": [0.001, 0.01]}
    experiment = read_experiment(written(tmp_path, sweep=sweep, figure=figure))
    found = [a_run(run.method, run.seed, 40.0 + number, 35.0) for number, run in enumerate(experiment.runs())]
    found = found[:-1]  # one that failed, a hole in the map
    pixels = {"knn": 30.0, "linear": 35.0, "rankme": 80.0, "feature_std": 0.2}
    rows = summarise(experiment, Found(found, pixels=pixels), "")
    draw_experiment(experiment, found, rows, tmp_path / "drawn.png")
    assert Image.open(tmp_path / "drawn.png").width > 500


def test_a_map_has_every_run_in_its_place(tmp_path):
    sweep = {"ema_momentum": [0.0, 0.9], "learning_rate": [0.001, 0.01, 0.1]}
    experiment = read_experiment(written(tmp_path, sweep=sweep, figure="map", seeds=[1]))
    runs = experiment.runs()
    found = [a_run(run.method, 1, 40.0 + number) for number, run in enumerate(runs)][:-1]
    rows = summarise(experiment, Found(found), "")
    (knn, *_), (of_second, *_) = np.array(_maps(experiment, found, rows).axes).reshape(2, -1)
    drawn = {  # the momentum goes up, the rate to the right
        (method, momentum, rate): axes.images[0].get_array()[row, column]
        for method, axes in (("c-jepa", knn), ("i-jepa", of_second))
        for row, momentum in enumerate((0.9, 0.0)) for column, rate in enumerate((0.001, 0.01, 0.1))
    }  # fmt: skip
    told = {run.method: 40.0 + number for number, run in enumerate(runs)}
    assert drawn.pop(("i-jepa", 0.9, 0.1)) is np.ma.masked
    for (method, momentum, rate), value in drawn.items():
        assert value == told[f"{method}, ema_momentum {momentum}, learning_rate {rate}"]
    assert "kNN" in knn.get_title() and of_second.get_ylabel().startswith("i-jepa")


def test_bars_are_of_the_rows(tmp_path):
    experiment = read_experiment(written(tmp_path))
    found = [a_run("c-jepa", 1, 40.0), a_run("i-jepa", 1, 30.0)]
    rows = summarise(experiment, Found(found), "")
    (knn, *_) = _bars(experiment, found, rows).axes
    points = {line.get_ydata()[0]: line.get_xdata()[0] for line in knn.lines if line.get_marker() == "o"}
    names = [label.get_text() for label in knn.get_yticklabels()]
    assert {names[place]: value for place, value in points.items()} == {
        "c-jepa": 40.0, "i-jepa": 30.0, "random encoder": 10.0,
    }  # fmt: skip
    ends = [list(line.get_xdata()) for line in knn.lines if line.get_marker() != "o"]
    assert ends[:2] == [of_400(40.0), of_400(30.0)]
