"""transformers' IJepaModel, in and out; its parameters have our names."""

from pathlib import Path

import torch
from transformers import AutoModel, IJepaConfig, IJepaModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN

from modeling_cjepa import CJepaModel
from trainers.conversion.checks import Check, Converted, Written, compare, in_float64, random_images
from trainers.conversion.formats import ReadOptions, Source
from trainers.conversion.names import build, exact_positions, has_fixed_positions
from trainers.conversion.ours import plain_encoder_only
from trainers.conversion.transformers_models import encoder_config, ijepa_fields, left_out, load_transformers
from trainers.errors import InputError
from trainers.loading import load_processor

# what the authors' code normalises by


def read_ijepa(source: Source, options: ReadOptions) -> Converted:
    """
    Reads an IJepaModel and compares it with the library's.

    Args:
        source ([`Source`]): Its folder or id.
        options ([`ReadOptions`]): Not needed.

    Returns:
        [`Converted`]: A [`CJepaModel`].

    Raises:
        InputError: It cannot be loaded, or its positions are learned ones.
    """
    original, unused, _ = load_transformers(IJepaModel, source.name)
    config = encoder_config(original.config, source.name)
    if not has_fixed_positions(config.grid_size, original.embeddings.position_embeddings):
        raise InputError(
            f"{source.name} has learned positions, not the fixed 2-D sin-cos table of I-JEPA; they do not map to ours."
        )
    positions = original.embeddings.position_embeddings
    positions.data, rounded = exact_positions(config.grid_size, positions)
    model = build(CJepaModel, config, original.state_dict(), source.name)
    notes = ["There is no predictor in it: an encoder comes in."]
    notes += rounded + left_out(unused, original.base_model_prefix)
    if source.name.startswith("facebook/ijepa"):
        notes.append(
            "The weights on the Hub are those of the context encoder; the authors' checkpoint has the target encoder."
        )
    processor = load_processor(source.name)
    if processor is not None and list(processor.image_mean) != IMAGENET_DEFAULT_MEAN:
        notes.append(
            f"Its image processor is taken over with mean {list(processor.image_mean)}; the authors' code has "
            f"{IMAGENET_DEFAULT_MEAN}."
        )
    return Converted(model, notes, _check(model, original), processor)


def write_ijepa_model(model: CJepaModel, processor, folder: Path, shard_size: int | str = "5GB") -> Written:
    """
    Writes an encoder as an IJepaModel, which `AutoModel` loads without code from elsewhere.

    Args:
        model ([`CJepaModel`]): The encoder.
        processor: Its image processor.
        folder (`Path`): An existing folder.
        shard_size (`int` or `str`): Bytes of the largest file of weights, such as `"1GB"`.

    Returns:
        [`Written`]: The check is of the folder, loaded again by `AutoModel`.

    Raises:
        InputError: It is a stack, or what was written differs.
    """
    plain_encoder_only(model, "transformers' IJepaModel")
    written = IJepaModel(IJepaConfig(**ijepa_fields(model.config)))
    written.load_state_dict(model.state_dict())
    written.save_pretrained(folder, max_shard_size=shard_size)
    processor.save_pretrained(folder)
    again = AutoModel.from_pretrained(folder, trust_remote_code=False)
    if type(again) is not IJepaModel:
        raise InputError(f"{folder} loads as a {type(again).__name__}, not as an IJepaModel; upgrade transformers.")
    return Written(_check(model, again.eval()))


@torch.no_grad()
def _check(model: CJepaModel, original: IJepaModel) -> Check:
    images = random_images(model.config, dtype=torch.float64)
    with in_float64(model):
        ours = model.eval()(images).last_hidden_state
    with in_float64(original):
        theirs = original(images).last_hidden_state
    return compare("transformers' IJepaModel on 2 random images", [ours], [theirs])
