"""Trains with a step that is not finite, or with one whose traces are undone by hand; started by tests or torchrun.

python tests/nonfinite_worker.py OUTPUT '{"name": {"max_steps": 4, "inject": {...}, ...}, ...}'
"""

import copy
import json
import math
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_worker import build_trainer
from transformers import TrainerCallback

from trainers.processes import end_processes


class Undo(TrainerCallback):
    """Puts back the model and the optimizer as they were before a step, however the step came out."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step + 1 == self.step:
            self.before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step + 1 == self.step:
            model.load_state_dict(self.before[0])
            optimizer.load_state_dict(self.before[1])


def inject(trainer, where: str, steps: list[int], ranks: list[int]):
    """Makes some steps not finite: by the images (`images`), or by the loss alone, whose gradients are (`loss`)."""

    def is_now(module):
        step = trainer.state.global_step + 1
        return module.training and step in steps and trainer.args.process_index in ranks

    def spoil_images(module, inputs):
        return (inputs[0] * math.nan, *inputs[1:]) if is_now(module) else None

    def spoil_loss(module, inputs, output):
        if is_now(module):
            output.loss = output.loss + math.inf

    if where == "images":
        trainer.model.register_forward_pre_hook(spoil_images)
    else:
        trainer.model.register_forward_hook(spoil_loss)


def run(output: str, training: dict):
    """Trains; returns the trainer after it."""
    training = dict(training)
    others = {name: training.pop(name) for name in ("model", "num_images") if name in training}
    injected, undone = training.pop("inject", None), training.pop("undo", None)
    trainer = build_trainer(output, training, **others)
    if injected is not None:
        inject(trainer, **injected)
    if undone is not None:
        # before the target encoder is moved
        trainer.callback_handler.callbacks.insert(0, Undo(undone))
    trainer.train()
    return trainer


def weights_of(trainer) -> dict[str, torch.Tensor]:
    tensors = trainer.model.state_dict().items()
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors}


def main(output: str, runs: str):
    """Makes each of several runs as one of two processes that torchrun started."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for name, training in json.loads(runs).items():
        trainer = run(f"{output}/{name}", training)
        assert torch.distributed.get_world_size() == 2
        save_file(weights_of(trainer), f"{output}/{name}-{rank}.safetensors")
        Path(output, f"{name}-{rank}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_processes()
