"""What a training step of C-JEPA needs of memory beside the authors', each in a process of its own."""

import math
import multiprocessing
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from modeling_cjepa.configuration_cjepa import pair
from modeling_cjepa.masking_cjepa import sample_block_masks
from trainers.allocator import keep_freed_memory
from trainers.bare_steps import BareSteps, fields_of
from trainers.benchmark import quartiles
from trainers.dry_step import LiveBytes
from trainers.errors import InputError
from trainers.estimate import free_memory
from trainers.precision import precision_name
from trainers.reference_step import ReferenceStep
from trainers.reports import markdown_table

WHAT = {
    "reference": "the authors', re-stated",
    "ours": "ours",
    "checkpointed": "ours, gradient checkpointing",
}
_MIB = 2**20


def benchmark_memory(size: str = "cifar", batch_size: int = 64, num_rounds: int = 3, precision: str = "auto") -> dict:
    """
    Takes steps of ours, with and without gradient checkpointing, and of [`ReferenceStep`], on the same masks.

    Args:
        size (`str`): One of [`~bare_steps.SIZES`].
        batch_size (`int`): Images of a step; batches of a quarter of it are measured, too.
        num_rounds (`int`): Processes of each.
        precision (`"auto"`, `"float32"` or `"bf16"`): `auto` is what the device multiplies faster.

    Returns:
        `dict`: `size`, `device`, `precision`, `batch_sizes`; of each of [`WHAT`] and each batch size, as text, the
        quartiles of `peak`, the bytes that a process takes at most for weights, optimizer and steps (on a GPU those
        allocated), on a CPU `tensors`, how many of them are tensors; `bytes_per_image` and `largest_batch_size`, of
        the memory that is free here, by a line through both batch sizes; `ratio`, of `peak` at the larger one to the
        reference's.

    Raises:
        InputError: There is no such size or precision, too little to measure with, or a system that does not tell a
            process' peak.
    """
    fields = fields_of(size)
    if batch_size < 8 or num_rounds < 2:
        raise InputError(f"--batch_size {batch_size} must be 8 or more and --rounds {num_rounds} 2 or more.")
    if not Path("/proc/self/status").is_file():
        raise InputError("`cjepa benchmark memory` reads peaks of memory from /proc; run it on Linux.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision, batch_sizes = precision_name(precision, device), (batch_size // 4, batch_size)
    rounds = [
        {kind: _in_a_process(kind, fields, batch_sizes, precision) for kind in WHAT}
        for _ in tqdm(range(num_rounds), desc="processes", unit="round")
    ]
    found = {kind: _summary(kind, rounds, batch_sizes, free_memory(device)) for kind in WHAT}
    for kind in WHAT:
        of_kind, reference = (found[name][str(batch_size)]["peak"]["median"] for name in (kind, "reference"))
        found[kind]["ratio"] = of_kind / reference
    sizes = {"size": size, "device": device.type, "precision": precision, "batch_sizes": list(batch_sizes)}
    return sizes | found


def _summary(kind: str, rounds: list[dict], batch_sizes: tuple[int, int], free: int) -> dict:
    found = {}
    for place, number in enumerate(batch_sizes):
        of_rounds = [each[kind][place] for each in rounds]
        found[str(number)] = {"peak": quartiles([each["peak"] for each in of_rounds])}
        if "tensors" in of_rounds[0]:
            found[str(number)]["tensors"] = max(each["tensors"] for each in of_rounds)
    few, many = (found[str(number)]["peak"]["median"] for number in batch_sizes)
    slope = max(many - few, 1) / (batch_sizes[1] - batch_sizes[0])
    largest = batch_sizes[1] + math.floor((free - many) / slope)
    return found | {"bytes_per_image": slope, "largest_batch_size": max(largest, 0)}


def _in_a_process(*arguments) -> list[dict[str, int]]:
    """What [`measure`] finds in a process that has done nothing before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments, torch.get_num_threads()).result()


def measure(
    kind: str, sizes: dict, batch_sizes: Sequence[int], precision: str, num_threads: int
) -> list[dict[str, int]]:
    """
    Takes steps in this process, which shall be a fresh one.

    Args:
        kind (`str`): One of [`WHAT`].
        sizes (`dict`): Fields of [`CJepaConfig`].
        batch_sizes (`Sequence[int]`): Images of the steps, rising.
        precision (`"float32"` or `"bf16"`): Whether under autocast.
        num_threads (`int`): Of torch.

    Returns:
        `list[dict[str, int]]`: Of each batch size `peak` and on a CPU `tensors`, in bytes, as of [`benchmark_memory`].
    """
    torch.set_num_threads(num_threads)
    keep_freed_memory()  # as in pre-training
    warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated")
    if torch.cuda.is_available():
        steps, found = _Steps(kind, sizes, precision, torch.device("cuda")), []
        for batch_size in batch_sizes:
            torch.cuda.reset_peak_memory_stats()
            steps.take(batch_size)
            found.append({"peak": torch.cuda.max_memory_allocated()})
        return found
    before, found = _status("VmRSS"), []
    with LiveBytes() as live:
        steps = _Steps(kind, sizes, precision, torch.device("cpu"))
        live.peak = live.now
        for batch_size in batch_sizes:
            steps.take(batch_size)
            found.append({"peak": _status("VmHWM") - before, "tensors": live.peak})
    return found


def _status(name: str) -> int:
    """Bytes of this process' memory, now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", status).group(1))


class _Steps:
    """Steps of one kind with a model of its own."""

    def __init__(self, kind: str, sizes: dict, precision: str, device: torch.device):
        self.steps, self.device = BareSteps(sizes | {"layer_norm_eps": 1e-6}, precision, device), device
        self.config = self.steps.model.config
        if kind == "reference":
            self.steps = ReferenceStep(self.steps.model, precision=precision)  # which has copied the weights
        elif kind == "checkpointed":
            self.steps.model.gradient_checkpointing_enable()

    def take(self, batch_size: int):
        """Two steps, of which the second has the optimizer's averages from its start."""
        generator = torch.Generator().manual_seed(0)
        size, channels = pair(self.config.image_size), self.config.num_channels
        images = torch.randn(batch_size, channels, *size, device=self.device)
        for _ in range(2):
            masks = sample_block_masks(
                batch_size, self.config.grid_size, generator=generator,
                min_context_patches=self.config.min_context_patches,
            )  # fmt: skip
            self.steps.take(images, *(ids.to(self.device) for ids in masks))


def format_memory_cost(found: dict) -> str:
    """The measurements as a table."""
    sizes = [str(number) for number in found["batch_sizes"]]
    has_tensors = "tensors" in found["ours"][sizes[0]]
    header = ["a step", *(f"MiB, {number} images (quartiles)" for number in sizes)]
    cells = [[*header, *(["of tensors"] if has_tensors else []), "ratio", "MiB an image", "largest batch"]]
    for kind, title in WHAT.items():
        row = found[kind]
        peaks = [{name: value / _MIB for name, value in row[number]["peak"].items()} for number in sizes]
        cells.append([
            title,
            *("{median:.0f} ({low:.0f} - {high:.0f})".format(**peak) for peak in peaks),
            *([f"{row[sizes[-1]]['tensors'] / _MIB:.0f}"] if has_tensors else []),
            f"{row['ratio']:.2f}",
            f"{row['bytes_per_image'] / _MIB:.2f}",
            f"{row['largest_batch_size']:,}",
        ])  # fmt: skip
    where = f"{found['size']}, {found['precision']}, {found['device']}"
    return "\n".join([where, *markdown_table(cells)])
