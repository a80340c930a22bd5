"""`cjepa experiment`: several methods with several seeds, and what they say together."""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Timer

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import FLAGS, RESNET

from trainers.cli import main
from trainers.cli_experiment import public_command
from trainers.errors import InputError
from trainers.experiment_evaluation import _places
from trainers.experiment_figures import _bars, _curves, _maps, draw_experiment
from trainers.experiment_file import read_experiment
from trainers.experiment_plan import choose_runs
from trainers.experiment_processes import Processes
from trainers.experiment_report import report
from trainers.experiment_results import format_rows, summarise
from trainers.experiment_runs import Call, carry_out, carry_out_run, digest_of, settings_text
from trainers.experiment_runs import main as carry_out_told_run
from trainers.experiment_store import Found, find, write_results
from trainers.probes import accuracy_interval, mean_interval
from trainers.resources import experiment_names

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = dict(zip((flag[2:] for flag in FLAGS[:-1:2]), map(yaml.safe_load, FLAGS[1:-1:2]), strict=True))
SETTINGS |= {"use_cpu": True, "disable_tqdm": True, "max_steps": 4, "final_regularizer_weight": 0.0}
PLAN_ONLY_CJEPA = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "final_regularizer_weight",
    "predictor_hidden_size", "predictor_num_hidden_layers", "predictor_num_attention_heads",
)  # fmt: skip
PLAN = {
    "title": "With and without", "dataset": "scenes-64", "recipe": "cjepa_scenes", "seeds": [1, 2],
    "methods": {"c-jepa": {}, "i-jepa": {"regularizer_weight": 0.0}}, "settings": SETTINGS,
}  # fmt: skip


def written(folder, **changes):
    path = folder / "small.yaml"
    path.write_text(yaml.dump(PLAN | changes))
    return str(path)


def of_400(percent):
    """The interval of an accuracy on 400 images."""
    return list(accuracy_interval(round(4 * percent), 400))


def a_run(method, seed, knn, *earlier, linear=50.0, begin=10.0, **changes):
    """What was found of a run of 100 images between evaluations."""
    row = {"encoder": "", "linear": linear, "rankme": 9.0, "lidar": 3.0, "feature_std": 0.5}
    points = [
        {
            "step": 10 * at,
            "images_seen": 100 * at,
            "rows": [row | {"knn": value, "knn_interval": of_400(value)}],
        }
        for at, value in enumerate((*earlier, knn), start=1)
    ]
    return {
        "method": method, "seed": seed, "swept": {}, "images": {"fingerprint": "a"}, "points": points,
        "baselines": [row | {"knn": begin, "weights": f"{begin}, {seed}"}],
        "training": {"images_seen": points[-1]["images_seen"], "seconds": 60.0 * seed, "steps": points[-1]["step"],
                     "skipped_steps": 0},
        "machine": {"processor": "P", "threads": 2},
        "software": {"commit": f"c{seed}"}, "evaluated": {"commit": "e", "precision": "float32"},
    } | changes  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of an experiment that was carried out, and the results beside another one's."""
    folder = tmp_path_factory.mktemp("experiment")
    results = folder / "results"
    results.mkdir()
    (results / "summary.json").write_text(json.dumps([{"experiment": "another"}, {"experiment": "small", "value": 0}]))
    given = written(folder, num_checkpoints=2, context_encoder=True, figure="curves", reach={"knn": 0.5})
    arguments = ["experiment", given, "--output", str(folder / "runs"), "--results", str(results), "--jobs", "2"]
    assert main(arguments) == 0
    return folder, arguments


def test_every_method_is_trained_with_every_seed_and_evaluated_on_its_way(done):
    folder, _ = done
    for method in ("c-jepa", "i-jepa"):
        for seed in (1, 2):
            found = json.loads((folder / f"runs/{method}/seed-{seed}/evaluation.json").read_text())
            assert [point["step"] for point in found["points"]] == [2, 4]
            assert found["settings"]["seed"] == seed
            assert min(row["lidar"] for row in (*found["points"][-1]["rows"], *found["baselines"])) > 1
            encoders = [[row["encoder"] for row in point["rows"]] for point in found["points"]]
            assert encoders == [[""], ["", "context encoder"]]
    # both methods begin with the same encoder
    assert len(list((folder / "runs/random_encoders").iterdir())) == 2
    weights = {
        m: yaml.safe_load((folder / f"runs/{m}/seed-1/settings.yaml").read_text()) for m in ("c-jepa", "i-jepa")
    }
    assert weights["i-jepa"]["regularizer_weight"] == 0.0 != weights["c-jepa"]["regularizer_weight"]


def test_the_figures_are_those_of_cjepa_evaluate(done, tmp_path):
    folder, _ = done
    final = folder / "runs/c-jepa/seed-1/final"
    flags = ["--seed", "1", "--precision", "float32", "--disable_tqdm"]
    assert main(["evaluate", str(final), "--output", str(tmp_path / "own.json"), *flags]) == 0
    own = json.loads((tmp_path / "own.json").read_text())["rows"]
    found = json.loads((folder / "runs/c-jepa/seed-1/evaluation.json").read_text())
    for name in ("knn", "linear", "rankme"):
        assert found["points"][-1]["rows"][0][name] == own[0][name]
        assert found["baselines"][0][name] == own[1][name]
    pixels = json.loads((folder / "runs/raw_pixels.json").read_text())["row"]
    assert (pixels["knn"], pixels["linear"]) == (own[2]["knn"], own[2]["linear"])


def test_results_are_written_beside_those_of_others(done):
    folder, _ = done
    summary = json.loads((folder / "results/summary.json").read_text())
    assert [row["experiment"] for row in summary].count("another") == 1
    rows = [row for row in summary if row["experiment"] == "small"]
    assert {row["method"] for row in rows} == {
        "c-jepa", "c-jepa, context encoder", "i-jepa", "i-jepa, context encoder", "random encoder", "raw pixels",
    }  # fmt: skip
    row = next(row for row in rows if (row["method"], row["metric"]) == ("c-jepa", "knn"))
    assert row.keys() == {
        "experiment", "method", "dataset", "metric", "value", "ci95", "seeds", "images_seen", "seconds", "machine",
        "commit", "command",
    }  # fmt: skip
    assert row["seeds"] == [1, 2] and row["images_seen"] == 4 * 16 and row["seconds"] > 0
    assert row["command"].startswith("cjepa experiment") and str(folder) not in json.dumps(rows)
    assert "| c-jepa " in (folder / "results/small.md").read_text()
    assert Image.open(folder / "results/small.png").width > 500
    assert len(json.loads((folder / "results/small.json").read_text())["runs"]) == 4


def test_what_is_done_is_not_done_again(done, capsys):
    folder, arguments = done
    written_at = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/final/model.safetensors")}
    assert len(written_at) == 4
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in written_at} == written_at
    assert main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out.count("done  ") == 4


def test_what_was_done_is_told_after_an_interruption(done, tmp_path):
    """Without the evaluation of raw pixels, which takes its time; the next report has it."""
    folder, (_, given, *_) = done
    copied = tmp_path / "runs"
    shutil.copytree(folder / "runs", copied)
    (copied / "raw_pixels.json").unlink()
    (copied / "i-jepa/seed-2/evaluation.json").unlink()
    call, experiment = Call(given, {}, str(copied), "cjepa experiment small"), read_experiment(given)
    told = report(experiment, call, is_whole=False)
    assert "| c-jepa " in told and "| i-jepa " in told and "raw pixels" not in told
    assert not (copied / "raw_pixels.json").exists()
    assert len(json.loads((copied / "small.json").read_text())["runs"]) == 3
    assert "raw pixels" in report(experiment, call)


def test_a_run_with_other_settings_is_not_taken_for_done(done, capsys):
    _, arguments = done
    assert main([*arguments, "--max_steps", "5"]) == 2
    assert "holds a run with other settings than small has now" in capsys.readouterr().err


def test_results_of_runs_with_other_settings_are_not_mixed(done, tmp_path, capsys):
    folder, arguments = done
    copied = tmp_path / "runs"
    shutil.copytree(folder / "runs", copied)
    settings = copied / "i-jepa/seed-2/settings.yaml"
    settings.write_text(settings.read_text().replace("max_steps: 4", "max_steps: 3"))
    given = ["experiment", arguments[1], "--output", str(copied), "--methods", "c-jepa"]
    for command in (given, [*given[:-2], "--list"]):
        assert main(command) == 2
        assert "i-jepa/seed-2 holds a run with other settings" in capsys.readouterr().err
    settings.unlink()
    assert main(given) == 2


def test_a_checkpoint_between_two_evaluations_is_not_evaluated(tmp_path):
    for step in (2, 3, 4, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    names = [(place.name, step) for place, step in _places(tmp_path, 6, 3)]
    assert names == [("checkpoint-2", 2), ("checkpoint-4", 4), ("final", 6)]
    assert _places(tmp_path, 6, 1) == [(tmp_path / "final", 6)]


def test_levels_of_a_stack_are_rows_and_one_stands_for_the_method(tmp_path):
    level = {"backbone": RESNET, "stem": "small", "expander_sizes": [8, 8, 8]}
    stack = {"recipe": "sjea_cifar10", "levels": [level, level | {"input": "vector"}], "dataset": "scenes"}
    shared = {name: value for name, value in SETTINGS.items() if name not in PLAN_ONLY_CJEPA}
    given = written(tmp_path, recipe="sjea_cifar10", methods={"s-jea": stack}, seeds=[1], level="all",
                    settings=shared | {"max_steps": 2})  # fmt: skip
    assert main(["experiment", given, "--output", str(tmp_path / "runs")]) == 0
    rows = json.loads((tmp_path / "runs/small.json").read_text())["rows"]
    value = {(row["method"], row["metric"]): row["value"] for row in rows}
    assert {method for method, _ in value} == {
        "s-jea", "s-jea, level 0", "s-jea, level 1", "random encoder", "raw pixels",
    }  # fmt: skip
    (run,) = json.loads((tmp_path / "runs/small.json").read_text())["runs"]
    assert run["points"][-1]["rows"][0]["dim"] == 64  # both levels side by side
    assert str(tmp_path) not in (tmp_path / "runs/small.json").read_text()
    assert [point["step"] for point in run["points"]] == [2]


def test_a_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    given = written(tmp_path, num_checkpoints=2, baselines=False)
    experiment = read_experiment(given)
    call = Call(given, {}, str(tmp_path / "runs"), "cjepa experiment small")
    (run,) = choose_runs(experiment, ["c-jepa"], [1])

    asked = []

    def stopped(recipe):
        asked.append(recipe.values.get("resume_from_checkpoint"))
        (call.folder(run) / "checkpoint-2").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr("trainers.experiment_runs.pretrain", stopped)
    for _ in range(2):
        with pytest.raises(InputError, match="c-jepa, seed 1, was stopped; repeat the command"):
            carry_out_run(experiment, run, call)
    assert asked == [None, "last"]
    told = asdict(call) | {"method": run.method, "seed": run.seed, "folder": str(call.folder(run))}
    told["settings"] = (call.folder(run) / "settings.yaml").read_text()
    assert carry_out_told_run(json.dumps(told)) == 130  # which ends the experiment


def test_images_without_labels_are_refused_before_they_are_trained_on(tmp_path):
    for number in range(20):
        Image.new("RGB", (32, 32), (10 * number, 0, 0)).save(tmp_path / f"{number}.png")
    given = written(tmp_path, settings=SETTINGS | {"dataset": str(tmp_path)})
    experiment = read_experiment(given)
    run = experiment.runs()[0]
    call = Call(given, {}, str(tmp_path / "runs"), "cjepa experiment small")
    with pytest.raises(InputError, match="has no labels; say which with --label_column"):
        carry_out_run(experiment, run, call)
    assert not call.folder(run).exists()


def test_a_run_that_fails_does_not_keep_others_from_being_run(tmp_path, capfd):
    methods = {"any": {}, "bad": {"num_train_images": 3}, "can": {}}
    given = written(tmp_path, methods=methods, seeds=[1], baselines=False)
    assert main(["experiment", given, "--output", str(tmp_path / "runs")]) == 2
    told = capfd.readouterr()
    assert "bad, seed 1, ended with status 2, see above" in told.err
    for method in ("any", "can"):
        assert (tmp_path / f"runs/{method}/seed-1/evaluation.json").is_file()
    assert "The table is of the others; the same command tries these again" in told.err
    assert "fewer than the 16 of a batch" in told.err
    assert "| any " in told.out and "| bad " not in told.out
    assert re.search("- Failed: bad, seed 1: .*fewer than the 16 of a batch", told.out)

    # the same command tries again what failed
    assert main(["experiment", given, "--output", str(tmp_path / "runs")]) == 2
    told = capfd.readouterr()
    assert "bad, seed 1, ended with status 2" in told.err and "fewer than the 16 of a batch" in told.err
    assert "Failed: bad" in (tmp_path / "runs/small.md").read_text()


def test_what_ails_the_first_run_ends_the_experiment(tmp_path, capfd):
    given = written(tmp_path, methods={"bad": {"num_train_images": 3}, "good": {}}, baselines=False)
    assert main(["experiment", given, "--output", str(tmp_path / "runs")]) == 2
    told = capfd.readouterr()
    assert "bad, seed 1, ended with status 2, see above; what is done is kept" in told.err
    assert not (tmp_path / "runs/good").exists()
    assert "- Failed: bad, seed 1: " in told.out


@pytest.mark.parametrize(("status", "ends_all"), [(130, True), (-15, True), (-9, False), (1, False)])
def test_a_signal_to_stop_is_meant_for_all_runs(tmp_path, monkeypatch, status, ends_all):
    given = written(tmp_path)
    experiment, begun = read_experiment(given), []

    def run(self, command, **kwargs):
        begun.append(command)
        return status if len(begun) == 2 else 0

    monkeypatch.setattr(Processes, "run", run)
    call = Call(given, {}, str(tmp_path / "runs"), "cjepa experiment small")
    told = f"i-jepa, seed 1, ended with status {status}"
    if ends_all:
        with pytest.raises(InputError, match=f"{told}.*what is done is kept"):
            carry_out(experiment, experiment.runs(), call)
        assert len(begun) == 2
    else:
        (failure,) = carry_out(experiment, experiment.runs(), call)
        assert failure.startswith(told) and len(begun) == 4
        (failed,) = find(experiment, tmp_path / "runs").failed
        assert failed["method"] == "i-jepa" and failed["why"] == f"It ended with status {status} and gave no reason."


def test_a_signal_reaches_the_runs_under_way(tmp_path):
    begun = tmp_path / "begun"
    waits = (
        "import pathlib, signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(130)); "
        f"pathlib.Path({str(begun)!r}).touch(); time.sleep(60); sys.exit(1)"
    )
    processes, before = Processes(), signal.getsignal(signal.SIGUSR1)

    def send():
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    with processes.told_of_signals(), ThreadPoolExecutor(1) as pool:
        Timer(0, send).start()
        assert pool.submit(processes.run, [sys.executable, "-c", waits]).result(timeout=50) == 130
    assert processes.stopped.is_set() and signal.getsignal(signal.SIGUSR1) == before
    # one that began at the same moment
    assert processes.run([sys.executable, "-c", "import time; time.sleep(60)"]) == -signal.SIGTERM


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


def test_no_two_methods_have_the_same_line(tmp_path):
    found = [a_run(str(number), 1, 40.0) for number in range(12)]
    (axes, _) = _curves(read_experiment(written(tmp_path)), found, []).axes
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 12


def test_skipped_steps_are_told(tmp_path):
    experiment = read_experiment(written(tmp_path))
    found = [a_run("c-jepa", 1, 40.0), a_run("i-jepa", 1, 30.0)]
    assert "skipped" not in format_rows(experiment, summarise(experiment, Found(found), ""))
    found[1]["training"]["skipped_steps"] = 5
    rows = summarise(experiment, Found(found), "")
    skipped = {row["method"]: row["value"] for row in rows if row["metric"] == "skipped_steps"}
    assert skipped == {"c-jepa": 0, "i-jepa": 50}


def digests(experiment):
    return {(run.method, run.seed): digest_of(run, settings_text(experiment, run)) for run in experiment.runs()}


def test_results_of_runs_that_are_elsewhere_are_kept(tmp_path):
    experiment = read_experiment(written(tmp_path))
    (first, *_, last), asked = experiment.runs(), digests(experiment)
    there = Found(
        [a_run(*place, 40.0, asked=digest) for place, digest in asked.items()][:-1],
        [{"method": last.method, "seed": last.seed, "asked": asked[last.method, last.seed], "why": "It diverged."}],
        {"knn": 31.0},
    )
    write_results(tmp_path, experiment, [], "the table", there)
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


def test_where_images_lie_makes_no_other_run(tmp_path):
    there, here, others = (
        digests(read_experiment(written(tmp_path), {"dataset": dataset, "decoded_cache": cache}))
        for dataset, cache in (("/there/cifar10", None), ("/here/cifar10", "cache"), ("/here/photos", None))
    )
    assert there == here and not set(here.values()) & set(others.values())
    assert len(set(here.values())) == 4


def test_a_sweep_is_every_combination(tmp_path):
    experiment = read_experiment(
        written(tmp_path, sweep={"ema_momentum": [0.0, 0.9], "learning_rate": [0.001, 0.01, 0.1]}, seeds=[1])
    )
    runs = experiment.runs()
    assert len({run.place for run in runs}) == len(runs) == 2 * 6
    assert "i-jepa, ema_momentum 0.9, learning_rate 0.01" in [run.method for run in runs]
    assert all(run.settings["learning_rate"] == run.swept["learning_rate"] for run in runs)
    assert len(choose_runs(experiment, ["i-jepa"], None)) == 6

    for keys in ("ema_momentum, final_ema_momentum", "ema_momentum ,final_ema_momentum"):
        run = read_experiment(written(tmp_path, sweep={keys: [0.0, 0.9]})).runs()[-1]
        assert run.method == "i-jepa, ema_momentum 0.9"
        assert run.settings["ema_momentum"] == run.settings["final_ema_momentum"] == 0.9


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


@pytest.mark.parametrize(("text", "words"), [("{", "summary.json is broken"), ("[1]", "is no list of rows")])
def test_a_broken_summary_is_not_replaced(tmp_path, text, words):
    experiment = read_experiment(written(tmp_path))
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(InputError, match=words):
        write_results(tmp_path, experiment, [], "", Found())
    assert (tmp_path / "summary.json").read_text() == text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"titel": "x"}, "unknown key 'titel' .did you mean 'title'"),
        ({"methods": None}, "'methods' is missing"),
        ({"methods": ["c-jepa"]}, "methods=.* is a list, not dict"),
        ({"methods": {"a/b": {}}}, "'a/b' cannot be a method's name"),
        ({"methods": {"raw pixels": {}}}, "'raw pixels' cannot be a method's name"),
        ({"methods": {"a b": {}, "a_b": {}}}, "two runs are a_b/seed-1; give methods"),
        ({"methods": {"a": False}}, "a: False must be a mapping of keys"),
        ({"methods": {"a": {"recipe": 5}}}, "recipe=5 is a int, not str"),
        ({"methods": {"a": {"regularizer": "view"}}}, "small.yaml, a: regularizer='view' is not known"),
        ({"methods": {"a": {"save_steps": 5}}}, "num_checkpoints says at how many places"),
        ({"sweep": {"seed": [1, 2]}}, "seed is set for each run"),
        ({"sweep": {"ema_momentum, final_ema_momentum": [0.1], "ema_momentum": [0.2]}}, "has a key twice"),
        ({"sweep": {1: [1]}}, "must be keys of a recipe"),
        ({"sweep": {"regularizer_weight": [0.1]}}, "i-jepa: 'regularizer_weight' is swept, too; leave it out"),
        ({"reach": {"knn": "36"}}, "reach"),
        ({"context_encoder": "no"}, "context_encoder='no' is a str, not bool"),
        ({"level": "top"}, "level='top' is no level"),
        ({"seeds": [1, 1]}, "two runs are c-jepa/seed-1"),
        (
            {"methods": {"a": {"regularizer_wieght": 0.0}}},
            "yaml, a: its settings: unknown key 'regularizer_wieght'",
        ),
        ({"methods": {"a": {"seed": 3}}}, "seed is set for each run"),
        ({"settings": {"output_dir": "x"}}, "output_dir is set for each run"),
        ({"recipe": "nowhere"}, "no recipe 'nowhere'"),
        ({"seeds": []}, r"seeds=\[\] must be a list of numbers"),
        ({"seeds": 42}, "seeds=42 is a int, not list"),
        ({"sweep": {"ema_momentum": 0.5}}, "ema_momentum=0.5 must be a list of numbers"),
        ({"figure": "pie"}, "figure='pie' is not known"),
        ({"figure": "map"}, "a map has two swept keys"),
        ({"num_checkpoints": 0}, "num_checkpoints=0 must be a whole number"),
        ({"reach": {"top5": 50.0}}, "reach: 'top5' is not known; choose knn or linear"),
    ],
)
def test_a_mistake_in_an_experiment_is_told(tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        read_experiment(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--regularizer_weight", "0.1"], "is what runs of small differ in"),
        (["--seed", "1"], "--seed is set for each run of an experiment"),
        (["--methods", "cjepa"], "'cjepa' is not one of small .did you mean 'c-jepa'"),
        (["--seeds", "7"], "--seeds 7 is not one of small, which has"),
        (["--jobs", "0"], "--jobs 0 is too small"),
    ],
)
def test_a_mistake_on_the_command_line_is_told(tmp_path, capsys, flags, told):
    assert main(["experiment", written(tmp_path), *flags, "--list"]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_the_command_that_is_told_is_everybodys():
    command = ["experiment", "cpu", "--dataset", "/my/images", "--seeds", "1", "2", "--max_steps", "5", "--jobs=2"]
    assert public_command(command) == "cjepa experiment cpu --dataset images --max_steps 5"


@pytest.mark.parametrize("name", experiment_names())
def test_shipped_experiments_are_sound(name):
    assert len(read_experiment(name).runs()) >= 2


def committed(name):
    return json.loads((ROOT / f"docs/results/{name}.json").read_text())


MEASURED = [name for name in experiment_names() if (ROOT / f"docs/results/{name}.json").is_file()]


@pytest.mark.parametrize("name", MEASURED)
def test_committed_figures_are_of_the_settings_that_are_shipped(name):
    """Of another recipe, or another experiment, they would be: run it again, or take back what changed."""
    asked = digests(read_experiment(name, {"dataset": "my/cifar10"})).items()
    runs = committed(name)["runs"]
    assert {((run["method"], run["seed"]), run["asked"]) for run in runs} <= set(asked) and runs


def test_all_committed_rows_are_in_one_file():
    rows = [row for name in MEASURED for row in committed(name)["rows"]]
    summary = committed("summary")
    assert len(summary) == len(rows) and all(row in rows for row in summary)


def test_the_script_for_one_gpu_runs_all_that_is_meant_for_it():
    (named,) = re.findall(r"^for name in (.*); do$", (ROOT / "scripts/experiments/gpu.sh").read_text(), re.MULTILINE)
    assert sorted(named.split()) == sorted(name for name in experiment_names() if name.startswith("gpu_"))


def test_pretraining_is_not_evaluated_if_so_asked(tmp_path, capsys):
    given = ["--evaluate", "false", "--output_dir", str(tmp_path / "run")]
    assert main(["pretrain", "cjepa_scenes", *FLAGS, "--max_steps", "2", *given]) == 0
    assert "not evaluated: --evaluate false" in capsys.readouterr().out
    assert "evaluation" not in json.loads((tmp_path / "run/final/results.json").read_text())
