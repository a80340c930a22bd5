"""What the runs of an experiment say together: rows, table, and what is kept of earlier results."""

import json
import math
import re

import pytest
from experiments import a_run, digests, measured, written

from trainers.cli import main
from trainers.errors import InputError
from trainers.experiment_differences import differences, format_differences
from trainers.experiment_file import read_experiment
from trainers.experiment_report import report
from trainers.experiment_results import format_cell, format_rows, summarise
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
    for metric in ("knn", "linear", "rankme", "lidar", "feature_std"):
        assert rows["c-jepa", metric]["value"] == measured(42.0)[metric]
        assert rows["c-jepa", metric]["ci95"] == pytest.approx(
            mean_interval([measured(40.0)[metric], measured(44.0)[metric]])
        )
    assert rows["i-jepa", "linear"]["ci95"] == measured(30.0)["linear_interval"]


def test_a_metric_that_a_seed_lacks_has_no_row(tmp_path):
    experiment = read_experiment(written(tmp_path))
    found = [a_run("c-jepa", 1, 40.0), a_run("c-jepa", 2, 44.0)]
    found[1]["points"][-1]["rows"][0]["lidar"] = None
    metrics = {row["metric"] for row in summarise(experiment, Found(found), "") if row["method"] == "c-jepa"}
    assert metrics == {"knn", "linear", "rankme", "feature_std"}


def test_cells_have_the_digits_of_their_metric():
    for metric, value, ci95, cell in (
        ("knn", 42.04, [40.0, 44.0], "42.0 (40.0 to 44.0)"), ("feature_std", 0.0419, None, "0.042"),
        ("silhouette", -0.0123, [-0.02, 0.01], "-0.012 (-0.020 to 0.010)"),
        ("images_to_knn_38", 16704.0, None, "16,704"), ("minutes_to_knn_38", None, None, "not reached"),
    ):  # fmt: skip
        assert format_cell({"metric": metric, "value": value, "ci95": ci95}) == cell
    assert format_cell(None) == "-"


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
    found.append(a_run("i-jepa", 2, 30.0, machine={"processor": "Q", "threads": 2}))
    table = re.sub(" +", " ", format_rows(experiment, summarise(experiment, Found(found), "")))
    assert "; A: P, 2 threads; B: Q, 2 threads; commit" in table and "| minutes | machine | seeds |" in table
    assert "| 1.0 | A | 1 |" in table and "| 1.5 | A, B | 1, 2 |" in table


def test_differences_are_of_the_same_seed(tmp_path):
    experiment = read_experiment(written(tmp_path, seeds=[1, 2, 3]))
    # the means' intervals overlap, and yet the second method is better in each run
    found = [a_run("c-jepa", 1, 40.0), a_run("i-jepa", 1, 41.0), a_run("c-jepa", 2, 60.0), a_run("i-jepa", 2, 63.0)]
    found[3]["points"][-1]["rows"][0]["linear"] = 74.0
    (knn, linear) = differences(experiment, found)
    assert knn == {
        "method": "i-jepa", "less": "c-jepa", "metric": "knn", "value": 2.0, "seeds": [1, 2],
        "ci95": pytest.approx([2 - 12.706, 2 + 12.706], abs=1e-3),
    }  # fmt: skip
    assert (linear["metric"], linear["value"]) == ("linear", 2.5)
    assert "| i-jepa | 2.0 (-10.7 to 14.7) | 2.5 (-16.6 to 21.6) | 1, 2  |" in format_differences([knn, linear])
    assert "Less `c-jepa` of the same seed" in format_differences([knn, linear])
    # a seed that one of them lacks counts for nothing, and one seed has no interval
    assert differences(experiment, [*found, a_run("i-jepa", 3, 0.0)]) == [knn, linear]
    assert differences(experiment, found[:2]) == differences(experiment, found[1:2]) == []
    assert format_differences([]) == ""


def test_levels_and_encoders_have_differences_of_their_own(tmp_path):
    experiment, found = read_experiment(written(tmp_path)), []
    for seed in (1, 2, 3):
        found += [a_run("c-jepa", seed, 40.0), a_run("i-jepa", seed, 50.0)]
        for run in found[-2:]:
            (point,) = run["points"]
            point["rows"].append(point["rows"][0] | {"encoder": "context encoder", "knn": 45.0})
    values = {row["method"]: row["value"] for row in differences(experiment, found) if row["metric"] == "knn"}
    assert values == {"c-jepa, context encoder": 5.0, "i-jepa": 10.0, "i-jepa, context encoder": 5.0}
    # an encoder that one of the seeds lacks cannot be paired
    found[-1]["points"][0]["rows"].pop()
    assert {row["method"] for row in differences(experiment, found)} == {"c-jepa, context encoder", "i-jepa"}
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
