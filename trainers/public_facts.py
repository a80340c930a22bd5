"""Facts that may be published: without where things lie on the machine that found them."""

import os
import re
import shlex
from pathlib import Path


def public_facts(facts: dict) -> dict:
    """Facts without places on this machine: of a path that is absolute, or is here, the last part is left."""
    found = {name: value if name == "history" else _public(value) for name, value in facts.items()}
    for name in ("output_dir", "resume_from_checkpoint"):
        found.get("settings", {}).pop(name, None)
    if "command" in facts:
        found["command"] = shlex.join(map(_public, shlex.split(facts["command"])))
    return found


def _public(value):
    if isinstance(value, dict):
        return {name: _public(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_public(entry) for entry in value]
    if not isinstance(value, str):
        return value
    flag, equals, text = value.partition("=") if value.startswith("--") else ("", "", value)
    text, split = re.fullmatch(r"(.*?)( \([^()]*\))?", text, re.DOTALL).groups("")  # as in `my/photos (test)`
    is_place = os.path.isabs(text) or text.startswith(("~", "./", "../")) or ("/" in text and os.path.exists(text))
    if not is_place:
        return value
    path = Path(text)
    return f"{flag}{equals}{path.parent.name if path.name == 'final' else path.name}{split}"
