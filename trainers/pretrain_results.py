"""What a pre-training run leaves behind: the published model, its evaluation, its results and its card."""

import os
import shlex
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from trainers.cards import write_card
from trainers.data_facts import data_facts
from trainers.datasets import ImageSource
from trainers.doctor import diagnose
from trainers.errors import InputError
from trainers.evaluation import evaluate_model
from trainers.files import write_json
from trainers.log_facts import log_facts
from trainers.model_facts import model_facts
from trainers.nonfinite import NONFINITE, num_skipped
from trainers.precision import precision_name
from trainers.public_facts import shown_name
from trainers.publishing import save_model, whole_folder
from trainers.recipes import Recipe
from trainers.reports import draw_curves, energy_facts, format_table, machine_facts, software_facts
from trainers.trainer import JepaTrainer

# gives labelled images to fit probes on, and to test them on
Labelled = Callable[[], tuple[ImageSource, ImageSource]]


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
        write_card(unfinished, model.config.model_type, facts, str(folder))
    skipped, steps = facts["training"]["skipped_steps"], facts["training"]["steps"]
    if skipped:
        print(f"\n{skipped:,} of {steps:,} steps were skipped, see {Path(trainer.args.output_dir, NONFINITE)}.")
    if trainer.quarantine.entries:
        print(f"\n{trainer.quarantine.summary()} and were replaced by others.")
    if "evaluation" in facts:
        print("\n" + format_table(facts["evaluation"]))
    print(
        CLOSING.format(folder=folder, quoted=shlex.quote(str(folder)), downstream=recipe.objective.downstream),
        flush=True,
    )


CLOSING = """
Saved in {folder} (weights, config, image processor, curves.png, results.json, README.md). Load it:

    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained("{folder}")
    encoder = AutoModel.from_pretrained("{folder}", trust_remote_code=True)  # {downstream}
    embeddings = encoder(**processor(images, return_tensors="pt")).pooler_output

Publish it: cjepa publish {quoted} --repo YOU/NAME"""


def run_facts(recipe: Recipe, trainer: JepaTrainer, model, seconds: float = 0.0) -> dict:
    """What is known about a run, for `results.json` and the card; `seconds` where the log does not tell how long."""
    state, args = trainer.state, trainer.args
    training = {
        "steps": state.global_step,
        "skipped_steps": num_skipped(state.log_history),
        "batch_size": trainer.clock.batch_size,
        "images_seen": trainer.clock.samples_seen(state.global_step),
        "seconds": seconds,
        "processes": args.world_size,
        "precision": precision_name(args.precision, args.device),
        "schedule": args.schedule_facts(),
        **energy_facts(Path(args.output_dir)),
        **log_facts(state.log_history),
    }
    return {
        "recipe": recipe.name,
        **({"start": shown_name(recipe.run.start_from)} if recipe.run.start_from else {}),
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "command": shlex.join(["cjepa", *recipe.command]),
        "seed": args.seed,
        "settings": recipe.values,
        "model": model_facts(model),
        "data": {
            **data_facts(recipe.data),
            "num_train_images": trainer.num_train_images,
            "num_unreadable": len(trainer.quarantine.entries),
        },
        "training": training,
        "machine": machine_facts(),
        "software": software_facts(),
    }
