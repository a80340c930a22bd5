"""Saves and loads checkpoints in several processes; started by torchrun or python in tests.

python tests/checkpoint_worker.py TASK OUTPUT
"""

import os
import resource
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from safetensors.torch import save_file  # noqa: E402
from tiny import images, tiny_model  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from training_worker import build_trainer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from trainers.errors import InputError  # noqa: E402
from trainers.optimizer_files import (  # noqa: E402
    host_state,
    load_optimizer,
    load_weights,
    optimizer_state,
    save_optimizer,
)
from trainers.processes import end_processes  # noqa: E402

TRAINING = {
    "max_steps": 4, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.2}


@contextmanager
def small_files(size: int = 100_000):
    """Files may not grow above a size, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class FullDisk(TrainerCallback):
    """In some steps no large file can be written."""

    def __init__(self, *steps: int):
        self.steps, self.limits = steps, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.limits = None
        if state.global_step + 1 in self.steps:
            self.limits = small_files()
            self.limits.__enter__()

    def on_save(self, args, state, control, **kwargs):
        if self.limits is not None:
            self.limits.__exit__(None, None, None)


def shard(model):
    """A model sharded over the processes by FSDP2, layer by layer."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (*model.cjepa.layers, *model.context_encoder.layers, *model.predictor.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def model_and_optimizer(sharded: bool, drawn: bool = False):
    """The tiny model, or one of other weights, and its optimizer, of two groups."""
    model = tiny_model(regularizer_weight=0.0)  # it would count the images of all processes
    if drawn:
        for parameter in model.parameters():
            parameter.data += 1
    model = shard(model) if sharded else model
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "decays": True},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0, "decays": False},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2)


def step(model, optimizer, seed: int):
    """A step on images that are the same in all processes."""
    context_ids, target_ids = model.sample_masks(4, (8, 8), torch.Generator().manual_seed(seed))
    model(images(4, seed=seed), context_ids, target_ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def save_sharded(output: str):
    """Trains sharded and saves; then goes on, and saves where that leads to."""
    model, optimizer = model_and_optimizer(sharded=True)
    is_main = dist.get_rank() == 0
    for seed in (1, 2):
        step(model, optimizer, seed)
    write(Path(output, "saved"), model, optimizer, is_main)
    step(model, optimizer, 3)
    write(Path(output, "goal"), model, optimizer, is_main)


def load_sharded(output: str):
    """Loads what was saved into other weights and a new optimizer, saves that, and goes on from it."""
    model, optimizer = model_and_optimizer(sharded=dist.is_initialized(), drawn=True)
    load_weights(Path(output, "saved"), model)
    load_optimizer(Path(output, "saved"), model, optimizer)
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size > 1:
        assert all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values())
    is_main = size == 1 or dist.get_rank() == 0
    write(Path(output, f"loaded-{size}"), model, optimizer, is_main)
    step(model, optimizer, 3)
    write(Path(output, f"goal-{size}"), model, optimizer, is_main)


def write(folder: Path, model, optimizer, is_main: bool):
    weights = host_state(model, kept=is_main, copied=False)
    state = optimizer_state(model, optimizer, kept=is_main, copied=False)
    assert is_main or not (weights or state[0])
    if is_main:
        folder.mkdir()
        save_file(weights, folder / "model.safetensors")
        save_optimizer(folder, *state)


def resume(output: str):
    """Trains with random dropout, and again from the middle; each process keeps the weights of both."""
    rank = dist.get_rank()
    for name, checkpoint in (("whole", None), ("resumed", str(Path(output, "checkpoint-2")))):
        trainer = build_trainer(output, TRAINING, DROPOUT)
        trainer.train(resume_from_checkpoint=checkpoint)
        save_file(trainer.model.state_dict(), Path(output, f"{name}-{rank}.safetensors"))


def fail(output: str):
    """The main process cannot save in the second step; all processes know."""
    trainer = build_trainer(output, TRAINING)
    known = {}

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            known[state.global_step] = trainer.save_error is not None

    trainer.add_callback(Watch)
    if dist.get_rank() == 0:
        trainer.add_callback(FullDisk(2))
    trainer.train()
    assert known == {1: False, 2: True, 3: False, 4: False}


def break_down(output: str):
    """Writing a checkpoint fails in the main process by no fault of the disk; none goes on, none waits."""
    trainer = build_trainer(output, TRAINING)
    if dist.get_rank() == 0:
        trainer.write_extra_files = lambda folder: 1 / 0
    try:
        trainer.train()
    except (ZeroDivisionError, InputError) as error:
        Path(output, f"error-{dist.get_rank()}").write_text(f"{type(error).__name__}: {error}")


def sharded(output: str):
    """Saves, and loads what was saved, in the same processes."""
    save_sharded(output)
    dist.barrier()
    load_sharded(output)


def trainers(output: str):
    """Goes on exactly, and with a checkpoint that cannot be saved."""
    resume(f"{output}/resume")
    fail(f"{output}/fail")
    break_down(f"{output}/broken")


TASKS = {"sharded": sharded, "load_sharded": load_sharded, "trainers": trainers}

if __name__ == "__main__":
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        assert dist.get_world_size() == 2
    TASKS[sys.argv[1]](sys.argv[2])
    end_processes()
