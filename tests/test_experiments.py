"""`cjepa experiment`: the runs of several methods with several seeds, one after another or side by side."""

import json
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from threading import Timer

import pytest
import yaml
from experiments import PLAN_ONLY_CJEPA, SETTINGS, written
from PIL import Image
from tiny import FLAGS, RESNET, tiny_model

from trainers.cli import main
from trainers.encoder_lidar import lidar_of_levels
from trainers.encoder_structure import structure_of_levels
from trainers.errors import InputError, Stopped
from trainers.experiment_evaluation import Images, _of_random, _places
from trainers.experiment_file import read_experiment
from trainers.experiment_plan import choose_runs
from trainers.experiment_processes import Processes
from trainers.experiment_report import report
from trainers.experiment_runs import Call, carry_out, carry_out_run
from trainers.experiment_runs import main as carry_out_told_run
from trainers.experiment_store import find
from trainers.loading import load_model


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of an experiment that was carried out, and the results beside another one's."""
    folder = tmp_path_factory.mktemp("experiment")
    results = folder / "results"
    results.mkdir()
    (results / "summary.json").write_text(
        json.dumps([{"experiment": "the other"}, {"experiment": "small", "value": 0}])
    )
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


def test_each_checkpoint_and_encoder_is_evaluated_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.experiment_runs.remove_checkpoints", lambda folder: None)
    given = written(tmp_path, num_checkpoints=2, context_encoder=True, methods={"c-jepa": {}}, seeds=[1])
    experiment = read_experiment(given)
    (run,) = experiment.runs()
    call = Call(given, {}, str(tmp_path / "runs"), "cjepa experiment small")
    carry_out_run(experiment, run, call)
    found = json.loads((call.folder(run) / "evaluation.json").read_text())
    flags = ["--seed", "1", "--precision", "float32", "--disable_tqdm", "--context_encoder"]
    for place, point in zip(("checkpoint-2", "final"), found["points"], strict=True):
        own = tmp_path / f"{place}.json"
        assert main(["evaluate", str(call.folder(run) / place), "--output", str(own), *flags]) == 0
        rows = json.loads(own.read_text())["rows"]
        for row, expected in zip(point["rows"], rows, strict=False):
            assert {name: row[name] for name in ("knn", "linear", "rankme", "feature_std")} == {
                name: expected[name] for name in ("knn", "linear", "rankme", "feature_std")
            }
    images = Images(run.read(tmp_path), (32, 32))
    _, test = images.sources
    model, settings = load_model(call.folder(run) / "final"), images.settings[2:]
    own, of_context = (
        lidar_of_levels(encoder, test, (32, 32), *settings)[0] for encoder in (model.cjepa, model.context_encoder)
    )
    assert [row["lidar"] for row in found["points"][-1]["rows"]] == [own, of_context] and own != of_context
    diagnosis = json.loads((call.folder(run) / "final/results.json").read_text())["diagnosis"]
    assert found["diagnosis"] == diagnosis["state"]
    ranks = [row["rankme"] for point in found["points"] for row in point["rows"]]
    assert len(set(ranks)) == 3  # after two steps, after four, and of the context encoder
    assert [point["images_seen"] for point in found["points"]] == [2 * 16, 4 * 16]


def test_classes_are_told_apart_where_it_is_asked_for(tmp_path):
    upper = {"upper_levels": [{}], "min_context_patches": 8}
    given = written(tmp_path, structure=True, num_checkpoints=2, level="all", methods={"stack": upper}, seeds=[1])
    experiment = read_experiment(given)
    (run,) = experiment.runs()
    call = Call(given, {}, str(tmp_path / "runs"), "cjepa experiment small")
    carry_out_run(experiment, run, call)
    found = json.loads((call.folder(run) / "evaluation.json").read_text())
    names = {"silhouette", "nmi", "coarse_silhouette", "coarse_nmi"}
    on_the_way, end = (point["rows"] for point in found["points"])
    assert not any(names & row.keys() for row in on_the_way) and all(names <= row.keys() for row in end)
    assert names <= found["baselines"][0].keys()
    images = Images(run.read(tmp_path), (32, 32))
    *_, test = images.sources
    _, dataset, *settings = images.settings
    model = load_model(call.folder(run) / "final").base_model
    *levels, both = structure_of_levels(model, test, dataset, *settings)
    assert [{name: row[name] for name in names} for row in end] == [both, *levels]
    assert "structure: true" in (call.folder(run) / "settings.yaml").read_text()
    table = report(experiment, call)
    assert "silhouette" in table and "Silhouette is of the classes" in table


def test_checkpoints_of_runs_that_are_done_are_removed(done):
    folder, _ = done
    assert len(list(folder.glob("runs/*/*/final"))) == 4 and not list(folder.glob("runs/*/*/checkpoint-*"))


def test_results_are_written_beside_those_of_others(done):
    folder, _ = done
    summary = json.loads((folder / "results/summary.json").read_text())
    assert [row["experiment"] for row in summary].count("the other") == 1
    assert [row["experiment"] for row in summary] == sorted(row["experiment"] for row in summary)
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


def test_the_level_that_is_asked_for_stands_for_a_stack(tmp_path):
    """Also of random encoders, whose rows are kept for all runs, whichever level these are asked for."""
    encoder = tiny_model(upper_levels=[{"hidden_size": 16}], min_context_patches=8).cjepa.eval()
    told = {}
    for level in ("all", 0, -1):
        experiment = read_experiment(written(tmp_path, level=level))
        images = Images(experiment.runs()[0].read(tmp_path), (32, 32))
        rows = _of_random(experiment, encoder, images, tmp_path / "random")
        told[level] = {row["encoder"]: (row["dim"], row["rankme"]) for row in rows}
    both, first, second = (told["all"][name] for name in ("", "level 0", "level 1"))
    assert len({both, first, second}) == 3 and both[0] == first[0] + second[0] == 32 + 16
    assert told[0] == {"": first, "level 1": second, "all levels": both}
    assert told[-1] == {"": second, "level 0": first, "all levels": both}


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
    methods = {"bad": {"num_train_images": 3}, "good": {}}
    given = written(tmp_path, methods=methods, seeds=[1], baselines=False)
    assert main(["experiment", given, "--output", str(tmp_path / "runs")]) == 2
    told = capfd.readouterr()
    assert "bad, seed 1, ended with status 2, see above; what is done is kept, and the same command" in told.err
    assert not (tmp_path / "runs/good").exists()
    assert "- Failed: bad, seed 1: " in told.out

    # and goes on, since it may be ill alone
    assert main(["experiment", given, "--output", str(tmp_path / "runs")]) == 2
    assert (tmp_path / "runs/good/seed-1/evaluation.json").is_file()


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
        with pytest.raises(Stopped, match=f"{told}.*what is done is kept"):
            carry_out(experiment, experiment.runs(), call)
        begun.clear()
        assert main(["experiment", given, "--output", call.output]) == 130
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


def test_pretraining_is_not_evaluated_if_so_asked(tmp_path, capsys):
    given = ["--evaluate", "false", "--output_dir", str(tmp_path / "run")]
    assert main(["pretrain", "cjepa_scenes", *FLAGS, "--max_steps", "2", *given]) == 0
    assert "not evaluated: --evaluate false" in capsys.readouterr().out
    assert "evaluation" not in json.loads((tmp_path / "run/final/results.json").read_text())
