"""Steps whose loss or gradient is not finite: they are skipped and recorded; too many in a row end the run.

A loss that is not finite makes all its gradients so. After their average over processes the gradient's norm is the
same in all, and alone decides: nothing else need be exchanged, and no process waits for its device in a step.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from torch.optim import Adam
from transformers import TrainerCallback

from trainers.checkpoint_files import checkpoint_step, present_checkpoints
from trainers.errors import InputError
from trainers.files import write_text_atomically

NONFINITE = "nonfinite.jsonl"
_ADVICE = "lower --learning_rate, set --max_grad_norm 1 or --precision float32"


def spoil_gradients(loss: torch.Tensor) -> torch.Tensor:
    """The loss (scalar), to the bit; if it is not finite its gradients are not either, whatever it depends on."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


@dataclass
class _Step:
    """
    A step that was made or skipped.

    Args:
        number (`int`): Counted from 1.
        is_bad (`torch.Tensor`): Whether it was skipped, on its way to the CPU.
        arrived (`torch.Event`, *optional*): When it is there; None if it was there at once.
        grad_norm (`torch.Tensor`): Norm of the gradient.
        terms (`list[dict[str, torch.Tensor]]`): The loss and its terms, of each micro-batch of this process.
    """

    number: int
    is_bad: torch.Tensor
    arrived: torch.Event | None
    grad_norm: torch.Tensor
    terms: list[dict[str, torch.Tensor]]


class NonFiniteSteps(TrainerCallback):
    """
    Skips steps that are not finite: weights, the optimizer's state, running statistics and what is logged of the
    window stay as they were before; schedules, the moving average of the unchanged weights and the data go on.

    A fused Adam skips on the device, and whether it did is read one step later; others are kept from stepping at once.
    Each skipped step adds a line for each process to `nonfinite.jsonl`: `step`, `rank`, `sample_ids`, `micro_batches`
    (the loss and its terms), `grad_norm`, and of the weights once `weights_of_step` steps were done `weight_norms`, by
    part, and `weights_are_finite`.

    Args:
        trainer ([`JepaTrainer`]): Whose steps; `args.max_skipped_steps` may be skipped in a row.
    """

    def __init__(self, trainer):
        self.trainer, self.last_finite_step = trainer, 0
        self._num_in_row, self._unread, self._terms = 0, [], []
        self._statistics: list[list[torch.Tensor]] = []
        # steps, and how many of them were skipped, of the means that are logged
        self._counts = {"loss": [0, 0], "train_loss": [0, 0]}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._num_in_row, self._unread, self._counts["train_loss"] = 0, [], [0, 0]
        self.last_finite_step = state.global_step
        if state.is_world_process_zero:
            keep_lines(Path(args.output_dir, NONFINITE), state.global_step)
        self.start_window()
        self._statistics = running_statistics(model)

    def start_window(self):
        """Begins to count the steps of the next log."""
        self._counts["loss"] = [0, 0]

    def on_step_begin(self, args, state, control, **kwargs):
        # what the step will change before it is known to be finite
        self._kept = [torch.cat(statistics) for statistics in self._statistics]
        self._loss_sum, self._terms = self.trainer._tr_loss.clone(), []
        self.trainer.monitor.begin_step()

    def watch(self, outputs):
        """Notes the loss and the terms of a micro-batch."""
        self._terms.append({"loss": outputs.loss.detach(), **outputs.loss_terms})

    def judge(self, grad_norm: torch.Tensor):
        """
        Undoes the step's traces if it is not finite, and keeps the optimizer from making it.

        Args:
            grad_norm (`torch.Tensor`): Norm of the gradient over all processes, a scalar.
        """
        trainer = self.trainer
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm.detach()
        is_bad = norm.isfinite().logical_not()
        for statistics, kept in zip(self._statistics, self._kept, strict=True):
            restored = torch.where(is_bad, kept, torch.cat(statistics))
            torch._foreach_copy_(statistics, restored.split([len(part) for part in statistics]))
        trainer._tr_loss.copy_(torch.where(is_bad, self._loss_sum, trainer._tr_loss))
        trainer.monitor.leave_out_step(is_bad)
        optimizer = trainer.optimizer.optimizer  # inside of Accelerate's
        on_device = skips_on_device(optimizer)
        if on_device:
            optimizer.found_inf = is_bad.float()
        elif is_bad.item():
            optimizer.zero_grad(set_to_none=True)
        self._unread.append(_arriving(trainer.state.global_step + 1, is_bad, norm, self._terms))
        if not on_device:
            self.settle()

    def on_step_end(self, args, state, control, **kwargs):
        self.settle(but=1)

    def settle(self, but: int = 0):
        """
        Reads which steps were skipped and records them.

        Args:
            but (`int`): So many of the latest steps are left for later.

        Raises:
            InputError: More were skipped in a row than may be, or the weights are not finite.
        """
        while len(self._unread) > but:
            step = self._unread.pop(0)
            if step.arrived is not None:
                step.arrived.synchronize()
            is_bad = bool(step.is_bad)
            for counts in self._counts.values():
                counts[0] += 1
                counts[1] += is_bad
            if not is_bad:
                self._num_in_row, self.last_finite_step = 0, step.number
            else:
                self._num_in_row += 1
                self._record(step)

    def _record(self, step: _Step):
        trainer = self.trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        record = {
            "step": step.number,
            "rank": trainer.args.process_index,
            "sample_ids": trainer.sample_ids(step.number - 1),
            "micro_batches": [{name: number(term) for name, term in terms.items()} for terms in step.terms],
            "grad_norm": number(step.grad_norm),
            "weight_norms": norms_by_part(model),
            "weights_are_finite": bool(are_finite(model)),
            "weights_of_step": trainer.state.global_step,
        }
        records = gather_object([record])
        what = f"The loss or gradient of step {step.number} is not finite"
        file = Path(trainer.args.output_dir, NONFINITE)
        if trainer.is_world_process_zero():
            append_lines(file, records)
        if not all(other["weights_are_finite"] for other in records):
            raise InputError(f"{what}, nor are the weights (see {file}); {last_checkpoint(trainer)}.")
        if self._num_in_row > trainer.args.max_skipped_steps:
            before = self._num_in_row - 1
            others = f", as of the {before} before it, which were skipped" if before else ""
            raise InputError(f"{what}{others} (see {file}); {last_checkpoint(trainer)}.")

    @property
    def is_skipping(self) -> bool:
        """Whether the latest step that is known of was skipped."""
        return self._num_in_row > 0

    def last_good_checkpoint(self, output: Path) -> Path | None:
        """The newest checkpoint that a finite step began at, or else one that the last finite step led to."""
        last = self.last_finite_step
        found = [path for path in present_checkpoints(output) if checkpoint_step(path) <= last]
        return next((path for path in found if checkpoint_step(path) < last), next(iter(found), None))

    def leave_out_skipped(self, logs: dict[str, float]):
        """
        Takes skipped steps out of the mean losses that `Trainer` logs, and says how many there were.

        Args:
            logs (`dict[str, float]`): What is about to be logged; loses its loss if all steps were skipped.

        Raises:
            InputError: The loss is still not finite, since DeepSpeed has made a step by the time it is judged.
        """
        for name, (num_steps, num_skipped) in self._counts.items():
            if name in logs and num_skipped:
                logs |= {name: logs[name] * num_steps / max(num_steps - num_skipped, 1), "skipped_steps": num_skipped}
                if num_skipped == num_steps:
                    del logs[name]
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]
        if not math.isfinite(logs.get("loss", 0.0)):
            step = self.trainer.state.global_step
            raise InputError(f"The loss is {logs['loss']} at step {step}; {last_checkpoint(self.trainer)}.")


def num_skipped(history: list[dict]) -> int:
    """How many steps were skipped by a run's log, the parts before a resume included."""
    # the last entry sums those of a call up
    return sum(entry.get("skipped_steps", 0) for entry in history if "train_runtime" not in entry)


def _arriving(step: int, is_bad: torch.Tensor, norm: torch.Tensor, terms: list[dict]) -> _Step:
    """The step, with its flag on the way from the device: a copy to pinned memory, which no one waits for."""
    flag = is_bad.to("cpu", non_blocking=True)
    arrived = None
    if is_bad.device.type != "cpu":
        arrived = torch.Event(is_bad.device)
        arrived.record()
    return _Step(step, flag, arrived, norm, terms)


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves out a step if its `found_inf` says so, which is on the device."""
    return isinstance(optimizer, Adam) and all(group.get("fused") for group in optimizer.param_groups)


def running_statistics(model: torch.nn.Module) -> list[list[torch.Tensor]]:
    """The running statistics of a model's batch norms, flat, by type; a forward pass in training changes them."""
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            for statistic in module.buffers(recurse=False):
                by_type.setdefault(statistic.dtype, []).append(statistic.view(-1))
    return list(by_type.values())


def number(value: torch.Tensor) -> float | str:
    """A scalar tensor's value; "nan", "inf" or "-inf", for which JSON has no number."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def norms_by_part(model: torch.nn.Module) -> dict[str, float | str]:
    """The norm of the weights and statistics of each part of a model that has any; of this process's shards."""
    tensors = {name: _float_tensors(part) for name, part in model.named_children()}
    norms = {name: torch.stack(torch._foreach_norm(part)) for name, part in tensors.items() if part}
    return {name: number(torch.linalg.vector_norm(of_part.float())) for name, of_part in norms.items()}


def are_finite(model: torch.nn.Module) -> torch.Tensor:
    """Whether all weights and statistics of this process are finite: a scalar, on their device."""
    # both are NaN where one element is; on a CPU it takes a fraction of the time of `isfinite` or of a norm
    extremes = [extreme for tensor in _float_tensors(model) if tensor.numel() for extreme in tensor.aminmax()]
    return torch.stack(extremes).isfinite().all()


def _float_tensors(module: torch.nn.Module) -> list[torch.Tensor]:
    tensors = (tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    return [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach() for tensor in tensors]


def append_lines(file: Path, records: list[dict]):
    """Adds records to a file of JSON lines, all by one write."""
    text = "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def keep_lines(file: Path, step: int):
    """Keeps the records of steps up to one, after which a run goes on anew."""
    if not file.exists():
        return
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept:
        write_text_atomically(file, "".join(kept))
    else:
        file.unlink()


def check_finite_weights(trainer):
    """
    Refuses weights that are not finite, in all processes where they are so in one.

    Args:
        trainer (`transformers.Trainer`): Whose model is about to be saved.

    Raises:
        InputError: A weight or a statistic is not finite.
    """
    is_broken = are_finite(trainer.accelerator.unwrap_model(trainer.model)).logical_not()
    if trainer.accelerator.reduce(is_broken.int(), "sum").item():
        raise InputError(
            f"The weights of step {trainer.state.global_step} are not finite and are not saved; "
            f"{last_checkpoint(trainer)}."
        )


def last_checkpoint(trainer) -> str:
    """How to go on after weights, loss or gradient were not finite: from a checkpoint that a finite step began at."""
    good = trainer.nonfinite.last_good_checkpoint(Path(trainer.args.output_dir))
    if good is None:
        return f"there is no good checkpoint: {_ADVICE}, and start anew with another --output_dir"
    return f"the last good one is {good}: {_ADVICE}, and --resume_from_checkpoint it"
