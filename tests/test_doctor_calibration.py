"""Stored runs, ill and healthy by their encoders, are told apart by their logs; and how the calibration counts."""

import json
from pathlib import Path

import pytest
import torch

from trainers.doctor_calibration import compact, format_verdicts, logged, truth, verdicts
from trainers.doctor_trials import trial_recipe, trials

STORED = Path(__file__).resolve().parents[1] / "docs/results/doctor_calibration.json"


def test_stored_logs_hold_what_the_doctor_reads():
    for run in json.loads(STORED.read_text()):
        assert {"step", "loss", "loss_variance", "feature_std", "rankme"} <= run["history"].keys()


# runs that became something else than they were made to be, see docs/doctor.md
OTHERWISE = {"cjepa_scenes", "vicreg_covariance_0"}


def test_no_stored_run_is_mistaken():
    rows = [row for row in verdicts(json.loads(STORED.read_text())) if row["truth"] and row["name"] not in OTHERWISE]
    assert sum(row["truth"] == "ill" for row in rows) >= 30 and sum(row["truth"] == "healthy" for row in rows) >= 15
    assert [row for row in rows if row["is_ill"] != (row["truth"] == "ill")] == []
    assert [row for row in rows if row["truth"] == "healthy" and row["alarm"]] == []


@pytest.mark.parametrize("name", trials())
def test_every_run_can_be_built(name):
    recipe = trial_recipe(name, 3, "a/copy", "unused")
    on_scenes = "scenes" in name
    assert recipe.data.dataset == ("scenes" if on_scenes else "a/copy") and recipe.training["seed"] == 3
    torch.manual_seed(0)
    assert recipe.objective.build_model(recipe.model, "sdpa").num_parameters() < 6e6


def encoder(knn: float, rankme: float = 20.0, feature_std: float = 0.5) -> dict:
    chance = {"knn": 25.0, "rankme": 4.0, "feature_std": 0.1, "dim": 32}
    return {"knn": knn, "rankme": rankme, "feature_std": feature_std, "dim": 32, "random": chance}


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([encoder(28.1)], "healthy"),
        ([encoder(27.0)], None),
        ([encoder(25.9)], "ill"),
        ([encoder(35.0, rankme=1.9)], "ill"),
        ([encoder(35.0, rankme=3.9)], None),
        ([encoder(35.0, feature_std=0.009)], "ill"),
        ([encoder(35.0), encoder(24.0)], "ill"),
        ([encoder(35.0), encoder(27.0)], None),
    ],
)
def test_the_truth_is_that_of_the_encoders(levels, expected):
    assert truth(levels) == expected


def test_a_log_is_kept_in_short():
    log = [
        {"step": 1, "loss": 0.123456, "rankme": 2.0, "loss_level1_variance": 0.5, "images_per_second": 7.0},
        {"step": 20, "loss": float("nan"), "rankme": 3.0, "loss_level1_variance": 0.4, "images_per_second": 7.0},
        {"train_runtime": 3.0},
    ]
    assert logged(compact(log)) == [
        {"step": 1, "loss": 0.1235, "rankme": 2.0, "loss_level1_variance": 0.5},
        {"step": 20, "loss": None, "rankme": 3.0, "loss_level1_variance": 0.4},
    ]


def test_the_table_counts_mistakes():
    log = [{"step": 20 * n, "loss": 1.0, "rankme": 2.0 + n, "feature_std": 0.1 + n / 10} for n in range(8)]
    runs = [
        {"name": "good", "seed": 1, "facts": {}, "history": compact(log), "encoders": [encoder(40.0)]},
        {"name": "bad", "seed": 1, "facts": {}, "history": compact(log), "encoders": [encoder(20.0)]},
        {"name": "odd", "seed": 1, "facts": {}, "history": compact(log), "encoders": [encoder(27.0)]},
    ]
    assert format_verdicts(runs).endswith("1 ill, 1 healthy, 1 neither and left out; 1 mistaken: bad 1.")
