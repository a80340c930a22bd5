"""Flags of the command line for the fields of configurations and dataclasses, with their types checked."""

import argparse
import dataclasses
import difflib
import re
import types
import typing
from enum import Enum

import yaml

from trainers.errors import InputError

# what an interrupted training is told
GOES_ON_FROM_CHECKPOINT = "a run that has saved a checkpoint goes on with --resume_from_checkpoint last"


def type_hints(cls) -> dict[str, object]:
    """Type hints of a dataclass' fields that can be set."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def check_value(name: str, value, hint, where: str):
    """Raises `InputError` if a value has not its field's type, and says how a number is written."""
    if fits(value, hint):
        return
    choices = enum_values(hint)
    if choices:
        raise InputError(f"{where}: {name}={value!r} is not known; choose one of {', '.join(choices)}.")
    items = value if isinstance(value, list) else [value]
    plain = ", ".join(plain_number(item) if is_number(item) else repr(item) for item in items)
    written = f"[{plain}]" if isinstance(value, list) else plain
    advice = f" Write {written}, without quotes." if any(map(is_number, items)) else ""
    raise InputError(f"{where}: {name}={value!r} is a {type(value).__name__}, not {type_name(hint)}.{advice}")


def closest(word: str, known) -> str | None:
    """The known word that was probably meant; None if none is like it."""
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


def enum_values(hint) -> list[str]:
    """The words that a field which holds a member of an enumeration may have; empty for all others."""
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type) and issubclass(kind, Enum)]
    return [member.value for kind in kinds for member in kind]


def fits(value, hint) -> bool:
    """Whether a value has a field's type; whole numbers pass as floats."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if enum_values(hint):
        return value in enum_values(hint) or (value is None and type(None) in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is list:
        return isinstance(value, list) and all(fits(item, arguments[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(arguments) and all(map(fits, value, arguments))
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    return isinstance(value, hint) if isinstance(hint, type) and hint in (str, bool, list) else True


def is_number(value) -> bool:
    """Whether a word reads as a number, such as YAML's `1e-3`."""
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False


def plain_number(value: str) -> str:
    """The number as YAML reads it: `1e-3` as `1.0e-3`."""
    mantissa, _, exponent = value.lower().partition("e")
    return value if not exponent else f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}"


def type_name(hint) -> str:
    """A type as a user reads it."""
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "").replace(" | None", " or null")


def flag_value(text: str):
    """A flag's text as YAML would read it, except that `1e-3` is a number here."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return float(value) if is_number(value) else value


def takes_words(hint) -> bool:
    """Whether a field is text and nothing else, or none."""
    return hint is str or set(typing.get_args(hint)) == {str, type(None)}


def word(text: str) -> str | None:
    """A flag's text as it is; `null` is none."""
    return None if text == "null" else text


def add_flags(parser: argparse.ArgumentParser, title: str, defaults, hints: dict[str, object], listed=None, told=None):
    """
    Adds a flag for each field.

    Args:
        parser (`argparse.ArgumentParser`): Where to.
        title (`str`): Heading of the group in `--help`.
        defaults: An instance of the fields' class, or the class itself, with their default values.
        hints (`dict[str, object]`): The fields and their types.
        listed (`set[str]`, *optional*): The fields that `--help` lists; all when not given.
        told (`dict[str, str]`, *optional*): What `--help` says the default of a field is, where it is not the class'.
    """
    group = parser.add_argument_group(title)
    for name in hints:
        cls = defaults if isinstance(defaults, type) else type(defaults)
        text = " ".join(field_help(cls, name).split()).split(". ")[0].rstrip(".")
        default = (told or {}).get(name, getattr(defaults, name, None))
        shown = f"{text} (default {default})".replace("%", "%%")
        group.add_argument(
            f"--{name}",
            type=word if takes_words(hints[name]) or enum_values(hints[name]) else flag_value,
            metavar="X",
            nargs="*",
            default=argparse.SUPPRESS,
            help=shown if listed is None or name in listed else argparse.SUPPRESS,
        )


def given_flags(namespace: argparse.Namespace, hints: dict[str, object]) -> dict:
    """The values of the flags that were given: no value means true, several values are a list."""
    given = {}
    for name in hints.keys() & vars(namespace).keys():
        values = getattr(namespace, name)
        single = values[0] if values else True
        is_list = len(values) > 1 or (values and not fits(single, hints[name]) and fits(values, hints[name]))
        given[name] = values if is_list else single
    return given


def dataclass_from_flags(namespace: argparse.Namespace, cls):
    """An instance of a dataclass with the flags that were given."""
    hints = type_hints(cls)
    given = given_flags(namespace, hints)
    for name, value in given.items():
        check_value(name, value, hints[name], "the command line")
    return cls(**given)


def field_help(cls, name: str) -> str:
    """The help of a field: of its metadata, or the sentence of the class' docstring."""
    text = cls.__dataclass_fields__[name].metadata.get("help")
    if text:
        return text
    entry = re.search(rf"^ +{name} \((.*?)\): (.*?)(?=^ +\w+ \(|\n\n|\Z)", cls.__doc__ or "", re.MULTILINE | re.DOTALL)
    if not entry:
        return ""
    choices = re.findall(r'`"(\w+)"`', entry.group(1).split(", defaults")[0])
    return f"{' | '.join(choices)}: {entry.group(2)}" if choices else entry.group(2)
