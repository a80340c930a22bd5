"""A fine-tuning run from a saved encoder to a published classifier, on transformers' own `Trainer`.

The optimizer's groups, the loss of mixed labels and the metrics are arguments of `Trainer`, and our models' parameters
have one name in memory and on disk, so that it reloads its best checkpoint exactly.
"""

import time
from pathlib import Path

import torch
import yaml
from transformers import ProgressCallback, Trainer
from transformers.trainer_utils import set_seed

from modeling_cjepa.configuration_cjepa import pair
from trainers.callbacks import CropEpochCallback, ImagesPerSecondBar
from trainers.checkpoints import WITHOUT_EFFECT, find_checkpoint, is_finished, load_state
from trainers.classifiers import add_adapters, build_classifier, classifier_config, freeze_encoder
from trainers.datasets import ImageDataset, ImageSource
from trainers.errors import InputError
from trainers.files import full_disk_named, write_text_atomically
from trainers.finetune_args import LEARNING_RATES, FinetuneTrainingArguments, Finetuning
from trainers.finetune_data import (
    ClassificationCollator,
    ClassificationLoss,
    Splits,
    TrainImages,
    finetune_transform,
    load_labelled_splits,
)
from trainers.finetune_results import finish, trainable_parameters
from trainers.finetune_trainer import ClassifierTrainer, check_possible, num_ranks
from trainers.layer_decay import parameter_groups
from trainers.probes import top_accuracies
from trainers.publication import push_finished
from trainers.readable import write_skipped
from trainers.recipe_files import read_settings, recipe_text
from trainers.recipes import RunArguments
from trainers.run_arguments import start_arguments
from trainers.run_lock import only_run_in
from trainers.stopping import stopped_sentence
from trainers.transforms import eval_transform, image_processor

_SETTINGS = "settings.yaml"
# in it, which images the run is of
_IMAGES = "images"
# what a continued run may change beside what has no effect
_LENGTH = {"max_steps", "num_train_epochs"}


def finetune(run: Finetuning) -> Path | None:
    """
    Trains a classifier, reports its accuracy on the evaluation split and saves it.

    Args:
        run ([`Finetuning`]): What to do.

    Returns:
        `Path`: The `final` folder: weights, configuration with the classes' names, code, image processor, curves,
        `results.json` and model card; with LoRA the adapter, too, in `adapter`. None if a signal or `max_hours` has
        stopped the run, with a checkpoint.

    Raises:
        InputError: The run cannot be made as it is; the message says what to change.
    """
    torch.set_flush_denormal(True)
    config = classifier_config(run.model, run.settings)  # a mistake is told before images are read
    args = training_arguments(run)
    output = Path(args.output_dir)
    with only_run_in(output):
        trainer, splits, checkpoint = prepare(run, args, pair(config.image_size))
        with full_disk_named(output):
            return _run(run, trainer, splits, checkpoint)


def prepare(
    run: Finetuning, args: FinetuneTrainingArguments, image_size: tuple[int, int]
) -> tuple[ClassifierTrainer, Splits, str | None]:
    """The trainer of a run, its images, and the checkpoint to go on from; nothing is written yet."""
    checkpoint = find_checkpoint(args)
    if checkpoint is not None:
        check_same_settings(checkpoint, run.values(), args.world_size)
    checking = not args.disable_tqdm, args.dataloader_num_workers, args.distributed_state
    splits = load_labelled_splits(run.data, max(image_size), *checking)
    if checkpoint is not None:
        check_same_images(checkpoint, splits.fingerprints())
    set_seed(args.seed)
    config = classifier_config(run.model, run.settings, splits.train.label_names)
    model = build_model(run, config, args)
    if args.process_index == 0:
        print(describe(run, model, args, splits), flush=True)
        if checkpoint is not None:
            print(f"going on from {checkpoint}", flush=True)
    return build_trainer(run, model, args, splits.train, splits.validation), splits, checkpoint


def _run(run: Finetuning, trainer: ClassifierTrainer, splits: Splits, checkpoint: str | None) -> Path | None:
    """Trains, and saves and tests what was trained."""
    args = trainer.args
    if trainer.is_world_process_zero():
        values = run.values() | {"processes": args.world_size, _IMAGES: splits.fingerprints()}
        write_text_atomically(Path(args.output_dir, _SETTINGS), recipe_text(values))
        write_skipped(Path(args.output_dir), splits.skipped)
    started = time.perf_counter()
    train(trainer, checkpoint)
    if trainer.stop.reason is not None:
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            print(stopped_sentence(trainer), flush=True)
        return None
    trainer.check_weights()
    seconds = time.perf_counter() - started
    test = ImageDataset(splits.test, eval_transform(pair(trainer.model.config.image_size)))
    predicted = trainer.predict(test, metric_key_prefix="test")
    folder = Path(args.output_dir, "final")
    if trainer.is_world_process_zero():
        finish(run, trainer, splits, predicted.predictions, seconds, folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.push is not None:
        push_finished(folder, trainer.push)  # in the main process; the others have nothing left to do
    return folder


def training_arguments(run: Finetuning) -> FinetuneTrainingArguments:
    """The run's arguments, with the learning rate of its mode; without held-out images nothing is evaluated on."""
    values = {"learning_rate": LEARNING_RATES[run.settings.mode]} | run.training
    if run.data.validation_share == 0:
        values |= {"eval_strategy": "no", "load_best_model_at_end": False, "metric_for_best_model": None}
    return start_arguments(FinetuneTrainingArguments, values, f"finetune-{run.settings.mode}")


def check_same_settings(checkpoint: str, values: dict, num_processes: int):
    """Refuses to go on with other settings than those a checkpoint was trained with, naming the first."""
    path, before = _settings_before(checkpoint)
    now = values | {"processes": num_processes}
    now = yaml.safe_load(recipe_text(now))  # as they are read
    for name in sorted((before.keys() | now.keys()) - WITHOUT_EFFECT - _LENGTH - {_IMAGES}):
        if before.get(name) != now.get(name):
            raise InputError(
                f"{checkpoint} was trained with {name} {before.get(name, 'not set')}, and it is now "
                f"{now.get(name, 'not set')}; go on with the settings in {path}."
            )


def check_same_images(checkpoint: str, images: dict[str, str]):
    """Refuses to go on with other images: what is held out of them is another choice, and was trained on in part."""
    before = _settings_before(checkpoint)[1].get(_IMAGES, images)
    for name, now in images.items():
        if before.get(name) != now:
            raise InputError(
                f"{checkpoint} was trained with other {name} images ({before.get(name)}) than there are now ({now}); "
                "make the data set as it was, or start a new run with another --output_dir."
            )


def _settings_before(checkpoint: str) -> tuple[Path, dict]:
    """The file with the settings of the run that wrote a checkpoint, and what it holds."""
    path = Path(checkpoint).parent / _SETTINGS
    return path, read_settings(path, "start a new run")


def build_model(run: Finetuning, config, args: FinetuneTrainingArguments):
    """The classifier, of which only what its mode trains takes gradients."""
    attention = RunArguments().attention(args.device, args.bf16)
    model = build_classifier(run.model, config, run.settings.from_scratch, attention)
    if run.settings.mode == "frozen":
        freeze_encoder(model)
    return add_adapters(model, run.settings, run.model) if run.settings.mode == "lora" else model


def describe(run: Finetuning, model, args, splits: Splits) -> str:
    """Two lines that say what is about to run."""
    train, validation, test, _ = splits
    number = trainable_parameters(model)
    start = "random weights, the architecture of" if run.settings.from_scratch else ""
    held_out = f", {len(validation):,} held out" if validation is not None else ""
    return (
        f"{run.settings.mode} fine-tuning of {start} {run.model}: {number / 1e6:.2f} M parameters to train, head "
        f"{run.settings.classifier_pooling}, {len(train.label_names)} classes\n".replace("  ", " ")
        + f"on {len(train):,} images of {train.name}{held_out}, tested on {len(test):,} of {test.name}, "
        f"{args.describe_devices()}, into {args.output_dir}"
    )


def build_trainer(
    run: Finetuning, model, args: FinetuneTrainingArguments, train: ImageSource, validation: ImageSource | None
) -> ClassifierTrainer:
    """The trainer of a classifier."""
    config, settings, data = model.config, run.settings, run.data
    image_size, num_classes = pair(config.image_size), config.num_labels
    check_possible(args, len(train), num_classes)
    rates = (args.learning_rate, args.weight_decay, settings.layer_decay)
    groups = parameter_groups(model.named_parameters(), config, *rates)
    try:
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
        trainer = ClassifierTrainer(
            model,
            args,
            data_collator=ClassificationCollator(
                data.image_mean, data.image_std, num_classes, settings.mixup, settings.cutmix
            ),
            train_dataset=TrainImages(train, finetune_transform(image_size, data), args.seed),
            eval_dataset=None if validation is None else ImageDataset(validation, eval_transform(image_size)),
            processing_class=image_processor(image_size, data.image_mean, data.image_std),
            compute_loss_func=ClassificationLoss(args.label_smoothing_factor),
            compute_metrics=lambda predicted: top_accuracies(predicted.predictions, predicted.label_ids),
            # not the logits of all classes, but those that the metrics look at
            preprocess_logits_for_metrics=lambda logits, labels: logits.topk(num_ranks(num_classes)).indices,
            optimizer_cls_and_kwargs=(optimizer_class, options | {"params": groups}),
            callbacks=[CropEpochCallback()],
        )
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        raise InputError(f"The run cannot start: {' '.join(str(error).split())}") from error
    if trainer.pop_callback(ProgressCallback) is not None:
        figures = {"loss": "loss", "eval_accuracy": "held-out accuracy"}
        trainer.add_callback(ImagesPerSecondBar("fine-tuning", figures))
    return trainer


def train(trainer: Trainer, checkpoint: str | None):
    """Trains from the start or a checkpoint; of a run that was at its end, loads what it would have published."""
    if checkpoint is None or not is_finished(checkpoint, trainer.args):
        trainer.train(resume_from_checkpoint=checkpoint)
        return
    trainer.state = load_state(checkpoint)
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
        trainer._load_best_model()
    else:
        trainer._load_from_checkpoint(checkpoint)
