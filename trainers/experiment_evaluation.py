"""What the runs of an experiment have come to: kNN, linear probe and diagnostics at several of their steps."""

import math
from pathlib import Path

from torch import nn

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import choose_level, pair
from trainers.baselines import random_encoders, raw_pixels_label
from trainers.checkpoint_files import checkpoint_step, present_checkpoints
from trainers.datasets import ImageDataset
from trainers.embedding import RawPixels
from trainers.evaluation import evaluate_encoder, evaluate_levels
from trainers.experiment_plan import Experiment
from trainers.loading import load_encoder_config, load_with_statistics
from trainers.readable import readable_splits
from trainers.recipes import Recipe
from trainers.sources import load_sources
from trainers.subsets import choose_images, with_common_classes
from trainers.transforms import eval_transform


class Images:
    """
    The labelled images on which the encoders of a recipe are evaluated.

    Args:
        recipe ([`Recipe`]): Says which, and how they are evaluated.
        image_size (`(height, width)`): As the encoders see them.
    """

    def __init__(self, recipe: Recipe, image_size: tuple[int, int]):
        self.recipe, self.arguments = recipe, recipe.evaluation
        progress = not self.arguments.disable_tqdm
        train, test = load_sources(recipe.data, max(image_size), progress)
        sources = with_common_classes(choose_images(train, self.arguments.num_probe_images), test)
        *self.sources, self.skipped = readable_splits(*sources, self.arguments.dataloader_num_workers, progress)
        self.datasets = [ImageDataset(source, eval_transform(image_size)) for source in self.sources]

    def facts(self) -> dict:
        """Their names and numbers."""
        train, test = self.sources
        return {
            "train": train.name, "test": test.name, "num_train": len(train), "num_test": len(test),
            "num_skipped": len(self.skipped),
        }  # fmt: skip

    def load(self, place: Path) -> tuple:
        """A saved model, and what its evaluation reads: these images, their mean and deviation, the arguments."""
        model, *statistics = load_with_statistics(str(place), self.recipe.data.image_mean, self.recipe.data.image_std)
        return model, (*self.datasets, *statistics, self.arguments)


def evaluate_run(experiment: Experiment, recipe: Recipe, folder: Path, training: dict) -> dict:
    """
    Evaluates a finished run.

    Args:
        experiment ([`Experiment`]): Says what is evaluated.
        recipe ([`Recipe`]): Of the run.
        folder (`Path`): Of the run.
        training (`dict`): What its results say of training: `steps` and `batch_size`.

    Returns:
        `dict`: `images`; `points`, of each checkpoint and last of the end `step`, `images_seen` and `rows`;
        `baselines`, rows of the encoder before training, if asked for. Rows are those of [`~evaluation.probe`], whose
        `encoder` is empty for what stands for the method, and else names what is beside it.
    """
    images = Images(recipe, pair(load_encoder_config(folder / "final").image_size))
    points = []
    for place, step in _places(folder, training["steps"], experiment.num_checkpoints):
        model, settings = images.load(place)
        rows = _of_levels(experiment, model.base_model, settings)
        points.append({"step": step, "images_seen": step * training["batch_size"], "rows": rows})
    if experiment.context_encoder and isinstance(model, CJepaForPreTraining):
        rows += evaluate_levels(model.context_encoder, *settings, None, "context encoder")
    baselines = []
    if experiment.baselines:
        ((_, encoder),) = random_encoders(model.base_model, 1, recipe.training["seed"])
        baselines = _of_levels(experiment, encoder.to(model.device), settings)
    return {"images": images.facts(), "points": points, "baselines": baselines}


def _places(folder: Path, num_steps: int, number: int) -> list[tuple[Path, int]]:
    """So many checkpoints of a run with their steps; not those of a run that was stopped between them."""
    every = math.ceil(num_steps * (1 / number))  # as transformers rounds the share that `save_steps` is
    saved = [(path, checkpoint_step(path)) for path in reversed(present_checkpoints(folder))]
    on_the_way = [(path, step) for path, step in saved if step < num_steps and step % every == 0]
    return [*on_the_way, (folder / "final", num_steps)]


def _of_levels(experiment: Experiment, encoder: nn.Module, settings: tuple) -> list[dict]:
    """The rows of an encoder's levels, first that which stands for the method."""
    rows = evaluate_levels(encoder, *settings, "all")
    num_levels = max(len(rows) - 1, 1)
    names = [f"level {number}" for number in range(num_levels)] + ["all levels"]
    rows = [row | {"encoder": name} for row, name in zip(rows, names, strict=False)]
    own = rows.pop(-1 if experiment.level == "all" else choose_level(experiment.level, num_levels))
    return [own | {"encoder": ""}, *rows]


def evaluate_pixels(recipe: Recipe, image_size: tuple[int, int]) -> dict:
    """The row of raw pixels in [0, 1] on a recipe's images."""
    images = Images(recipe, image_size)
    label = raw_pixels_label(image_size)
    return evaluate_encoder(RawPixels(), *images.datasets, [0.0] * 3, [1.0] * 3, images.arguments, label)
