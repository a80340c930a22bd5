"""Files that are written whole or not at all."""

import errno
import json
import math
import os
import re
import socket
from contextlib import contextmanager
from pathlib import Path

import psutil
from safetensors import SafetensorError

from trainers.errors import InputError, first_line


@contextmanager
def whole_file(path: str | Path):
    """
    A place to write a file to, from which it is moved to its own when all is written.

    Args:
        path (`str` or `Path`): The file; its folder is made if there is none.

    Returns:
        `Path`: Where to write: a hidden file beside it, which is removed if the writing fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_beside(path)
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_figure(figure, path: str | Path, dpi: int = 110):
    """
    Writes a picture whole, as PNG whatever its name.

    Args:
        figure (`matplotlib.figure.Figure`): The picture.
        path (`str` or `Path`): The file; its folder is made if there is none.
        dpi (`int`): Pixels an inch.
    """
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=dpi, format="png")


def write_text_atomically(path: str | Path, text: str):
    """
    Writes a text file whole, so that no reader sees half of it.

    Args:
        path (`str` or `Path`): The file; its folder is made if there is none.
        text (`str`): What to write, as UTF-8.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def unfinished_beside(path: Path) -> Path:
    """Where this process writes a file or folder before it has its name: `.NAME.MACHINE.PROCESS.tmp` beside it."""
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def leftovers(path: Path) -> list[Path]:
    """
    What killed processes of this machine have left beside a file or folder that they were to write.

    Args:
        path (`Path`): The file or folder.

    Returns:
        `list[Path]`: Those of processes that are no more, or have the number of this one. What another machine, which
        shares the disk, has begun is not among them: it may be at work.
    """
    if not path.parent.is_dir():
        return []
    begun = re.escape(f".{path.name}.{socket.gethostname()}.")
    matches = ((each, re.fullmatch(rf"{begun}(\d+)\.tmp", each.name)) for each in path.parent.iterdir())
    pids = ((each, int(match[1])) for each, match in matches if match)
    return [each for each, pid in pids if pid == os.getpid() or not psutil.pid_exists(pid)]


def user_path(path: str | Path, flag: str) -> Path:
    """A path that a user gave, without its `~`; raises `InputError`, naming the flag, if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{flag} {path} begins with a user whose folder is not known; name another place.") from error


def make_place(path: Path, flag: str):
    """
    Makes the folder that a file or folder shall be in, and tries to write there, under the name it will have first.

    Args:
        path (`Path`): The file or folder.
        flag (`str`): What it was given by.

    Raises:
        InputError: It cannot be made, or not be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_beside(path)
        unfinished.touch()
        unfinished.unlink()
    except (OSError, ValueError) as error:  # the latter of names with a NUL
        raise InputError(f"{flag} {path} cannot be made ({first_line(error)}); name another place.") from error


@contextmanager
def full_disk_named(folder: Path):
    """
    Writes into a folder, whose name and remedy are said if there is no room for them.

    Args:
        folder (`Path`): Where the writes go.

    Raises:
        InputError: The disk is full, or a file may not grow as large; other errors pass.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        advice = "go on with --resume_from_checkpoint last" if any(folder.glob("checkpoint-*")) else "start again"
        raise InputError(f"The disk is full ({first_line(error)}); make room for {folder} and {advice}.") from error


def is_disk_full(error: Exception) -> bool:
    """Whether a write failed for want of space, in the words of Python, safetensors or torch."""
    words = ("No space left", "os error 28", "Disk quota exceeded", "File too large", "unexpected pos")
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(word in str(error) for word in words)


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
