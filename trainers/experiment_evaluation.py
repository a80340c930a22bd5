"""What the runs of an experiment have come to: kNN, linear probe and diagnostics at several of their steps."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import choose_level, pair
from trainers.baselines import random_encoders, raw_pixels_label
from trainers.checkpoint_files import checkpoint_step, present_checkpoints
from trainers.datasets import ImageDataset, ImageSource
from trainers.embedding import RawPixels
from trainers.encoder_lidar import lidar_of_levels
from trainers.encoder_structure import structure_of_levels
from trainers.evaluation import evaluate_encoder, evaluate_levels
from trainers.experiment_plan import Experiment
from trainers.feature_encoder import fingerprint
from trainers.files import write_json
from trainers.precision import precision_name
from trainers.readable import readable_splits
from trainers.recipes import Recipe
from trainers.reports import software_facts
from trainers.sources import load_sources
from trainers.subsets import choose_images, with_common_classes
from trainers.transforms import eval_transform

# of the folder of all runs: what was found of random encoders, by their weights
_RANDOM = "random_encoders"


def check_images(recipe: Recipe):
    """Refuses images on which no run can be evaluated, before one is trained; rendered scenes have their labels."""
    if recipe.data.dataset != "scenes":
        _labelled(recipe, progress=False)


def _labelled(recipe: Recipe, image_size: int = 32, progress: bool = True) -> tuple[ImageSource, ImageSource]:
    train, test = load_sources(recipe.data, image_size, progress)
    return with_common_classes(choose_images(train, recipe.evaluation.num_probe_images), test)


class Images:
    """
    The labelled images on which the encoders of a recipe are evaluated.

    Args:
        recipe ([`Recipe`]): Says which, and how they are evaluated.
        image_size (`(height, width)`): As the encoders see them.
    """

    def __init__(self, recipe: Recipe, image_size: tuple[int, int]):
        self.recipe, self.arguments, self.image_size = recipe, recipe.evaluation, image_size
        progress = not self.arguments.disable_tqdm
        sources = _labelled(recipe, max(image_size), progress)
        *self.sources, self.skipped = readable_splits(*sources, self.arguments.dataloader_num_workers, progress)
        self.datasets = [ImageDataset(source, eval_transform(image_size)) for source in self.sources]

    def facts(self) -> dict:
        """Their names and numbers, and which those to test on are."""
        train, test = self.sources
        return {
            "train": train.name, "test": test.name, "num_train": len(train), "num_test": len(test),
            "num_skipped": len(self.skipped), "fingerprint": test.fingerprint(),
        }  # fmt: skip

    @property
    def settings(self) -> tuple:
        """What an evaluation reads: the images, their channels' mean and deviation, the arguments."""
        return *self.datasets, self.recipe.data.image_mean, self.recipe.data.image_std, self.arguments


def evaluate_run(experiment: Experiment, recipe: Recipe, folder: Path, training: dict, load: Callable) -> dict:
    """
    Evaluates a finished run.

    Args:
        experiment ([`Experiment`]): Says what is evaluated.
        recipe ([`Recipe`]): Of the run.
        folder (`Path`): Of the run, two below that of all runs.
        training (`dict`): What its results say of training: `steps` and `batch_size`.
        load (`Callable`): Gives the model that is saved at a place, in float32.

    Returns:
        `dict`: `images`; `evaluated`, the `precision` of the encoders' arithmetic and the `commit` of the code, where
        it is known; `points`, of each checkpoint and last of the end `step`, `images_seen` and `rows`; `baselines`,
        rows of a random encoder of the same kind, if asked for. Rows are those of [`~evaluation.probe`], at the end
        and of the random encoder with `lidar` and, if asked for, what [`structure_of_levels`] tells; their `encoder`
        is empty for what stands for the method, and else names what is beside it.
    """
    images = Images(recipe, saved_image_size(folder))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    *on_the_way, (end, num_steps) = _places(folder, training["steps"], experiment.num_checkpoints)
    of_steps = {
        step: _of_levels(experiment, load(place).to(device).base_model, images, at_end=False)
        for place, step in on_the_way
    }
    model = load(end).to(device)
    of_steps[num_steps] = _of_end(experiment, model, images)
    points = [
        {"step": step, "images_seen": step * training["batch_size"], "rows": rows} for step, rows in of_steps.items()
    ]
    baselines = []
    if experiment.baselines:
        ((_, encoder),) = random_encoders(model.base_model, 1, recipe.training["seed"])
        baselines = _of_random(experiment, encoder.to(device), images, folder.parents[1] / _RANDOM)
    evaluated = {"precision": precision_name(recipe.evaluation.precision, torch.device(device))}
    evaluated |= {name: value for name, value in software_facts().items() if name == "commit"}
    return {"images": images.facts(), "evaluated": evaluated, "points": points, "baselines": baselines}


def saved_image_size(folder: Path) -> tuple[int, int]:
    """Height and width of the images of a finished run's model, which may have them of the one it started from."""
    config = json.loads((folder / "final" / "config.json").read_text(encoding="utf-8"))
    return pair(config["image_size"])


def _of_random(experiment: Experiment, encoder: PreTrainedModel, images: Images, known: Path) -> list[dict]:
    """The rows of a random encoder, which are found once for all runs that are compared with the same one."""
    weights = fingerprint(encoder)[:16]
    asked = [asdict(images.recipe.data), asdict(images.arguments), images.facts(), experiment.level]
    asked += ["structure"] if experiment.structure else []
    path = known / f"{weights}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}.json"
    if not path.is_file():
        known.mkdir(exist_ok=True)
        rows = _of_levels(experiment, encoder, images, at_end=True)
        write_json(path, [row | {"weights": weights} for row in rows])
    return json.loads(path.read_text(encoding="utf-8"))


def _places(folder: Path, num_steps: int, number: int) -> list[tuple[Path, int]]:
    """So many checkpoints of a run with their steps; not those of a run that was stopped between them."""
    every = math.ceil(num_steps * (1 / number))  # as transformers rounds the share that `save_steps` is
    saved = [(path, checkpoint_step(path)) for path in reversed(present_checkpoints(folder))]
    on_the_way = [(path, step) for path, step in saved if step < num_steps and step % every == 0]
    return [*on_the_way, (folder / "final", num_steps)]


def _of_end(experiment: Experiment, model: PreTrainedModel, images: Images) -> list[dict]:
    """The rows of a trained model, with those of its context encoder if they are asked for and it has one."""
    rows = _of_levels(experiment, model.base_model, images, at_end=True)
    if experiment.context_encoder and isinstance(model, CJepaForPreTraining):
        own, *_ = _of_levels(experiment, model.context_encoder, images, at_end=True)
        rows.append(own | {"encoder": "context encoder"})
    return rows


def _of_levels(experiment: Experiment, encoder: PreTrainedModel, images: Images, at_end: bool) -> list[dict]:
    """The rows of an encoder's levels, first that which stands for the method."""
    rows = evaluate_levels(encoder, *images.settings, "all")
    if at_end:
        (_, test), (_, dataset) = images.sources, images.datasets
        _, _, *settings = images.settings
        found = lidar_of_levels(encoder, test, images.image_size, *settings)
        for row, value in zip(rows, found, strict=False):  # none of all levels side by side
            row["lidar"] = value
        if experiment.structure:
            found = structure_of_levels(encoder, test, dataset, *settings)
            rows = [row | structure for row, structure in zip(rows, found, strict=True)]
    num_levels = max(len(rows) - 1, 1)
    names = [f"level {number}" for number in range(num_levels)] + ["all levels"]
    rows = [row | {"encoder": name} for row, name in zip(rows, names, strict=False)]
    # a method of one level has no other, whatever the stacks beside it are asked for
    own = -1 if experiment.level == "all" or num_levels == 1 else choose_level(experiment.level, num_levels)
    stands_for_all = rows.pop(own) | {"encoder": ""}
    return [stands_for_all, *rows]


def evaluate_pixels(recipe: Recipe, image_size: tuple[int, int]) -> dict:
    """The row of raw pixels in [0, 1] on a recipe's images."""
    images = Images(recipe, image_size)
    label = raw_pixels_label(image_size)
    return evaluate_encoder(RawPixels(), *images.datasets, [0.0] * 3, [1.0] * 3, images.arguments, label)
