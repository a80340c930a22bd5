"""Experiments as files: what a plan says, which mistakes are told, and that what is committed is what is shipped."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from experiments import digests, written
from PIL import Image, ImageChops, ImageStat

from trainers.cli import main
from trainers.cli_experiment import public_command
from trainers.errors import InputError
from trainers.experiment_differences import differences
from trainers.experiment_figures import draw_experiment
from trainers.experiment_file import read_experiment
from trainers.experiment_plan import choose_runs
from trainers.experiment_report import format_table
from trainers.experiment_results import summarise
from trainers.experiment_store import Found
from trainers.resources import experiment_names

ROOT = Path(__file__).resolve().parents[1]


def test_rows_say_if_images_are_others_than_the_files(tmp_path):
    given = written(tmp_path)
    for changes, told in (
        ({}, "scenes-64"), ({"dataset": "/there/scenes"}, "scenes-64"),
        ({"dataset": "/my/photos", "image_size": 64}, "scenes-64 (dataset photos, image_size 64)"),
    ):  # fmt: skip
        assert read_experiment(given, changes).dataset == told


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


def test_where_images_lie_makes_no_other_run(tmp_path):
    there, here, others = (
        digests(read_experiment(written(tmp_path), {"dataset": dataset, "decoded_cache": cache}))
        for dataset, cache in (("/there/cifar10", None), ("/here/cifar10", "cache"), ("/here/photos", None))
    )
    assert there == here and not set(here.values()) & set(others.values())
    assert len(set(here.values())) == 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"titel": "x"}, "unknown key 'titel' .did you mean 'title'"),
        ({"methods": None}, "'methods' is missing"),
        ({"methods": ["c-jepa"]}, "methods=.* is a list, not dict"),
        ({"methods": {"a/b": {}}}, "'a/b' cannot be a method's name"),
        ({"methods": {"raw pixels": {}}}, "'raw pixels' cannot be a method's name"),
        ({"methods": {"a": {}, "a, level 0": {}}}, "'a, level 0' would be taken for a row of another method's"),
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
    assert public_command(command) == "cjepa experiment cpu --dataset images --max_steps 5 --jobs=2"


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


def to_nine_digits(told):
    """What another machine's last digits cannot change."""
    return json.loads(json.dumps(told), parse_float=lambda text: f"{float(text):.9g}")


@pytest.mark.parametrize("name", MEASURED)
def test_committed_tables_and_pictures_are_those_of_the_committed_runs(name, tmp_path):
    """As the code makes them today: repeat the command with --results docs/results where they differ."""
    told, experiment = committed(name), read_experiment(name, {"dataset": "my/cifar10"})
    command = re.sub(" --seeds [0-9 ]*$", "", told["rows"][0]["command"])
    found = Found(told["runs"], told["failed"], told["pixels"])
    rows, less_first = summarise(experiment, found, command), differences(experiment, found.runs)
    assert told["title"] == experiment.title
    assert to_nine_digits([told["rows"], told["differences"]]) == to_nine_digits([rows, less_first])
    table = format_table(experiment, rows, less_first, found)
    assert (ROOT / f"docs/results/{name}.md").read_text() == table
    draw_experiment(experiment, found.runs, rows, tmp_path / "drawn.png")
    drawn, there = (Image.open(path) for path in (tmp_path / "drawn.png", ROOT / f"docs/results/{name}.png"))
    if drawn.info["Software"] == there.info["Software"]:  # another matplotlib draws other letters
        assert drawn.size == there.size
        assert ImageStat.Stat(ImageChops.difference(drawn.convert("L"), there.convert("L"))).mean[0] < 0.001


def test_all_committed_rows_are_in_one_file():
    rows = [row for name in MEASURED for row in committed(name)["rows"]]
    summary = committed("summary")
    assert len(summary) == len(rows) and all(row in rows for row in summary)


def test_the_script_for_one_gpu_runs_all_that_is_meant_for_it():
    (named,) = re.findall(r"^ *for name in (.*); do$", (ROOT / "scripts/experiments/gpu.sh").read_text(), re.MULTILINE)
    assert sorted(named.split()) == sorted(name for name in experiment_names() if name.startswith("gpu_"))


@pytest.mark.parametrize(("status", "num_begun"), [(0, 12), (2, 12), (130, 1)], ids=["done", "failed", "stopped"])
def test_the_script_for_one_gpu_ends_with_a_stop_and_not_with_a_failure(tmp_path, status, num_begun):
    (tmp_path / "cjepa").write_text(f'#!/bin/sh\necho "$2 $4" >> {tmp_path}/begun\nexit {status}\n')
    (tmp_path / "cjepa").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["sh", ROOT / "scripts/experiments/gpu.sh"], env=environment).returncode == status
    begun = (tmp_path / "begun").read_text().splitlines()
    assert len(set(begun)) == len(begun) == num_begun
    # of each experiment one seed before others have the second
    assert [line.split()[1] for line in begun] == [str(seed) for seed in (42, 43, 44) for _ in range(4)][:num_begun]
