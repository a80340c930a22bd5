"""Vision transformers of the transformers library, loaded by its own classes alone."""

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from modeling_cjepa import CJepaConfig
from trainers.conversion.weight_files import check_folder, check_tensors
from trainers.errors import InputError, first_line

# fields of a configuration that mean the same in ours
_SHARED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps",
    "image_size", "patch_size", "num_channels", "qkv_bias",
)  # fmt: skip
_PREDICTOR_HEADS = 12


def load_transformers(model_class, name: str, unneeded=()) -> tuple[PreTrainedModel, list[str], list[str]]:
    """
    A model of the library's, in float32 and evaluation mode.

    Args:
        model_class: Its class.
        name (`str`): Its folder, or its id on the Hub.
        unneeded (`tuple` of `str`): Beginnings of the names of weights that may be missing.

    Returns:
        `(model, unused, missing)`: With the names of the weights that it has no place for, and of those it lacks.

    Raises:
        InputError: It cannot be loaded, lacks weights, or has some that are not finite.
    """
    check_folder(name)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of weights without a place is ours to give
    try:
        model, info = model_class.from_pretrained(
            name,
            dtype=torch.float32,
            output_loading_info=True,
            trust_remote_code=False,
            weights_only=True,
            attn_implementation="sdpa",
        )
    except (OSError, RuntimeError, ValueError, TypeError, StrictDataclassError, SafetensorError) as error:
        raise InputError(f"{name} cannot be loaded as a {model_class.__name__} ({first_line(error)}).") from error
    finally:
        logging.set_verbosity(level)
    missing = sorted(info["missing_keys"])
    if needed := [each for each in missing if not each.startswith(tuple(unneeded))]:
        raise InputError(f"{name} lacks {len(needed)} weights of a {model_class.__name__} ({needed[0]}, ...).")
    check_tensors(model.state_dict(), name)
    return model.eval(), sorted(info["unexpected_keys"]), missing


def left_out(unused: list[str], prefix: str = "") -> list[str]:
    """
    A sentence on weights that have no place, by the parts they belong to; none where there are none.

    Args:
        unused (`list[str]`): Their names.
        prefix (`str`): What the encoder is called in the model they are of; its own parts are named in full.
    """
    inside = {name.removeprefix(f"{prefix}.") for name in unused if name.startswith(f"{prefix}.")}
    parts = sorted(inside | {name.partition(".")[0] for name in unused if not name.startswith(f"{prefix}.")})
    return [f"Without a place in the encoder, and left out: {', '.join(parts)}."] if parts else []


def encoder_config(config, name: str, **changes) -> CJepaConfig:
    """
    The configuration of our encoder that computes as one of the library's does.

    Args:
        config (`PreTrainedConfig`): Of a vision transformer of the library.
        name (`str`): Where it is from, for the sentence.
        changes: Fields of ours that it has not, or calls otherwise.

    Returns:
        [`CJepaConfig`].

    Raises:
        InputError: It makes no model of ours.
    """
    fields = {field: getattr(config, field) for field in _SHARED if hasattr(config, field)} | changes
    heads = fields["num_attention_heads"]
    fields |= predictor_heads(heads)
    head_dim = getattr(config, "head_dim", None)
    if head_dim not in (None, fields["hidden_size"] // heads):
        raise InputError(f"{name} has head_dim={head_dim}, not its width by its heads, which does not map.")
    try:
        return CJepaConfig(**fields)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise InputError(f"The configuration of {name} makes no model of ours ({first_line(error)}).") from error


def predictor_heads(heads: int) -> dict[str, int]:
    """The field of an encoder's configuration whose heads are none of a predictor of the default width."""
    is_odd = CJepaConfig.predictor_hidden_size % heads
    return {"predictor_num_attention_heads": _PREDICTOR_HEADS} if is_odd else {}


def ijepa_fields(config: CJepaConfig) -> dict:
    """The fields of our configuration that the library's vision transformers have, too."""
    return {field: getattr(config, field) for field in _SHARED}
