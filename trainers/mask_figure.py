"""The masks of pre-training, drawn on images: what the context encoder sees, and what is to be predicted.

Shapes: B images, M target blocks, K patches a block, Nc context patches, H and W rows and columns of pixels.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from modeling_cjepa import CJepaConfig, CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from modeling_cjepa.masking_cjepa import grids_by_level, ids_by_level
from trainers.datasets import sample_seed
from trainers.decoding import read_image
from trainers.errors import InputError
from trainers.level_views import class_colors
from trainers.loading import load_encoder_config
from trainers.panels import Panel, PatchGrid, view_of, write_picture

# points of the thinnest outline of a block
_LINE = 0.8

Masks = tuple[torch.Tensor, torch.Tensor]


def visualize_masks(
    model: str | Path, images: Sequence[str | Path], output_dir: str | Path, seed: int = 0, num_draws: int = 1
) -> dict:
    """
    Draws masks on images as pre-training does and writes `masks.png` and `masks.json`.

    Args:
        model (`str` or `Path`): A C-JEPA model, of which only the configuration is read: a folder or an id of the Hub.
        images (`list` of `str` or `Path`): Files, which are one batch.
        output_dir (`str` or `Path`): The folder to write to.
        seed (`int`): Of the masks, 0 or more.
        num_draws (`int`): How often masks are drawn for the batch; a row each.

    Returns:
        `dict`: What `masks.json` holds: for each draw, level and image the positions of the context and of the target
        blocks, in raster order, and how many there are.

    Raises:
        InputError: An image cannot be read, the model is none of C-JEPA, or its grid is too small for its masks.
    """
    if num_draws < 1:
        raise InputError(f"num_draws={num_draws} draws nothing; set it to 1 or more.")
    config = load_encoder_config(model)
    if not isinstance(config, CJepaConfig):
        raise InputError(f"{model} is an S-JEA model, which learns from two views and has no masks; give a C-JEPA "
                         "model, or look at its features by `cjepa visualize pca`.")  # fmt: skip
    views = [view_of(read_image(file), pair(config.image_size)) for file in images]
    with torch.device("meta"):  # the sampler needs no weights
        sampler = CJepaForPreTraining(config)
    draws = [masks_by_level(sampler, draw_masks(sampler, len(views), seed, draw)) for draw in range(num_draws)]
    rows = [mask_panels(view, number, levels, config) for number, view in enumerate(views) for levels in draws]
    rows[0][0].title = "image"
    results = {
        "model": str(model),
        "images": [str(file) for file in images],
        "seed": seed,
        "num_draws": num_draws,
        "draws": [_entries(levels, config) for levels in draws],
    }
    write_picture(Path(output_dir), "masks", rows, results)
    return results


def draw_masks(model: CJepaForPreTraining, batch_size: int, seed: int, draw: int = 0) -> Masks:
    """
    Masks of a batch as pre-training draws them, seeded by (seed, draw).

    Args:
        model ([`CJepaForPreTraining`]): Whose geometry they have.
        batch_size (`int`): Images B.
        seed, draw (`int`): 0 or more.

    Returns:
        Context (B, Nc) and target positions (B, M, K) on the top level's grid.

    Raises:
        InputError: The seed is negative, or the grid is too small.
    """
    if seed < 0:
        raise InputError(f"seed={seed} is no seed; set it to 0 or more.")
    try:
        return model.sample_masks(batch_size, generator=torch.Generator().manual_seed(sample_seed(seed, draw)))
    except ValueError as error:
        raise InputError(f"The model's masks cannot be drawn: {error}") from error


def masks_by_level(model: CJepaForPreTraining, masks: Masks) -> list[Masks]:
    """The same masks as positions on the grid of each level, from the image up."""
    config, merges = model.config, model.cjepa.merges
    contexts, targets = (ids_by_level(ids, config.grid_size, merges) for ids in masks)
    return list(zip(contexts, targets, strict=True))


def mask_panels(view: np.ndarray, number: int, levels: list[Masks], config: CJepaConfig) -> list[Panel]:
    """
    An image, the context of it, and the target blocks outlined on it.

    The masks of a stack's levels lie over each other, so that one picture shows them all.

    Args:
        view (`np.ndarray` of shape `(H, W, 3)`, uint8): The image.
        number (`int`): Its place in the batch.
        levels (`list`): Context and target positions by level.
        config ([`CJepaConfig`]): Of the model.

    Returns:
        `list` of [`Panel`].
    """
    grid = PatchGrid(config.grid_size[1], pair(config.patch_size))
    context_ids, target_ids = (ids[number].numpy() for ids in levels[0])
    colors = class_colors(len(target_ids))
    # the later the thinner: two blocks at the same place are both seen
    outlines = [
        dataclasses.replace(grid.outline(block, color), line=_LINE * (len(target_ids) - place))
        for place, (block, color) in enumerate(zip(target_ids, colors, strict=True))
    ]
    sizes = [rows * columns for rows, columns in _grids(config)]
    of_context = [f"{ids.shape[1]} of {size}" for (ids, _), size in zip(levels, sizes, strict=True)]
    blocks = "1 block" if len(target_ids) == 1 else f"{len(target_ids)} blocks"
    of_targets = [f"{blocks} of {ids.shape[2]}" for _, ids in levels]
    return [
        Panel(view),
        Panel(grid.show(view, context_ids), _title("context", of_context)),
        Panel(grid.show(view, np.unique(target_ids)), _title("targets", of_targets), outlines),
    ]


def _title(what: str, by_level: list[str]) -> str:
    """A line for what is drawn, and one for each level of a stack above it."""
    return "\n".join([f"{what}: {by_level[0]}", *(f"level {k}: {text}" for k, text in enumerate(by_level[1:], 1))])


def _grids(config: CJepaConfig) -> list[tuple[int, int]]:
    merges = [pair(config.level_config(level).patch_size) for level in range(1, config.num_levels)]
    return grids_by_level(config.grid_size, merges)


def _entries(levels: list[Masks], config: CJepaConfig) -> list[dict]:
    """A draw's positions and their numbers by level."""
    return [
        {
            "level": level,
            "grid": list(grid),
            "num_context_patches": context_ids.shape[1],
            "num_target_blocks": target_ids.shape[1],
            "num_block_patches": target_ids.shape[2],
            "context_ids": context_ids.tolist(),
            "target_ids": target_ids.tolist(),
        }
        for level, (grid, (context_ids, target_ids)) in enumerate(zip(_grids(config), levels, strict=True))
    ]
