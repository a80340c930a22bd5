"""Stops by signals and by the clock: the same step in all processes, a checkpoint, exit status 0, exact resume."""

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import FLAGS
from training_worker import build_trainer
from transformers import TrainerCallback

from trainers import stopping
from trainers.cli import main
from trainers.errors import InputError
from trainers.stopping import StopCallback, stopped_sentence

pytestmark = pytest.mark.usefixtures("few_penalties")

ROOT = Path(__file__).resolve().parent.parent
STEPS = 60
SCENES = ["cjepa_scenes", *FLAGS, "--max_steps", str(STEPS), "--save_strategy", "no", "--disable_tqdm"]


@contextmanager
def training(launcher: list[str], output: Path, *flags: str):
    """A run in a process group of its own that has printed the log of a step."""
    command = [*launcher, "scripts/pretrain.py", *SCENES, "--output_dir", str(output), *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"text": True, "stdout": subprocess.PIPE, "start_new_session": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
    try:
        assert any("'loss'" in line for line in process.stdout)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "final" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The weights of an uninterrupted run."""
    output = tmp_path_factory.mktemp("whole")
    assert main(["pretrain", *SCENES, "--output_dir", str(output)]) == 0
    return weights(output)


def test_sigterm_saves_and_the_resumed_run_is_bit_identical(tmp_path, whole):
    with training([sys.executable], tmp_path / "run") as process:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 0 < step < STEPS and not (tmp_path / "run" / "final").exists()
    sentence = f"stopped by SIGTERM at step {step} of {STEPS}; saved checkpoint-{step}; go on with"
    assert f"{sentence} --resume_from_checkpoint last\n" in rest
    flags = ["--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "last"]
    assert main(["pretrain", *SCENES, *flags]) == 0
    resumed = weights(tmp_path / "run")
    assert resumed.keys() == whole.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_the_whole_group_leaves_the_workers_alive(tmp_path, name):
    with training([sys.executable], tmp_path, "--dataloader_num_workers", "2") as process:
        workers = psutil.Process(process.pid).children()
        assert len(workers) >= 2
        os.killpg(process.pid, getattr(signal, name))
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"stopped by {name} at step" in rest
    # and they end with the run
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_the_workers_of_an_evaluation_outlive_a_signal_that_another_sends(tmp_path):
    trainer = build_trainer(str(tmp_path), {"dataloader_num_workers": 1, "per_device_eval_batch_size": 2})
    batches = iter(trainer.get_eval_dataloader(trainer.train_dataset))
    first = next(batches)
    (worker,) = multiprocessing.active_children()
    for name in ("TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    time.sleep(0.5)
    assert sum(len(batch["pixel_values"]) for batch in (first, *batches)) == len(trainer.train_dataset)


def test_two_processes_stop_at_the_same_step_when_one_is_told(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with training(launcher, tmp_path) as process:
        workers = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children()}
        workers["1"].send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=120)
    assert process.returncode == 0, rest
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert rest.count("stopped by SIGTERM at step") == 1 and f"saved {checkpoint.name};" in rest
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert f"checkpoint-{state['global_step']}" == checkpoint.name and state["global_step"] < STEPS


def test_a_budget_of_hours_stops_and_has_no_part_in_the_run(tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path), "--max_steps", "3"]
    assert main(["pretrain", *SCENES, *flags, "--max_hours", "1e-9"]) == 0
    assert "stopped by --max_hours 1e-09 at step 1 of 3; saved checkpoint-1;" in capsys.readouterr().out
    assert main(["pretrain", *SCENES, *flags, "--resume_from_checkpoint", "last", "--max_hours", "5"]) == 0
    assert "with other settings" not in capsys.readouterr().out and (tmp_path / "final").is_dir()


class Signal(TrainerCallback):
    """Sends the process SIGUSR1 in a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def stopped(output: Path, step: int):
    trainer = build_trainer(str(output), {"max_steps": 4, "per_device_train_batch_size": 8})
    trainer.add_callback(Signal(step))
    trainer.train()
    return trainer


def test_sigusr1_stops_and_handlers_are_put_back(tmp_path):
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    trainer = stopped(tmp_path, 2)
    assert trainer.stop.reason == "SIGUSR1" and trainer.state.global_step == 2
    assert stopped_sentence(trainer).startswith("stopped by SIGUSR1 at step 2 of 4; saved checkpoint-2;")
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    (tmp_path / "checkpoint-2").rename(tmp_path / "gone")
    with pytest.raises(InputError, match="stopped by SIGUSR1 at step 2 of 4, and .*checkpoint-2 could not be saved"):
        stopped_sentence(trainer)


def test_a_run_at_its_last_step_finishes(tmp_path):
    trainer = stopped(tmp_path, 4)
    assert trainer.stop.reason is None and trainer.state.global_step == 4 and not list(tmp_path.glob("checkpoint-*"))
    # another training by the same trainer is not stopped by what was said in the first
    assert stopped(tmp_path, 9).state.global_step == 4


class LateWriting(TrainerCallback):
    """Has the background write the second step's checkpoint only when all that follows a save at once is over."""

    def __init__(self, executor: ThreadPoolExecutor):
        self.executor, self.over = executor, threading.Event()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.executor.submit(self.over.wait)

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.over.set()


def test_a_stop_keeps_the_best_checkpoint(tmp_path):
    """The first step's is the best, and one may stay."""

    def run(folder, better):
        trainer = build_trainer(
            str(folder),
            {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 0.05, "save_strategy": "steps",
             "save_steps": 1, "save_total_limit": 1, "metric_for_best_model": "loss",
             "greater_is_better": better is max},
        )  # fmt: skip
        trainer.eval_dataset, trainer.args.load_best_model_at_end = trainer.train_dataset, True
        trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 1
        trainer.checkpoint_executor = ThreadPoolExecutor(1)
        for callback in (Signal(2), LateWriting(trainer.checkpoint_executor)):
            trainer.add_callback(callback)
        trainer.train()
        losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        return trainer, losses

    _, (first, second) = run(tmp_path / "try", min)
    trainer, _ = run(tmp_path / "run", min if first < second else max)
    assert trainer.stop.reason == "SIGUSR1" and trainer.state.best_global_step == 1 and first != second
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}


def test_handlers_are_put_back_after_an_error(tmp_path):
    trainer = build_trainer(str(tmp_path), {"max_steps": 2, "per_device_train_batch_size": 8})
    trainer.model.predictor.mask_token.data.fill_(math.nan)
    with pytest.raises(InputError, match="not finite"):
        trainer.train()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_training_outside_the_main_thread_takes_no_signals(tmp_path):
    trainer = build_trainer(str(tmp_path), {"max_steps": 2, "per_device_train_batch_size": 8})
    thread = threading.Thread(target=trainer.train)
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2 and trainer.stop.reason is None


def test_a_signal_sent_again_does_what_it_did_before(monkeypatch):
    caught = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    try:
        with StopCallback().watching():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR1)  # by a launcher that passes it on
            assert not caught
            monkeypatch.setattr(stopping, "_SECONDS_OF_ONE_SIGNAL", 0.0)
            time.sleep(0.001)
            signal.raise_signal(signal.SIGUSR1)
            assert caught == [signal.SIGUSR1]
            signal.raise_signal(signal.SIGUSR1)
        assert len(caught) == 2
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("hours", [0.0, -1.0, math.nan])
def test_hours_out_of_range_are_refused(tmp_path, hours):
    with pytest.raises(ValueError, match="max_hours=.* must be above 0"):
        build_trainer(str(tmp_path), {"max_hours": hours})
