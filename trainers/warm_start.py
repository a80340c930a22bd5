"""Pre-training that starts from weights that are there: those of a run, or of another package.

The architecture of what the weights have is theirs; masks, views, loss and schedules are the recipe's.
"""

import re
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedConfig

from modeling_cjepa import CJepaConfig, CJepaForPreTraining, SJeaForPreTraining
from trainers.conversion.checks import Converted
from trainers.conversion.converting import load_start
from trainers.conversion.formats import ReadOptions
from trainers.errors import InputError
from trainers.recipes import Recipe

_ENCODER_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps",
    "qkv_bias", "patch_size", "stem_hidden_sizes",
)  # fmt: skip
# which follow from the predictor's width and the encoder's heads where they are not given
_DERIVED_FIELDS = ("predictor_num_attention_heads", "predictor_intermediate_size")
_PREDICTOR_FIELDS = (
    "predictor_hidden_size", "predictor_num_hidden_layers", "predictor_attention", *_DERIVED_FIELDS,
)  # fmt: skip
_PREDICTOR, _EXPANDER = r"(upper_)?predictors?\.", r"(upper_)?expanders?\."
# of S-JEA, the second where the level above reads it
_EXPANDER_OF = r"expanders\.(\d+)\.|(?:sjea\.)?levels\.(\d+)\.expander\."
# of a level of S-JEA; its loss is the recipe's
_LEVEL_FIELDS = ("backbone", "stem", "input", "reads", "fold_height")
_HEADS = "num_attention_heads"
_COLOURS = 3
# what a sentence calls a part of a model: `predictor`, `expanders.1`, `sjea.levels.1`
_PART = r"sjea\.levels\.\d+(\.expander\b)?|\w+\.upper_levels\.\d+|\w+s\.\d+|\w+"


def read_start(recipe: Recipe) -> Converted:
    """
    Reads the weights that a recipe names by `start_from`, and gives it their architecture.

    A predictor is another one, which starts anew, where the command line says how large it is. Expanders are the
    recipe's, of S-JEA where the weights have none.

    Args:
        recipe ([`Recipe`]): Its fields of the model, and its values, are changed in place.

    Returns:
        [`Converted`].

    Raises:
        InputError: They cannot be read, are of the other way of pre-training or of images without colours, or
            contradict a key of the command line.
    """
    source = recipe.run.start_from
    start = load_start(source, _read_options(recipe))
    config = start.model.config
    if not isinstance(config, recipe.objective.config_class):
        other = "cjepa" if isinstance(config, CJepaConfig) else "sjea"
        raise InputError(f"start_from={source} is a model of type {other!r}; give a recipe of model_type {other}.")
    if config.num_channels != _COLOURS:
        raise InputError(
            f"start_from={source} reads images of {config.num_channels} channels, and training reads them as RGB; "
            "start from a model of 3 channels."
        )
    fields = _with_another_predictor(_fields(start, recipe.model), recipe)
    differ = _differing(fields, recipe)
    notes = [*start.notes, *([f"its sizes are taken: {', '.join(differ)}"] if differ else [])]
    ours, processor = list(recipe.data.image_mean), start.processor
    if processor is not None and list(processor.image_mean) != ours:
        notes.append(f"images are normalised by the recipe's mean {ours}, and were by {list(processor.image_mean)}")
    recipe.model |= fields
    recipe.values |= fields
    return replace(start, notes=notes)


def _read_options(recipe: Recipe) -> ReadOptions:
    """The heads, which the authors' files do not hold: those of the command line, or of a recipe as wide."""
    heads = recipe.model.get(_HEADS)
    if not isinstance(heads, int) or not Path(recipe.run.start_from).is_file():
        return ReadOptions()
    if _HEADS in recipe.given:
        return ReadOptions(num_attention_heads=heads)
    return ReadOptions(heads_by_width={recipe.model.get("hidden_size"): heads})


def _fields(start: Converted, recipe_fields: dict) -> dict:
    """The fields of a configuration that the weights decide."""
    config = start.model.config
    if not isinstance(config, CJepaConfig):
        return {"levels": _levels(start, recipe_fields.get("levels"))}
    names = _ENCODER_FIELDS + (_PREDICTOR_FIELDS if isinstance(start.model, CJepaForPreTraining) else ())
    fields = {name: getattr(config, name) for name in names}
    theirs, ours = config.upper_levels, recipe_fields.get("upper_levels")
    fields["upper_levels"] = _merged(theirs, theirs if ours is None else ours, [names] * len(theirs))
    if "image_size" not in recipe_fields:
        fields["image_size"] = config.image_size
    return fields


def _levels(start: Converted, recipe_levels: list | None) -> list[dict]:
    """The levels of S-JEA's weights, each with the recipe's loss, and its expander where they have none."""
    theirs = [level if isinstance(level, dict) else asdict(level) for level in start.model.config.levels]
    with_expander = {int(found[1] or found[2]) for name in start.weights() if (found := re.match(_EXPANDER_OF, name))}
    names = [
        (*_LEVEL_FIELDS, "expander_sizes") if number in with_expander else _LEVEL_FIELDS
        for number in range(len(theirs))
    ]
    return _merged(theirs, theirs if recipe_levels is None else recipe_levels, names)


def _merged(theirs: list[dict], ours: list[dict], names: list[tuple[str, ...]]) -> list[dict]:
    """Levels with the fields of theirs that are named, the others of ours, and above them those one alone has."""
    kept = [
        {name: value for name, value in our.items() if name not in taken}
        | {name: their[name] for name in taken if name in their}
        for our, their, taken in zip(ours, theirs, names, strict=False)
    ]
    return kept + (theirs[len(ours) :] or ours[len(theirs) :])


def _with_another_predictor(fields: dict, recipe: Recipe) -> dict:
    """The fields with the recipe's predictor, where the command line gives it another size than the weights have."""
    said = {name: recipe.model[name] for name in _PREDICTOR_FIELDS if name in recipe.model}
    if all(said[name] == fields.get(name, said[name]) for name in recipe.given & said.keys()):
        return fields
    other = fields | said
    if other["predictor_hidden_size"] != fields["predictor_hidden_size"]:
        other = {name: value for name, value in other.items() if name not in _DERIVED_FIELDS or name in said}
    return other


def _differing(fields: dict, recipe: Recipe) -> list[str]:
    """What is taken in the place of what the recipe says; the command line is not overruled, but contradicted."""
    differ = []
    for name in sorted(fields.keys() & recipe.model.keys()):
        said, found = recipe.model[name], _differences(name, fields[name], recipe.model[name])
        if found and name in recipe.given:
            raise InputError(
                f"--{name} {said} contradicts start_from={recipe.run.start_from}, whose {name} is {fields[name]}; "
                "leave it out."
            )
        differ += found
    return differ


def _differences(name: str, taken, said) -> list[str]:
    """Where what is taken is not what the recipe says, within levels, too."""
    if isinstance(taken, dict) and isinstance(said, dict):
        shared = [key for key in said if key in taken]
        return [each for key in shared for each in _differences(f"{name}.{key}", taken[key], said[key])]
    if isinstance(taken, list) and isinstance(said, list) and any(isinstance(each, dict) for each in said):
        pairs = enumerate(zip(taken, said, strict=False))
        return [each for number, pair in pairs for each in _differences(f"{name}[{number}]", *pair)]
    return [] if taken == said else [f"{name} {taken} (the recipe says {said})"]


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
    tensors = start.weights()
    if not isinstance(start.model, type(model)):
        parts = [model.base_model_prefix, *(["context_encoder"] if isinstance(model, CJepaForPreTraining) else [])]
        tensors = {f"{part}.{name}": tensor for part in parts for name, tensor in tensors.items()}
    own = model.state_dict()
    left = dict.fromkeys(_part(name) for name in tensors if name not in own)
    for names, pattern in ((_PREDICTOR_FIELDS, _PREDICTOR), (("expander_hidden_size",), _EXPANDER)):
        if any(_differ(start.model.config, model.config, name) for name in names):
            tensors = {name: tensor for name, tensor in tensors.items() if not re.match(pattern, name)}
    fitting = {name: tensor for name, tensor in tensors.items() if name in own and own[name].shape == tensor.shape}
    model.load_state_dict(fitting, strict=False)
    # tables of positions are computed for the grid
    anew = [name for name in own if name not in fitting and not name.endswith("position_embeddings")]
    sentences = [*start.notes, *([start.check.sentence()] if start.check else [])]
    parts = dict.fromkeys(_part(name) for name in anew)
    sentences += [f"{', '.join(left)} of the start {_verb(left, 'is', 'are')} left out"] if left else []
    return sentences + ([f"{', '.join(parts)} {_verb(parts, 'starts', 'start')} anew"] if parts else [])


def _verb(parts, one: str, several: str) -> str:
    return one if len(parts) == 1 else several


def _differ(one: PreTrainedConfig, other: PreTrainedConfig, name: str) -> bool:
    return getattr(one, name, None) != getattr(other, name, None)


def _part(name: str) -> str:
    """The part of a model that a weight is of, as a user thinks of it."""
    return re.match(_PART, name)[0]
