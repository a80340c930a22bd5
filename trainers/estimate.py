"""What a run of pre-training will take, told before it: memory, arithmetic, time and disk; nothing is trained."""

import math
import shutil
from contextlib import nullcontext
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel, Trainer

from trainers.checkpoint_files import count_kept
from trainers.dry_step import DryStep
from trainers.errors import InputError
from trainers.flops import matmul_rate
from trainers.model_facts import parameters_by_part
from trainers.precision import precision_name
from trainers.pretraining import (
    can_checkpoint,
    check_training,
    choose_attention,
    find_own_checkpoint,
)
from trainers.progress import RunClock
from trainers.recipes import Recipe
from trainers.reports import markdown_table
from trainers.run_arguments import training_arguments
from trainers.run_lock import only_run_in
from trainers.sources import known_num_train_images
from trainers.stream_sources import stream_files
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
        `peak`, `free`, `checkpoint`; `num_checkpoints` that are kept; in bytes `disk`, for these, and for one where
        their number is None, and for the model at last, and `free_disk`; `fits`, both memory and disk;
        `largest_batch_size`, 0 if none fits; `could_checkpoint`, whether gradient checkpointing would need less;
        `matmul_rate` in FLOP/s, `assumed_mfu`, `images_per_second`, of all processes; `num_images` that the run reads
        and `hours`. `num_checkpoints`, `num_images` and `hours` are None where they follow from the number of train
        images and it is not known.

    Raises:
        InputError: The recipe cannot be run as it is, which is told as by the run as far as it needs no image; or the
            device is neither a CPU nor one of CUDA.
    """
    args = training_arguments(recipe)
    if args.device.type not in MARGIN:
        raise InputError(f"--estimate knows no {args.device.type}; give --use_cpu, or run it where there is CUDA.")
    if recipe.run.start_from is not None:
        read_start(recipe)
    known = known_num_train_images(recipe.data)
    model = _model(recipe, args)
    _check_start(recipe, model, args, known)
    # there are no statistics of one image, where another process may have a second
    step, batch_size = _dry_step(recipe, model, args), max(args.train_batch_size, 2)
    found = _memory(step, batch_size, args) | _disk(step, args, known)
    precision, device = precision_name(args.precision, args.device), args.device
    flops, rate, mfu = step.flops(batch_size), matmul_rate(device, precision), ASSUMED_MFU[device.type, precision]
    speed = args.world_size * mfu * rate / flops
    steps = _num_steps(args, known)
    num_images = None if steps is None else steps * _images_of_step(args)
    return {
        "recipe": recipe.name, "device": device.type, "precision": precision, "processes": args.world_size,
        "batch_size": args.train_batch_size, "parameters": parameters_by_part(model), **found,
        "flops_per_image": flops, "matmul_rate": rate, "assumed_mfu": mfu, "images_per_second": speed,
        "num_images": num_images,
        "could_checkpoint": can_checkpoint(model) and not args.gradient_checkpointing,
        "hours": None if num_images is None else num_images / speed / 3600,
        "fits": found["peak"] <= found["free"] and found["disk"] <= found["free_disk"],
    }  # fmt: skip


def _model(recipe: Recipe, args: JepaTrainingArguments) -> PreTrainedModel:
    """The model of a recipe, of which only shapes are there."""
    objective, attention = recipe.objective, choose_attention(recipe, args)
    try:
        with torch.device("meta"):
            return objective.model_class._from_config(
                objective.build_config(recipe.model), attn_implementation=attention
            )
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error


def _check_start(recipe: Recipe, model: PreTrainedModel, args: JepaTrainingArguments, known: int | None):
    """Refuses what the run itself would refuse before it looks at an image."""
    output = Path(args.output_dir)
    # looking for checkpoints may put one back, which would be in the way of a run that is saving it
    with only_run_in(output) if output.exists() else nullcontext():
        find_own_checkpoint(args, model)
    if recipe.data.streaming:
        stream_files(recipe.data)
    check_training(recipe, model, args, known, recipe.data.dataset)


def _dry_step(recipe: Recipe, model: PreTrainedModel, args: JepaTrainingArguments) -> DryStep:
    if choose_attention(recipe, args) not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")  # the others need a GPU's kernels, and as much memory
    try:
        if args.gradient_checkpointing:
            model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        return DryStep(
            model,
            lambda size: recipe.objective.random_batch(model.config, size),
            args.bf16,
            _optimizer(args, model),
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


def _disk(step: DryStep, args: JepaTrainingArguments, known: int | None) -> dict:
    """Bytes of a checkpoint, weights of all parts and the optimizer's averages, and of those that are kept."""
    checkpoint, number = step.weights + step.averages, _num_checkpoints(args, known)
    folder = Path(args.output_dir).absolute()
    while not folder.is_dir():
        folder = folder.parent
    # and the model that is published at last
    return {
        "checkpoint": checkpoint,
        "num_checkpoints": number,
        "disk": (1 if number is None else number) * checkpoint + step.weights,
        "free_disk": shutil.disk_usage(folder).free,
    }


def _num_checkpoints(args: JepaTrainingArguments, known: int | None) -> int | None:
    """How many checkpoints the run keeps at most; None where that is known only once its images are."""
    saved, limit, every = _saved_steps(args, known), args.save_total_limit, args.keep_checkpoints_every
    if saved is None:
        return limit if limit and limit > 0 and every is None else None
    return count_kept(saved, limit, every)


def _saved_steps(args: JepaTrainingArguments, known: int | None) -> set[int] | None:
    """After which steps the run saves a checkpoint; None where that is known only once its images are."""
    if args.save_strategy not in ("steps", "epoch"):
        return set()  # `best` is by evaluations, and pre-training makes none
    steps, batch = _num_steps(args, known), _images_of_step(args)
    if steps is None or (args.save_strategy == "epoch" and known is None):
        return None
    if args.save_strategy == "epoch":
        return {steps, *(math.ceil(number * known / batch) for number in range(1, steps * batch // known + 1))}
    every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
    return {steps, *(range(every, steps, every) if every > 0 else ())}


def _num_steps(args: JepaTrainingArguments, known: int | None) -> int | None:
    """Steps of the run; None where their number is known only once its images are read."""
    if args.max_steps > 0:
        return args.max_steps
    return None if known is None else RunClock(_images_of_step(args), round(args.num_train_epochs * known)).num_steps()


def _images_of_step(args: JepaTrainingArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


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
            _disk_space(found),
            verdict(found),
        ]
    )


def _disk_space(found: dict) -> str:
    each, free = f"{found['checkpoint'] / _GIB:.2f} GiB a checkpoint", f"{found['free_disk'] / _GIB:.1f} GiB free"
    number = found["num_checkpoints"]
    if number is None:
        return (
            f"disk: {each}, {free}; how many are kept depends on the number of train images, which is not known "
            "before they are read: give --num_train_images, --max_steps or --save_total_limit"
        )
    kept = f"{number} checkpoint{'s' if number != 1 else ''} that the run keeps and the model at last"
    return f"disk: {each}, {found['disk'] / _GIB:.2f} GiB for {kept}, {free}"


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
    condition = ""
    if found["num_checkpoints"] is None:
        most = 1 + (found["free_disk"] - found["disk"]) // found["checkpoint"]
        condition = f" if no more than {most:,} checkpoints are kept"
    return f"It fits{condition}; so would batches of about {found['largest_batch_size']} images a process ({each})."
