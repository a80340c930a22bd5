"""Models of this package as a format: what comes in as it is, and the folder that others are converted to."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_cjepa import CJepaForPreTraining, SJeaForPreTraining, SJeaModel
from trainers.conversion.checks import Check, Converted, Written, compare, random_images
from trainers.conversion.formats import ReadOptions, Source
from trainers.conversion.names import POSITIONS, exact_positions
from trainers.conversion.weight_files import check_tensors
from trainers.errors import InputError
from trainers.loading import load_model, load_processor
from trainers.model_facts import is_classifier
from trainers.publishing import save_model


def read_ours(source: Source, options: ReadOptions) -> Converted:
    """
    Loads a model of this package.

    Args:
        source ([`Source`]): Its folder or id.
        options ([`ReadOptions`]): Not needed.

    Returns:
        [`Converted`] without a check: there is nothing to compare with.

    Raises:
        InputError: It cannot be loaded whole, or has weights that are not finite.
    """
    if (source.config or {}).get("quantization_config"):
        raise InputError(f"{source.name} has 8-bit weights, which only go out; convert the model it was made from.")
    model = load_model(source.name, with_classifier=True).eval()
    check_tensors(model.state_dict(), source.name)
    notes = _put_exact_positions(model)
    return Converted(model, notes, processor=load_processor(source.name))


def _put_exact_positions(model: PreTrainedModel) -> list[str]:
    """Changes the tables of positions in place; a sentence where one was rounded, as by saving in half precision."""
    notes = []
    for module in model.modules():
        if POSITIONS in dict(module.named_buffers(recurse=False)):
            exact, rounded = exact_positions(module.config.grid_size, module.position_embeddings)
            module.position_embeddings.copy_(exact)
            notes += rounded
    return notes[:1]


def write_ours(model: PreTrainedModel, processor, folder: Path) -> Written:
    """
    Writes weights, configuration, code and image processor into an existing folder.

    Args:
        model: Any of this package.
        processor: Its image processor.
        folder (`Path`): Where to.

    Returns:
        [`Written`]: The check is of the folder, loaded again, which must give the same features.
    """
    save_model(model, processor, folder)
    return Written(check_written(model, load_model(folder, with_classifier=True).eval(), "the folder loaded again"))


@torch.no_grad()
def check_written(model: PreTrainedModel, again: PreTrainedModel, what: str) -> Check:
    """Compares two models of this package: the embeddings of each encoder, or a classifier's logits."""
    images = random_images(model.config)
    ours, theirs = (
        [
            output
            for module in _parts(each.eval())
            for output in ([module(images).logits] if is_classifier(module) else module(images).level_embeddings)
        ]
        for each in (model, again)
    )  # fmt: skip
    return compare(f"{what} on 2 random images", ours, theirs)


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    if isinstance(model, CJepaForPreTraining):
        return [model.cjepa, model.context_encoder]
    return [model.sjea] if isinstance(model, SJeaForPreTraining) else [model]


def encoder_of(model: PreTrainedModel, encoder: str | None) -> PreTrainedModel:
    """
    One encoder of a model.

    Args:
        model: Of this package.
        encoder (`"target"` or `"context"`, *optional*): Of a model of pre-training; the target encoder when not given.

    Returns:
        [`CJepaModel`] or [`SJeaModel`].

    Raises:
        InputError: The model has no context encoder.
    """
    if isinstance(model, CJepaForPreTraining):
        return model.context_encoder if encoder == "context" else model.cjepa
    if is_classifier(model):
        model = model.base_model
    if encoder == "context":
        raise InputError("--encoder context: the source has one encoder and no context encoder; leave it out.")
    return model.sjea if isinstance(model, SJeaForPreTraining) else model


def plain_encoder_only(model: PreTrainedModel, what: str):
    """
    Refuses what other layouts have no place for.

    Raises:
        InputError: The model is of S-JEA or a stack.
    """
    if isinstance(model, SJeaModel | SJeaForPreTraining):
        raise InputError(f"An S-JEA model does not fit {what}; use `--to cjepa`, `onnx` or `program`.")
    if model.config.stem_hidden_sizes is not None:
        raise InputError(
            f"A convolutional stem (stem_hidden_sizes={list(model.config.stem_hidden_sizes)}) does not fit {what}, "
            "which projects patches; use `--to cjepa`, `onnx` or `program`."
        )
    if model.config.num_levels > 1:
        raise InputError(
            f"A stack of {model.config.num_levels} levels does not fit {what}, which has one; use `--to cjepa`, "
            "`onnx`, `program` or `int8`."
        )
