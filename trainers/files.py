"""Files that are written whole or not at all."""

import json
import math
import os
from pathlib import Path


def write_text_atomically(path: str | Path, text: str):
    """
    Writes a text file beside its place, then moves it there, so that no reader sees half of it.

    Args:
        path (`str` or `Path`): The file; its folder is made if there is none.
        text (`str`): What to write, as UTF-8.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, obj):
    """
    Writes a JSON file whole; numbers JSON has no word for (NaN, infinity) become null.

    Args:
        path (`str` or `Path`): The file.
        obj: Dictionaries, lists, tuples, strings, numbers, booleans, None.
    """
    write_text_atomically(path, json.dumps(_without_nan(obj), indent=2, allow_nan=False) + "\n")


def _without_nan(obj):
    if isinstance(obj, dict):
        return {key: _without_nan(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_without_nan(value) for value in obj]
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj
