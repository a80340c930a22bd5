"""The encoders that a picture sets side by side, a column each."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from trainers.embedding import device_of, encoding
from trainers.level_embeddings import LoadedModel
from trainers.loading import load_with_statistics
from trainers.pooling import level_of


@dataclass
class DrawnEncoder(LoadedModel):
    """
    An encoder that is ready for images, of which one level is drawn.

    Args:
        title (`str`): What its column is called.
        level (`int`): From 0.
    """

    title: str
    level: int

    def run(self, module: nn.Module, view: np.ndarray):
        """What a module around the encoder gives for one image (H, W, 3) uint8 of the encoder's size."""
        pixel_values = torch.from_numpy(view).permute(2, 0, 1).unsqueeze(0)
        with encoding(module, self.image_mean, self.image_std, device_of(self.encoder)) as encode:
            return encode(pixel_values)


def load_encoders(
    model: str | Path, beside: Mapping[str, str | Path] | None = None, level: int | None = None
) -> list[DrawnEncoder]:
    """
    The columns of a picture: of each model beside the encoder that is published, then target and context encoder of
    the model, or its only one.

    Args:
        model (`str` or `Path`): A folder, or the id of a model on the Hub.
        beside (`dict`, *optional*): Other such models by what they are called.
        level (`int`, *optional*): Of a stack; that of its configuration when not given. Those beside give theirs.

    Returns:
        `list` of [`DrawnEncoder`].

    Raises:
        InputError: There is no whole model of this package, or no such level.
    """
    columns = []
    for name, other in (beside or {}).items():
        loaded, *statistics = load_with_statistics(other, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        kind = "target encoder" if isinstance(loaded, CJepaForPreTraining) else "encoder"
        columns.append(_drawn(f"{name} {kind}", loaded.base_model, statistics, None))
    loaded, *statistics = load_with_statistics(model, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if not isinstance(loaded, CJepaForPreTraining):
        return [*columns, _drawn("encoder", loaded.base_model, statistics, level)]
    # without the regulariser it is I-JEPA, exactly
    name = "C-JEPA" if loaded.config.regularizer_weight else "I-JEPA"
    own = {"target encoder": loaded.cjepa, "context encoder": loaded.context_encoder}
    return columns + [_drawn(f"{name} {kind}", each, statistics, level) for kind, each in own.items()]


def _drawn(title: str, encoder: PreTrainedModel, statistics, level: int | None) -> DrawnEncoder:
    config = encoder.config
    level = level_of(config, level)
    if config.num_levels > 1:
        title = f"{title}, level {level}"
    return DrawnEncoder(encoder, pair(config.image_size), *statistics, title, level)
