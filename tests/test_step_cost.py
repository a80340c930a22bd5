"""The benchmark of a step compares the same function, and says so."""

import json

import pytest
import torch
from tiny import SIZES as TINY

from trainers import step_cost
from trainers.cli import main
from trainers.errors import InputError
from trainers.step_cost import SIZES, benchmark_step, format_step_cost


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY | {"predictor_num_attention_heads": 2})


def test_steps_of_both_and_shares_of_the_parts_of_ours(small):
    found = benchmark_step("small", batch_size=4, num_rounds=3, precision="float32")
    assert found["difference"] < 1e-5 and sum(found["parts"].values()) == pytest.approx(1)
    assert list(found["parts"]) == ["masks", "target encoder", "context encoder", "predictor", "loss and signs",
                                    "backward", "optimizer", "moving average"]  # fmt: skip
    assert all(found[name]["low"] <= found[name]["median"] <= found[name]["high"] for name in ("ours", "reference"))
    table = format_step_cost(found)
    assert f"{found['factor']['median']:.2f} times the speed" in table and "float32" in table


def test_the_factor_is_the_reference_s_time_over_ours(small, monkeypatch):
    monkeypatch.setattr(step_cost._Race, "reference_seconds", lambda self: 3.0)
    monkeypatch.setattr(step_cost._Race, "our_seconds", lambda self: 2.0)
    assert benchmark_step("small", 4, 2, "float32")["factor"]["median"] == 1.5


def test_mfu_is_the_reference_s_work_over_what_the_device_multiplies(small, monkeypatch):
    monkeypatch.setattr(step_cost._Race, "reference_seconds", lambda self: 3.0)
    monkeypatch.setattr(step_cost._Race, "our_seconds", lambda self: 2.0)
    monkeypatch.setattr(step_cost, "matmul_rate", lambda device, precision: 1e9)
    monkeypatch.setattr(step_cost, "model_flops", lambda config, *lengths: {"context encoder": 4e7, "predictor": 2e7})
    found = benchmark_step("small", 4, 2, "float32")
    assert found["mfu"]["reference"]["median"] == 4 * 6e7 / 3 / 1e9 and found["mfu"]["ours"]["median"] == 0.12
    assert "0.06 GFLOP an image of the authors' step, at 8.0% (8.0% - 8.0%) and 12.0%" in format_step_cost(found)


def test_another_function_is_no_comparison(small, monkeypatch):
    loss = step_cost.ReferenceStep.loss
    monkeypatch.setattr(step_cost.ReferenceStep, "loss", lambda self, *inputs: 1.01 * loss(self, *inputs))
    with pytest.raises(InputError, match="it is no comparison"):
        benchmark_step("small", 4, 2, "float32")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--size", "huge"], "--size 'huge' is not known"), (["--rounds", "1"], "must be 2 or more"),
     (["--precision", "fp8"], "--precision 'fp8' is not known")],
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
