"""Facts that may be published: without secrets, and without where things lie on the machine that found them."""

import json
import os
import re
import shlex
from pathlib import Path

import yaml

from trainers.recipe_files import SECRETS, without_flags

# settings that say where things are on this machine, and nothing about the model
_LEFT_OUT = ("output_dir", "resume_from_checkpoint", *SECRETS)
# names of folders that do not tell what is there; the part before does, unless it is a home or the like
_SAYS_NOTHING = ("data", "images", "train")
# paths of two parts and more within a text, of no address
_PATH = re.compile(r"(?:file://|(?<![\w:/.<]))~?/(?:[^\s/'\"`,;)\]]+/)+[^\s/'\"`,;)\]]*|\b[A-Za-z]:\\[^\s'\"]+")


def shown_name(place: str) -> str:
    """What a model is called in public: a folder by its run's name, all else as it is."""
    return _last_part(place) if Path(place).expanduser().exists() else place


def public_facts(facts: dict) -> dict:
    """
    The facts of a run as they may be published.

    Args:
        facts (`dict`): As `results.json` holds them.

    Returns:
        `dict`: The same without secrets, and with the last part of each path: of those that are absolute, are here, or
        were on the machine of the run.
    """
    settings = {name: value for name, value in facts.get("settings", {}).items() if name not in _LEFT_OUT}
    local = _local_places(facts, settings)
    found = {name: value if name == "history" else _public(value, local) for name, value in facts.items()}
    if "settings" in facts:
        found["settings"] = _public(settings, local)
    if "command" in facts:
        command = without_flags(shlex.split(facts["command"]), _LEFT_OUT)
        found["command"] = shlex.join(_public(word, local) for word in command)
    return found


def _local_places(facts: dict, settings: dict) -> set[str]:
    """Names that were places on the machine of the run, and not ids of the Hub."""
    data, model = facts.get("data", {}), facts.get("model", {})
    on_hub = {data["dataset"] if data.get("is_on_hub") else None, facts.get("start"), model.get("start")}
    names = {settings.get(name) for name in ("dataset", "start_from", "model")} | {data.get("dataset")}
    return {name for name in names - on_hub if isinstance(name, str) and "/" in name}


def _public(value, local: set[str]):
    if isinstance(value, dict):
        return {name: _public(entry, local) for name, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry, local) for entry in value]
    if not isinstance(value, str):
        return value
    if value.startswith(("[", "{")):
        return _public_list(value, local)
    # as in `--dataset=my/photos`, `vicreg=runs/vicreg` and `my/photos (test)`
    before, text, after = re.fullmatch(r"((?:-{0,2}[\w-]+=)?)(.*?)((?: \([^()]*\))?)", value, re.DOTALL).groups()
    is_place = os.path.isabs(text) or text.startswith(("~", "./", "../")) or ("/" in text and os.path.exists(text))
    if is_place or text in local:
        return f"{before}{_last_part(text)}{after}"
    return _PATH.sub(lambda found: re.split(r"[/\\]", found.group().rstrip("/\\"))[-1], value)


def _public_list(text: str, local: set[str]) -> str:
    """A list or a mapping of the command line, if it is one."""
    try:
        return json.dumps(_public(yaml.safe_load(text), local))
    except yaml.YAMLError:
        return text


def _last_part(place: str) -> str:
    path = Path(place)
    if path.name == "final" or (path.name in _SAYS_NOTHING and path.parts[0][0] not in "./~"):
        return path.parent.name or path.name
    return path.name
