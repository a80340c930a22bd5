"""Small runs, some made to collapse and some healthy, by which the thresholds of the doctor are chosen and checked.

What a run came to is judged by its encoder on held-out images, beside a random one, and never by the doctor.
"""

import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from modeling_cjepa.configuration_cjepa import pair
from trainers.baselines import random_encoders
from trainers.datasets import ImageDataset, ImageSource
from trainers.diagnostics import feature_std, rankme
from trainers.doctor import diagnose, what_is_left
from trainers.evaluation import EvaluationArguments, embed
from trainers.files import write_json
from trainers.pooling import EveryLevel
from trainers.pretraining import build_model, build_trainer, training_arguments
from trainers.probes import knn_predict
from trainers.recipes import read_recipe
from trainers.reports import markdown_table
from trainers.sources import choose_images, load_sources, with_common_classes
from trainers.transforms import eval_transform

# what of a log is kept
FIGURES = ("loss", "feature_std", "rankme", "lidar", "correlation", "context_distance", "prediction_norm",
           "prediction_std", "grad_norm", "learning_rate")  # fmt: skip
TERMS = ("_prediction", "_invariance", "_variance", "_covariance")
SHARED = {
    "num_train_images": 4000, "num_eval_images": 2000, "num_probe_images": 2000, "logging_steps": 20,
    "dataloader_num_workers": 0, "precision": "float32", "use_cpu": True, "disable_tqdm": True,
    "report_to": "none", "save_strategy": "no",
}  # fmt: skip
CJEPA = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512,
    "predictor_hidden_size": 64, "predictor_num_hidden_layers": 2, "predictor_num_attention_heads": 2,
    "max_steps": 400,
}  # fmt: skip
STACK = {"upper_levels": [{"num_hidden_layers": 2, "stop_gradient": True}], "min_context_patches": 8}


def resnet_level(hidden_sizes=(16, 32, 64, 128), **changes) -> dict:
    """A level of S-JEA with a narrow ResNet."""
    backbone = {
        "model_type": "resnet", "embedding_size": hidden_sizes[0], "hidden_sizes": list(hidden_sizes),
        "depths": [1] * len(hidden_sizes), "layer_type": "basic",
    }  # fmt: skip
    return {"backbone": backbone, "stem": "small", "expander_sizes": [256] * 3} | changes


def sjea(*levels: dict, **changes) -> dict:
    """The keys of a small run of S-JEA."""
    return {"levels": list(levels) or [resnet_level()], "per_device_train_batch_size": 64, "max_steps": 300} | changes


@dataclass(frozen=True)
class Trial:
    """
    A run of the calibration.

    Args:
        recipe (`str`): The recipe it starts from.
        changes (`dict`): The keys that differ.
    """

    recipe: str
    changes: dict


def trials() -> dict[str, Trial]:
    """All runs by their names, those meant to be healthy first."""
    target_follows = {"ema_momentum": 0.0, "final_ema_momentum": 0.0}
    no_terms = {"regularizer_weight": 0.0}
    rate_0 = {"start_learning_rate": 1.0e-7, "learning_rate": 1.0e-7, "final_learning_rate": 0.0}
    shallow, on_map = (16, 32, 64), {"hidden_sizes": (96,), "input": "map"}
    unheld = {"variance_weight": 0.0}

    def cjepa(recipe: str = "cjepa_cifar10", **changes) -> Trial:
        return Trial(recipe, CJEPA | changes)

    def two_views(*levels: dict, **changes) -> Trial:
        return Trial("sjea_cifar10", sjea(*levels, **changes))

    return {
        "cjepa": cjepa(),
        "cjepa_wide": cjepa(hidden_size=256, num_hidden_layers=2, max_steps=300),
        "cjepa_batch_64": cjepa(per_device_train_batch_size=64, max_steps=250),
        "cjepa_weight_falls": cjepa(final_regularizer_weight=5.0e-4),
        "cjepa_pair": cjepa(regularizer="pair", regularizer_weight=0.02),
        "cjepa_scenes": cjepa("cjepa_scenes"),
        "cjepa_stack": cjepa(**STACK),
        "vicreg": two_views(),
        "vicreg_shallow": two_views(resnet_level(shallow)),
        "vicreg_batch_128": two_views(per_device_train_batch_size=128, max_steps=200),
        "vicreg_scenes": two_views(dataset="scenes"),
        "sjea": two_views(resnet_level(shallow), resnet_level(**on_map)),
        "sjea_folded": two_views(resnet_level(), resnet_level((32, 64), stop_gradient=True)),
        # made to collapse, to diverge or to learn nothing
        "ema_0": cjepa(**target_follows, **no_terms),
        "ema_0_wide": cjepa(**target_follows, **no_terms, hidden_size=192),
        "ema_0_scenes": cjepa("cjepa_scenes", **target_follows, **no_terms, final_regularizer_weight=0.0),
        "ema_half": cjepa(ema_momentum=0.5, **no_terms),
        "stack_ema_0": cjepa(**STACK, **target_follows, **no_terms),
        "no_terms": cjepa(**no_terms),
        "variance_0": cjepa(**target_follows, **unheld),
        "rate_x30": cjepa(learning_rate=1.5e-2, max_grad_norm=0.0),
        "target_frozen": cjepa(ema_momentum=1.0),
        "rate_0": cjepa(**rate_0),
        "vicreg_variance_0": two_views(resnet_level(**unheld)),
        "vicreg_covariance_0": two_views(resnet_level(covariance_weight=0.0)),
        "vicreg_invariance_alone": two_views(resnet_level(**unheld, covariance_weight=0.0)),
        "vicreg_rate_x30": two_views(learning_rate=9.0e-2),
        "vicreg_rate_0": two_views(**rate_0),
        "sjea_variance_0": two_views(resnet_level(shallow, **unheld), resnet_level(**on_map, **unheld)),
    }


def run_trial(name: str, seed: int, dataset: str | None) -> dict:
    """
    Trains one run and measures its encoder.

    Args:
        name (`str`): Of [`trials`].
        seed (`int`): Of the run.
        dataset (`str`, *optional*): A copy of CIFAR-10; that of the Hub when not given.

    Returns:
        `dict`: `name`, `seed`, `facts` of the doctor, `history` (figures by their names, a list each), `encoders` (a
        level each, of [`measure_levels`], with those of a random encoder as `random`).
    """
    with tempfile.TemporaryDirectory() as unused:
        return _run(name, seed, dataset, unused)


def _run(name: str, seed: int, dataset: str | None, output_dir: str) -> dict:
    torch.set_flush_denormal(True)
    trial = trials()[name]
    overrides = SHARED | trial.changes | {"seed": seed, "output_dir": output_dir}
    if dataset and overrides.get("dataset") != "scenes" and trial.recipe != "cjepa_scenes":
        overrides["dataset"] = dataset
    recipe = read_recipe(trial.recipe, overrides)
    args = training_arguments(recipe)
    model = build_model(recipe, args)
    train, test = load_sources(recipe.data, max(pair(model.config.image_size)), progress=False)
    trainer = build_trainer(recipe, model, args, train)
    trainer.train()
    statistics = recipe.data.image_mean, recipe.data.image_std
    ((_, random_encoder),) = random_encoders(model.base_model, 1, seed)
    encoders = [
        measure_levels(encoder, train, test, *statistics, recipe.evaluation.num_probe_images)
        for encoder in (model.base_model, random_encoder)
    ]
    return {
        "name": name,
        "seed": seed,
        "facts": trainer.doctor.facts,
        "history": compact(trainer.state.log_history),
        "encoders": [own | {"random": chance} for own, chance in zip(*encoders, strict=True)],
    }


def measure_levels(encoder, train: ImageSource, test: ImageSource, mean, std, num_images: int) -> list[dict]:
    """kNN accuracy, RankMe and standard deviation of each level's embeddings of held-out images."""
    sources = with_common_classes(choose_images(train, num_images), test)
    images = [ImageDataset(source, eval_transform(pair(encoder.config.image_size))) for source in sources]
    levels = EveryLevel(encoder)
    arguments = EvaluationArguments(disable_tqdm=True)
    train_x, train_y, test_x, test_y = embed(levels, *images, mean, std, arguments, "encoder")
    rows = []
    for of_train, of_test in zip(levels.split(train_x), levels.split(test_x), strict=True):
        voted = knn_predict(of_train, train_y, of_test, int(train_y.max()) + 1, 20, 0.07)
        rows.append({
            "knn": 100 * (voted == test_y).float().mean().item(),
            "rankme": rankme(of_test), "feature_std": feature_std(of_test), "dim": of_test.shape[1],
        })  # fmt: skip
    return rows


def compact(log_history: list[dict]) -> dict[str, list]:
    """The figures of a log that the doctor may read, four digits each, as a list a figure."""
    logged = [entry for entry in log_history if "rankme" in entry]
    names = [
        key
        for key in logged[0]
        if key == "step" or key.rpartition("_")[2] in TERMS or any(key.endswith(f) for f in FIGURES)
    ]
    return {key: [shortened(entry.get(key)) for entry in logged] for key in names}


def shortened(value):
    """A number with four digits; whole numbers as they are, None of one that is not finite."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.4g}") if math.isfinite(value) else None


def logged(history: dict[str, list]) -> list[dict]:
    """The log that [`compact`] was made of."""
    return [dict(zip(history, values, strict=True)) for values in zip(*history.values(), strict=True)]


def truth(encoders: list[dict]) -> str | None:
    """
    What a run came to, by its encoder on held-out images; the rule was written down before any verdict was seen.

    Ill: of a level kNN is less than 1 point above the random encoder's (one standard error of 2,000 test images), or
    the effective rank is below half of it, or the standard deviation below a tenth. Healthy: of all levels kNN is 3
    points or more above it, and the rank not below it. Else None: such runs are counted and left out.
    """
    states = [_level_truth(level, level["random"]) for level in encoders]
    if "ill" in states:
        return "ill"
    return None if None in states else "healthy"


def _level_truth(own: dict, chance: dict) -> str | None:
    gain = own["knn"] - chance["knn"]
    if gain < 1 or own["rankme"] < chance["rankme"] / 2 or own["feature_std"] < chance["feature_std"] / 10:
        return "ill"
    return "healthy" if gain >= 3 and own["rankme"] >= chance["rankme"] else None


def verdicts(results: list[dict]) -> list[dict]:
    """Of each run its name, seed, `truth`, and the doctor's `verdict`, `alarm` (the step of the first one)
    and what is `left` of its features."""
    rows = []
    for result in results:
        history = logged(result["history"])
        states = [diagnose(history[: number + 1], result["facts"]) for number in range(len(history))]
        alarm = next((state.step for state in states if state.is_ill), None)
        rows.append({
            "name": result["name"], "seed": result["seed"], "truth": truth(result["encoders"]),
            "verdict": states[-1].state, "is_ill": states[-1].is_ill, "alarm": alarm, "steps": states[-1].step,
            "left": what_is_left(history),
        })  # fmt: skip
    return rows


def calibrate(script: str, dataset: str | None, seeds: list[int], names: list[str], folder: Path, output: Path,
              num_processes: int) -> str:  # fmt: skip
    """
    Runs every trial with every seed, each in a process of one thread, and collects them; those done are kept.

    Args:
        script (`str`): The entry point, called with `--trial NAME SEED`.
        dataset (`str`, *optional*): A copy of CIFAR-10.
        seeds (`list[int]`): Of each trial; thresholds are chosen on the even ones and confirmed on the odd ones.
        names (`list[str]`): Of [`trials`].
        folder (`Path`): Where each run leaves its figures.
        output (`Path`): The JSON file of all of them.
        num_processes (`int`): Runs at a time.

    Returns:
        `str`: A table of the verdicts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = [(name, seed, folder / f"{name}-{seed}.json") for name in names for seed in seeds]

    def run(name: str, seed: int, file: Path):
        command = [sys.executable, script, "--trial", name, str(seed), "--folder", str(folder)]
        if not file.exists():
            subprocess.run(command + (["--dataset", dataset] if dataset else []), check=True, capture_output=True)
        print(f"{name}, seed {seed}: done", flush=True)

    with ThreadPoolExecutor(num_processes) as pool:
        list(pool.map(lambda each: run(*each), asked))
    results = [json.loads(file.read_text(encoding="utf-8")) for _, _, file in asked]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, separators=(",", ":")) + "\n", encoding="utf-8")
    return format_verdicts(results)


def format_verdicts(results: list[dict]) -> str:
    """A table of the runs, and how many the doctor has mistaken, as Markdown."""
    rows = verdicts(results)
    cells = [
        [
            "run",
            "seed",
            "kNN % (random)",
            "RankMe (random)",
            "left of spread",
            "of rank",
            "truth",
            "doctor",
            "first alarm at",
        ]
    ]
    for row, result in zip(rows, results, strict=True):
        pairs = [(level, level["random"]) for level in result["encoders"]]
        cells.append([
            row["name"], str(row["seed"]),
            "; ".join(f"{own['knn']:.1f} ({chance['knn']:.1f})" for own, chance in pairs),
            "; ".join(f"{own['rankme']:.1f} ({chance['rankme']:.1f})" for own, chance in pairs),
            *("; ".join(f"{level[name]:.2g}" for level in row["left"]) for name in ("spread", "rank")),
            row["truth"] or "neither", row["verdict"],
            f"{row['alarm']} of {row['steps']}" if row["alarm"] else "-",
        ])  # fmt: skip
    known = [row for row in rows if row["truth"]]
    ill = sum(row["truth"] == "ill" for row in known)
    wrong = [row for row in known if row["is_ill"] != (row["truth"] == "ill")]
    summary = (
        f"{ill} ill, {len(known) - ill} healthy, {len(rows) - len(known)} neither and left out; "
        f"{len(wrong)} mistaken{': ' if wrong else ''}{', '.join(map(_called, wrong))}."
    )
    return "\n".join([*markdown_table(cells), "", summary])


def _called(row: dict) -> str:
    return f"{row['name']} {row['seed']}"


def save_trial(name: str, seed: int, dataset: str | None, folder: Path):
    """Runs one trial on one thread and leaves its figures in the folder."""
    torch.set_num_threads(1)
    write_json(folder / f"{name}-{seed}.json", run_trial(name, seed, dataset))
