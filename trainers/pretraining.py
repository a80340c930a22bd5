"""A pre-training run from recipe to published folder."""

import json
import math
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint, set_seed

from modeling_cjepa import CJepaConfig, CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from trainers.datasets import ImageDataset, ImageSource, load_sources
from trainers.errors import InputError
from trainers.evaluation import evaluate_model, format_table
from trainers.files import write_json
from trainers.publishing import render_card, save_model, whole_folder
from trainers.recipes import Recipe, model_fields, write_recipe
from trainers.reports import draw_curves, machine_facts, software_facts
from trainers.trainer import CJepaTrainer
from trainers.training_args import CJepaTrainingArguments
from trainers.transforms import image_processor, train_transform

LAST = "last"


def pretrain(recipe: Recipe) -> Path:
    """
    Pre-trains, saves, evaluates and describes a model.

    Args:
        recipe ([`Recipe`]): What to do.

    Returns:
        `Path`: The `final` folder: weights of all three parts, configuration, code, image processor, curves,
        `results.json` and model card.

    Raises:
        InputError: The recipe cannot be run as it is; the message says what to change.
    """
    args = training_arguments(recipe)
    model = build_model(recipe, args)
    checkpoint = find_checkpoint(args)
    if checkpoint is not None:
        check_same_model(checkpoint, model.config)
    if args.process_index == 0:
        print(describe(recipe, model, args), flush=True)
    with args.main_process_first(desc="reading the images"):
        train_source, eval_source = load_sources(recipe.data, max(pair(model.config.image_size)), args.seed)
    trainer = build_trainer(recipe, model, args, train_source)
    if trainer.is_world_process_zero():
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        write_recipe(recipe.values, Path(args.output_dir, "recipe.yaml"))
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    trainer.accelerator.wait_for_everyone()
    folder = Path(args.output_dir, "final")
    if trainer.is_world_process_zero():
        finish(recipe, trainer, train_source, eval_source, seconds, folder)
    return folder


def training_arguments(recipe: Recipe) -> CJepaTrainingArguments:
    """The run's arguments; without an output folder a new one under `runs/` is named after recipe and time."""
    values = dict(recipe.training)
    values.setdefault("output_dir", f"runs/{recipe.name}-{datetime.now():%Y%m%d-%H%M%S}")
    values.setdefault("report_to", "none")
    try:
        return CJepaTrainingArguments(**values)
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error


def build_model(recipe: Recipe, args: CJepaTrainingArguments) -> CJepaForPreTraining:
    """The model of a recipe, initialised from its seed, with masks that can be drawn on its grid."""
    attention = recipe.run.attn_implementation
    if attention == "auto":
        attention = "eager" if args.bf16 and args.device.type == "cpu" else "sdpa"
    set_seed(args.seed)
    try:
        config = CJepaConfig(**recipe.model)
        model = CJepaForPreTraining._from_config(config, attn_implementation=attention)
        model.sample_masks(2)
    except (ValueError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error
    return model


def build_trainer(recipe: Recipe, model, args, train_source: ImageSource) -> CJepaTrainer:
    """The trainer of a recipe on its train images."""
    data = recipe.data
    batch_size = args.train_batch_size * args.world_size
    if len(train_source) < batch_size:
        raise InputError(
            f"{train_source.name} has {len(train_source)} images, fewer than the {batch_size} of a batch over all "
            "processes; lower --per_device_train_batch_size or give more images."
        )
    transform = train_transform(pair(model.config.image_size), data.crop_scale, data.horizontal_flip)
    dataset = ImageDataset(train_source, transform, args.seed)
    return CJepaTrainer(
        model, args, train_dataset=dataset, image_mean=data.image_mean, image_std=data.image_std
    )  # fmt: skip


def find_checkpoint(args: CJepaTrainingArguments) -> str | None:
    """The checkpoint to resume from, if any; a folder that already holds a run is never started anew silently."""
    asked, output = args.resume_from_checkpoint, Path(args.output_dir)
    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    if (output / "final").exists():
        raise InputError(f"{output} already holds a finished run; choose another --output_dir.")
    if asked is None:
        if last is not None:
            raise InputError(
                f"{output} already holds {Path(last).name}; go on with --resume_from_checkpoint {LAST} or choose "
                "another --output_dir."
            )
        return None
    if asked == LAST:
        if last is None:
            raise InputError(f"{output} holds no checkpoint to resume from; mend --output_dir.")
        return last
    if not Path(asked, "trainer_state.json").is_file():
        raise InputError(f"{asked} is no checkpoint of a run (it has no trainer_state.json); mend "
                         "--resume_from_checkpoint.")  # fmt: skip
    return asked


def check_same_model(checkpoint: str, config: CJepaConfig):
    """Refuses a checkpoint of another architecture, grid or loss, naming the first field that differs."""
    path = Path(checkpoint, "config.json")
    if not path.is_file():
        raise InputError(f"{checkpoint} has no config.json; it is no whole checkpoint, resume from another.")
    saved = json.loads(path.read_text(encoding="utf-8"))
    ours = json.loads(config.to_json_string(use_diff=False))
    for name in model_fields():
        if name in saved and saved[name] != ours[name]:
            raise InputError(
                f"{checkpoint} was trained with {name}={saved[name]}, the recipe says {ours[name]}; resume with the "
                "recipe it was trained with (recipe.yaml beside it)."
            )


def describe(recipe: Recipe, model, args) -> str:
    """Two lines that say what is about to run."""
    config = model.config
    rows, columns = config.grid_size
    parts = (("encoder", model.cjepa), ("predictor", model.predictor))
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M" for name, part in parts)
    precision = "bf16" if args.bf16 else "float32"
    return (
        f"C-JEPA (I-JEPA + VICReg), recipe {recipe.name}: {sizes} parameters, grid {rows}x{columns}, regularizer "
        f"{config.regularizer!r} x {config.regularizer_weight:g}\n"
        f"on {recipe.data.dataset}, {args.world_size} process{'es' if args.world_size > 1 else ''} on "
        f"{args.device.type} in {precision}, into {args.output_dir}"
    )


def finish(recipe: Recipe, trainer: CJepaTrainer, train_source, eval_source, seconds: float, folder: Path):
    """Saves the trained model, evaluates it where there are labels, writes results and card, says how to load it."""
    data, history = recipe.data, trainer.state.log_history
    model = trainer.accelerator.unwrap_model(trainer.model)
    processor = image_processor(pair(model.config.image_size), data.image_mean, data.image_std)
    with whole_folder(folder) as unfinished:
        save_model(model, processor, unfinished)
        facts = run_facts(recipe, trainer, model, train_source, seconds)
        if eval_source.labels is not None:
            facts["evaluation"] = evaluate_model(str(unfinished), train_source, eval_source, recipe.evaluation)
        else:
            print(f"{eval_source.name} has no labels: nothing to evaluate.", flush=True)
        facts["history"] = history
        draw_curves(history, unfinished / "curves.png")
        write_json(unfinished / "results.json", facts)
        (unfinished / "README.md").write_text(render_card(card_facts(facts)), encoding="utf-8")
    if "evaluation" in facts:
        print("\n" + format_table(facts["evaluation"]))
    print(CLOSING.format(folder=folder), flush=True)


def card_facts(facts: dict) -> dict:
    """The facts with the evaluation as a table."""
    if "evaluation" not in facts:
        return facts
    return facts | {"evaluation_table": format_table(facts["evaluation"])}


CLOSING = """
Saved in {folder} (weights, config, image processor, curves.png, results.json, README.md). Load it:

    from transformers import AutoImageProcessor, AutoModel

    processor = AutoImageProcessor.from_pretrained("{folder}")
    encoder = AutoModel.from_pretrained("{folder}", trust_remote_code=True)  # the target encoder
    embeddings = encoder(**processor(images, return_tensors="pt")).pooler_output"""


def run_facts(recipe: Recipe, trainer: CJepaTrainer, model, train_source: ImageSource, seconds: float) -> dict:
    """What is known about a finished run, for `results.json` and the card."""
    state, args = trainer.state, trainer.args
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    logged = [entry for entry in state.log_history if "target_rankme" in entry]
    speeds = sorted(entry["images_per_second"] for entry in logged)
    training = {
        "steps": state.global_step,
        "batch_size": batch_size,
        "images_seen": state.global_step * batch_size,
        "seconds": round(seconds, 1),
        "processes": args.world_size,
        "precision": "bf16" if args.bf16 else "float32",
    }
    if logged:
        training |= {
            "images_per_second": round(speeds[len(speeds) // 2], 1),
            "data_wait_share": round(math.fsum(entry["data_wait_share"] for entry in logged) / len(logged), 4),
            "rankme_first": logged[0]["target_rankme"],
            "rankme_last": logged[-1]["target_rankme"],
            "loss_last": logged[-1]["loss"],
        }
    return {
        "recipe": recipe.name,
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "command": " ".join(["cjepa", *sys.argv[1:]]),
        "seed": args.seed,
        "settings": recipe.values,
        "model": {
            "encoder_parameters": sum(p.numel() for p in model.cjepa.parameters()),
            "predictor_parameters": sum(p.numel() for p in model.predictor.parameters()),
            **{name: getattr(model.config, name) for name in model_fields()},
        },
        "data": {"dataset": recipe.data.dataset, "num_train_images": len(train_source)},
        "training": training,
        "machine": machine_facts(),
        "software": software_facts(),
    }
