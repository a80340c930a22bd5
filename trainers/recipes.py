"""Recipes: flat YAML files whose keys are fields of the model, the data, the training or the evaluation.

A flag of the command line overrides a key. An unknown key, or a value of another type than its field, is an error that
names it: YAML reads `1e-3` as a word, and nothing may turn that into a number silently.
"""

import argparse
import inspect
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from trainers.errors import InputError
from trainers.evaluation import EvaluationArguments
from trainers.flags import add_flags, check_value, closest, enum_values, given_flags, type_hints
from trainers.model_facts import model_fields
from trainers.objectives import OBJECTIVES, Objective
from trainers.recipe_files import SECRETS
from trainers.resources import recipe_path
from trainers.sources import DataArguments
from trainers.training_args import PrecisionTrainingArguments

# fields of transformers' TrainingArguments worth a line of `--help`; all others are accepted, too
COMMON_TRAINING_FIELDS = {
    "output_dir", "max_steps", "gradient_accumulation_steps", "save_steps", "save_total_limit", "report_to", "seed",
    "dataloader_num_workers", "resume_from_checkpoint", "torch_compile", "use_cpu", "push_to_hub", "hub_model_id",
    "hub_private_repo",
}  # fmt: skip


@dataclass
class RunArguments:
    """What belongs to the run as a whole."""

    model_type: str = field(
        default="cjepa", metadata={"help": "what is pre-trained: `cjepa` (masked prediction) or `sjea` (two views)"}
    )
    attn_implementation: str = field(
        default="auto",
        metadata={
            "help": "`sdpa`, `eager`, `flash_attention_2`, `flex_attention`, or `auto`: sdpa, but eager where a CPU "
            "computes in bf16 (sdpa's backward pass is slower there)"
        },
    )
    evaluate: bool = field(
        default=True, metadata={"help": "evaluate the encoder at the end, where the images have labels"}
    )
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "start from the weights of a model: a run, an id on the Hub, or whatever `cjepa convert` "
            "reads (I-JEPA's checkpoints, transformers' and timm's vision transformers, a ResNet's file); what they "
            "lack, such as a predictor, starts anew; their sizes replace those of the recipe"
        },
    )

    def attention(self, device: torch.device, bf16: bool) -> str:
        """The implementation for a device and a precision, `auto` decided."""
        if self.attn_implementation != "auto":
            return self.attn_implementation
        return "eager" if bf16 and device.type == "cpu" else "sdpa"


@dataclass
class Recipe:
    """
    A run, ready to be built.

    Args:
        name (`str`): The recipe file's stem.
        values (`dict`): Every key that was set, by file or flag, but for secrets such as a token.
        model (`dict`): Those of them that are fields of the model's configuration.
        training (`dict`): Those that are fields of the training's arguments.
        given (`set[str]`): The keys that were given as flags.
        command (`list[str]`): The command line it came from, for the record.
        data ([`DataArguments`]), evaluation ([`EvaluationArguments`]), run ([`RunArguments`]): The others.
    """

    name: str
    values: dict
    model: dict
    training: dict
    data: DataArguments
    evaluation: EvaluationArguments
    run: RunArguments
    given: set[str] = field(default_factory=set)
    command: list[str] = field(default_factory=list)

    @property
    def objective(self) -> Objective:
        """The way of pre-training."""
        return OBJECTIVES[self.run.model_type]


def first_difference(name: str, before, now) -> tuple:
    """Where two values differ first, such as `levels[1].stop_gradient`, and what each has there."""
    inside = []
    if isinstance(before, dict) and isinstance(now, dict):
        inside = [(f"{name}.{key}", before.get(key), now.get(key)) for key in {**before, **now}]
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            return f"number of {name}", len(before), len(now)
        inside = [(f"{name}[{index}]", *pair) for index, pair in enumerate(zip(before, now, strict=True))]
    for part, *values in inside:
        if values[0] != values[1]:
            return first_difference(part, *values)
    return name, before, now


def section_fields(objective: Objective) -> dict[str, dict[str, object]]:
    """Types of all fields of a recipe, by section; a name that two sections have means the same in both."""
    return {
        "run": type_hints(RunArguments),
        "model": model_fields(objective.config_class),
        "data": type_hints(objective.data_class),
        "training": type_hints(objective.training_class),
        "evaluation": type_hints(EvaluationArguments),
    }


def field_hints(objective: Objective) -> dict[str, object]:
    """Types of all fields of a recipe."""
    return {name: hint for fields in section_fields(objective).values() for name, hint in fields.items()}


def read_recipe(path_or_name: str, overrides: dict | None = None, whence: str = "the command line") -> Recipe:
    """
    Reads a recipe and lays overrides on it.

    Args:
        path_or_name (`str`): A YAML file, or the name of a shipped recipe.
        overrides (`dict`, *optional*): Values that replace the file's.
        whence (`str`): Where the overrides come from, as an error calls it.

    Returns:
        [`Recipe`].

    Raises:
        InputError: No such recipe, no YAML mapping, an unknown key, or a value of a wrong type.
    """
    path = recipe_path(path_or_name)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML ({' '.join(str(error).split())}); mend it.") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} is not a mapping of keys to values; write lines such as `hidden_size: 192`.")
    objective = _objective(values | (overrides or {}), path)
    sections, hints = section_fields(objective), field_hints(objective)
    # YAML reads the word `no` as false
    values = {
        key: "no" if value is False and "no" in enum_values(hints.get(key)) else value for key, value in values.items()
    }
    for where, part in ((str(path), values), (whence, overrides or {})):
        check_values(part, hints, where)
    values = values | (overrides or {})
    chosen = {
        section: {key: value for key, value in values.items() if key in fields} for section, fields in sections.items()
    }
    return Recipe(
        name=path.stem,
        values={key: value for key, value in values.items() if key not in SECRETS},
        model=chosen["model"],
        training=chosen["training"],
        data=objective.data_class(**chosen["data"]),
        evaluation=EvaluationArguments(**chosen["evaluation"]),
        run=RunArguments(**chosen["run"]),
        given=set(overrides or {}),
    )


def _objective(values: dict, path: Path) -> Objective:
    asked = values.get("model_type", RunArguments.model_type)
    if asked not in OBJECTIVES:
        raise InputError(f"{path}: model_type={asked!r} is not known; choose one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[asked]


def check_values(values: dict, hints: dict[str, object], where: str):
    """Raises `InputError` for the first key that is unknown or whose value has the wrong type."""
    for key, value in values.items():
        if key not in hints:
            others = [name for name, objective in OBJECTIVES.items() if key in field_hints(objective)]
            if others:
                raise InputError(
                    f"{where}: {key!r} is a key of model_type {others[0]}, not of this one; leave it out."
                )
            close = closest(str(key), hints)
            guess = f" (did you mean {close!r}?)" if close else ""
            raise InputError(f"{where}: unknown key {key!r}{guess}; `cjepa pretrain --help` lists the keys.")
        check_value(key, value, hints[key], where)


def add_recipe_flags(parser: argparse.ArgumentParser):
    """Adds a flag for every field of a recipe; `--help` leaves out the rarer ones of `TrainingArguments`."""
    listed = {name for objective in OBJECTIVES.values() for cls in objective.training_class.__mro__
              if issubclass(cls, PrecisionTrainingArguments) for name in inspect.get_annotations(cls)}  # fmt: skip
    taken: set[str] = set()
    for model_type, objective in OBJECTIVES.items():
        defaults = {
            "run": RunArguments(),
            "model": objective.config_class(),
            "data": objective.data_class(),
            "training": objective.training_class,
            "evaluation": EvaluationArguments(),
        }
        for section, fields in section_fields(objective).items():
            fields = {name: hint for name, hint in fields.items() if name not in taken}
            taken |= fields.keys()
            is_shared = section != "model" and model_type == RunArguments.model_type
            title = section if is_shared else f"{section} of {model_type}"
            shown = listed | COMMON_TRAINING_FIELDS if section == "training" else None
            add_flags(parser, title, defaults[section], fields, shown)


def overrides_of(namespace: argparse.Namespace) -> dict:
    """The recipe flags that were given."""
    hints = {name: hint for objective in OBJECTIVES.values() for name, hint in field_hints(objective).items()}
    return given_flags(namespace, hints)
