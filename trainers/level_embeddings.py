"""Models made ready to be looked at level by level, and the embeddings of all levels in one pass over the images.

Shapes: n images, D_k width of level k's embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_cjepa.configuration_cjepa import pair
from trainers.datasets import ImageDataset, ImageSource
from trainers.embedding import extract_embeddings
from trainers.errors import InputError
from trainers.loading import load_with_statistics
from trainers.model_facts import model_fields
from trainers.pooling import EveryLevel
from trainers.recipes import first_difference
from trainers.transforms import eval_transform


@dataclass
class LoadedModel:
    """
    An encoder that is ready for images.

    Args:
        encoder (`PreTrainedModel`): Gives `level_embeddings`.
        image_size (`(int, int)`): Height and width of its images.
        image_mean, image_std (`list[float]`): Of the channels, for pixels in [0, 1].
    """

    encoder: PreTrainedModel
    image_size: tuple[int, int]
    image_mean: Sequence[float]
    image_std: Sequence[float]


def load_levels(model: str | Path | PreTrainedModel, image_mean, image_std) -> LoadedModel:
    """
    An encoder with all of its levels.

    Args:
        model (`str`, `Path` or `PreTrainedModel`): A folder, the id of a model on the Hub, or a model, used where it
            is; of one for pre-training or classification its encoder.
        image_mean, image_std (`list[float]`): Of the channels, where the folder has no image processor to say.

    Returns:
        [`LoadedModel`].

    Raises:
        InputError: There is no whole model of this package.
    """
    model, image_mean, image_std = load_with_statistics(model, image_mean, image_std)
    if not hasattr(model.config, "num_levels"):
        raise InputError(f"A {type(model).__name__} has no levels to look at; give a C-JEPA or S-JEA model.")
    return LoadedModel(model.base_model, pair(model.config.image_size), image_mean, image_std)


def load_runs(name: str, models: Sequence[str | Path | PreTrainedModel], image_mean, image_std) -> list[LoadedModel]:
    """
    The encoders of several runs of one recipe.

    Args:
        name (`str`): What they are called together.
        models (`list`): As in [`load_levels`].
        image_mean, image_std (`list[float]`): As there.

    Returns:
        `list` of [`LoadedModel`].

    Raises:
        InputError: A model is no whole one, is named twice, or is of another kind than the first.
    """
    for number, model in enumerate(models):
        if model in models[:number]:
            raise InputError(f"{model} is named twice among the runs of {name}; name each run once.")
    runs = [load_levels(model, image_mean, image_std) for model in models]
    first = runs[0].encoder.config
    for model, run in zip(models, runs, strict=True):
        config = run.encoder.config
        for field in ("model_type", *model_fields(type(first))):
            what, *values = first_difference(field, getattr(first, field), getattr(config, field, None))
            if values[0] != values[1]:
                raise InputError(
                    f"The runs of {name} are of different models: {what} is {values[0]} in {models[0]} and "
                    f"{values[1]} in {model}; name models of different kinds apart, one by --beside."
                )
    return runs


def embed_levels(
    model: LoadedModel, source: ImageSource, description: str, progress: bool = True, batch_size: int = 256
) -> list[torch.Tensor]:
    """
    The embeddings of all images at all levels, whichever level the model's configuration chooses.

    Args:
        model ([`LoadedModel`]): The encoder.
        source ([`ImageSource`]): The images.
        description (`str`): What the bar says.
        progress (`bool`): Whether to show a bar.
        batch_size (`int`): Images at once.

    Returns:
        `list` of `torch.Tensor` of shape `(n, D_k)`, float32, on the CPU: One a level, from the image up.
    """
    # the encoder is left in the mode that what wraps it is in
    levels = EveryLevel(model.encoder).train(model.encoder.training)
    images = ImageDataset(source, eval_transform(model.image_size))
    embeddings, _ = extract_embeddings(
        levels, images, model.image_mean, model.image_std, batch_size, progress=progress, description=description
    )
    return levels.split(embeddings)
