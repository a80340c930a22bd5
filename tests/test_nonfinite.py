"""Steps that are not finite: skipped whole, recorded, and the end of the run where there are too many."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nonfinite_worker import inject, run, weights_of
from safetensors.torch import load_file
from tiny import FLAGS, sjea_level
from training_worker import build_trainer
from transformers import TrainerCallback

from trainers.cli import main
from trainers.errors import InputError
from trainers.nonfinite import spoil_gradients

pytestmark = pytest.mark.usefixtures("few_penalties")

WORKER = Path(__file__).parent / "nonfinite_worker.py"
STACK = {"levels": [sjea_level(), sjea_level()]}
FIVE_STEPS = {"max_steps": 5, "per_device_train_batch_size": 8}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "nonfinite.jsonl").read_text().splitlines()]


def states(optimizer) -> list[torch.Tensor]:
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values()]


# the first skips on the device; the others are kept from stepping
SKIPS = [("adamw_torch_fused", "images"), ("adamw_torch_fused", "loss"), ("adamw_torch", "loss"), ("sgd", "images")]


@pytest.mark.parametrize(("optim", "where"), SKIPS)
@pytest.mark.parametrize("model", [{"regularizer_weight": 0.1}, STACK], ids=["cjepa", "sjea"])
def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path, model, optim, where):
    training = FIVE_STEPS | {"optim": optim, "model": model, "gradient_accumulation_steps": 2, "num_images": 96}
    if optim == "sgd":
        training |= {"learning_rate": 1e-4, "start_learning_rate": 1e-4}
    injected = {"where": where, "steps": [3], "ranks": [0]}
    skipped = run(str(tmp_path / "skipped"), training | {"inject": injected, "logging_steps": 5})
    expected = run(str(tmp_path / "expected"), training | {"undo": 3})
    for name, tensor in weights_of(expected).items():
        assert torch.equal(weights_of(skipped)[name], tensor), name
    for ours, theirs in zip(states(skipped.optimizer), states(expected.optimizer), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    check_log(skipped.state.log_history, expected.state.log_history)


def check_log(skipped: list[dict], expected: list[dict]):
    """The log of step 5 is the mean over steps 2, 4 and 5; that of step 1 stands alone."""
    last = skipped[1]
    assert last["step"] == 5 and last["skipped_steps"] == 1
    for name in {name for name in last if name.startswith("loss")}:
        assert last[name] == pytest.approx(sum(expected[step - 1][name] for step in (2, 4, 5)) / 3, rel=1e-5), name
    assert {"loss", "rankme", "feature_std"} <= last.keys() and all(map(math.isfinite, last.values()))
    mean = sum(expected[step - 1]["loss"] for step in (1, 2, 4, 5)) / 4
    assert skipped[-1]["train_loss"] == pytest.approx(mean, rel=1e-5)


def test_skipped_step_is_recorded(tmp_path):
    training = FIVE_STEPS | {"inject": {"where": "images", "steps": [2, 3], "ranks": [0]}, "max_skipped_steps": 2}
    trainer = run(str(tmp_path), training | {"gradient_accumulation_steps": 2, "num_images": 96})
    first, second = lines(tmp_path)
    assert (first["step"], second["step"]) == (2, 3) and first["rank"] == 0
    assert len(first["micro_batches"]) == 2 and first["grad_norm"] == "nan"
    names = ("loss", "prediction", "invariance", "variance", "covariance")
    assert all(batch[name] == "nan" for batch in first["micro_batches"] for name in names)
    # both steps were skipped: the weights are those of the first step
    assert first["weight_norms"] == pytest.approx(second["weight_norms"]) and second["weights_of_step"] == 2
    parts = {name for name, part in trainer.model.named_children() if list(part.parameters())}
    assert first["weight_norms"].keys() == parts
    entries = trainer.state.log_history
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 4, 5]
    assert [entry.get("skipped_steps") for entry in entries] == [None, 1, 1, None, None, 2]


def test_run_stops_after_too_many_in_a_row(tmp_path):
    training = FIVE_STEPS | {"save_strategy": "steps", "save_steps": 1, "max_skipped_steps": 1}
    run(str(tmp_path / "apart"), training | {"inject": {"where": "images", "steps": [2, 4], "ranks": [0]}})
    good = tmp_path / "run" / "checkpoint-1"
    with pytest.raises(InputError, match=f"step 4 is not finite, as of the 1 before.*last good one is {good}:"):
        run(str(tmp_path / "run"), training | {"inject": {"where": "images", "steps": [3, 4], "ranks": [0]}})
    training |= {"max_skipped_steps": 0, "optim": "adamw_torch_fused", "save_strategy": "no"}
    with pytest.raises(InputError, match="step 5 is not finite .*no good checkpoint.*start anew"):
        run(str(tmp_path / "first"), training | {"inject": {"where": "images", "steps": [5], "ranks": [0]}})
    assert [line["step"] for line in lines(tmp_path / "first")] == [5]


def test_the_last_good_checkpoint_stays_while_steps_are_skipped(tmp_path):
    """And records of a course that is left are not kept."""
    training = FIVE_STEPS | {
        "max_steps": 7, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_skipped_steps": 3
    }  # fmt: skip

    def spoiled(steps):
        return training | {"inject": {"where": "images", "steps": steps, "ranks": [0]}}

    with pytest.raises(
        InputError, match=f"step 6 is not finite.*last good one is {tmp_path / 'run' / 'checkpoint-1'}:"
    ):
        run(str(tmp_path / "run"), spoiled([3, 4, 5, 6]))
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-5"}
    trainer = build_trainer(str(tmp_path / "run"), {**training, "learning_rate": 1e-4})
    inject(trainer, "images", [6], [0])
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    # finite again, the limit holds
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-7"}
    assert [line["step"] for line in lines(tmp_path / "run")] == [6]


def test_a_checkpoint_whose_next_step_is_not_finite_is_the_last_resort(tmp_path):
    training = FIVE_STEPS | {
        "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_skipped_steps": 1,
        "inject": {"where": "images", "steps": [3, 4], "ranks": [0]},
    }  # fmt: skip
    with pytest.raises(InputError, match=f"step 4 is not finite.*last good one is {tmp_path / 'checkpoint-2'}:"):
        run(str(tmp_path), training)


def test_a_fused_optimizer_is_asked_one_step_later(tmp_path):
    training = FIVE_STEPS | {"max_skipped_steps": 0, "optim": "adamw_torch_fused"}
    trainer = build_trainer(str(tmp_path), training | {"logging_steps": 5, "logging_first_step": False})
    inject(trainer, "loss", [2], [0])
    with pytest.raises(InputError, match="step 2 is not finite"):
        trainer.train()
    assert trainer.state.global_step == 3 and lines(tmp_path)[0]["weights_of_step"] == 3


def test_command_says_why_it_ends(tmp_path, capsys):
    # the first step makes weights so large that all that follow overflow
    flags = ["--learning_rate", "1e30", "--start_learning_rate", "1e30", "--warmup_steps", "0", "--max_steps", "9"]
    flags += ["--max_skipped_steps", "2", "--output_dir", str(tmp_path / "run")]
    assert main(["pretrain", "cjepa_scenes", *FLAGS, *flags]) == 2
    (sentence,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("cjepa: "))
    assert "step 4 is not finite, as of the 2 before it, which were skipped (see" in sentence
    assert "nonfinite.jsonl" in sentence and "lower --learning_rate" in sentence
    assert [line["step"] for line in lines(tmp_path / "run")] == [2, 3, 4]
    assert not (tmp_path / "run" / "final").exists()


def test_a_run_says_how_many_steps_it_has_skipped(tmp_path, capsys):
    flags = ["--learning_rate", "1e30", "--start_learning_rate", "1e30", "--warmup_steps", "0", "--max_steps", "4"]
    flags += ["--max_skipped_steps", "9", "--output_dir", str(tmp_path / "run"), "--logging_steps", "2"]
    assert main(["pretrain", "cjepa_scenes", *FLAGS, *flags]) == 0
    assert f"3 of 4 steps were skipped, see {tmp_path / 'run' / 'nonfinite.jsonl'}." in capsys.readouterr().out
    final = tmp_path / "run" / "final"
    assert json.loads((final / "results.json").read_text())["training"]["skipped_steps"] == 3
    assert "\n3 steps were skipped, as their loss or gradient was not finite.\n" in (final / "README.md").read_text()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.predictor.mask_token.data[..., 0] = math.inf

    training = {"max_steps": 3, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
    trainer = build_trainer(str(tmp_path), training)
    trainer.add_callback(Break)
    with pytest.raises(InputError, match="weights of step 3 are not finite and are not saved.*checkpoint-2:"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("model", [{}, STACK], ids=["cjepa", "sjea"])
def test_two_processes_agree(tmp_path, model):
    training = FIVE_STEPS | {"model": model, "optim": "adamw_torch_fused"}
    runs = {where: training | {"inject": {"where": where, "steps": [3], "ranks": [1]}} for where in ("images", "loss")}
    runs["expected"] = training | {"undo": 3}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(WORKER), str(tmp_path), json.dumps(runs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    expected = load_file(tmp_path / "expected-0.safetensors")
    assert all(tensor.isfinite().all() for tensor in expected.values())
    for where in ("images", "loss"):
        for rank in (0, 1):
            weights = load_file(tmp_path / f"{where}-{rank}.safetensors")
            assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        first, second = lines(tmp_path / where)
        assert (first["rank"], second["rank"]) == (0, 1) and first["step"] == second["step"] == 3
        assert first["grad_norm"] == second["grad_norm"] == "nan"
    # of a loss that only one process could not compute, the other's is told, too
    assert isinstance(first["micro_batches"][0]["loss"], float) and second["micro_batches"][0]["loss"] == "inf"


def test_spoiled_gradients():
    x = torch.tensor([0.1, 2.0], requires_grad=True)
    loss = (x**3).sum()
    (expected,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(spoil_gradients(loss), loss)
    assert torch.equal(torch.autograd.grad(spoil_gradients(loss), x, retain_graph=True)[0], expected)
    assert torch.autograd.grad(spoil_gradients(loss + math.inf), x)[0].isnan().all()
