"""Classifiers on saved encoders: built with a new head, frozen, or with low-rank adapters by peft."""

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_cjepa import CJepaConfig
from modeling_cjepa.configuration_cjepa import pair
from trainers.errors import InputError
from trainers.finetune_args import FinetuneArguments
from trainers.loading import CLASSIFIERS, load_encoder_config, load_model

# queries and values of the encoder's layers; an attentive head has its own
_ADAPTED = r"(.*\.)?attention\.(q_proj|v_proj)"
HEAD = ("classifier", "pooling")


def classifier_config(path: str | Path, settings: FinetuneArguments, label_names: list[str] | None = None):
    """
    The configuration of a saved encoder with what fine-tuning sets.

    Args:
        path (`str` or `Path`): The encoder's folder, or its id on the Hub.
        settings ([`FinetuneArguments`]): Image size, level, head, drop path.
        label_names (`list[str]`, *optional*): The classes; not set when not given.

    Returns:
        [`CJepaConfig`] or [`SJeaConfig`].

    Raises:
        InputError: There is no such model, or it cannot be had with these settings.
    """
    config = load_encoder_config(path)
    changes = {"classifier_pooling": settings.classifier_pooling}
    changes |= {
        name: getattr(settings, name) for name in ("level", "image_size") if getattr(settings, name) is not None
    }
    if isinstance(config, CJepaConfig):
        changes["drop_path_rate"] = settings.drop_path_rate
    elif settings.drop_path_was_given and settings.drop_path_rate > 0:
        raise InputError("drop_path_rate is one of C-JEPA's encoder, and an S-JEA model has none; leave it out.")
    if label_names is not None:
        changes["id2label"] = dict(enumerate(label_names))
        changes["label2id"] = {name: number for number, name in enumerate(label_names)}
    try:
        config = type(config).from_dict(config.to_dict() | changes)
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())) from error
    if isinstance(config, CJepaConfig):
        _check_patches(config)
    if config.num_channels != 3:
        raise InputError(f"{path} reads num_channels={config.num_channels}, but images are read as RGB.")
    return config


def _check_patches(config: CJepaConfig):
    for size, patch in zip(pair(config.image_size), pair(config.patch_size), strict=True):
        if size % patch:
            raise InputError(
                f"image_size={config.image_size} is no multiple of patch_size={config.patch_size}; set it to "
                f"{size // patch * patch or patch} or {(size // patch + 1) * patch}."
            )


def build_classifier(path: str | Path, config, from_scratch: bool = False, attention: str = "sdpa") -> PreTrainedModel:
    """
    A classifier with a new head on a saved encoder; weights are drawn from torch's default generator.

    Args:
        path (`str` or `Path`): The encoder's folder, or its id on the Hub.
        config: What [`classifier_config`] gave.
        from_scratch (`bool`): Whether the encoder, too, is new.
        attention (`str`): Implementation of attention.

    Returns:
        [`CJepaForImageClassification`] or [`SJeaForImageClassification`], in float32.

    Raises:
        InputError: The weights are not whole or do not fit.
    """
    try:
        model = CLASSIFIERS[type(config)]._from_config(config, attn_implementation=attention, dtype=torch.float32)
        if not from_scratch:
            saved = load_model(path).base_model
            weights = saved.state_dict()
            if saved.config.image_size != config.image_size:
                weights |= {name: table for name, table in model.base_model.named_buffers() if _is_positions(name)}
            model.base_model.load_state_dict(weights)
    except InputError:
        raise
    except (ValueError, RuntimeError, ImportError) as error:
        raise InputError(f"{path} cannot become this classifier: {' '.join(str(error).split())}") from error
    return model


def _is_positions(name: str) -> bool:
    return name.rpartition(".")[2] == "position_embeddings"


def freeze_encoder(model: PreTrainedModel):
    """Leaves only the head to train: the encoder gets no gradient, and evaluates whatever mode the model is in."""
    model.base_model.requires_grad_(False)
    # Trainer puts the whole model into training mode at every step
    model.register_forward_pre_hook(lambda module, inputs: module.base_model.eval() and None)


def add_adapters(model: PreTrainedModel, settings: FinetuneArguments, source: str | Path):
    """
    Low-rank adapters (arXiv 2106.09685) of the queries and values of all layers, by peft; the head is trained whole.

    Args:
        model: The classifier.
        settings ([`FinetuneArguments`]): Rank, scale and dropout.
        source (`str` or `Path`): Where its encoder came from, for the record.

    Returns:
        `peft.PeftModel`.

    Raises:
        InputError: peft is not installed, or the encoder has no attention.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise InputError(
            '--mode lora needs peft, which is not installed; install it: pip install "peft>=0.19".'
        ) from error
    if not any(re.fullmatch(_ADAPTED, name) for name, _ in model.named_modules()):
        raise InputError("--mode lora adapts attention, and this encoder has none; choose --mode full or frozen.")
    heads = [name for name, _ in model.named_children() if name in HEAD]
    adapters = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=_ADAPTED,
        modules_to_save=heads,
    )
    adapted = get_peft_model(model, adapters)
    adapted.peft_config["default"].base_model_name_or_path = str(source)
    return adapted
