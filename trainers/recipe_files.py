"""The keys of a recipe as YAML, to be read again by [`~recipes.read_recipe`]."""

from collections.abc import Collection
from pathlib import Path

import yaml

from trainers.files import write_text_atomically

# what is never written down
SECRETS = ("hub_token",)


def without_flags(command: list[str], names: Collection[str] = SECRETS) -> list[str]:
    """A command line without some flags and all their values; without those that hold a secret when none are named."""
    flags = {f"--{name}" for name in names}
    kept, is_left_out = [], False
    for token in command:
        if token.startswith("--"):
            is_left_out = token.partition("=")[0] in flags
        if not is_left_out:
            kept.append(token)
    return kept


def write_recipe(values: dict, path: Path):
    """Writes the keys that were set as a recipe that repeats the run elsewhere."""
    kept = {name: value for name, value in values.items() if name not in ("output_dir", "resume_from_checkpoint")}
    write_text_atomically(path, recipe_text(kept))


class _PlainDumper(yaml.SafeDumper):
    """Writes a mapping that occurs twice twice, not as a reference."""

    def ignore_aliases(self, data):
        return True


def recipe_text(values: dict) -> str:
    """
    Keys and values as [`read_recipe`] reads them: 0.00001 as `1.0e-05`, which YAML does not take for a word, and lists
    of numbers on one line.
    """
    # a flat mapping would be one line otherwise
    inline = None if any(isinstance(value, list | dict) for value in values.values()) else False
    return yaml.dump(values, Dumper=_PlainDumper, sort_keys=False, default_flow_style=inline, width=110)
