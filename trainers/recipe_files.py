"""The keys of a recipe as YAML, to be read again by [`~recipes.read_recipe`], and by whoever has a checkpoint."""

from collections.abc import Collection
from pathlib import Path

import yaml

from trainers.errors import InputError, first_line
from trainers.files import write_text_atomically

# beside the checkpoints of a run
RECIPE = "recipe.yaml"
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


def recipe_beside(checkpoint: str | Path) -> dict:
    """The keys that the run of a checkpoint has set, of the recipe beside it; empty where there is none."""
    path = Path(checkpoint).parent / RECIPE
    return read_settings(path, "mend or remove it") if path.is_file() else {}


def read_settings(path: Path, advice: str) -> dict:
    """The keys and values of a file that a run wrote; raises `InputError`, which ends with the advice."""
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise InputError(f"{path}, settings of a run, cannot be read ({first_line(error)}); {advice}.") from error


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
