"""The wheel carries everything it needs and nothing else, and the imports point in one direction:

scripts -> trainers -> modeling_cjepa -> torch, transformers
"""

import ast
import configparser
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import FLAGS
from transformers.dynamic_module_utils import get_relative_imports

from trainers.errors import InputError
from trainers.resources import recipe_names, recipe_path, template_path

ROOT = Path(__file__).resolve().parents[1]
# `scripts` and `tests` are there to leak into the wheel, if they can.
SOURCES = ["LICENSE", "README.md", "pyproject.toml", "setup.cfg"]
SOURCES += ["model_cards", "modeling_cjepa", "scripts", "tests", "trainers"]

METADATA = configparser.ConfigParser()
METADATA.read(ROOT / "setup.cfg")
VERSION = METADATA["metadata"]["version"]

LOOK_AROUND = """
import importlib.metadata, json
import modeling_cjepa, trainers
from trainers.resources import experiment_names, experiment_path, recipe_names, recipe_path, template_path

distribution = importlib.metadata.distribution("cjepa")
print(json.dumps({
    "modules": [modeling_cjepa.__file__, trainers.__file__],
    "recipes": {name: str(recipe_path(name)) for name in recipe_names()},
    "experiments": {name: str(experiment_path(name)) for name in experiment_names()},
    "templates": {name: str(template_path(name)) for name in TEMPLATES},
    "metadata": [distribution.version, distribution.metadata["License-Expression"]],
    "commands": [[point.group, point.name, point.value] for point in distribution.entry_points],
}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_of(folder: str, *patterns: str) -> dict[str, str]:
    """The text of a folder's files, by file name."""
    return {path.name: path.read_text() for pattern in patterns for path in (ROOT / folder).glob(pattern)}


def modules_of(package: str) -> list[Path]:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules, f"{package} holds no module"
    return modules


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this checkout, built from a copy of it so that no build product stays behind."""
    copy = tmp_path_factory.mktemp("copy")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist", cwd=copy)
    (built,) = (copy / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder the wheel is installed to, far from the checkout."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def test_the_wheel_holds_every_module_and_no_other(wheel):
    expected = {str(path.relative_to(ROOT)) for name in ("modeling_cjepa", "trainers") for path in modules_of(name)}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if name.endswith(".py")} == expected
    assert {name.split("/")[0] for name in names} == {"modeling_cjepa", "trainers", f"cjepa-{VERSION}.dist-info"}


def test_the_wheel_works_away_from_the_checkout(installed, tmp_path):
    templates = files_of("model_cards", "*.j2")
    code = f"TEMPLATES = {list(templates)}\n{LOOK_AROUND}"
    found = json.loads(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()[-1])

    for path in [*found["modules"], *(path for kind in ("recipes", "experiments", "templates")
                                      for path in found[kind].values())]:  # fmt: skip
        assert Path(path).is_relative_to(installed)
    for kind in ("recipes", "experiments"):
        shipped = {Path(path).name: Path(path).read_text() for path in found[kind].values()}
        assert shipped and shipped == files_of(f"scripts/{kind}", "*.yaml")
    assert templates and {name: Path(path).read_text() for name, path in found["templates"].items()} == templates
    assert found["metadata"] == [VERSION, "Apache-2.0"]
    assert found["commands"] == [["console_scripts", "cjepa", "trainers.cli:main"]]


def test_the_wheel_pretrains_away_from_the_checkout(installed, tmp_path):
    command = [sys.executable, "-m", "trainers.cli", "pretrain", "cjepa_scenes", *FLAGS, "--max_steps", "2"]
    printed = run(*command, "--output_dir", "mine", cwd=tmp_path, PYTHONPATH=str(installed))
    assert 'AutoModel.from_pretrained("mine/final"' in printed
    card = (tmp_path / "mine/final/README.md").read_text()
    assert "2 steps of 16 images" in card and f"cjepa {VERSION}" in card


def test_the_wheel_carries_the_cards(installed):
    cards = {path.name: path.read_text() for path in (installed / "trainers/model_cards").iterdir()}
    assert cards == files_of("model_cards", "*.j2", "*.md")


def test_recipes_are_found_by_name_and_by_path(tmp_path, monkeypatch):
    names = recipe_names()
    assert names == sorted(path.stem for path in ROOT.glob("scripts/recipes/*.yaml")) != []
    for name in names:
        assert recipe_path(name) == recipe_path(f"{name}.yaml") == ROOT / f"scripts/recipes/{name}.yaml"

    monkeypatch.chdir(tmp_path)
    own = Path(f"{names[0]}.yaml")
    own.touch()
    assert recipe_path(str(own)) == own
    with pytest.raises(InputError, match=f"'nowhere/{names[0]}'.*{names[0]}"):
        recipe_path(f"nowhere/{names[0]}")


def test_an_unknown_template_is_refused_by_name():
    for path in ROOT.glob("model_cards/*.j2"):
        assert template_path(path.name) == path
        with pytest.raises(InputError, match=rf"'\.\./{path.name}'.*{path.name}"):
            template_path(f"../{path.name}")


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Each import of a file as its level (the number of leading dots) and the module, empty for `from . import`."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append((node.level, node.module or ""))
    return imports


@pytest.mark.parametrize("path", modules_of("modeling_cjepa"), ids=lambda path: path.name)
def test_a_modeling_file_can_travel_with_a_checkpoint(path):
    """Transformers copies the file and those it imports; beside them it finds the two libraries and nothing more."""
    siblings = {sibling.stem for sibling in path.parent.glob("*_*.py")}
    for level, module in imports_of(path):
        if level == 0:
            assert module.split(".")[0] in sys.stdlib_module_names | {"torch", "transformers"}
        else:
            assert (level, module in siblings) == (1, True)
    # Transformers looks for the imports line by line, and so in the docstrings too.
    assert set(get_relative_imports(path)) == {module for level, module in imports_of(path) if level}


@pytest.mark.parametrize("path", modules_of("trainers"), ids=lambda path: path.name)
def test_trainers_import_no_script_and_no_test(path):
    for level, module in imports_of(path):
        assert level or module.split(".")[0] not in ("scripts", "tests")
