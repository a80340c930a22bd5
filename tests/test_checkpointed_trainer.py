"""Checkpoints of a training run: what they hold, killed and failing saves, the background, sharded models, the Hub."""

import json
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from checkpoint_worker import DROPOUT, FullDisk, small_files
from safetensors.torch import load_file
from test_trainer_sjea import LEVELS
from torch import nn
from training_worker import build_trainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from trainers.checkpoint_files import broken_part
from trainers.errors import InputError
from trainers.optimizer_files import load_optimizer, optimizer_state, save_optimizer

WORKER = Path(__file__).parent / "checkpoint_worker.py"
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}


def trained(folder, model=None, callbacks=(), resume=None, **training):
    trainer = build_trainer(str(folder), TRAINING | training, model)
    for callback in callbacks:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def names(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def launch(task: str, output, processes: int = 2):
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = subprocess.run([*start, str(WORKER), task, str(output)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_checkpoint_holds_safetensors_and_json_alone(tmp_path):
    trainer = trained(tmp_path, max_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    assert [name for name in names(checkpoint) if not name.endswith("_cjepa.py")] == [
        "config.json", "manifest.json", "model.safetensors", "optimizer.json", "optimizer.safetensors",
        "preprocessor_config.json", "progress.json", "scheduler.json", "trainer_state.json",
    ]  # fmt: skip
    for path in checkpoint.glob("*.json"):
        json.loads(path.read_text())
    assert same(load_file(checkpoint / "model.safetensors"), trainer.model.state_dict())
    state = load_file(checkpoint / "optimizer.safetensors")
    for name, parameter in trainer.model.named_parameters():
        for key, tensor in trainer.optimizer.state.get(parameter, {}).items():
            assert torch.equal(state.pop(f"{name}/{key}"), tensor)
    assert state == {}
    groups = json.loads((checkpoint / "optimizer.json").read_text())["groups"]
    assert [group["decays"] for group in groups] == [True, False] and "predictor.mask_token" in groups[1]["params"]


@pytest.mark.parametrize(
    ("optim", "options"),
    [
        ("adamw_torch", None),
        ("adamw_torch_fused", None),
        ("sgd", "momentum=0.9"),
        ("adafactor", None),
        ("adagrad", None),
        ("rmsprop", "momentum=0.9"),
    ],
)
@pytest.mark.parametrize("levels", [None, LEVELS], ids=["cjepa", "channels last"])
def test_any_optimizer_goes_on_exactly(tmp_path, optim, options, levels):
    training = {"optim": optim, "optim_args": options, "weight_decay": 0.01, "max_steps": 4, "save_steps": 2}
    model = DROPOUT if levels is None else levels
    whole = trained(tmp_path, model, **training)
    torch.manual_seed(7)
    resumed = trained(tmp_path, model, resume=str(tmp_path / "checkpoint-2"), **training)
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    first, second = (optimizer_state(trainer.model, trainer.optimizer, True, False) for trainer in (whole, resumed))
    assert first[0] and same(first[0], second[0])
    assert json.loads(first[1]) == json.loads(second[1])


class Nested(torch.optim.SGD):
    """Keeps dictionaries in its state, as optimizers of quantised states do, and numbers."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] |= {"inside": {"deep": {"mean": parameter.detach() / 3}, "count": 0.1 + 0.2}}


def test_nested_state_and_numbers_come_back(tmp_path):
    model, again = nn.Linear(3, 2), nn.Linear(3, 2)
    optimizers = [Nested(module.parameters(), lr=0.1, momentum=0.5) for module in (model, again)]
    model(torch.ones(1, 3)).sum().backward()
    optimizers[0].step()
    save_optimizer(tmp_path, *optimizer_state(model, optimizers[0], True, False))
    load_optimizer(tmp_path, again, optimizers[1])
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        before, after = optimizers[0].state[one], optimizers[1].state[other]
        assert torch.equal(before["momentum_buffer"], after["momentum_buffer"])
        assert torch.equal(before["inside"]["deep"]["mean"], after["inside"]["deep"]["mean"])
        assert after["inside"]["count"] == 0.1 + 0.2


def test_states_that_cannot_be_saved_or_are_of_others_are_refused(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    optimizer.state[model.weight]["projector"] = object()
    with pytest.raises(InputError, match="state of SGD cannot be saved .*object.*choose another --optim"):
        optimizer_state(model, optimizer, True, False)
    del optimizer.state[model.weight]
    save_optimizer(tmp_path, *optimizer_state(model, optimizer, True, False))
    others = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
    with pytest.raises(InputError, match="of other groups of parameters"):
        load_optimizer(tmp_path, model, others)


def test_options_of_the_machine_and_of_the_run_are_its_own(tmp_path):
    model = nn.Linear(3, 2)
    saved = torch.optim.AdamW(model.parameters(), lr=0.25, betas=(0.5, 0.75), fused=True)
    model(torch.ones(1, 3)).sum().backward()
    saved.step()
    save_optimizer(tmp_path, *optimizer_state(model, saved, True, False))
    loaded = torch.optim.AdamW(model.parameters(), foreach=True, betas=(0.5, 0.875))
    load_optimizer(tmp_path, model, loaded)
    group = loaded.param_groups[0]
    assert (group["lr"], group["betas"], group["fused"], group["foreach"]) == (0.25, (0.5, 0.875), None, True)


def test_no_checkpoint_of_another_trainer_is_resumed_from(tmp_path):
    trainer = build_trainer(str(tmp_path / "ours"), TRAINING)
    arguments = TrainingArguments(
        str(tmp_path / "theirs"), max_steps=1, save_steps=1, per_device_train_batch_size=4, use_cpu=True
    )
    data = [{"pixel_values": image["pixel_values"].float()} for image in trainer.train_dataset]
    Trainer(trainer.model, arguments, train_dataset=data).train()
    checkpoint = str(tmp_path / "theirs" / "checkpoint-1")
    with pytest.raises(InputError, match="no manifest.json.*pickles such as optimizer.pt"):
        trainer.train(resume_from_checkpoint=checkpoint)
    with pytest.raises(InputError, match="holds no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(tmp_path):
    whole = trained(tmp_path / "whole", max_steps=3).model.state_dict()
    script = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_checkpointed_trainer import TRAINING, build_trainer\n"
        "import trainers.checkpointed_trainer as module\n"
        "trainer = build_trainer(sys.argv[1], TRAINING | {'max_steps': 3})\n"
        # a slow disk: what is killed is half a file of the optimizer's
        "save = module.save_optimizer\n"
        "def slow(folder, tensors, text):\n"
        "    save(folder, tensors, text)\n"
        "    if 'checkpoint-2' in folder.name:\n"
        "        file = folder / 'optimizer.safetensors'\n"
        "        file.write_bytes(file.read_bytes()[:5000])\n"
        "        print('half', flush=True)\n"
        "        import time; time.sleep(100)\n"
        "module.save_optimizer = slow\n"
        "trainer.train()\n"
    )
    root = WORKER.parent.parent
    run = [sys.executable, "-c", script, str(tmp_path / "killed")]
    with subprocess.Popen(run, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert any(line == "half\n" for line in child.stdout)
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert names(tmp_path / "killed") == [".checkpoint-2.unfinished", "checkpoint-1"]
    resumed = trained(tmp_path / "killed", resume=True, max_steps=3)
    assert same(resumed.model.state_dict(), whole)
    assert names(tmp_path / "killed") == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_full_disk_costs_one_checkpoint(tmp_path, capsys):
    trainer = trained(tmp_path, callbacks=[FullDisk(2)], save_total_limit=2)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The checkpoint")]
    assert len(said) == 1 and said[0].startswith("The checkpoint of step 2 could not be saved (")
    assert said[0].endswith("): training goes on; the last whole one is checkpoint-1.") and "large" in said[0]
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-4"] and trainer.save_error is None
    assert same(load_file(tmp_path / "checkpoint-4" / "model.safetensors"), trainer.model.state_dict())


def test_the_best_checkpoint_is_the_best_of_those_that_could_be_saved(tmp_path):
    """The best one's step, of the loss on the train images, has a full disk."""
    training = {"metric_for_best_model": "loss", "save_total_limit": 1, "learning_rate": 0.05}

    def run(folder, better, *full):
        trainer = build_trainer(str(folder), TRAINING | training | {"greater_is_better": better is max})
        trainer.eval_dataset, trainer.args.load_best_model_at_end = trainer.train_dataset, True
        trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 1
        trainer.add_callback(FullDisk(*full))
        trainer.train()
        return trainer, [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]

    _, losses = run(tmp_path / "whole", min)
    better = min if losses.index(min(losses)) < 3 else max
    full = losses.index(better(losses))
    assert full < 3 and len(set(losses)) == 4
    trainer, again = run(tmp_path / "full", better, full + 1)
    assert again == losses
    second = losses.index(better(losses[:full] + losses[full + 1 :])) + 1
    assert trainer.state.best_global_step == second
    assert same(
        load_file(tmp_path / "full" / f"checkpoint-{second}" / "model.safetensors"), trainer.model.state_dict()
    )
    assert names(tmp_path / "full") == sorted({f"checkpoint-{second}", "checkpoint-4"})


def test_a_full_disk_at_the_end_ends_the_run(tmp_path):
    with pytest.raises(InputError, match="step 4 could not be saved .*the last whole one is checkpoint-3. Make room"):
        trained(tmp_path, callbacks=[FullDisk(4)])
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert broken_part(tmp_path / "checkpoint-3") is None


def test_a_folder_that_cannot_be_written_costs_checkpoints_only(tmp_path, capsys):
    class Blocks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                Path(args.output_dir, ".checkpoint-1.unfinished").write_text("in the way")
            elif state.global_step == 1:
                Path(args.output_dir, ".checkpoint-1.unfinished").unlink()

    tmp_path.mkdir(exist_ok=True)
    trained(tmp_path, callbacks=[Blocks()])
    assert "training goes on; there is none yet." in capsys.readouterr().out
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


class Gate(TrainerCallback):
    """Saves in the first step only; the background writes when the third is over."""

    def __init__(self):
        self.opened, self.states = threading.Event(), []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        control.should_save = state.global_step == 1
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        moments, _ = optimizer_state(model, optimizer, True, True)
        self.states.append((weights, moments))
        if state.global_step == 3:
            assert names(args.output_dir) == [".checkpoint-1.unfinished"]
            self.opened.set()


@pytest.mark.parametrize("fails", [False, True])
def test_the_background_writes_the_step_it_was_asked_at(tmp_path, capsys, fails):
    trainer, gate = build_trainer(str(tmp_path), TRAINING | {"save_steps": 100}), Gate()
    trainer.checkpoint_executor = ThreadPoolExecutor(1)
    trainer.checkpoint_executor.submit(gate.opened.wait)
    trainer.add_callback(gate)
    if not fails:
        trainer.train()
        weights, moments = gate.states[0]
        assert not same(weights, gate.states[1][0]) and not same(moments, gate.states[1][1])
        assert broken_part(tmp_path / "checkpoint-1") is None
        assert same(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), weights)
        assert same(load_file(tmp_path / "checkpoint-1" / "optimizer.safetensors"), moments)
        assert json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
        return
    with small_files():
        trainer.train()
    assert "step 1 could not be saved" in capsys.readouterr().out and names(tmp_path) == []
    assert "large" in trainer.save_error


def test_checkpoints_of_multiples_stay(tmp_path):
    trained(tmp_path, max_steps=5, save_total_limit=1, keep_checkpoints_every=2)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    with pytest.raises(ValueError, match="keep_checkpoints_every=0 must be 1 or more"):
        build_trainer(str(tmp_path), {"keep_checkpoints_every": 0})


def test_a_sharded_run_is_saved_by_two_and_loaded_by_any(tmp_path):
    launch("sharded", tmp_path)
    launch("load_sharded", tmp_path, processes=1)
    for file in ("model.safetensors", "optimizer.safetensors"):
        saved, goal, two, one, goal_of_two, goal_of_one = (
            load_file(tmp_path / name / file) for name in ("saved", "goal", "loaded-2", "loaded-1", "goal-2", "goal-1")
        )
        assert same(two, saved) and same(one, saved) and not same(goal, saved)
        assert same(goal_of_two, goal)
        # means of gradients: Adam's steps magnify the rounding of those that vanish
        for name in (name for name in goal if name.endswith("/exp_avg")):
            torch.testing.assert_close(goal_of_one[name], goal[name], atol=1e-6, rtol=1e-4)
    texts = {(tmp_path / name / "optimizer.json").read_text() for name in ("saved", "loaded-2", "loaded-1")}
    assert len(texts) == 1


def test_two_processes_resume_exactly_and_agree_on_failures(tmp_path):
    (tmp_path / "resume").mkdir()
    said = launch("trainers", tmp_path)
    whole, resumed, other = (
        load_file(tmp_path / "resume" / f"{name}.safetensors") for name in ("whole-0", "resumed-0", "resumed-1")
    )
    assert same(whole, resumed) and same(resumed, other)
    assert said.count("The checkpoint of step 2 could not be saved") == 1
    assert names(tmp_path / "fail") == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    errors = [(tmp_path / "broken" / f"error-{rank}").read_text() for rank in (0, 1)]
    other = "InputError: The checkpoint of step 1 could not be saved (division by zero)."
    assert errors == ["ZeroDivisionError: division by zero", other] and names(tmp_path / "broken") == [
        "error-0",
        "error-1",
    ]
