"""Small runs, some made to collapse and some healthy, by which the thresholds of the doctor are chosen and checked.

What a run came to is judged by its encoder on held-out images, beside a random one, and never by the doctor.
"""

import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from modeling_cjepa.configuration_cjepa import pair
from trainers.baselines import random_encoders
from trainers.datasets import ImageDataset, ImageSource
from trainers.diagnostics import feature_std, rankme
from trainers.doctor import diagnose, what_is_left
from trainers.doctor_trials import trial_recipe
from trainers.evaluation import EvaluationArguments, embed
from trainers.files import write_json, write_text_atomically
from trainers.pooling import EveryLevel
from trainers.pretraining import build_model, build_trainer
from trainers.probes import knn_predict
from trainers.reports import markdown_table
from trainers.run_arguments import training_arguments
from trainers.sources import load_sources
from trainers.subsets import choose_images, with_common_classes
from trainers.transforms import eval_transform

# what of a log is kept
FIGURES = ("loss", "feature_std", "rankme", "lidar", "correlation", "context_distance", "prediction_norm",
           "prediction_std", "grad_norm", "learning_rate")  # fmt: skip
TERMS = ("_prediction", "_invariance", "_variance", "_covariance")


def run_trial(name: str, seed: int, dataset: str | None) -> dict:
    """
    Trains one run and measures its encoder.

    Args:
        name (`str`): Of [`~doctor_trials.trials`].
        seed (`int`): Of the run.
        dataset (`str`, *optional*): A copy of CIFAR-10; that of the Hub when not given.

    Returns:
        `dict`: `name`, `seed`, `facts` of the doctor, `history` (figures by their names, a list each), `encoders` (a
        level each, of [`trial_levels`], with those of a random encoder as `random`).
    """
    with tempfile.TemporaryDirectory() as unused:
        return _run(name, seed, dataset, unused)


def _run(name: str, seed: int, dataset: str | None, output_dir: str) -> dict:
    torch.set_flush_denormal(True)
    recipe = trial_recipe(name, seed, dataset, output_dir)
    args = training_arguments(recipe)
    model = build_model(recipe, args)
    train, test = load_sources(recipe.data, max(pair(model.config.image_size)), progress=False)
    trainer = build_trainer(recipe, model, args, train)
    trainer.train()
    statistics = recipe.data.image_mean, recipe.data.image_std
    ((_, random_encoder),) = random_encoders(model.base_model, 1, seed)
    encoders = [
        trial_levels(encoder, train, test, *statistics, recipe.evaluation.num_probe_images)
        for encoder in (model.base_model, random_encoder)
    ]
    return {
        "name": name,
        "seed": seed,
        "facts": trainer.doctor.facts,
        "history": compact(trainer.state.log_history),
        "encoders": [own | {"random": chance} for own, chance in zip(*encoders, strict=True)],
    }


def trial_levels(encoder, train: ImageSource, test: ImageSource, mean, std, num_images: int) -> list[dict]:
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
    names = [key for key in logged[0] if key.endswith(("step", *FIGURES, *TERMS))]
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
        names (`list[str]`): Of [`~doctor_trials.trials`].
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
            subprocess.run(
                command + (["--dataset", dataset] if dataset else []), check=True, stdout=subprocess.DEVNULL
            )
        print(f"{name}, seed {seed}: done", flush=True)

    with ThreadPoolExecutor(num_processes) as pool:
        list(pool.map(lambda each: run(*each), asked))
    results = [json.loads(file.read_text(encoding="utf-8")) for _, _, file in asked]
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(output, json.dumps(results, separators=(",", ":")) + "\n")
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
