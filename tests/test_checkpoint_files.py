"""Checkpoints on the disk: whole after a kill at any operation, damage found and named, the oldest removed."""

import itertools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from trainers.checkpoint_files import (
    all_checkpoints,
    broken_part,
    choose_checkpoint,
    finish_checkpoint,
    rotate_checkpoints,
    start_checkpoint,
)
from trainers.errors import InputError

# what Python tells of its operations on files
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "shutil.rmtree"}


def save(output: Path, step: int, word: str, limit: int | None = None, every: int | None = None):
    """A checkpoint of three files that hold a word."""
    folder = start_checkpoint(output, step)
    (folder / "part").mkdir()
    for name in ("a.json", "b.safetensors", "part/c"):
        for _ in range(3):
            with open(folder / name, "a") as file:
                file.write(word)
    finish_checkpoint(folder, step)
    rotate_checkpoints(output, step, limit, every)


def words(checkpoint: Path) -> set[str]:
    assert broken_part(checkpoint) is None
    return {(checkpoint / name).read_text() for name in ("a.json", "b.safetensors", "part/c")}


def is_killed_at(operation: int, action) -> bool:
    """Runs an action in a process that is killed at one of its operations on files; whether it came to that."""
    child = os.fork()
    if child == 0:
        number = itertools.count()

        def watch(event, arguments):
            if event in OPERATIONS and next(number) == operation:
                os.kill(os.getpid(), signal.SIGKILL)

        status = 1
        try:
            sys.addaudithook(watch)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    was_killed = os.WIFSIGNALED(status)
    assert was_killed or os.WEXITSTATUS(status) == 0
    return was_killed


@pytest.mark.parametrize("step", [2, 3], ids=["replaced", "new"])
def test_a_kill_at_any_operation_leaves_the_newest_whole(tmp_path, step):
    """The only checkpoint, of step 2, is saved again, or one of step 3 that it makes room for."""
    seen = set()
    for operation in itertools.count():
        output = tmp_path / str(operation)
        save(output, 2, "old")
        was_killed = is_killed_at(operation, lambda folder=output: save(folder, step, "new", limit=1))
        assert not any(broken_part(checkpoint) for checkpoint in all_checkpoints(output))
        newest = Path(choose_checkpoint(output, "last"))
        found = newest.name, words(newest)
        assert found in (("checkpoint-2", {"oldoldold"}), (f"checkpoint-{step}", {"newnewnew"}))
        seen.add(found[1].pop())
        save(output, step, "last", limit=1)
        assert [path.name for path in output.iterdir()] == [f"checkpoint-{step}"]
        assert words(output / f"checkpoint-{step}") == {"lastlastlast"}
        if not was_killed:
            break
    assert operation > 20 and seen == {"oldoldold", "newnewnew"}


def test_a_replaced_checkpoint_is_put_back_where_the_new_one_is_not(tmp_path):
    save(tmp_path, 4, "old")
    (tmp_path / "checkpoint-4").rename(tmp_path / ".checkpoint-4.replaced")
    assert words(all_checkpoints(tmp_path)[0]) == {"oldoldold"}


@pytest.mark.parametrize("name", ["a.json", "b.safetensors", "part/c", "manifest.json"])
def test_any_damage_is_found_and_named(tmp_path, name):
    save(tmp_path, 1, "word")
    file = tmp_path / "checkpoint-1" / name
    whole = file.read_bytes()
    for position in range(len(whole)):
        for bit in (1, 4, 128):
            file.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
            assert broken_part(file.parents[name.count("/")]).startswith(name), position
        file.write_bytes(whole[:position])
        assert broken_part(file.parents[name.count("/")]).startswith(name), position
    file.write_bytes(whole + b" ")
    assert broken_part(tmp_path / "checkpoint-1").startswith(name)
    file.unlink()
    assert name in broken_part(tmp_path / "checkpoint-1")
    file.write_bytes(whole)
    assert broken_part(tmp_path / "checkpoint-1") is None


def test_the_newest_whole_one_is_taken(tmp_path, capsys):
    for step in (2, 9, 10):
        save(tmp_path, step, "word")
    for step, name in ((9, "part/c"), (10, "manifest.json")):
        (tmp_path / f"checkpoint-{step}" / name).write_text("other")
    assert choose_checkpoint(tmp_path, "last") == str(tmp_path / "checkpoint-2")
    said = capsys.readouterr().out
    assert "checkpoint-10 is passed over: manifest.json" in said and "checkpoint-9 is passed over: part/c" in said
    with pytest.raises(InputError, match="checkpoint-9 is no whole checkpoint .part/c has 5 of 12 bytes"):
        choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-9"))


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    torch.save({}, tmp_path / "checkpoint-5" / "optimizer.pt")
    with pytest.raises(
        InputError, match="no manifest.json, so .*pickles such as optimizer.pt, which are never loaded"
    ):
        choose_checkpoint(tmp_path, str(tmp_path / "checkpoint-5"))
    with pytest.raises(InputError, match="no whole checkpoint to resume from"):
        choose_checkpoint(tmp_path, "last")
    with pytest.raises(InputError, match="it has no manifest.json"):
        choose_checkpoint(tmp_path, str(tmp_path / "nowhere"))


def test_another_format_is_refused(tmp_path):
    save(tmp_path, 1, "word")
    manifest = tmp_path / "checkpoint-1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    assert broken_part(manifest.parent) == "manifest.json is of format 2, and this version reads 1"


@pytest.mark.parametrize(
    ("limit", "every", "kept", "left"),
    [
        (None, None, [], [5, 10, 15, 100, 105]),
        (2, None, [], [100, 105]),
        (1, None, ["checkpoint-10"], [10, 105]),
        (2, None, ["checkpoint-10"], [10, 105]),
        (3, None, ["checkpoint-10"], [10, 100, 105]),
        (1, 10, [], [10, 100, 105]),
        (2, 5, [], [5, 10, 15, 100, 105]),
        (2, 100, ["checkpoint-5"], [5, 100, 105]),
    ],
)
def test_the_oldest_are_removed_by_their_steps(tmp_path, limit, every, kept, left):
    """Step 200 is of another course of the run: it is neither counted nor removed."""
    for step in (100, 5, 10, 200, 15, 105):  # not in the order of the clock
        save(tmp_path, step, "word")
    rotate_checkpoints(tmp_path, 105, limit, every, kept)
    assert sorted(int(path.name.partition("-")[2]) for path in tmp_path.iterdir()) == [*left, 200]
