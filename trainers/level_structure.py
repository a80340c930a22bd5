"""The embeddings of every level of several models, and how they arrange the classes, over one run or several.

Shapes: n train images, m test images, D_k width of level k's embedding.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from tqdm import tqdm

from trainers.datasets import ImageSource
from trainers.level_embeddings import LoadedModel, embed_levels
from trainers.structure import NUM_K_MEANS, difference, structure_of, summarize


@dataclass
class EmbeddedLevel:
    """
    One row of all that is shown.

    Args:
        title (`str`): What it is called where the levels of all models stand together.
        model (`str`): By what its model is called.
        number (`int`): Of the level, from 0.
        train_x, test_x (`torch.Tensor` of shapes `(n, D_k)` and `(m, D_k)`): The embeddings.
    """

    title: str
    model: str
    number: int
    train_x: torch.Tensor
    test_x: torch.Tensor


def embed_models(
    loaded: Mapping[str, LoadedModel], train: ImageSource, test: ImageSource, progress: bool
) -> list[EmbeddedLevel]:
    """The levels of all models, from the lowest of the first to the highest of the last."""
    levels = []
    for name, model in loaded.items():
        train_levels, test_levels = (
            embed_levels(model, source, f"{name}: {images} images", progress)
            for source, images in ((train, "train"), (test, "test"))
        )
        for number, (train_x, test_x) in enumerate(zip(train_levels, test_levels, strict=True)):
            title = f"level {number}" if len(loaded) == 1 else f"{name}, level {number}"
            levels.append(EmbeddedLevel(title if len(train_levels) > 1 else name, name, number, train_x, test_x))
    return levels


def measure_levels(
    levels: Sequence[EmbeddedLevel],
    runs: Mapping[str, Sequence[LoadedModel]],
    sources: tuple[ImageSource, ImageSource],
    labellings: Mapping[str, tuple[np.ndarray, np.ndarray, list[str]]],
    seed: int,
    progress: bool,
) -> tuple[list[dict], list[dict]]:
    """
    The numbers of every level, and by how much the levels of a model differ.

    Args:
        levels (`list` of [`EmbeddedLevel`]): Those of the first run of each model.
        runs (`dict` of lists of [`LoadedModel`]): All runs of each model, the first one first.
        sources (two of [`ImageSource`]): Train and test images, for the runs after the first.
        labellings (`dict`): By name the labels of the train (n,) and of the test images (m,), and the classes' names.
        seed (`int`): Of k-means.
        progress (`bool`): Whether to show bars.

    Returns:
        `rows` and `differences` as [`~visualize.visualize_levels`] returns them.
    """
    rows = [_row(level, labellings, seed) for level in tqdm(levels, desc="measuring", disable=not progress)]
    for name, of_model in runs.items():
        if len(of_model) > 1:
            others = (
                embed_models({f"{name}, run {number}": run}, *sources, progress)
                for number, run in enumerate(of_model[1:], start=2)
            )
            _add_runs([row for row in rows if row["model"] == name], others, labellings, seed)
    return rows, _differences(rows)


def _row(level: EmbeddedLevel, labellings: Mapping, seed: int) -> dict:
    train_y, test_y = (
        {name: torch.from_numpy(labelling[side]) for name, labelling in labellings.items()} for side in (0, 1)
    )
    seeds = range(seed, seed + NUM_K_MEANS)
    return {
        "encoder": level.title,
        "model": level.model,
        "level": level.number,
        "dim": level.test_x.shape[1],
        "structure": structure_of(level.train_x, train_y, level.test_x, test_y, seeds),
    }


def _add_runs(rows: list[dict], others: Iterable[list[EmbeddedLevel]], labellings: Mapping, seed: int):
    """Replaces the numbers of a model's first run, a row a level, by those of all runs."""
    for row in rows:
        row["runs"] = [row["structure"]]
    for levels in others:
        for row, level in zip(rows, levels, strict=True):
            row["runs"].append(_row(level, labellings, seed)["structure"])
    for row in rows:
        row["structure"] = summarize(row["runs"])


def _differences(rows: list[dict]) -> list[dict]:
    """Each level less the one below it, run by run: narrower intervals than those of the two levels would tell."""
    return [
        {
            "encoder": f"{above['encoder']} less level {below['level']}",
            "model": above["model"],
            "structure": summarize([difference(*pair) for pair in zip(above["runs"], below["runs"], strict=True)]),
        }
        for below, above in pairwise(rows)
        if "runs" in above and above["model"] == below["model"]
    ]
