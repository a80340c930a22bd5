"""Verdicts on logs: what is said of the shapes a run's curves can have, and what to change."""

import math

import pytest
from tiny import sjea_level, tiny_config

from modeling_cjepa import SJeaConfig
from trainers.doctor import COLLAPSED, DIMENSIONAL, DIVERGED, HEALTHY, NOT_LEARNING, TOO_SHORT, diagnose
from trainers.doctor_advice import run_settings

STEPS = 12


def history(level: int = 0, **curves) -> list[dict]:
    """A log every 20 steps whose figures go straight from one value to another, or stay."""
    prefix = f"level{level}_" if level else ""
    healthy = {"loss": (0.6, 0.3), "loss_prediction": (0.5, 0.2), "feature_std": (0.1, 0.5), "rankme": (2.5, 30.0)}
    entries = []
    for number in range(STEPS):
        share = number / (STEPS - 1)
        entry = {"step": 20 * number}
        for name, ends in (healthy | curves).items():
            kind = "loss_" if name.startswith("loss_") else ""
            key = name if name == "loss" else f"{kind}{prefix}{name.removeprefix(kind)}"
            first, last = ends if isinstance(ends, tuple) else (ends, ends)
            entry[key] = first + share * (last - first)
        entries.append(entry)
    return entries


def settings(training: dict | None = None, warmup_steps: float = 0, **config) -> dict:
    return run_settings(tiny_config(**config), training or {}, warmup_steps)


def test_a_healthy_run():
    diagnosis = diagnose(history(), settings())
    assert diagnosis.state == HEALTHY and not diagnosis.is_ill and diagnosis.advice == []
    assert diagnosis.step == 220 and "effective rank 2.5 -> 30 of 32" in diagnosis.sentences()[0]


def test_a_rising_loss_of_a_healthy_run_is_explained():
    log = history(loss_prediction=(0.5, 0.1)) + [
        entry | {"step": entry["step"] + 240, "feature_std": 0.5 + 0.01 * number}
        for number, entry in enumerate(history(loss_prediction=(0.1, 0.3), rankme=(30.0, 40.0)))
    ]
    diagnosis = diagnose(log)
    assert diagnosis.state == HEALTHY
    (sentence,) = [sentence for sentence in diagnosis.sentences() if "has risen" in sentence]
    assert "(0.1 -> 0.3)" in sentence and "0.5 -> 0.61" in sentence and "no sign of collapse" in sentence


def test_a_rank_that_was_never_high_is_told_and_no_alarm():
    few, enough = (diagnose(history(rankme=(2.6, last)), settings(hidden_size=384)) for last in (4.8, 20.0))
    assert few.state == enough.state == HEALTHY
    assert "effective rank 2.6 -> 4.8 of 384" in few.sentences()[0]
    assert "these are few directions" in few.sentences()[1]
    assert "few directions" not in " ".join(enough.sentences())


def test_shrunk_features():
    log = history(feature_std=(0.5, 0.01), loss_prediction=(0.5, 0.001), rankme=(6.0, 1.1))
    diagnosis = diagnose(log, settings({"ema_momentum": 0.0}, regularizer_weight=0.0))
    assert diagnosis.state == COLLAPSED and diagnosis.is_ill and diagnosis.levels[0].turned == 0
    assert "the loss fell (0.5 -> 0.001) because the features shrank" in diagnosis.sentences()[0]
    assert "from 0.5 to 0.01" in diagnosis.sentences()[0] and "in 220 steps" in diagnosis.sentences()[0]
    assert diagnosis.advice[0].startswith("--regularizer_weight 0.001 (is 0)")
    assert diagnosis.advice[1].startswith("--ema_momentum 0.996 (is 0)")


def test_what_the_regulariser_sees_has_shrunk():
    # batch norm keeps the embeddings as large as they were: only the expanded ones tell
    log = history(loss_variance=(0.6, 0.99), rankme=(40.0, 35.0))
    assert diagnose(log).state == COLLAPSED
    assert diagnose(history(loss_variance=(0.6, 0.8), rankme=(40.0, 35.0))).state == HEALTHY


def test_few_directions():
    diagnosis = diagnose(history(rankme=(41.0, 3.0)), settings())
    assert diagnosis.state == DIMENSIONAL
    assert "effective rank 41 -> 3 of 32 in 220 steps" in diagnosis.sentences()[0]
    assert diagnosis.advice[0].startswith("--regularizer_weight 0.003 (is 0.001)")


@pytest.mark.parametrize("value", [math.nan, None, math.inf])
def test_figures_that_are_not_finite(value):
    log = history()
    log[-1]["loss_prediction"] = value
    diagnosis = diagnose(log, settings({"learning_rate": 0.03}))
    assert diagnosis.state == DIVERGED and "step 220 is not finite" in diagnosis.sentences()[0]
    assert diagnosis.advice[0].startswith("--learning_rate 0.003 (is 0.03)")
    assert diagnosis.advice[1].startswith("--max_grad_norm")
    assert diagnose(log[:-1]).state == HEALTHY


def test_a_loss_that_grows_has_diverged():
    assert diagnose(history(loss_prediction=(0.5, 5.0))).state == DIVERGED


def test_embeddings_that_never_change():
    log = history(feature_std=(0.1, 0.102), rankme=(2.5, 2.5))
    log[0]["rankme"] = 2.0  # of one batch
    diagnosis = diagnose(log, settings({"ema_momentum": 1.0}))
    assert diagnosis.state == NOT_LEARNING and diagnosis.advice[0].startswith("--ema_momentum 0.996 (is 1)")
    # a slow target may not have moved yet
    assert diagnose(log, settings({"ema_momentum": 0.996})).state == HEALTHY
    assert diagnose(log, settings({"ema_momentum": 0.98})).state == NOT_LEARNING


def test_first_steps_raise_no_alarm():
    log = history(feature_std=(0.5, 0.01), rankme=(40.0, 1.1))
    assert diagnose([]).state == diagnose(log[:4]).state == TOO_SHORT
    assert diagnose(log, settings(warmup_steps=221)).state == TOO_SHORT
    assert diagnose(log, settings(warmup_steps=220)).state == COLLAPSED
    assert diagnose([{"step": 1, "loss": 1.0}, {"train_runtime": 3.0}]).state == TOO_SHORT


def test_a_stack_is_as_ill_as_its_worst_level():
    upper = history(1, feature_std=(0.5, 0.01), rankme=(6.0, 1.1))
    log = [first | second for first, second in zip(history(), upper, strict=True)]
    config = SJeaConfig(levels=[sjea_level(), sjea_level(variance_weight=0.0)])
    diagnosis = diagnose(log, run_settings(config, {"learning_rate": 1e-3}))
    assert [level.state for level in diagnosis.levels] == [HEALTHY, COLLAPSED] and diagnosis.state == COLLAPSED
    assert diagnosis.sentences()[1].startswith("level 1: ")
    assert diagnosis.advice == ["variance_weight: 25 in the entry of level 1 in levels (is 0): VICReg's own value"]


def test_advice_is_about_what_was_set():
    log = history(feature_std=(0.5, 0.01), rankme=(6.0, 1.1))
    assert diagnose(log).advice == []
    first = diagnose(log, settings(regularizer_weight=0.01, variance_weight=0.0)).advice[0]
    assert first.startswith("--variance_weight 25 (is 0)")
    last = diagnose(log, settings({"learning_rate": 0.015})).advice[-1]
    assert last.startswith("--learning_rate 0.0015 (is 0.015)")
    usual = run_settings(SJeaConfig(levels=[sjea_level()]), {"learning_rate": 1e-3})
    assert diagnose(log, usual).advice[0].startswith("--learning_rate 0.000333")
    upper = settings(upper_levels=[{"regularizer_weight": 0.0}], min_context_patches=8)
    log = [first | second for first, second in zip(history(), history(1, feature_std=(0.5, 0.01)), strict=True)]
    assert diagnose(log, upper).advice[0].startswith("regularizer_weight: 0.001 in the entry of level 1")


def test_figures_of_fewer_images_after_a_resume_are_passed_over():
    figures = {"loss": 1.0, "rankme": 40.0}
    log = [
        figures | {"step": 20 * n, "feature_std": 0.5 + n / 20, "monitored_images": min(64 * n, 256)}
        for n in range(1, 9)
    ]
    resumed = [entry | {"step": 160 + entry["step"], "rankme": 9.0} for entry in log[:2]]
    assert diagnose(log + resumed).state == HEALTHY
    assert diagnose(log + resumed).step == 160
    sunk = log + resumed + [log[-1] | {"step": 240, "rankme": 9.0}]
    assert diagnose(sunk).state == DIMENSIONAL


def monitored(log: list[dict], *numbers: int) -> list[dict]:
    return [entry | {"monitored_images": number} for entry, number in zip(log, numbers, strict=True)]


def test_other_batches_after_a_resume_do_not_blind_it():
    """2,046 images where 2,048 were watched before, by six processes in the place of four."""
    log = monitored(history(), *[2048] * 12)
    after = [entry | {"step": entry["step"] + 240} for entry in history(feature_std=(0.5, 0.01), rankme=(30.0, 1.1))]
    diagnosis = diagnose(log + monitored(after, 600, 1200, *[2046] * 10))
    assert diagnosis.state == COLLAPSED and diagnosis.step == 460 and diagnosis.note is None
    few = diagnose(log + monitored(after, *[512] * 12))
    assert few.state == HEALTHY and few.step == 220
    assert few.sentences()[-1] == "logs since step 220 are of too few images to be compared with those before"


def test_a_lower_number_of_images_begins_anew():
    facts = settings({"num_monitored_images": 64})
    before = monitored(history(feature_std=2.0, rankme=30.0), *[2048] * 12)
    after = [entry | {"step": entry["step"] + 240} for entry in history(feature_std=(0.5, 0.01), rankme=9.0)]
    diagnosis = diagnose(before + monitored(after, *[64] * 12), facts)
    assert diagnosis.state == COLLAPSED and "from 0.5 to 0.01" in diagnosis.sentences()[0]
    well = [entry | {"step": entry["step"] + 240} for entry in history(feature_std=(0.3, 0.35), rankme=(9.0, 12.0))]
    assert diagnose(before + monitored(well, *[64] * 12), facts).state == HEALTHY


def test_gaps_in_a_log_are_no_error():
    broken = [entry | {"feature_std": math.nan, "rankme": None} for entry in history()[:-1]] + history()[-1:]
    assert diagnose(broken).state == HEALTHY
    without_loss = [{name: value for name, value in entry.items() if "loss" not in name} for entry in history()]
    assert diagnose(without_loss).state == HEALTHY
    sunk = history(rankme=(20.0, 2.0))
    late = [{name: value for name, value in sunk[0].items() if "loss" not in name}] + sunk[1:]
    assert diagnose(late).state == DIMENSIONAL
    never = [{name: value for name, value in entry.items() if "loss" not in name} for entry in sunk]
    (sentence,) = diagnose(never).sentences()
    assert sentence.startswith("the features came to lie in few directions: effective rank 20 -> 2")


def test_what_was_lost_is_there_again_only_with_as_much():
    """An effective rank of 30 falls to 10 and rises again: at 20 it is not what it was, at 29 it is."""

    def fallen(*ranks, **facts):
        after = [entry for rank in ranks for entry in history(rankme=rank)[:4]]
        for number, entry in enumerate(after):
            entry["step"] = 240 + 20 * number
        return diagnose(history() + after, settings(**facts))

    sunk = fallen(10.0, 20.0)
    assert sunk.state == DIMENSIONAL and sunk.levels[0].turned == 220
    assert "effective rank 30 -> 20 of 32 (it was 10 at step 240)" in sunk.sentences()[0]
    assert fallen(10.0, 20.0, 29.0).state == HEALTHY
    assert fallen(20.0).state == HEALTHY
    assert fallen(10.0, 20.0, warmup_steps=301).state == HEALTHY
    assert fallen(10.0, 20.0, warmup_steps=300).state == DIMENSIONAL
