"""A pre-training run from recipe to published folder."""

import math
import os
import shlex
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import set_seed

from modeling_cjepa.configuration_cjepa import pair
from modeling_cjepa.losses_cjepa import level_term
from trainers.checkpoints import (
    changed_batches,
    changed_settings,
    check_same_model,
    find_checkpoint,
    is_finished,
    load_state,
)
from trainers.datasets import ImageSource
from trainers.doctor import diagnose
from trainers.errors import InputError
from trainers.evaluation import evaluate_model
from trainers.files import full_disk_named, write_json
from trainers.lanes import choose_lanes, uneven_lanes
from trainers.nonfinite import NONFINITE, check_finite_weights, num_skipped
from trainers.publishing import save_model, whole_folder
from trainers.recipes import Recipe, model_fields, recipe_text, write_recipe
from trainers.reports import draw_curves, format_table, machine_facts, software_facts
from trainers.resources import render_template
from trainers.run_lock import only_run_in
from trainers.sharding import whole_model
from trainers.sources import load_sources, with_common_classes
from trainers.stopping import stopped_sentence
from trainers.stream_sources import load_stream
from trainers.streams import Shards
from trainers.trainer import JepaTrainer
from trainers.training_args import JepaTrainingArguments

# gives labelled images to fit probes on, and to test them on
Labelled = Callable[[], tuple[ImageSource, ImageSource]]


def pretrain(recipe: Recipe) -> Path | None:
    """
    Pre-trains, saves, evaluates and describes a model.

    Args:
        recipe ([`Recipe`]): What to do.

    Returns:
        `Path`: The `final` folder: weights of all three parts, configuration, code, image processor, curves,
        `results.json` and model card. None if a signal or `max_hours` has stopped the run, with a checkpoint.

    Raises:
        InputError: The recipe cannot be run as it is; the message says what to change.
    """
    # numbers too small for a normal float slow a CPU's matrix products down tenfold and more
    torch.set_flush_denormal(True)
    args = training_arguments(recipe)
    model = build_model(recipe, args)
    output = Path(args.output_dir)
    with only_run_in(output):
        trainer, labelled, checkpoint = prepare(recipe, args, model)
        with full_disk_named(output):
            return _run(recipe, trainer, labelled, checkpoint)


def prepare(recipe: Recipe, args: JepaTrainingArguments, model) -> tuple[JepaTrainer, Labelled | None, str | None]:
    """The trainer of a run, what gives labelled images, and the checkpoint to go on from; nothing is written yet."""
    checkpoint = find_checkpoint(args)
    if checkpoint is not None:
        check_same_model(checkpoint, model.config)
    if args.process_index == 0:
        print(describe(recipe, model, args), flush=True)
        if checkpoint is not None:
            changed = changed_settings(recipe, checkpoint) + changed_batches(checkpoint, args)
            print(f"going on from {checkpoint}{changed}", flush=True)
    image_size = max(pair(model.config.image_size))
    train, labelled = load_images(recipe, image_size, args)
    return build_trainer(recipe, model, args, train), labelled, checkpoint


def _run(recipe: Recipe, trainer: JepaTrainer, labelled: Labelled | None, checkpoint: str | None) -> Path | None:
    """Trains, and saves and evaluates what was trained."""
    args = trainer.args
    trainer.take_over(checkpoint)  # refuses other images before anything is written
    if trainer.is_world_process_zero():
        write_recipe(recipe.values, Path(args.output_dir, "recipe.yaml"))
    started = time.perf_counter()
    if checkpoint is not None and is_finished(checkpoint, args):
        trainer.state = load_state(checkpoint)
        trainer._load_from_checkpoint(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    trainer.accelerator.wait_for_everyone()
    if trainer.stop.reason is not None:
        if trainer.is_world_process_zero():
            print(stopped_sentence(trainer), flush=True)
        return None
    check_finite_weights(trainer)
    if trainer.doctor.has_stopped:
        raise InputError(trainer.doctor.stop_sentence(args.output_dir))
    folder = Path(args.output_dir, "final")
    model = whole_model(trainer)
    if trainer.is_world_process_zero():
        finish(recipe, trainer, model, labelled, seconds, folder)
    return folder


def load_images(
    recipe: Recipe, image_size: int, args: JepaTrainingArguments
) -> tuple[ImageSource | Shards, Labelled | None]:
    """The images to train on, and what gives labelled ones to evaluate with; None, which is said, if it cannot be."""
    reason = None
    if recipe.data.streaming:
        stream = load_stream(recipe.data)
        train, reason = stream.shards, stream.without_evaluation()
        labelled = partial(stream.some_images, recipe.evaluation.num_probe_images)
        lanes = choose_lanes(train.num_shards, args.world_size, train.name)
        unequal = uneven_lanes(train.num_shards, lanes, train.shard_rows)
        if unequal is not None and args.process_index == 0:
            print(unequal, flush=True)
    else:
        train, test = load_sources(recipe.data, image_size, not args.disable_tqdm)
        labelled = partial(with_common_classes, train, test)
        try:
            labelled()
        except InputError as error:
            reason = error
    if reason is not None and args.process_index == 0:
        print(f"The encoder will be saved, but not evaluated: {reason}", flush=True)
    return train, labelled if reason is None else None


def training_arguments(recipe: Recipe) -> JepaTrainingArguments:
    """The run's arguments."""
    return start_arguments(recipe.objective.training_class, recipe.training, recipe.name)


def start_arguments(training_class: type[TrainingArguments], values: dict, name: str) -> TrainingArguments:
    """
    Training arguments for the processes that were launched.

    Args:
        training_class (`type`): Their class.
        values (`dict`): The fields that are set; without `output_dir` a new folder under `runs/` is named after the
            run and the time.
        name (`str`): What the run is called.

    Returns:
        An instance of `training_class`.

    Raises:
        InputError: A value is out of its range, or the devices do not suffice for the processes.
    """
    values = dict(values)
    values.setdefault("report_to", "none")
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if num_processes > 1 and not torch.accelerator.is_available():
        # without it, transformers starts a run in each process
        values.setdefault("use_cpu", True)
    if "output_dir" not in values:
        folder = [f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}"]
        if num_processes > 1:
            # the clocks of the processes may differ by the second that matters
            PartialState(cpu=bool(values.get("use_cpu", False)))
            broadcast_object_list(folder)
        values["output_dir"] = folder[0]
    output = Path(values["output_dir"])
    if any(path.exists() and not path.is_dir() for path in (output, *output.parents)):
        raise InputError(f"--output_dir {output} is a file or lies in one; name a folder.")
    try:
        args = training_class(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if args.world_size != num_processes:
        raise InputError(
            f"{num_processes} processes were launched, and {args.world_size} would train on {args.device}; launch as "
            "many as there are devices, or all on the CPU with --use_cpu."
        )
    return args


def build_model(recipe: Recipe, args: JepaTrainingArguments) -> PreTrainedModel:
    """The model of a recipe, initialised from its seed."""
    attention = recipe.run.attention(args.device, args.bf16)
    if attention == "flex_attention" and args.device.type == "cpu":
        raise InputError("attn_implementation='flex_attention' trains on a GPU only; choose sdpa or eager.")
    set_seed(args.seed)
    try:
        return recipe.objective.build_model(recipe.model, attention)
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error


def build_trainer(recipe: Recipe, model, args, train_source: ImageSource | Shards) -> JepaTrainer:
    """The trainer of a recipe on its train images."""
    batch_size = args.train_batch_size * args.world_size
    num_images = train_source.num_images if isinstance(train_source, Shards) else len(train_source)
    if num_images is not None and num_images < batch_size:
        raise InputError(
            f"{train_source.name} has {num_images} images, fewer than the {batch_size} of a batch over all "
            "processes; lower --per_device_train_batch_size or give more images."
        )
    if recipe.objective.batch_of_one_is_error(model.config):
        if batch_size < 2:
            raise InputError("A batch of 1 image has no variance; raise --per_device_train_batch_size to 2 or more.")
    can_checkpoint = any(hasattr(module, "gradient_checkpointing") for module in model.modules())
    if args.gradient_checkpointing and not can_checkpoint:
        raise InputError("gradient_checkpointing: no layer of this model can do it; leave it out.")
    try:
        return recipe.objective.build_trainer(model, args, recipe.data, train_source)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise InputError(f"The run cannot start: {' '.join(str(error).split())}") from error


def describe(recipe: Recipe, model, args) -> str:
    """Two lines that say what is about to run."""
    objective = recipe.objective
    sizes = ", ".join(f"{name} {number / 1e6:.1f} M" for name, number in objective.parameters(model).items())
    precision = "bf16" if args.bf16 else "float32"
    return (
        f"{objective.title}, recipe {recipe.name}: {sizes} parameters, {objective.describe(model)}\n"
        f"on {recipe.data.dataset}, {args.world_size} process{'es' if args.world_size > 1 else ''} on "
        f"{args.device.type} in {precision}, into {args.output_dir}"
    )


def finish(recipe: Recipe, trainer: JepaTrainer, model, labelled: Labelled | None, seconds: float, folder: Path):
    """Saves the trained model, evaluates it where there are labels, writes results and card, says how to load it."""
    # the other processes are done: their threads are free
    num_threads = torch.get_num_threads() * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(min(num_threads, os.cpu_count() or num_threads))
    with whole_folder(folder) as unfinished:
        save_model(model, trainer.processing_class, unfinished)
        facts = run_facts(recipe, trainer, model, seconds)
        facts["diagnosis"] = diagnose(trainer.state.log_history, trainer.doctor.facts).to_dict()
        if labelled is not None:
            try:
                facts["evaluation"] = evaluate_model(str(unfinished), *labelled(), recipe.evaluation, level="all")
            except InputError as error:
                print(f"The model is saved, but cannot be evaluated: {error}", flush=True)
        draw_curves(trainer.state.log_history, unfinished / "curves.png")
        write_json(unfinished / "results.json", facts | {"history": trainer.state.log_history})
        card = render_template(recipe.objective.card, card_facts(facts, folder))
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    skipped, steps = facts["training"]["skipped_steps"], facts["training"]["steps"]
    if skipped:
        print(f"\n{skipped:,} of {steps:,} steps were skipped, see {Path(trainer.args.output_dir, NONFINITE)}.")
    if trainer.quarantine.entries:
        print(f"\n{trainer.quarantine.summary()} and were replaced by others.")
    if "evaluation" in facts:
        print("\n" + format_table(facts["evaluation"]))
    print(CLOSING.format(folder=folder, downstream=recipe.objective.downstream), flush=True)


def card_facts(facts: dict, folder: Path) -> dict:
    """The facts with the folder's place, the settings as a recipe and the evaluation as a table."""
    table = {"evaluation_table": format_table(facts["evaluation"])} if "evaluation" in facts else {}
    return facts | {"folder": folder, "settings_text": recipe_text(facts["settings"])} | table


CLOSING = """
Saved in {folder} (weights, config, image processor, curves.png, results.json, README.md). Load it:

    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained("{folder}")
    encoder = AutoModel.from_pretrained("{folder}", trust_remote_code=True)  # {downstream}
    embeddings = encoder(**processor(images, return_tensors="pt")).pooler_output"""


def trained_seconds(logged: list[dict]) -> float:
    """Seconds of training by the log, the parts before a resume included."""
    seen = [0, *(entry["images_seen"] for entry in logged)]
    return math.fsum(
        (now - before) / entry["images_per_second"] for before, now, entry in zip(seen, seen[1:], logged, strict=False)
    )


def run_facts(recipe: Recipe, trainer: JepaTrainer, model, seconds: float) -> dict:
    """What is known about a finished run, for `results.json` and the card."""
    state, args = trainer.state, trainer.args
    logged = [entry for entry in state.log_history if "rankme" in entry]
    objective = recipe.objective
    speeds = sorted(entry["images_per_second"] for entry in logged)
    training = {
        "steps": state.global_step,
        "skipped_steps": num_skipped(state.log_history),
        "batch_size": trainer.clock.batch_size,
        "images_seen": trainer.clock.samples_seen(state.global_step),
        "seconds": round(trained_seconds(logged) or seconds, 1),
        "processes": args.world_size,
        "precision": "bf16" if args.bf16 else "float32",
    }
    if logged:
        training |= {
            "images_per_second": round(speeds[len(speeds) // 2], 1),
            "data_wait_share": round(math.fsum(entry["data_wait_share"] for entry in logged) / len(logged), 4),
            # of each level at the first log and at the last
            "rankme": [
                [entry[level_term("rankme", level)] for entry in (logged[0], logged[-1])]
                for level in range(model.config.num_levels)
            ],
            "loss_last": logged[-1]["loss"],
        }
    return {
        "recipe": recipe.name,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "command": shlex.join(["cjepa", *recipe.command]),
        "seed": args.seed,
        "settings": recipe.values,
        "model": {
            "parameters": objective.parameters(model),
            **{name: getattr(model.config, name) for name in model_fields(objective.config_class)},
        },
        "data": {
            "dataset": recipe.data.dataset,
            "num_train_images": trainer.num_train_images,
            "num_unreadable": len(trainer.quarantine.entries),
        },
        "training": training,
        "machine": machine_facts(),
        "software": software_facts(),
    }
