"""What each level of a stack costs: time of a training step and memory, of the stack cut off after each level."""

import copy
import statistics
import time

import torch
from transformers import PreTrainedModel

from trainers.benchmark import quartiles, shown
from trainers.datasets import seeded
from trainers.errors import InputError
from trainers.flops import wait_for
from trainers.model_facts import count
from trainers.precision import computes_in_bf16
from trainers.recipes import Recipe
from trainers.reports import markdown_table

_MIB = 2**20
# steps that the activations are the mean of: masks are drawn anew, larger or smaller, for each
_NUM_DRAWS = 8


def benchmark_levels(recipe: Recipe, batch_size: int = 64, num_rounds: int = 5) -> list[dict]:
    """
    Times training steps of the lowest level of a stack, of the lowest two, and so on, in turns.

    Args:
        recipe ([`Recipe`]): Which model; its data are not read.
        batch_size (`int`): Images of a step.
        num_rounds (`int`): Timed steps of each.

    Returns:
        One `dict` a level: `levels` (how many), `parameters` of the whole, `median`, `low`, `high` (quartiles) in
        milliseconds a step, `factor` (the median over that of one level), `activations` (MiB that the backward pass
        needs of the forward pass), `states` (MiB of weights, gradients and AdamW's two averages), and on a GPU `peak`
        (MiB allocated at most).

    Raises:
        InputError: A number is too small to measure with.
    """
    if batch_size < 2 or num_rounds < 2:
        raise InputError(f"--batch_size {batch_size} and --rounds {num_rounds} must be 2 or more.")
    objective = recipe.objective
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    attention = recipe.run.attention(device, computes_in_bf16(device))
    whole = objective.build_model(recipe.model, attention).config

    def step_of(number: int) -> _Step:
        config = objective.lowest_levels(copy.deepcopy(whole), number)
        model = objective.model_class._from_config(config, attn_implementation=attention)
        model = model.to(device, memory_format=torch.channels_last).train()
        return _Step(model, objective.random_batch(config, batch_size).to(device))

    numbers = range(1, whole.num_levels + 1)
    memories = [step_of(number).memory() for number in numbers]  # one after the other: each has the device to itself
    steps = [step_of(number) for number in numbers]
    times = [[] for _ in steps]
    for round_number in shown(num_rounds, "steps"):
        for step, of_step in zip(steps, times, strict=True):
            with seeded(round_number):  # the masks, the same each time
                seconds = step.timed()
            if round_number > 0:  # the first one sets things up
                of_step.append(1000 * seconds)
    rows = []
    for number, of_step, memory in zip(numbers, times, memories, strict=True):
        rows.append({"levels": number} | quartiles(of_step) | memory)
        rows[-1]["factor"] = rows[-1]["median"] / rows[0]["median"]
    return rows


class _Step:
    """A training step of one model on one batch."""

    def __init__(self, model: PreTrainedModel, batch: torch.Tensor):
        self.model, self.batch, self.device = model, batch, batch.device
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run(self):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=computes_in_bf16(self.device)):
            loss = self.model(self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self) -> float:
        """Seconds of a step."""
        wait_for(self.device)
        started = time.perf_counter()
        self.run()
        wait_for(self.device)
        return time.perf_counter() - started

    def memory(self) -> dict[str, float]:
        """Parameters, and MiB of what a step keeps; the first one makes the optimizer's averages."""
        self.run()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        activations = statistics.mean(self._activations(seed) for seed in range(_NUM_DRAWS))
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        frozen = sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad)
        found = {
            "parameters": count(self.model),
            "activations": activations / _MIB,
            "states": (4 * trained + frozen) / _MIB,
        }
        if self.device.type == "cuda":
            found["peak"] = torch.cuda.max_memory_allocated() / _MIB
        return found

    def _activations(self, seed: int) -> int:
        """Bytes that the backward pass of a step needs of the forward pass."""
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        with seeded(seed), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            self.run()
        return sum(size for pointer, size in kept.items() if pointer not in weights)


def format_level_cost(rows: list[dict]) -> str:
    """The measurements as a table."""
    header = ["levels", "parameters, M", "ms a step (quartiles)", "times one level", "activations, MiB", "states, MiB"]
    table = [header + ["peak, MiB"] if "peak" in rows[0] else header]
    for row in rows:
        cells = [
            str(row["levels"]),
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['median']:.0f} ({row['low']:.0f} - {row['high']:.0f})",
            f"{row['factor']:.2f}",
            *(f"{row[name]:.0f}" for name in ("activations", "states", "peak") if name in row),
        ]
        table.append(cells)
    return "\n".join(markdown_table(table))
