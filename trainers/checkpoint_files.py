"""The files of a checkpoint: there whole or not at all, with a manifest by which a broken one is told.

A checkpoint is filled as `.checkpoint-N.unfinished`, synced to the disk, and renamed to `checkpoint-N` when its last
file, `manifest.json` with the size and the SHA-256 of each other one, is written. What a killed run leaves is hidden,
and removed by the next save.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from trainers.errors import InputError

LAST = "last"
MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = re.compile(r"\.checkpoint-\d+\.(unfinished|replaced|removed)")
_PICKLES = {".pt", ".pth", ".bin", ".pkl"}
_BLOCK = 1 << 20  # bytes that are hashed at once
_FILES_AT_ONCE = 4


def checkpoint_step(checkpoint: Path) -> int:
    """After which step a checkpoint was saved, by its name."""
    return int(_NAME.fullmatch(checkpoint.name).group(1))


def all_checkpoints(output: Path) -> list[Path]:
    """
    The checkpoints of a run, broken ones among them, the newest first.

    Args:
        output (`Path`): The run's folder. A checkpoint that was about to be replaced when the run was killed is put
            back first.
    """
    for replaced in output.glob(".checkpoint-*.replaced"):
        place = replaced.with_name(replaced.stem.removeprefix("."))
        if not place.exists():
            os.replace(replaced, place)
    return present_checkpoints(output)


def present_checkpoints(output: Path) -> list[Path]:
    """As [`all_checkpoints`], but changes nothing: for those that only look at a run, which may be going on."""
    found = [path for path in output.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step, reverse=True)


def set_aside_later(checkpoint: Path):
    """Renames what is later than the checkpoint that a run goes on from: it is broken, or another course begins."""
    for path in all_checkpoints(checkpoint.parent):
        if checkpoint_step(path) > checkpoint_step(checkpoint):
            names = (f"superseded-{path.name}{f'-{number}' if number else ''}" for number in itertools.count())
            place = next(place for name in names if not (place := path.with_name(name)).exists())
            os.replace(path, place)
            print(f"{path} is later than {checkpoint.name}: it is called {place.name} from now on.", flush=True)


def best_beside(checkpoint: Path, step: int | None) -> str | None:
    """
    The best checkpoint of the run that wrote one. Only its step is kept in the state of a run: folders move, and a
    pushed checkpoint tells of no place on the machine.

    Args:
        checkpoint (`Path`): A checkpoint of the run.
        step (`int`, *optional*): The best one's, `best_global_step` of the state.

    Returns:
        `str`: Its folder; None where it is not there.
    """
    best = checkpoint.with_name(f"checkpoint-{step}")
    return str(best) if step and best.is_dir() else None


def choose_checkpoint(output: Path, asked: str) -> str:
    """
    A whole checkpoint to resume from.

    Args:
        output (`Path`): The run's folder.
        asked (`str`): A checkpoint's folder, or `last`: the newest whole one; broken ones are passed over with the
            reason.

    Returns:
        `str`: Its folder.

    Raises:
        InputError: The one asked for is broken or foreign, or there is none.
    """
    if asked != LAST:
        broken = broken_part(Path(asked))
        if broken:
            raise InputError(f"{asked} is no whole checkpoint ({broken}); mend --resume_from_checkpoint.")
        return asked
    for checkpoint in all_checkpoints(output):
        broken = broken_part(checkpoint)
        if not broken:
            return str(checkpoint)
        print(f"{checkpoint} is passed over: {broken}", flush=True)
    raise InputError(f"{output} holds no whole checkpoint to resume from; mend --output_dir.")


def broken_part(checkpoint: Path, pattern: str = "*") -> str | None:
    """
    Why a folder is no whole checkpoint, or None if it is one.

    Args:
        checkpoint (`Path`): The folder.
        pattern (`str`): Which files are looked at, such as `*.json`; every byte of them is read.
    """
    try:
        text = (checkpoint / MANIFEST).read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return _why_foreign(checkpoint)
    except (OSError, UnicodeDecodeError):
        return f"{MANIFEST} cannot be read"
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} is of format {manifest['format']}, and this version reads {FORMAT}"
        if text != manifest_text(manifest["step"], manifest["files"]):
            return f"{MANIFEST} is damaged"
        files = [(name, entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, size, digest in files:
        if not Path(name).match(pattern):
            continue
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} of {size} bytes"
            if file_digest(checkpoint / name) != digest:
                return f"{name} is damaged, its checksum is another"
        except OSError as error:
            return f"{name} is missing or cannot be read ({error.strerror})"
    return None


def _why_foreign(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in _PICKLES)
    loaded = f"; it holds pickles such as {pickles[0]}, which are never loaded" if pickles else ""
    return f"it has no {MANIFEST}, so it is of another program or an older version{loaded}"


def write_manifest(folder: Path, step: int):
    """Writes the manifest of the files in a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor(_FILES_AT_ONCE) as executor:
        digests = executor.map(file_digest, paths)
        files = {
            path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
            for path, digest in zip(paths, digests, strict=True)
        }
    (folder / MANIFEST).write_text(manifest_text(step, files), encoding="utf-8")


def manifest_text(step: int, files: dict[str, dict]) -> str:
    """The manifest of a checkpoint with a checksum of its own."""
    contents = {"format": FORMAT, "step": step, "files": files}
    digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    return json.dumps(contents | {"sha256": digest}, indent=2) + "\n"


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def start_checkpoint(output: Path, step: int) -> Path:
    """An empty folder to fill for the checkpoint of a step; what killed runs have left unfinished is removed."""
    output.mkdir(parents=True, exist_ok=True)
    all_checkpoints(output)  # puts back what was about to be replaced
    for leftover in output.iterdir():
        if _HIDDEN.fullmatch(leftover.name):
            shutil.rmtree(leftover)
    unfinished = unfinished_folder(output, step)
    unfinished.mkdir()
    return unfinished


def unfinished_folder(output: Path, step: int) -> Path:
    """Where the checkpoint of a step is filled."""
    return output / f".checkpoint-{step}.unfinished"


def finish_checkpoint(unfinished: Path, step: int):
    """Writes the manifest of a filled folder, syncs all to the disk, and gives the checkpoint its name."""
    # the disk is at work while checksums are computed
    with ThreadPoolExecutor(1) as executor:
        syncing = executor.submit(lambda paths: [_sync(path) for path in paths], list(unfinished.rglob("*")))
        write_manifest(unfinished, step)
        syncing.result()
    for path in (unfinished / MANIFEST, unfinished):
        _sync(path)
    place, replaced = (unfinished.with_name(name) for name in (f"checkpoint-{step}", f".checkpoint-{step}.replaced"))
    if place.exists():
        os.replace(place, replaced)
    os.replace(unfinished, place)
    _sync(place.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path):
    """Has a file or a folder written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def removed_on_error(folder: Path):
    """Removes a folder if what is done in it fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def count_kept(steps: Collection[int], limit: int | None, every: int | None) -> int:
    """How many checkpoints of a run that saves after these steps [`rotate_checkpoints`] leaves, no other staying."""
    staying = sum(_stays(step, every) for step in steps)
    others = len(steps) - staying
    return staying + (min(others, limit) if limit and limit > 0 else others)


def _stays(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0


def rotate_checkpoints(output: Path, step: int, limit: int | None, every: int | None, kept: Iterable[str] = ()):
    """
    Removes the oldest checkpoints when a new one is whole.

    Args:
        output (`Path`): The run's folder.
        step (`int`): Of the new checkpoint. Those of later steps, of another course of the run, are left alone.
        limit (`int`, *optional*): How many are kept; all when not given, or 0 or less.
        every (`int`, *optional*): Those of its multiples are never removed, and not counted.
        kept (`Iterable[str]`): Names of others that stay, such as the best one's.
    """
    if not limit or limit < 0:
        return
    numbers = [(checkpoint_step(path), path) for path in reversed(all_checkpoints(output))]
    counted = [path for number, path in numbers if number <= step and not _stays(number, every)]
    kept = {*kept, f"checkpoint-{step}"}
    removable = [path for path in counted if path.name not in kept]
    num_kept = max(limit, len(counted) - len(removable))
    for path in removable[: max(len(counted) - num_kept, 0)]:
        # no half-removed checkpoint is ever seen
        hidden = path.with_name(f".{path.name}.removed")
        try:
            os.replace(path, hidden)
            shutil.rmtree(hidden)
        except OSError as error:
            print(f"{path} could not be removed ({error.strerror}); the run goes on with it there.", flush=True)
