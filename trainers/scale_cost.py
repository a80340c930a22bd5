"""How the cost of a training step grows with the work: the ratio of seconds beside that of operations."""

import json
import statistics
import tempfile
import time
from pathlib import Path
from threading import BrokenBarrierError

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from trainers.bare_steps import BareSteps, fields_of
from trainers.benchmark import quartiles, shown
from trainers.errors import InputError
from trainers.flops import model_flops, wait_for
from trainers.precision import precision_name
from trainers.reports import markdown_table

PROCESSES = "processes x2, the same images"
# seconds that a process waits for another one's step
_LONGEST = 900


def benchmark_scale(size: str = "cifar", batch_size: int = 16, num_rounds: int = 7, precision: str = "auto") -> dict:
    """
    Times steps of C-JEPA before and after the work has grown in one way, in turns.

    The image's side, the layers and the number of processes are doubled, the batch is 8 times as large, and a level
    is put on top. Two processes share the batch, and the threads, of one; this is measured on a CPU alone. Seconds
    are those of the clock on a GPU, and on a CPU those of the processors, of both processes together, so that what
    else the machine does counts little; the waiting for another process does not count.

    Args:
        size (`str`): One of [`~bare_steps.SIZES`], from which it grows.
        batch_size (`int`): Images of a step before; an even number.
        num_rounds (`int`): Timed steps of each, after one that is not counted.
        precision (`"auto"`, `"float32"` or `"bf16"`): `auto` is what the device multiplies faster.

    Returns:
        `dict`: `size`, `batch_size`, `device`, `threads`, `precision`; in `growths` by what grows the quartiles of
        `before` and `after`, in seconds, and of `seconds`, their ratios round by round; `flops`, the mean ratio of
        [`~flops.model_flops`]; and the quartiles of `excess`, `seconds` over `flops`: 1 is a cost that grows as the
        work does.

    Raises:
        InputError: There is no such size or precision, or too little to measure with.
    """
    fields = fields_of(size)
    if batch_size < 4 or batch_size % 2 or num_rounds < 2:
        raise InputError(
            f"--batch_size {batch_size} must be an even number from 4 up and --rounds {num_rounds} 2 or more."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = precision_name(precision, device)
    growths = {}
    for name, (changes, factor) in grown_by(fields).items():
        before = Steps(fields, batch_size, precision, device)
        after = Steps(fields | changes, factor * batch_size, precision, device)
        growths[name] = _summary([(before.round(), after.round()) for _ in shown(num_rounds, name)][1:])
    if device.type == "cpu":
        growths[PROCESSES] = _summary(_rounds_of_processes(fields, batch_size, precision, num_rounds))
    return {
        "size": size, "batch_size": batch_size, "device": device.type, "threads": torch.get_num_threads(),
        "precision": precision, "growths": growths,
    }  # fmt: skip


def grown_by(fields: dict) -> dict[str, tuple[dict, int]]:
    """By what grows, the changed fields of [`CJepaConfig`] and how many times the images a step has."""
    return {
        "image side x2": ({"image_size": 2 * fields["image_size"]}, 1),
        "batch x8": ({}, 8),
        "levels +1": ({"upper_levels": [{}]}, 1),
        "layers x2": ({"num_hidden_layers": 2 * fields["num_hidden_layers"]}, 1),
    }


class Steps(BareSteps):
    """
    Timed steps on masks that are the same for all who take as many.

    Args:
        fields, precision, device: As of [`BareSteps`].
        batch_size (`int`): Images of a step of this process.
        is_shared (`bool`): Whether the processes there are average their gradients.
    """

    def __init__(self, fields: dict, batch_size: int, precision: str, device: torch.device, is_shared: bool = False):
        super().__init__(fields, precision, device)
        if is_shared:
            self.run = DistributedDataParallel(self.model)
        self.batch = self.images(batch_size)
        self.num_taken = 0

    def round(self) -> tuple[float, int]:
        """Seconds of a step, as of [`benchmark_scale`], and the floating-point operations that it is worth."""
        batch_size, device = len(self.batch), self.batch.device
        generator = torch.Generator().manual_seed(self.num_taken)  # blocks of the same size before and after
        self.num_taken += 1
        masks = self.model.sample_masks(batch_size, generator=generator, device="cpu")
        context_ids, target_ids = (ids.to(device) for ids in masks)
        wait_for(device)
        clock = time.process_time if device.type == "cpu" else time.perf_counter
        started = clock()
        self.take(self.batch, context_ids, target_ids)
        wait_for(device)
        seconds = clock() - started
        flops = model_flops(self.model.config, context_ids.shape[1], *target_ids.shape[1:])
        return seconds, batch_size * sum(flops.values())


def _rounds_of_processes(fields: dict, batch_size: int, precision: str, num_rounds: int) -> list:
    """Rounds of one process with a batch, and of two with half of it each, and half of the threads."""
    num_threads = max(torch.get_num_threads() // 2, 1)
    # at which the two wait while this process takes its step, and this one while they take theirs
    barrier = mp.get_context("spawn").Barrier(3)
    with tempfile.TemporaryDirectory() as folder:
        arguments = folder, barrier, fields, batch_size // 2, precision, num_rounds, num_threads
        workers = mp.spawn(_work, arguments, nprocs=2, join=False)
        steps, alone = Steps(fields, batch_size, precision, torch.device("cpu")), []
        try:
            for _ in shown(num_rounds, PROCESSES):
                alone.append(steps.round())
                barrier.wait(_LONGEST)
                barrier.wait(_LONGEST)
        except BrokenBarrierError:
            barrier.abort()
        while not workers.join():  # which raises what a worker has raised
            pass
        of_both = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in (0, 1)]
    shared = [(one[0] + other[0], one[1] + other[1]) for one, other in zip(*of_both, strict=True)]
    return list(zip(alone, shared, strict=True))[1:]


def _work(
    rank, folder: str, barrier, fields: dict, batch_size: int, precision: str, num_rounds: int, num_threads: int
):
    torch.set_num_threads(num_threads)
    rounds = []
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        steps = Steps(fields, batch_size, precision, torch.device("cpu"), is_shared=True)
        for _ in range(num_rounds + 1):
            barrier.wait(_LONGEST)
            rounds.append(steps.round())
            barrier.wait(_LONGEST)
        dist.destroy_process_group()
    except BaseException:
        barrier.abort()
        raise
    Path(folder, f"{rank}.json").write_text(json.dumps(rounds))


def _summary(rounds: list) -> dict:
    before, after = ([each[place] for each in rounds] for place in (0, 1))
    ratios = [grown[0] / small[0] for small, grown in zip(before, after, strict=True)]
    flops = [grown[1] / small[1] for small, grown in zip(before, after, strict=True)]
    return {
        "before": quartiles([seconds for seconds, _ in before]),
        "after": quartiles([seconds for seconds, _ in after]),
        "seconds": quartiles(ratios),
        "flops": statistics.mean(flops),
        "excess": quartiles([ratio / work for ratio, work in zip(ratios, flops, strict=True)]),
    }


def format_scale_cost(found: dict) -> str:
    """The measurements as a table."""
    cells = [["what grows", "ms before", "ms after", "times the seconds (quartiles)", "times the FLOPs", "excess"]]
    for name, row in found["growths"].items():
        spread = "{median:.2f} ({low:.2f} - {high:.2f})"
        cells.append([
            name,
            *(f"{row[when]['median'] * 1e3:.0f}" for when in ("before", "after")),
            spread.format(**row["seconds"]),
            f"{row['flops']:.2f}",
            spread.format(**row["excess"]),
        ])  # fmt: skip
    where = f"{found['size']}, {found['batch_size']} images, {found['precision']}, {found['device']}"
    return "\n".join([f"{where}, {found['threads']} threads", *markdown_table(cells)])
