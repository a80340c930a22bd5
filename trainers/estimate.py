"""What a run of pre-training will take, told before it: memory, arithmetic, time and disk; nothing is trained."""

import math
import shutil
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel, Trainer

from trainers.dry_step import DryStep
from trainers.errors import InputError
from trainers.flops import matmul_rate
from trainers.model_facts import parameters_by_part
from trainers.pretraining import can_checkpoint, check_checkpointing, training_arguments
from trainers.recipes import Recipe
from trainers.reports import markdown_table
from trainers.training_args import JepaTrainingArguments
from trainers.warm_start import read_start

# Shares of a device's matmul rate, by device and precision, that a duration is guessed by. Steps of `cjepa benchmark
# step` have reached 0.6 and 0.1 on a CPU; those of a GPU are not measured.
ASSUMED_MFU = {("cpu", "float32"): 0.5, ("cpu", "bf16"): 0.1, ("cuda", "float32"): 0.4, ("cuda", "bf16"): 0.3}
# what steps take at most, over the bytes of their tensors: allocators and kernels have some, too; measured by
# `cjepa benchmark memory` on a CPU, where steps of 64 images of the size `cifar` had the most
MARGIN = {"cpu": 1.65, "cuda": 1.1}
_GIB = 2**30


def estimate(recipe: Recipe) -> dict:
    """
    Estimates a run from a step that is carried out without memory or arithmetic.

    Memory is that of all tensors of the heaviest step of one process, times a margin for what lies around them, and on
    a CPU that of the program itself; the images that wait, data loader workers, evaluation, graphs of `torch.compile`
    and shards are left out, and a decoded cache on the disk. No image is looked at.

    Args:
        recipe ([`Recipe`]): What would be run.

    Returns:
        `dict`: `recipe`, `device`, `precision`, `processes`, `batch_size` (images a process and forward pass);
        `parameters` by part, `flops_per_image`; in bytes `weights` (trained), `target_encoder`, `gradients`,
        `optimizer`, `activations`, `program` (0 on a GPU) and `margin` (the rest of `peak`), `bytes_per_image`,
        `peak`, `free`, `checkpoint`,
        `disk` (all checkpoints that are kept), `free_disk`; `fits`, both memory and disk; `largest_batch_size`, 0 if
        none fits; `could_checkpoint`, whether gradient checkpointing would need less; `matmul_rate` in FLOP/s,
        `assumed_mfu`, `images_per_second`, of all processes; `num_images` of the run and `hours`, both None where the
        number of images is not known.

    Raises:
        InputError: The recipe cannot be run as it is, or the device is neither a CPU nor one of CUDA.
    """
    args = training_arguments(recipe)
    if args.device.type not in MARGIN:
        raise InputError(f"--estimate knows no {args.device.type}; give --use_cpu, or run it where there is CUDA.")
    if recipe.run.start_from is not None:
        read_start(recipe)
    step, batch_size = _dry_step(recipe, args), args.train_batch_size
    found = _memory(step, batch_size, args) | _disk(step, args)
    precision, device = "bf16" if args.bf16 else "float32", args.device
    flops, rate, mfu = step.flops(batch_size), matmul_rate(device, precision), ASSUMED_MFU[device.type, precision]
    speed = args.world_size * mfu * rate / flops
    num_images = _num_images(recipe, args)
    return {
        "recipe": recipe.name, "device": device.type, "precision": precision, "processes": args.world_size,
        "batch_size": batch_size, "parameters": parameters_by_part(step.model), "flops_per_image": flops, **found,
        "matmul_rate": rate, "assumed_mfu": mfu, "images_per_second": speed, "num_images": num_images,
        "could_checkpoint": can_checkpoint(step.model) and not args.gradient_checkpointing,
        "hours": None if num_images is None else num_images / speed / 3600,
        "fits": found["peak"] <= found["free"] and found["disk"] <= found["free_disk"],
    }  # fmt: skip


def _dry_step(recipe: Recipe, args: JepaTrainingArguments) -> DryStep:
    attention = recipe.run.attention(args.device, args.bf16)
    if attention not in ("eager", "sdpa"):
        attention = "sdpa"  # the others need a GPU's kernels, and as much memory
    objective = recipe.objective
    try:
        with torch.device("meta"):
            model = objective.model_class._from_config(
                objective.build_config(recipe.model), attn_implementation=attention
            )
        check_checkpointing(model, args)
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        return DryStep(
            model, lambda size: objective.random_batch(model.config, size), args.bf16, _optimizer(args, model)
        )
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error


def _optimizer(args: JepaTrainingArguments, model: PreTrainedModel):
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    return lambda parameters: optimizer_class(parameters, **options)


def _memory(step: DryStep, batch_size: int, args: JepaTrainingArguments) -> dict:
    exchanged = step.gradients if args.world_size > 1 else 0  # gradients are once more in what processes exchange
    margin = MARGIN[args.device.type]
    program = program_memory(args.device)
    tensors, of_twice = (step.peak(size) + exchanged for size in (batch_size, 2 * batch_size))
    slope = margin * (of_twice - tensors) / batch_size
    free = free_memory(args.device)
    if args.device.type == "cpu":
        free = free // args.world_size + program  # which this program takes, and the run's will instead
    kept = {
        "weights": step.weights - step.frozen, "target_encoder": step.frozen, "gradients": step.gradients + exchanged,
        "optimizer": step.averages,
    }  # fmt: skip
    peak = program + int(margin * tensors)
    return kept | {
        "activations": max(tensors - sum(kept.values()), 0), "margin": peak - program - tensors, "program": program,
        "peak": peak,
        "bytes_per_image": slope, "free": free,
        "largest_batch_size": max(batch_size + math.floor((free - peak) / slope), 0),
    }  # fmt: skip


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or in this machine for a CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def program_memory(device: torch.device) -> int:
    """Bytes that a program like this one, with its libraries, takes of the memory that a device works in."""
    return psutil.Process().memory_info().rss if device.type == "cpu" else 0


def _disk(step: DryStep, args: JepaTrainingArguments) -> dict:
    """Bytes of a checkpoint, weights of all parts and the optimizer's averages, and of those that are kept."""
    checkpoint = step.weights + step.averages
    number = args.save_total_limit or 1
    if args.save_total_limit is None and args.max_steps > 0 and args.save_strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else args.save_steps * args.max_steps
        number = math.ceil(args.max_steps / every)
    folder = Path(args.output_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    # and the model that is published at last
    return {
        "checkpoint": checkpoint,
        "disk": number * checkpoint + step.weights,
        "free_disk": shutil.disk_usage(folder).free,
    }


def _num_images(recipe: Recipe, args: JepaTrainingArguments) -> int | None:
    """The images that the run sees; None where their number is known only once they are read."""
    if args.max_steps > 0:
        return args.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    known = recipe.data.num_train_images
    return None if known is None else math.ceil(known * args.num_train_epochs)


def format_estimate(found: dict) -> str:
    """The estimate as a table and sentences, the last of which says whether the run fits."""
    parts = ", ".join(f"{name} {number / 1e6:.1f} M" for name, number in found["parameters"].items())
    processes = f"{found['processes']} process" + ("es" if found["processes"] > 1 else "")
    told = {
        "weights": "weights that are trained", "target_encoder": "weights that are not: the target encoder",
        "gradients": "gradients", "optimizer": "optimizer", "activations": "activations",
        "margin": "around these", "program": "the program itself", "peak": "steps at most",
        "free": f"free on the {found['device']}",
    }  # fmt: skip
    cells = [["memory of a process", "GiB"], *([title, f"{found[name] / _GIB:.2f}"] for name, title in told.items())]
    return "\n".join(
        [
            f"{found['recipe']}: {parts} parameters; {processes} with batches of {found['batch_size']} images on "
            f"{found['device']} in {found['precision']}; {found['flops_per_image'] / 1e9:.2f} GFLOP an image",
            *markdown_table(cells),
            _duration(found),
            f"disk: {found['checkpoint'] / _GIB:.2f} GiB a checkpoint, {found['disk'] / _GIB:.2f} GiB for those that "
            f"are kept, {found['free_disk'] / _GIB:.1f} GiB free",
            verdict(found),
        ]
    )


def _duration(found: dict) -> str:
    guess = (
        f"about {found['images_per_second']:,.0f} images/s, if steps reach {found['assumed_mfu']:.0%} of the "
        f"{found['matmul_rate'] / 1e9:,.0f} GFLOP/s of large products here, and images come as fast"
    )
    if found["hours"] is None:
        hours = 1e6 / found["images_per_second"] / 3600
        return f"time: {guess}: {hours:.2g} hours a million images"
    return f"time: {guess}: {found['hours']:.2g} hours for {found['num_images']:,} images"


def verdict(found: dict) -> str:
    """One sentence: whether a run fits, and what to change where it does not."""
    each = f"{found['bytes_per_image'] / 2**20:.1f} MiB an image"
    if found["peak"] > found["free"]:
        largest = found["largest_batch_size"]
        lower = f"lower --per_device_train_batch_size to {largest} or less" if largest else "choose a smaller model"
        advice = ["give --gradient_checkpointing", lower] if found["could_checkpoint"] else [lower]
        return f"It does not fit in memory ({each}): {', or '.join(advice)}."
    if found["disk"] > found["free_disk"]:
        return "It does not fit on the disk: make room, or lower --save_total_limit."
    return f"It fits; so would batches of about {found['largest_batch_size']} images a process ({each})."
