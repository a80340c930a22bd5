"""A run of two processes that is killed in a step, in a save and between its processes ends like one left alone."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "scripts" / "kill_and_resume.py"


def test_a_killed_run_ends_like_one_left_alone(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--processes", "2", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 kills: weights equal" in result.stdout
    for moment in ("s after a save", "ms into the save of", "rank"):
        assert moment in result.stdout
