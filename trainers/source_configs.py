"""The `config.json` of a model that others made, looked over before anything of it is built."""

import json
from contextlib import contextmanager
from math import prod
from pathlib import Path

from transformers.utils import cached_file

from trainers.errors import InputError, first_line

# fields by which transformers would read another file, or run another's code, than those that are looked over, with
# the values that lead nowhere: other names of an attention are repositories of kernels
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_ELSEWHERE = {
    "configuration_files": (None,), "transformers_weights": (None,), "attn_implementation": _ATTENTIONS,
    "_attn_implementation": _ATTENTIONS,
}  # fmt: skip
# by words in the names of fields, the largest value that is believed
_LARGEST = {
    "num_hidden_layers": 1_000, "depth": 1_000, "num_heads": 1_000, "attention_heads": 1_000, "hidden_size": 20_000,
    "embed_dim": 20_000, "embedding_size": 20_000, "pooler_output_size": 20_000, "intermediate_size": 200_000,
    "mlp_ratio": 1_000, "expander_sizes": 100_000, "num_register_tokens": 10_000, "reg_tokens": 10_000,
    "image_size": 10_000, "img_size": 10_000, "patch_size": 10_000, "num_channels": 1_000, "in_chans": 1_000,
}  # fmt: skip
_MAY_BE_NONE = {"num_register_tokens", "reg_tokens"}
# in a whole configuration; and of one image: 128 x 128 patches, 2,048 x 2,048 pixels of 4 channels
_MOST_LAYERS, _MOST_LEVELS = 2_000, 100
_MOST_PATCHES, _MOST_VALUES = 2**14, 2**24
_LAYERS, _LEVELS = ("num_hidden_layers", "depth"), ("levels", "upper_levels")
_LABELS = ("id2label", "label2id")


@contextmanager
def no_model_named(what: str, advice: str):
    """
    Says in one sentence that there is no model, whatever a library makes of what is there instead.

    Args:
        what (`str`): The beginning of the sentence, such as "x is no model".
        advice (`str`): Its end.

    Raises:
        InputError: Something was raised within.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a configuration of others can be wrong in any way
        raise InputError(f"{what} ({first_line(error)}); {advice}.") from error


def read_config(name: str | Path) -> dict:
    """
    The `config.json` of a folder or of an id on the Hub.

    Args:
        name (`str` or `Path`): The folder or id.

    Returns:
        `dict`: Its fields.

    Raises:
        InputError: It holds no mapping, points elsewhere, or has sizes that no encoder has.
        Exception: There is none, or it is no JSON; see [`no_model_named`].
    """
    path = cached_file(str(name), "config.json")
    if path is None:
        raise FileNotFoundError("there is no config.json")
    config = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise InputError(f"config.json of {name} holds no mapping; it is no model.")
    if not isinstance(config.get("architectures") or [], list):
        raise InputError(f"config.json of {name} says architectures={config['architectures']!r}, no list; mend it.")
    _check_fields(config, str(name))
    return config


def _check_fields(config: dict, name: str):
    """Refuses what points elsewhere, and sizes that no encoder has, in mappings within mappings, too."""
    found, num_layers = [config], 0
    for mapping in found:
        for field, value in mapping.items():
            if value not in _ELSEWHERE.get(field, (value,)):
                raise InputError(f"config.json of {name} has {field}, which leads elsewhere; take that field out.")
            if field in _LABELS:
                continue
            values = _flat(value)
            found += [each for each in values if isinstance(each, dict)]
            numbers = [each for each in values if _is_number(each)]
            least = 0 if field in _MAY_BE_NONE else 1e-9
            most = next((most for word, most in _LARGEST.items() if word in field), None)
            num_layers += sum(numbers) if any(word in field for word in _LAYERS) else 0
            is_believed = most is None or all(least <= number <= most for number in numbers)
            if not is_believed or num_layers > _MOST_LAYERS or field in _LEVELS and len(values) > _MOST_LEVELS:
                _refuse(name, field, value)
        _check_image(mapping, name)


def _flat(value) -> list:
    """The values in lists in each other; another value as a list of one."""
    found, left = [], [value]
    while left:
        each = left.pop()
        if isinstance(each, list):
            left += each
        else:
            found.append(each)
    return found


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_image(mapping: dict, name: str):
    """Refuses images of more patches, or values, than an encoder is checked with."""
    channels = mapping.get("num_channels", mapping.get("in_chans"))
    channels = channels if _is_number(channels) else 3
    for field in {"image_size", "img_size"} & mapping.keys():
        pixels = _area(mapping[field])
        num_patches = pixels / _area(mapping["patch_size"]) if "patch_size" in mapping else 1
        if pixels * channels > _MOST_VALUES or num_patches > _MOST_PATCHES:
            _refuse(name, field, mapping[field])


def _area(size) -> float:
    """Of a side, or of height and width; 1 of what is no size."""
    sides = size if isinstance(size, list) and len(size) == 2 else [size, size]
    return prod(sides) if all(_is_number(side) for side in sides) else 1


def _refuse(name: str, field: str, value):
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]} ..."
    raise InputError(f"config.json of {name} says {field}={shown}, which is no size of an encoder; mend it.")
