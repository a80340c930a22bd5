"""Two runs in one folder: the second is refused, and what the first leaves behind does not hold the lock."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_finetuning import encoder, finetune, photos  # noqa: F401
from test_pretraining import fails_in_one_sentence
from tiny import FLAGS

from trainers.cli import main

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


def test_a_fine_tuning_is_refused_too(busy, encoder, photos, capsys):  # noqa: F811
    fails_in_one_sentence(capsys, finetune(encoder, photos, busy[0]), f"Another run is writing into {busy[0]}")
    assert [path.name for path in busy[0].iterdir()] == [".lock"]
