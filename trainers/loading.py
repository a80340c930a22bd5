"""Saved models as a user names them, a folder or an id of the Hub: whole, or refused with the reason."""

import json
import math
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, PreTrainedModel
from transformers.utils import cached_file, has_file

from modeling_cjepa import (
    CJepaConfig,
    CJepaForImageClassification,
    CJepaForPreTraining,
    CJepaModel,
    SJeaConfig,
    SJeaForImageClassification,
    SJeaForPreTraining,
    SJeaModel,
)
from trainers.checkpoint_files import MANIFEST, broken_part
from trainers.conversion.weight_files import check_folder
from trainers.errors import InputError, first_line
from trainers.recipe_files import recipe_beside
from trainers.source_configs import no_model_named, read_config

# what is saved with all of its weights; of a classifier only the encoder is loaded, unless it is asked for
_CLASSES = {CJepaConfig: (CJepaForPreTraining, CJepaModel), SJeaConfig: (SJeaForPreTraining, SJeaModel)}
CLASSIFIERS = {CJepaConfig: CJepaForImageClassification, SJeaConfig: SJeaForImageClassification}


def load_encoder_config(path: str | Path) -> CJepaConfig | SJeaConfig:
    """
    The configuration of a saved model.

    Args:
        path (`str` or `Path`): Its folder, or its id on the Hub.

    Returns:
        [`CJepaConfig`] or [`SJeaConfig`].

    Raises:
        InputError: There is no model of this package.
    """
    with no_model_named(
        f"{path} is neither a folder with a C-JEPA or S-JEA model nor the id of one on the Hub",
        "give a folder such as runs/mine/final",
    ):
        read_config(path)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if type(config) not in _CLASSES:
        raise InputError(
            f"{path} is a model of type {config.model_type!r}, not 'cjepa' or 'sjea'; give a C-JEPA or S-JEA model."
        )
    return config


def load_model(path: str | Path, with_classifier: bool = False) -> PreTrainedModel:
    """
    A saved model in float32.

    Args:
        path (`str` or `Path`): Its folder, or its id on the Hub.
        with_classifier (`bool`): Whether a classifier is loaded as one, and not its encoder alone.

    Returns:
        `PreTrainedModel`: [`CJepaForPreTraining`] or [`SJeaForPreTraining`] with all of its weights if it is one, else
        [`CJepaModel`] or [`SJeaModel`], or a classifier.

    Raises:
        InputError: There is none, it is broken, or a weight is missing.
    """
    config = load_encoder_config(path)
    pretraining, encoder = _CLASSES[type(config)]
    choices = (pretraining, *([CLASSIFIERS[type(config)]] if with_classifier else []))
    cls = next((choice for choice in choices if choice.__name__ in (config.architectures or [])), encoder)
    model, missing = read_weights(cls, path)
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise InputError(f"{path} lacks {len(missing)} weights of a {cls.__name__} ({shown}); save it again.")
    return model


def read_weights(cls: type[PreTrainedModel], path: str | Path) -> tuple[PreTrainedModel, list[str]]:
    """
    A model of a class in float32, and the names of those of its weights that were not there, in order.

    Raises:
        InputError: It is a broken checkpoint, or its weights cannot be loaded.
    """
    broken = Path(path, MANIFEST).is_file() and broken_part(Path(path), "model*.safetensors")
    if broken:
        raise InputError(f"{path} is a broken checkpoint ({broken}); take another one.")
    check_folder(str(path))
    try:
        model, info = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise InputError(f"The weights of {path} cannot be loaded ({first_line(error)}); save it again.") from error
    return model, sorted(info["missing_keys"])


def load_processor(path: str | Path):
    """
    The image processor beside a model; no code of its own is run.

    Args:
        path (`str` or `Path`): The model's folder, or its id on the Hub.

    Returns:
        The processor; `None` where there is none.

    Raises:
        InputError: It cannot be loaded, needs code of its own, or normalises no image.
    """
    if not has_file(str(path), "preprocessor_config.json"):
        return None
    with no_model_named(f"The image processor of {path} cannot be loaded", "mend preprocessor_config.json"):
        processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    if getattr(processor, "auto_map", None):
        raise InputError(f"preprocessor_config.json of {path} names code of its own (auto_map), which is not run.")
    check_processor(processor, None, path)
    return processor


def check_processor(processor, num_channels: int | None, path: str | Path):
    """
    Refuses an image processor whose mean and standard deviation are not those of channels.

    Args:
        processor: An image processor.
        num_channels (`int`, *optional*): Of the model; of any number when not given.
        path (`str` or `Path`): Where it is from, for the sentence.

    Raises:
        InputError: They are no lists of finite numbers, one a channel, or a standard deviation is not above 0.
    """
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name, None)
        is_list = isinstance(values, list | tuple) and all(isinstance(value, int | float) for value in values)
        if not is_list or not all(math.isfinite(value) and (value > 0 or name == "image_mean") for value in values):
            raise InputError(
                f"The image processor of {path} says {name}={values!r}, by which no image is normalised; mend "
                "preprocessor_config.json."
            )
        if num_channels is not None and len(values) != num_channels:
            raise InputError(
                f"The image processor of {path} says {name}={values!r}, and the model has {num_channels} "
                "channels; mend preprocessor_config.json."
            )


def load_image_statistics(path: str | Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the channels that a model's image processor says, if it has one."""
    processor = load_processor(path)
    if processor is None:
        return None
    return list(processor.image_mean), list(processor.image_std)


def load_run_settings(path: str | Path) -> dict:
    """
    The recipe of the run that made a model.

    Args:
        path (`str` or `Path`): The model's folder, a checkpoint, or a model's id on the Hub.

    Returns:
        `dict`: The keys that were set, of its `results.json`, or of the `recipe.yaml` beside a checkpoint; empty where
        there is neither.

    Raises:
        InputError: The file is broken.
    """
    results = read_json(path, "results.json")
    if not results:
        return recipe_beside(path)
    if not isinstance(results, dict) or not isinstance(results.get("settings"), dict):
        raise InputError(f"results.json of {path} does not tell the settings of its run; give --dataset.")
    return results["settings"]


def read_json(place: str | Path, name: str) -> dict:
    """A JSON file beside a model, in its folder or on the Hub; empty if there is none."""
    if not has_file(place, name):
        return {}
    try:
        return json.loads(Path(cached_file(place, name)).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name} of {place} cannot be read ({first_line(error)}); mend or remove it, or take another model."
        ) from error


def load_with_statistics(model, image_mean, image_std) -> tuple:
    """
    A model with the mean and standard deviation of the images it reads.

    Args:
        model (`str`, `Path` or a model): A folder or the id of a model on the Hub, put on the GPU if there is one; or
            a model, used where it is.
        image_mean, image_std (`list[float]`): Of the channels, where no image processor says.

    Returns:
        `(model, image_mean, image_std)`.
    """
    if isinstance(model, str | Path):
        path, model = model, load_model(model).to("cuda" if torch.cuda.is_available() else "cpu")
        image_mean, image_std = load_image_statistics(path) or (image_mean, image_std)
    return model, image_mean, image_std
