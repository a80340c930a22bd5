"""Runs commands of `cjepa` one after the other in a process with an environment of its own: a JSON list a line."""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback


def ended_process() -> int:
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


if __name__ != "__main__":

    class Commands:
        """
        The other end: starts the process and asks it.

        Args:
            environment (`dict[str, str]`): Beside that of this process.
        """

        def __init__(self, environment):
            self.process = subprocess.Popen(
                [sys.executable, __file__], env={**os.environ, **environment}, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            )  # fmt: skip

        def run(self, *arguments, **environment) -> tuple[int, str, str]:
            """The exit status, the output and the errors of a command, in changed environment variables."""
            print(json.dumps([list(map(str, arguments)), environment]), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
            assert line, "the process has ended"
            return tuple(json.loads(line))

        def close(self):
            """Ends the process."""
            self.process.stdin.close()
            self.process.wait(timeout=60)

else:
    from trainers.cli import main

    answers = sys.stdout
    for line in sys.stdin:
        arguments, environment = json.loads(line)
        out, err = io.StringIO(), io.StringIO()
        before = dict(os.environ)
        os.environ.update(environment)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = main(arguments)
            except SystemExit as end:
                status = end.code
            except Exception:
                traceback.print_exc()
                status = 1
        os.environ.clear()
        os.environ.update(before)
        print(json.dumps([status, out.getvalue(), err.getvalue()]), file=answers, flush=True)
