"""A fine-tuning run from a saved encoder to a published classifier, on transformers' own `Trainer`.

The optimizer's groups, the loss of mixed labels and the metrics are arguments of `Trainer`, and our models' parameters
have one name in memory and on disk, so that it reloads its best checkpoint exactly.
"""

import json
import shlex
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
import yaml
from transformers import ProgressCallback, Trainer, TrainerState
from transformers.trainer_utils import set_seed

from modeling_cjepa.configuration_cjepa import pair
from trainers.callbacks import CropEpochCallback, ImagesPerSecondBar
from trainers.checkpoints import WITHOUT_EFFECT, find_checkpoint, is_finished, load_state
from trainers.classifiers import add_adapters, build_classifier, classifier_config, freeze_encoder
from trainers.datasets import ImageDataset, ImageSource
from trainers.errors import InputError
from trainers.files import full_disk_named, write_json, write_text_atomically
from trainers.finetune_args import LEARNING_RATES, FinetuneArguments, FinetuneDataArguments, FinetuneTrainingArguments
from trainers.finetune_data import (
    ClassificationCollator,
    ClassificationLoss,
    Splits,
    TrainImages,
    changed_fields,
    finetune_transform,
    load_splits,
)
from trainers.finetune_trainer import ClassifierTrainer, check_possible, num_ranks
from trainers.layer_decay import parameter_groups
from trainers.pretraining import start_arguments
from trainers.probes import accuracy_interval, top_accuracies
from trainers.publishing import save_model, whole_folder
from trainers.readable import write_skipped
from trainers.recipes import RunArguments, recipe_text
from trainers.reports import draw_curves, machine_facts, software_facts
from trainers.resources import render_template
from trainers.run_lock import only_run_in
from trainers.stopping import stopped_sentence
from trainers.transforms import eval_transform, image_processor

_SETTINGS = "settings.yaml"
# in it, which images the run is of
_IMAGES = "images"
# what a continued run may change beside what has no effect
_LENGTH = {"max_steps", "num_train_epochs"}
_PANELS = (
    ("loss", ("loss", "eval_loss"), True),
    ("accuracy on held-out images", ("eval_accuracy",), False),
    ("learning rate of the head", ("learning_rate",), True),
)


@dataclass
class Finetuning:
    """
    A run, ready to be started.

    Args:
        model (`str`): Folder of the encoder, or its id on the Hub.
        settings ([`FinetuneArguments`]): What of it is trained.
        data ([`FinetuneDataArguments`]): On what.
        training (`dict`): Fields of [`FinetuneTrainingArguments`] that are set.
        command (`list[str]`): The command line it came from, for the record.
    """

    model: str
    settings: FinetuneArguments
    data: FinetuneDataArguments
    training: dict = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    def values(self) -> dict:
        """Every setting that is not as its default, for the record and to compare with when resuming."""
        return (
            {"model": self.model}
            | changed_fields(self.settings)
            | changed_fields(self.data)
            | dict(sorted(self.training.items()))
        )


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
    checkpoint = find_checkpoint(args)
    if checkpoint is not None:
        check_same_settings(checkpoint, run.values(), args.world_size)
    image_size = pair(config.image_size)
    checking = not args.disable_tqdm, args.dataloader_num_workers, args.distributed_state
    splits = load_splits(run.data, max(image_size), *checking)
    images = splits.fingerprints()
    if checkpoint is not None:
        check_same_images(checkpoint, images)
    set_seed(args.seed)
    config = classifier_config(run.model, run.settings, splits.train.label_names)
    model = build_model(run, config, args)
    if args.process_index == 0:
        print(describe(run, model, args, splits), flush=True)
        if checkpoint is not None:
            print(f"going on from {checkpoint}", flush=True)
    trainer = build_trainer(run, model, args, splits.train, splits.validation)
    with full_disk_named(Path(args.output_dir)), only_run_in(Path(args.output_dir)):
        if trainer.is_world_process_zero():
            values = run.values() | {"processes": args.world_size, _IMAGES: images}
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
        test = ImageDataset(splits.test, eval_transform(image_size))
        predicted = trainer.predict(test, metric_key_prefix="test")
        folder = Path(args.output_dir, "final")
        if trainer.is_world_process_zero():
            finish(run, trainer, splits, predicted.predictions, seconds, folder)
        trainer.accelerator.wait_for_everyone()
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
    try:
        return path, dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(f"{path}, the settings of the run to resume, cannot be read; start a new run.") from error


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
        f"{args.world_size} process{'es' if args.world_size > 1 else ''} on {args.device.type} in "
        f"{'bf16' if args.bf16 else 'float32'}, into {args.output_dir}"
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


def finish(run: Finetuning, trainer: Trainer, splits: Splits, ranked, seconds: float, folder: Path):
    """Saves the classifier with its results and card, and says how good it is and how to load it."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    test = splits.test
    num_trained = trainable_parameters(model)
    figures = top_accuracies(ranked, test.labels)
    num_correct = round(figures["accuracy"] * len(test))
    evaluation = {
        **{name: 100 * value for name, value in figures.items()},
        "accuracy_interval": list(accuracy_interval(num_correct, len(test))),
        "test_dataset": test.name,
        "num_test_images": len(test),
    }
    with whole_folder(folder) as unfinished:
        if run.settings.mode == "lora":
            model.save_pretrained(unfinished / "adapter")
            model = model.merge_and_unload()
        save_model(model, trainer.processing_class, unfinished)
        facts = run_facts(run, trainer, model, num_trained, splits, seconds) | {"evaluation": evaluation}
        draw_curves(trainer.state.log_history, unfinished / "curves.png", _PANELS)
        write_json(unfinished / "results.json", facts | {"history": trainer.state.log_history})
        card_facts = facts | {"folder": folder, "settings_text": recipe_text(facts["settings"])}
        card = render_template("classifier.md.j2", json.loads(json.dumps(card_facts, default=str)))
        (unfinished / "README.md").write_text(card, encoding="utf-8")
    low, high = evaluation["accuracy_interval"]
    top5 = f", top-5 {evaluation['top5_accuracy']:.1f} %" if "top5_accuracy" in evaluation else ""
    print(
        f"\naccuracy {evaluation['accuracy']:.1f} % (95 % interval {low:.1f}-{high:.1f}){top5} on {len(test):,} "
        f"images of {test.name}"
    )
    print(_CLOSING.format(folder=folder), flush=True)


_CLOSING = """
Saved in {folder} (weights, config, image processor, curves.png, results.json, README.md). Load it:

    from transformers import pipeline

    classifier = pipeline("image-classification", model="{folder}", trust_remote_code=True)
    classifier("photo.jpg")"""


def trainable_parameters(model) -> int:
    """How many of a model's parameters take gradients."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def best_checkpoint(args: FinetuneTrainingArguments, state: TrainerState) -> dict:
    """The step of the checkpoint that was chosen, by what, and its held-out accuracy; None each if it is the last."""
    steps = {entry["step"]: entry["eval_accuracy"] for entry in state.log_history if "eval_accuracy" in entry}
    if not args.load_best_model_at_end or state.best_global_step not in steps:
        return {"best_step": None, "best_by": None, "best_held_out_accuracy": None}
    return {
        "best_step": state.best_global_step,
        "best_by": args.metric_for_best_model.removeprefix("eval_"),
        "best_held_out_accuracy": 100 * steps[state.best_global_step],
    }


def run_facts(run: Finetuning, trainer: Trainer, model, num_trained: int, splits: Splits, seconds: float) -> dict:
    """What is known about a finished run, for `results.json` and the card."""
    train, validation, _, skipped = splits
    args, state, settings = trainer.args, trainer.state, run.settings
    return {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "command": shlex.join(["cjepa", *run.command]),
        "seed": args.seed,
        "settings": run.values() | {"dataset": run.data.dataset},
        "model": {
            "start": run.model,
            "from_scratch": settings.from_scratch,
            "parameters": model.num_parameters(),
            "trained_parameters": num_trained,
            "image_size": list(pair(model.config.image_size)),
            "classes": list(model.config.id2label.values()),
        },
        "data": {
            "dataset": run.data.dataset,
            "train_dataset": train.name,
            "num_train_images": len(train),
            "num_held_out_images": 0 if validation is None else len(validation),
            "num_skipped_images": len(skipped),
            "label_share": run.data.label_share,
        },
        "training": {
            "mode": settings.mode,
            "classifier_pooling": settings.classifier_pooling,
            "steps": state.global_step,
            "epochs": round(state.epoch or 0, 2),
            "batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
            "learning_rate": args.learning_rate,
            "weight_decay": args.weight_decay,
            "label_smoothing": args.label_smoothing_factor,
            **{name: getattr(settings, name) for name in ("layer_decay", "drop_path_rate", "mixup", "cutmix")},
            "seconds": round(seconds, 1),
            "processes": args.world_size,
            "precision": "bf16" if args.bf16 else "float32",
            **best_checkpoint(args, state),
        },
        "machine": machine_facts(),
        "software": software_facts(),
    }
