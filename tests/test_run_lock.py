"""Two runs in one folder: the second is refused, and what the first leaves behind does not hold the lock."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import test_finetuning
from test_pretraining import fails_in_one_sentence
from tiny import FLAGS

from trainers import finetuning, pretraining
from trainers.cli import main
from trainers.errors import InputError

pytestmark = pytest.mark.usefixtures("few_penalties")

encoder, photos, finetune = test_finetuning.encoder, test_finetuning.photos, test_finetuning.finetune
ROOT = Path(__file__).resolve().parent.parent
# is in the folder until it is killed, and leaves a child behind that was started meanwhile, as a loader's workers are
HOLDER = """
import os, sys, time
from pathlib import Path
from trainers.run_lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def busy(tmp_path):
    """A folder in which another process runs, and that process."""
    folder = tmp_path / "run"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield folder, process
    process.kill()
    os.kill(child, signal.SIGKILL)


def test_another_run_is_refused_until_the_first_has_ended(busy, capsys):
    folder, first = busy
    command = ["pretrain", "cjepa_scenes", *FLAGS, "--max_steps", "1", "--output_dir", str(folder)]
    said = f"Another run is writing into {folder}", "name another --output_dir"
    fails_in_one_sentence(capsys, main(command), *said)
    assert [path.name for path in folder.iterdir()] == [".lock"]
    first.kill()
    first.wait()
    assert main(command) == 0


@pytest.mark.parametrize("place", ["/proc/x", "/sys/x", "n" * 300, "dangling", "file/x", ""])
def test_a_folder_that_cannot_be_made_is_said_before_images_are_read(place, tmp_path, capsys, monkeypatch):
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretraining, "prepare", None)
    fails_in_one_sentence(capsys, main(["pretrain", "cjepa_scenes", *FLAGS, "--output_dir", place]), "--output_dir")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file"]


def test_a_fine_tuning_is_refused_too(busy, encoder, photos, capsys):
    fails_in_one_sentence(capsys, finetune(encoder, photos, busy[0]), f"Another run is writing into {busy[0]}")
    assert [path.name for path in busy[0].iterdir()] == [".lock"]


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_what_a_folder_holds_is_looked_at_once_no_other_can_write(
    tmp_path,
    monkeypatch,
    command,
    encoder,
    photos,
    capsys,
):
    """Else a call that is loading images when another one saves its first checkpoint starts anew over it."""
    folder, refused = tmp_path / "new" / "run", []

    def look(args):
        other = "import sys; from pathlib import Path; from trainers.run_lock import only_run_in\n"
        other += "with only_run_in(Path(sys.argv[1])): pass"
        tried = subprocess.run([sys.executable, "-c", other, str(folder)], cwd=ROOT, capture_output=True, text=True)
        refused.append("Another run is writing into" in tried.stderr)
        raise InputError("enough")

    module = pretraining if command == "pretrain" else finetuning
    monkeypatch.setattr(module, "find_checkpoint", look)
    if command == "pretrain":
        status = main(["pretrain", "cjepa_scenes", *FLAGS, "--output_dir", str(folder)])
    else:
        status = finetune(encoder, photos, folder)
    fails_in_one_sentence(capsys, status, "enough")
    assert refused == [True] and not folder.exists()
