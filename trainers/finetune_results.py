"""What a fine-tuning run leaves behind: the published classifier, its results and its card."""

import json
import shlex
from datetime import datetime, timezone
from pathlib import Path

from transformers import Trainer, TrainerState

from trainers.cards import write_card
from trainers.data_facts import data_facts
from trainers.files import write_json
from trainers.finetune_args import FinetuneTrainingArguments, Finetuning
from trainers.finetune_data import Splits
from trainers.model_facts import classifier_facts
from trainers.precision import precision_name
from trainers.probes import accuracy_interval, top_accuracies
from trainers.public_facts import shown_name
from trainers.publishing import save_model, whole_folder
from trainers.reports import draw_curves, energy_facts, machine_facts, software_facts

_PANELS = (
    ("loss", ("loss", "eval_loss"), True),
    ("accuracy on held-out images", ("eval_accuracy",), False),
    ("learning rate of the head", ("learning_rate",), True),
)


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
        write_card(unfinished, "classifier", json.loads(json.dumps(facts, default=str)), str(folder))
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
    was_loaded = args.load_best_model_at_end and state.best_model_checkpoint is not None
    if not was_loaded or state.best_global_step not in steps:
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
            "start": shown_name(run.model),
            "from_scratch": settings.from_scratch,
            "trained_parameters": num_trained,
            **classifier_facts(model),
        },
        "data": {
            **data_facts(run.data),
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
            "precision": precision_name(args.precision, args.device),
            **best_checkpoint(args, state),
            **energy_facts(Path(args.output_dir)),
        },
        "machine": machine_facts(),
        "software": software_facts(),
    }
