"""The files that travel with the package: recipes and experiments (YAML), templates of model cards (Jinja).

A wheel carries them inside `trainers`; a checkout, installed in editable mode or not at all, keeps them beside it.
"""

from pathlib import Path

import jinja2

from trainers.errors import InputError

_PACKAGE = Path(__file__).resolve().parent


def _folder(in_wheel: str, in_checkout: str) -> Path:
    shipped = _PACKAGE / in_wheel
    return shipped if shipped.is_dir() else _PACKAGE.parent / in_checkout


_RECIPES = _folder("recipes", "scripts/recipes")
_EXPERIMENTS = _folder("experiments", "scripts/experiments")
_TEMPLATES = _folder("model_cards", "model_cards")


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes, sorted, without `.yaml`."""
    return _names(_RECIPES)


def experiment_names() -> list[str]:
    """Return the names of the shipped experiments, sorted, without `.yaml`."""
    return _names(_EXPERIMENTS)


def recipe_path(name: str | Path) -> Path:
    """
    Find a recipe.

    Args:
        name (`str` or `Path`):
            The path of an existing file, or the name of a shipped recipe, with or without `.yaml`. A path wins.

    Returns:
        `Path`: The recipe's file.

    Raises:
        InputError: If there is neither such a file nor such a shipped recipe.
    """
    return _yaml_path(name, _RECIPES, "recipe")


def experiment_path(name: str | Path) -> Path:
    """Find an experiment, as [`recipe_path`] finds a recipe."""
    return _yaml_path(name, _EXPERIMENTS, "experiment")


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _yaml_path(name: str | Path, folder: Path, kind: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    stem = str(name).removesuffix(".yaml")
    if stem not in _names(folder):
        raise InputError(
            f"There is no {kind} '{name}': give the path of a YAML file or one of {', '.join(_names(folder))}."
        )
    return folder / f"{stem}.yaml"


def template_path(name: str) -> Path:
    """
    Find a shipped template of a model card.

    Args:
        name (`str`):
            The template's file name, such as `cjepa.md.j2`.

    Returns:
        `Path`: The template's file.

    Raises:
        InputError: If no such template is shipped.
    """
    names = sorted(path.name for path in _TEMPLATES.glob("*.j2"))
    if name not in names:
        raise InputError(f"There is no template '{name}': give one of {', '.join(names)}.")
    return _TEMPLATES / name


def render_template(name: str, facts: dict, autoescape: bool = False) -> str:
    """
    Fill in a shipped template.

    Args:
        name (`str`):
            Its file name, such as `cjepa.md.j2`.
        facts (`dict`):
            What it names; a name that is missing is an error.
        autoescape (`bool`):
            Whether text is escaped, as in HTML.

    Returns:
        `str`: The text.
    """
    template = template_path(name)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        undefined=jinja2.StrictUndefined,
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(name).render(**facts)
