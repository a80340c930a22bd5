"""What a pre-training run leaves behind: the published model, its evaluation, its results and its card."""

import math
import os
import shlex
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from modeling_cjepa.losses_cjepa import level_term
from trainers.cards import write_card
from trainers.data_facts import data_facts
from trainers.datasets import ImageSource
from trainers.doctor import diagnose
from trainers.errors import InputError
from trainers.evaluation import evaluate_model
from trainers.files import write_json
from trainers.model_facts import model_facts
from trainers.nonfinite import NONFINITE, num_skipped
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
    print(CLOSING.format(folder=folder, downstream=recipe.objective.downstream), flush=True)


CLOSING = """
Saved in {folder} (weights, config, image processor, curves.png, results.json, README.md). Load it:

    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained("{folder}")
    encoder = AutoModel.from_pretrained("{folder}", trust_remote_code=True)  # {downstream}
    embeddings = encoder(**processor(images, return_tensors="pt")).pooler_output

Publish it: cjepa publish {folder} --repo YOU/NAME"""


def trained_seconds(logged: list[dict]) -> float:
    """Seconds of training by the log, the parts before a resume included."""
    seen = [0, *(entry["images_seen"] for entry in logged)]
    return math.fsum(
        (now - before) / entry["images_per_second"] for before, now, entry in zip(seen, seen[1:], logged, strict=False)
    )


def run_facts(recipe: Recipe, trainer: JepaTrainer, model, seconds: float = 0.0) -> dict:
    """What is known about a run, for `results.json` and the card; `seconds` where the log does not tell how long."""
    state, args = trainer.state, trainer.args
    logged = [entry for entry in state.log_history if "rankme" in entry]
    speeds = sorted(entry["images_per_second"] for entry in logged)
    training = {
        "steps": state.global_step,
        "skipped_steps": num_skipped(state.log_history),
        "batch_size": trainer.clock.batch_size,
        "images_seen": trainer.clock.samples_seen(state.global_step),
        "seconds": round(trained_seconds(logged) or seconds, 1),
        "processes": args.world_size,
        "precision": "bf16" if args.bf16 else "float32",
        "schedule": args.schedule_facts(),
        **energy_facts(Path(args.output_dir)),
    }
    if logged:
        training |= {
            "images_per_second": round(speeds[len(speeds) // 2], 1),
            "data_wait_share": round(math.fsum(entry["data_wait_share"] for entry in logged) / len(logged), 4),
            # of each level at the first log and at the last
            **{
                sign: [
                    [entry[level_term(sign, level)] for entry in (logged[0], logged[-1])]
                    for level in range(model.config.num_levels)
                ]
                for sign in ("rankme", "feature_std")
            },
            "loss_last": logged[-1]["loss"],
        }
    return {
        "recipe": recipe.name,
        **({"start": recipe.run.start_from} if recipe.run.start_from else {}),
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
