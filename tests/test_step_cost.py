"""The benchmark of a step compares the same function, and says so."""

import json
from functools import partial

import pytest
import torch
from tiny import SIZES as TINY
from tiny import tiny_model

from trainers import step_cost
from trainers.bare_steps import SIZES
from trainers.cli import main
from trainers.errors import InputError
from trainers.step_cost import RACERS, benchmark_step, format_step_cost


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY | {"predictor_num_attention_heads": 2})


def test_steps_of_all_and_shares_of_the_parts_of_ours(small):
    found = benchmark_step("small", batch_size=4, num_rounds=3, precision="float32")
    assert found["difference"] < 1e-5 and sum(found["parts"].values()) == pytest.approx(1)
    assert list(found["parts"]) == ["masks", "target encoder", "context encoder", "predictor", "prediction loss",
                                    "regulariser", "signs of collapse",
                                    "backward", "optimizer", "moving average"]  # fmt: skip
    for name in RACERS:
        assert found["seconds"][name]["low"] <= found["seconds"][name]["median"] <= found["seconds"][name]["high"]
    table = format_step_cost(found)
    assert all(title in table for title in RACERS.values()) and "float32" in table


def test_every_racer_takes_its_own_steps_on_the_same_masks(small, monkeypatch):
    race = step_cost._Race(SIZES["small"], 4, "float32", torch.device("cpu"), compile_mode=None)
    seen = {}
    for name, steps in race.racers.items():

        def take(images, *masks, name=name):
            seen[name] = (len(images), masks)

        monkeypatch.setattr(steps, "take", take)
    race.round()
    assert {name: number for name, (number, _) in seen.items()} == {
        "reference": 4, "ours": 4, "shared_context": 4, "mask_sets": 2,
    }  # fmt: skip
    assert len({id(ids) for _, masks in seen.values() for ids in masks}) == 2
    settings = [(steps.model.config.predictor_attention, steps.model.config.num_mask_sets)
                for name, steps in race.racers.items() if name != "reference"]  # fmt: skip
    assert settings == [("per_block", 1), ("shared_context", 1), ("shared_context", 2)]


@pytest.fixture
def of_known_speed(monkeypatch):
    """Rounds of a reference that takes 3 seconds, and of others that take 2, 1 and half of one."""
    seconds = dict(zip(RACERS, (3.0, 2.0, 1.0, 0.5), strict=True))
    monkeypatch.setattr(step_cost._Race, "round", lambda self: (6e7, seconds, 0.75, {"masks": 1.0, "backward": 3.0}))
    monkeypatch.setattr(step_cost, "matmul_rate", lambda device, precision: 1e9)


def test_factors_are_over_the_reference_s_time(small, of_known_speed):
    found = benchmark_step("small", 4, 2, "float32")
    assert {name: row["median"] for name, row in found["factor"].items()} == {
        "ours": 1.5, "shared_context": 3.0, "mask_sets": 6.0,
    }  # fmt: skip
    assert {name: row["median"] for name, row in found["factor_of_ours"].items()} == {
        "shared_context": 2.0, "mask_sets": 4.0,
    }  # fmt: skip
    assert found["parts"] == {"masks": 0.25, "backward": 0.75} and found["reference_masks"] == 0.25
    assert "drawn by a loop, are 25.0% of their step" in format_step_cost(found)


def test_masks_are_part_of_every_step(small, monkeypatch):
    race = step_cost._Race(SIZES["small"], 4, "float32", torch.device("cpu"), compile_mode=None)
    steps = []
    monkeypatch.setattr(step_cost, "loop_masks", lambda number, grid, generator: steps.append(("loop", number, grid)))
    draw = race.draw_masks
    monkeypatch.setattr(race, "draw_masks", lambda: steps.append("ours") or draw())
    monkeypatch.setattr(race, "take", steps.append)
    monkeypatch.setattr(race, "part_seconds", dict)
    monkeypatch.setattr(step_cost._Stopwatch, "seconds", lambda self: 1.0)
    _, seconds, loop, _ = race.round()
    assert steps == [
        ("loop", 4, 8), "reference", "ours", "ours", "ours", "shared_context", "ours", "mask_sets",
    ]  # fmt: skip
    assert loop == 1 and seconds == {"reference": 2, "ours": 1, "shared_context": 1, "mask_sets": 1}


def test_mfu_is_the_reference_s_work_over_what_the_device_multiplies(small, of_known_speed):
    found = benchmark_step("small", 4, 2, "float32")
    assert found["mfu"]["reference"]["median"] == 4 * 6e7 / 3 / 1e9 and found["mfu"]["ours"]["median"] == 0.12
    assert "0.06 GFLOP an image" in format_step_cost(found) and "| 12.0% |" in format_step_cost(found)


def test_memory_of_a_step_is_that_of_its_tensors(small, monkeypatch):
    monkeypatch.setattr(step_cost.ReferenceStep, "take", lambda self, *batch: torch.zeros(2**20).sum().item())
    found = benchmark_step("small", 4, 2, "float32")
    assert found["memory"]["reference"] == 2**22 + 4
    # of gradients alone, and no more than a step of so little can need
    gradients = sum(p.numel() * 4 for p in tiny_model(predictor_num_attention_heads=2).parameters() if p.requires_grad)
    assert gradients < found["memory"]["ours"] < 40 * gradients
    assert " 1.00 " in format_step_cost(found)


def test_compiled_steps_learn_the_same(small, monkeypatch):
    # without the kernels, which take minutes
    monkeypatch.setattr(step_cost.torch, "compile", partial(torch.compile, backend="aot_eager"))
    race, plain = (
        step_cost._Race(SIZES["small"] | {"predictor_num_hidden_layers": 1, "num_hidden_layers": 1}, 4, "float32",
                        torch.device("cpu"), mode) for mode in ("default", None)
    )  # fmt: skip
    plain.ours.model.load_state_dict(race.ours.model.state_dict())
    plain.images, plain.masks = race.images, race.masks
    for each in (race, plain):
        each.take("ours")
    assert race.ours.run is not race.ours.model
    for name, tensor in race.ours.model.state_dict().items():
        torch.testing.assert_close(tensor, plain.ours.model.state_dict()[name], atol=2e-4, rtol=0, msg=name)


def test_another_function_is_no_comparison(small, monkeypatch):
    loss = step_cost.ReferenceStep.loss
    monkeypatch.setattr(step_cost.ReferenceStep, "loss", lambda self, *inputs: 1.01 * loss(self, *inputs))
    with pytest.raises(InputError, match="it is no comparison"):
        benchmark_step("small", 4, 2, "float32")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--size", "huge"], "--size 'huge' is not known"), (["--rounds", "1"], "--rounds 1 2 or more"),
     (["--precision", "fp8"], "precision='fp8' is not known"),
     (["--compile", "fast"], "--compile 'fast' is not known")],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_sentence(arguments, sentence, capsys):
    assert main(["benchmark", "step", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_the_command_prints_and_writes(small, tmp_path, capsys):
    output = tmp_path / "step.json"
    flags = ["--size", "small", "--batch_size", "4", "--rounds", "2", "--output", str(output)]
    assert main(["benchmark", "step", *flags]) == 0
    assert json.loads(output.read_text())["threads"] == torch.get_num_threads()
    assert "times the speed" in capsys.readouterr().out
