"""The cost of the training loop: bare steps that do what a trainer's do, turns without its saves, and the command."""

import signal

import pytest
import torch
from tiny import FLAGS
from training_worker import build_trainer

from trainers.cli import main, parse
from trainers.errors import InputError
from trainers.recipe_files import write_recipe
from trainers.recipes import read_recipe
from trainers.train_data import TrainLoader
from trainers.training_cost import _LooplessSteps, benchmark_training


def test_a_bare_step_is_a_step(tmp_path):
    training = {
        "max_steps": 1, "per_device_train_batch_size": 16, "warmup_steps": 0, "max_grad_norm": 0.01,
        "ema_momentum": 0.996,
    }  # fmt: skip
    trainer = build_trainer(str(tmp_path), training, {"regularizer_weight": 0.01}, num_images=16)
    first = next(iter(TrainLoader(trainer.make_train_data(), trainer.data_collator, trainer.args, 16, 0)))
    bare = _LooplessSteps(trainer)
    bare.batches = iter([{"pixel_values": first["pixel_values"]}])
    start = trainer.model.context_encoder.layernorm.bias.clone()
    trainer.state.max_steps = 1
    bare.step()
    trainer.train()
    for (name, one), other in zip(trainer.model.named_parameters(), bare.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, msg=lambda text, name=name: f"{name}: {text}")
    assert not torch.equal(start, trainer.model.context_encoder.layernorm.bias)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A recipe that takes seconds, alone in the current folder."""
    monkeypatch.chdir(tmp_path)
    sizes = {flag.removeprefix("--"): int(value) for flag, value in zip(FLAGS[:14:2], FLAGS[1:14:2], strict=True)}
    sizes |= {"logging_steps": 2, "num_train_images": 64, "num_eval_images": 16, "use_cpu": True}
    write_recipe(read_recipe("cjepa_scenes", sizes).values, path := tmp_path / "tiny.yaml")
    return path


def test_command_prints_a_table(tiny, capsys, tmp_path):
    assert main(["benchmark", "training", str(tiny), "--rounds", "2"]) == 0
    said = capsys.readouterr().out
    assert "| of the trainer " in said and "overhead" in said and "rounds of 2 steps" in said
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_what_a_signal_stops_is_no_measurement(tiny, monkeypatch):
    step = _LooplessSteps.step

    def interrupted(self):
        step(self)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(_LooplessSteps, "step", interrupted)
    with pytest.raises(InputError, match="Stopped at step 1 of 7: nothing was measured"):
        benchmark_training(read_recipe(tiny), num_rounds=2)


def test_too_few_rounds_are_refused():
    with pytest.raises(InputError, match="--rounds 1 must be 2 or more"):
        benchmark_training(read_recipe("cjepa_scenes"), num_rounds=1)


def test_each_part_has_its_own_flags(capsys):
    assert parse(["benchmark", "training"]).recipe == "cjepa_cifar10"
    with pytest.raises(SystemExit):
        parse(["benchmark", "masks", "--dataset", "scenes"])
    assert "'--dataset' is not known" in capsys.readouterr().err
