"""A pre-training run from recipe to published folder."""

import time
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.trainer_utils import set_seed
from transformers.training_args import ParallelMode

from modeling_cjepa.configuration_cjepa import pair
from trainers.allocator import keep_freed_memory
from trainers.checkpoints import (
    changed_batches,
    changed_settings,
    check_same_model,
    find_checkpoint,
    is_finished,
    load_state,
)
from trainers.datasets import ImageSource
from trainers.decoded_cache import with_cache
from trainers.errors import InputError
from trainers.files import full_disk_named
from trainers.lanes import choose_lanes, uneven_lanes
from trainers.model_facts import parameters_by_part
from trainers.nonfinite import check_finite_weights
from trainers.pretrain_results import Labelled, finish, run_facts
from trainers.publication import push_finished
from trainers.recipe_files import RECIPE, write_recipe
from trainers.recipes import Recipe
from trainers.run_arguments import training_arguments
from trainers.run_lock import only_run_in
from trainers.sharding import whole_model
from trainers.sources import load_sources
from trainers.stopping import stopped_sentence
from trainers.stream_sources import PretrainDataArguments, load_stream
from trainers.streams import Shards
from trainers.subsets import with_common_classes
from trainers.trainer import JepaTrainer
from trainers.training_args import JepaTrainingArguments
from trainers.warm_start import load_start_weights, read_start


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
    args = prepare_process(recipe)
    model = build_model(recipe, args)
    output = Path(args.output_dir)
    with only_run_in(output):
        trainer, labelled, checkpoint = prepare(recipe, args, model)
        with full_disk_named(output):
            return _run(recipe, trainer, labelled, checkpoint)


def prepare_process(recipe: Recipe) -> JepaTrainingArguments:
    """The arguments of a run, and the process as fast as it can be on its device."""
    # numbers too small for a normal float slow a CPU's matrix products down tenfold and more
    torch.set_flush_denormal(True)
    args = training_arguments(recipe)
    if args.device.type == "cpu":
        keep_freed_memory()
    return args


def prepare(recipe: Recipe, args: JepaTrainingArguments, model) -> tuple[JepaTrainer, Labelled | None, str | None]:
    """The trainer of a run, what gives labelled images, and the checkpoint to go on from; its folder is as it was."""
    checkpoint = find_own_checkpoint(args, model)
    announce(describe(recipe, model), recipe, args, checkpoint)
    image_size = max(pair(model.config.image_size))
    train, labelled = load_images(recipe, image_size, args)
    if recipe.data.decoded_cache is not None:
        train = read_decoded(train, recipe.data, image_size, args)
    trainer = build_trainer(recipe, model, args, train)
    trainer.describe_run = partial(run_facts, recipe, trainer, model)
    return trainer, labelled, checkpoint


def find_own_checkpoint(args: JepaTrainingArguments, model: PreTrainedModel) -> str | None:
    """As [`find_checkpoint`]; one of another model is refused, too."""
    checkpoint = find_checkpoint(args)
    if checkpoint is not None:
        check_same_model(checkpoint, model.config)
    return checkpoint


def _run(recipe: Recipe, trainer: JepaTrainer, labelled: Labelled | None, checkpoint: str | None) -> Path | None:
    """Trains, and saves and evaluates what was trained."""
    seconds = train(recipe, trainer, checkpoint)
    if seconds is None:
        return None
    folder = Path(trainer.args.output_dir, "final")
    model = whole_model(trainer)
    if trainer.is_world_process_zero():
        finish(recipe, trainer, model, labelled, seconds, folder)
        if trainer.push is not None:
            push_finished(folder, trainer.push)
    return folder


def train(recipe: Recipe, trainer: JepaTrainer, checkpoint: str | None) -> float | None:
    """
    Trains to the end of a run.

    Args:
        recipe ([`Recipe`]): Of the run, which is written beside its checkpoints.
        trainer ([`JepaTrainer`]): What trains.
        checkpoint (`str`, *optional*): Where to go on from; of a run that was at its end the weights are loaded.

    Returns:
        `float`: Seconds that this call took; None if a signal or `max_hours` has stopped it, with a checkpoint.

    Raises:
        InputError: The checkpoint is of other images, the weights are not finite, or the doctor has stopped the run.
    """
    args = trainer.args
    trainer.take_over(checkpoint)  # refuses other images before anything is written
    if trainer.is_world_process_zero():
        write_recipe(recipe.values, Path(args.output_dir, RECIPE))
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
    return seconds


def load_images(
    recipe: Recipe, image_size: int, args: JepaTrainingArguments
) -> tuple[ImageSource | Shards, Labelled | None]:
    """The images to train on, and what gives labelled ones to evaluate with; None, which is said, if it cannot be."""
    reason = None if recipe.run.evaluate else "--evaluate false."
    if recipe.data.streaming:
        stream = load_stream(recipe.data)
        train, reason = stream.shards, reason or stream.without_evaluation()
        labelled = partial(stream.some_images, recipe.evaluation.num_probe_images)
        lanes = choose_lanes(train.num_shards, args.world_size, train.name)
        unequal = uneven_lanes(train.num_shards, lanes, train.shard_rows)
        if unequal is not None and args.process_index == 0:
            print(unequal, flush=True)
    else:
        train, test = load_sources(recipe.data, image_size, not args.disable_tqdm)
        labelled = partial(with_common_classes, train, test)
        if args.process_index == 0:
            chosen = f", chosen by {train.chosen_by} (null takes all)" if train.chosen_by else ""
            print(f"{len(train):,} train images{chosen}", flush=True)
        try:
            labelled()
        except InputError as error:
            reason = reason or error
    if reason is not None and args.process_index == 0:
        print(f"The encoder will be saved, but not evaluated: {reason}", flush=True)
    return train, labelled if reason is None else None


def read_decoded(
    train: ImageSource, data: PretrainDataArguments, image_size: int, args: JepaTrainingArguments
) -> ImageSource:
    """The train images from their cache of decoded ones, which is made first if there is none."""
    if data.decoded_size < image_size:
        raise InputError(f"decoded_size={data.decoded_size} is less than the {image_size} pixels of a view; raise it.")
    workers, progress = args.dataloader_num_workers, not args.disable_tqdm
    return with_cache(train, data.decoded_cache, data.decoded_size, workers, progress)


def choose_attention(recipe: Recipe, args: JepaTrainingArguments) -> str:
    """The implementation of attention on the run's device; one that does not train there is refused."""
    attention = recipe.run.attention(args.device, args.bf16)
    if attention == "flex_attention" and args.device.type == "cpu":
        raise InputError("attn_implementation='flex_attention' trains on a GPU only; choose sdpa or eager.")
    return attention


def build_model(recipe: Recipe, args: JepaTrainingArguments) -> PreTrainedModel:
    """The model of a recipe, initialised from its seed."""
    attention = choose_attention(recipe, args)
    start = None if recipe.run.start_from is None else read_start(recipe)
    set_seed(args.seed)
    try:
        model = recipe.objective.build_model(recipe.model, attention)
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if start is not None:
        sentences = load_start_weights(model, start)
        if args.process_index == 0 and args.resume_from_checkpoint is None:
            told = "".join(f"\n- {sentence}" for sentence in sentences)
            print(f"starting from {recipe.run.start_from}{told}", flush=True)
    return model


def build_trainer(recipe: Recipe, model, args, train_source: ImageSource | Shards) -> JepaTrainer:
    """The trainer of a recipe on its train images."""
    num_images = train_source.num_images if isinstance(train_source, Shards) else len(train_source)
    check_training(recipe, model, args, num_images, train_source.name)
    try:
        return recipe.objective.build_trainer(model, args, recipe.data, train_source)
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise InputError(f"The run cannot start: {' '.join(str(error).split())}") from error


def check_training(
    recipe: Recipe, model: PreTrainedModel, args: JepaTrainingArguments, num_images: int | None, name: str
):
    """
    Refuses what cannot be trained, as far as that is known without looking at an image.

    Args:
        recipe ([`Recipe`]): What to train by.
        model (`PreTrainedModel`): What to train.
        args ([`JepaTrainingArguments`]): How.
        num_images (`int`, *optional*): Train images; None where their number is not known.
        name (`str`): What an error calls them.

    Raises:
        InputError: A batch is too large for the images or too small for the loss, or the model or the processes
            cannot do what the arguments ask for.
    """
    batch_size = args.train_batch_size * args.world_size
    if num_images is not None and num_images < batch_size:
        raise InputError(
            f"{name} has {num_images} images, fewer than the {batch_size} of a batch over all processes; lower "
            "--per_device_train_batch_size or give more images."
        )
    if batch_size < 2 and recipe.objective.batch_of_one_is_error(model.config):
        raise InputError("A batch of 1 image has no variance; raise --per_device_train_batch_size to 2 or more.")
    if args.gradient_checkpointing and not can_checkpoint(model):
        raise InputError("gradient_checkpointing: no layer of this model can do it; leave it out.")
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise InputError(
            "fsdp shards a model over processes that a launcher has started, and none has; start the run with "
            "torchrun or accelerate launch, or leave --fsdp out."
        )


def can_checkpoint(model: PreTrainedModel) -> bool:
    """Whether a layer of a model can compute its activations again instead of keeping them."""
    return any(hasattr(module, "gradient_checkpointing") for module in model.modules())


def describe(recipe: Recipe, model) -> str:
    """What is about to be trained."""
    sizes = ", ".join(f"{name} {number / 1e6:.1f} M" for name, number in parameters_by_part(model).items())
    return f"{recipe.objective.title}, recipe {recipe.name}: {sizes} parameters, {recipe.objective.describe(model)}"


def announce(what: str, recipe: Recipe, args: JepaTrainingArguments, checkpoint: str | None):
    """Says what is about to be trained, on what, where, and from which checkpoint on."""
    if args.process_index != 0:
        return
    print(
        f"{what}\non {recipe.data.dataset}, {args.describe_devices()}, into {args.output_dir}",
        flush=True,
    )
    if checkpoint is not None:
        changed = changed_settings(recipe, checkpoint) + changed_batches(checkpoint, args)
        print(f"going on from {checkpoint}{changed}", flush=True)
