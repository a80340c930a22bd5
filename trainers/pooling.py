"""Which features of an encoder are an image's embedding: "encoders" whose `pooler_output` is what is asked for.

Shapes: B images, N tokens, h and w rows and columns of a level's grid, D width of its features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_cjepa import CJepaModel
from modeling_cjepa.configuration_cjepa import choose_level
from modeling_cjepa.masking_cjepa import grids_by_level
from trainers.errors import InputError

POOLINGS = ("mean", "last4", "levels", "patches")
"""`mean`: the level's own embedding; `last4`: the mean tokens of the last four layers side by side; `levels`: the
embeddings of all levels side by side; `patches`: the map of features before pooling."""


def pooled_encoder(model: PreTrainedModel, pooling: str = "mean", level: int | None = None) -> nn.Module:
    """
    An encoder whose `pooler_output` are the features asked for.

    Args:
        model (`PreTrainedModel`): [`CJepaModel`] or [`SJeaModel`].
        pooling (`str`): One of `POOLINGS`.
        level (`int`, *optional*): Of a stack; that of its configuration when not given.

    Returns:
        `nn.Module`: Gives `pooler_output`, (B, D), with `last4` (B, 4 * D), with `levels` (B, sum of widths), with
        `patches` (B, h, w, D).

    Raises:
        InputError: The pooling is not known or the model has no such features, or there is no such level.
    """
    if pooling not in POOLINGS:
        raise InputError(f"pooling={pooling!r} is not known; choose one of {', '.join(POOLINGS)}.")
    if pooling == "levels":
        if level is not None:
            raise InputError(f"pooling='levels' takes all levels; leave level={level} out.")
        return EveryLevel(model)
    level = level_of(model.config, level)
    if pooling == "mean":
        return OneLevel(model, level)
    if pooling == "patches":
        return PatchMap(model, level)
    if not isinstance(model, CJepaModel):
        raise InputError(f"pooling='last4' reads the layers of a C-JEPA encoder, and the model is a "
                         f"{type(model).__name__}; choose mean, levels or patches.")  # fmt: skip
    return LastLayers(model, level)


def level_of(config: PreTrainedConfig, level: int | None = None) -> int:
    """
    The index of a level of a model.

    Args:
        config (`PreTrainedConfig`): The model's.
        level (`int`, *optional*): From 0, or from the top as -1; that of the configuration when not given.

    Returns:
        `int`: From 0.

    Raises:
        InputError: There is no such level.
    """
    try:
        return choose_level(config.level if level is None else level, config.num_levels)
    except ValueError as error:
        raise InputError(str(error)) from error


class EveryLevel(nn.Module):
    """
    An "encoder" whose embedding is those of a model's levels, one after the other.

    Args:
        model (`PreTrainedModel`): Gives `level_embeddings`, such as [`SJeaModel`].
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.widths: list[int] = []
        self.train(model.training)  # which a wrapper is at first, and whoever wraps does not mean to change

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Images (B, C, H, W) as embeddings (B, sum of the levels' widths)."""
        embeddings = self.model(pixel_values, level=-1).level_embeddings
        self.widths = [embedding.shape[1] for embedding in embeddings]
        return BaseModelOutputWithPooling(pooler_output=torch.cat(embeddings, dim=1))

    def split(self, embeddings: torch.Tensor) -> list[torch.Tensor]:
        """The embeddings (n, D) of each level."""
        return list(embeddings.split(self.widths, dim=1))


def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The embeddings (n, D) of all levels as one, each level's of length 1."""
    return torch.cat([F.normalize(part, dim=1) for part in parts], dim=1)


class OneLevel(nn.Module):
    """
    An encoder that gives the embedding of one level.

    Args:
        model (`PreTrainedModel`): As in [`EveryLevel`].
        level (`int`): Which.
    """

    def __init__(self, model: PreTrainedModel, level: int):
        super().__init__()
        self.model, self.level = model, level
        self.train(model.training)

    def forward(self, pixel_values: torch.Tensor):
        """The output of the model at the level, for images (B, C, H, W)."""
        return self.model(pixel_values, level=self.level)


class LastLayers(OneLevel):
    """A [`CJepaModel`] whose embedding is the mean tokens of the last four layers of a level, side by side."""

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Images (B, C, H, W) as embeddings (B, 4 * D)."""
        return BaseModelOutputWithPooling(pooler_output=self.model.embed_last_layers(pixel_values, 4, self.level))


class PatchMap(OneLevel):
    """An encoder whose embedding is the map of a level's features before pooling."""

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Images (B, C, H, W) as maps (B, h, w, D)."""
        features = self.model(pixel_values, level=self.level).last_hidden_state
        if features.ndim == 4:
            return BaseModelOutputWithPooling(pooler_output=features.permute(0, 2, 3, 1))
        if not isinstance(self.model, CJepaModel):
            raise InputError(
                f"A map of patches needs features on a grid, and level {self.level} of this "
                f"{type(self.model).__name__} gives tokens without one; choose a level of maps, such as a ResNet's."
            )
        return BaseModelOutputWithPooling(
            pooler_output=features.unflatten(1, level_grid(self.model, self.level, pixel_values))
        )


def level_grid(model: CJepaModel, level: int, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of a level's tokens for images (B, C, H, W)."""
    grid_size = model.embeddings.patch_embeddings.grid_size(pixel_values)
    return grids_by_level(grid_size, model.merges[:level])[-1]
