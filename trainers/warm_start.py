"""Pre-training that starts from weights that are there: those of a run, or of another package.

The architecture of what the weights have is theirs; masks, views, loss and schedules are the recipe's.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel

from modeling_cjepa import CJepaConfig, CJepaForPreTraining, SJeaForPreTraining
from trainers.conversion.checks import Converted
from trainers.conversion.converting import load_start
from trainers.conversion.formats import ReadOptions
from trainers.errors import InputError
from trainers.recipes import Recipe

_ENCODER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "qkv_bias", "patch_size", "num_channels", "upper_levels",
)  # fmt: skip
_PREDICTOR_FIELDS = (
    "predictor_hidden_size", "predictor_num_hidden_layers", "predictor_num_attention_heads",
    "predictor_intermediate_size", "expander_hidden_size",
)  # fmt: skip
_PREDICTOR = r"(upper_)?(predictors?|expanders?)\."
# of a level of S-JEA; its loss is the recipe's
_LEVEL_FIELDS = ("backbone", "stem", "input", "reads", "fold_height", "expander_sizes")


def read_start(recipe: Recipe) -> Converted:
    """
    Reads the weights that a recipe names by `start_from`, and gives it their architecture.

    Args:
        recipe ([`Recipe`]): Its fields of the model, and its values, are changed in place.

    Returns:
        [`Converted`].

    A predictor is another one, which starts anew, where the command line says how large it is.

    Raises:
        InputError: They cannot be read, are of the other way of pre-training, or contradict a key of the command line.
    """
    source = recipe.run.start_from
    heads = "num_attention_heads"  # which the authors' files do not hold
    asked = recipe.model[heads] if heads in recipe.given and Path(source).is_file() else None
    start = load_start(source, ReadOptions(num_attention_heads=asked))
    config = start.model.config
    if not isinstance(config, recipe.objective.config_class):
        other = "cjepa" if isinstance(config, CJepaConfig) else "sjea"
        raise InputError(f"start_from={source} is a model of type {other!r}; give a recipe of model_type {other}.")
    fields = _fields(start.model, recipe.model)
    for name in recipe.given & fields.keys():
        if name in _PREDICTOR_FIELDS:
            fields |= {each: recipe.model[each] for each in _PREDICTOR_FIELDS if each in recipe.model}
        elif recipe.model.get(name) != fields[name]:
            raise InputError(
                f"--{name} {recipe.model[name]} contradicts start_from={source}, whose {name} is {fields[name]}; "
                "leave it out."
            )
    differ = [
        f"{name} {fields[name]} (the recipe says {recipe.model[name]})"
        for name in sorted(fields.keys() & recipe.model.keys())
        if name != "levels" and recipe.model[name] != fields[name]
    ]
    notes = [*start.notes, *([f"its sizes are taken: {', '.join(differ)}"] if differ else [])]
    mean = list(getattr(start.processor, "image_mean", recipe.data.image_mean))
    if mean != list(recipe.data.image_mean):
        notes.append(f"images are normalised by the recipe's mean {recipe.data.image_mean}, and were by {mean}")
    recipe.model |= fields
    recipe.values |= fields
    return replace(start, notes=notes)


def _fields(model: PreTrainedModel, recipe_fields: dict) -> dict:
    """The fields of a configuration that the weights decide."""
    config = model.config
    if not isinstance(config, CJepaConfig):
        return {"levels": _levels(config, recipe_fields.get("levels"))}
    names = _ENCODER_FIELDS + (_PREDICTOR_FIELDS if isinstance(model, CJepaForPreTraining) else ())
    fields = {name: getattr(config, name) for name in names}
    if "image_size" not in recipe_fields:
        fields["image_size"] = config.image_size
    return fields


def _levels(config: PreTrainedConfig, recipe_levels: list | None) -> list[dict]:
    """The levels of the weights, each with the recipe's loss, and above them those that only the recipe has."""
    theirs = [level if isinstance(level, dict) else asdict(level) for level in config.levels]
    ours = recipe_levels or theirs
    kept = [
        our | {name: their[name] for name in _LEVEL_FIELDS if name in their}
        for our, their in zip(ours, theirs, strict=False)
    ]
    return kept + (theirs[len(ours) :] or ours[len(theirs) :])


def load_start_weights(model: CJepaForPreTraining | SJeaForPreTraining, start: Converted) -> list[str]:
    """
    Puts the weights a run starts from into its model.

    An encoder alone becomes both context and target encoder; what it has not, such as the predictor, stays as it was
    initialised.

    Args:
        model ([`CJepaForPreTraining`] or [`SJeaForPreTraining`]): Changed in place.
        start ([`Converted`]): As [`read_start`] gives it.

    Returns:
        `list[str]`: Sentences on what did not map and what starts anew.
    """
    tensors = start.model.state_dict()
    if not isinstance(start.model, type(model)):
        parts = [model.base_model_prefix, *(["context_encoder"] if isinstance(model, CJepaForPreTraining) else [])]
        tensors = {f"{part}.{name}": tensor for part in parts for name, tensor in tensors.items()}
    if any(_differ(start.model.config, model.config, name) for name in _PREDICTOR_FIELDS):
        tensors = {name: tensor for name, tensor in tensors.items() if not re.match(_PREDICTOR, name)}
    own = model.state_dict()
    fitting = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    model.load_state_dict(fitting, strict=False)
    # tables of positions are computed for the grid
    anew = [name for name in own if name not in fitting and not name.endswith("position_embeddings")]
    sentences = [*start.notes, *([start.check.sentence()] if start.check else [])]
    parts = dict.fromkeys(_part(name) for name in anew)
    return sentences + ([f"{', '.join(parts)} start{'s' if len(parts) == 1 else ''} anew"] if parts else [])


def _differ(one: PreTrainedConfig, other: PreTrainedConfig, name: str) -> bool:
    return getattr(one, name, None) != getattr(other, name, None)


def _part(name: str) -> str:
    """The module a weight is of, as a user thinks of it: `predictor`, `expanders.1`, `sjea.levels.1`."""
    words = name.split(".")
    depth = 3 if words[0] == "sjea" else 2 if words[1].isdigit() else 1
    return ".".join(words[:depth])
