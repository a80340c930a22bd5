"""The processes of an experiment's runs, which do not outlive a signal that stops the experiment."""

import signal
import subprocess
import threading
from contextlib import contextmanager

from trainers.stopping import SIGNALS


class Processes:
    """
    Processes that are told to stop when this one is.

    Attributes:
        stopped (`Event`): Once it is set no other begins.
    """

    def __init__(self):
        self.stopped = threading.Event()
        self._begun: list[subprocess.Popen] = []

    def run(self, command: list[str], **kwargs) -> int:
        """The exit status of a command, which is carried out to its end; for the rest see `subprocess.Popen`."""
        with subprocess.Popen(command, **kwargs) as process:
            self._begun.append(process)
            if self.stopped.is_set():  # while it began
                process.terminate()
            return process.wait()

    @contextmanager
    def told_of_signals(self):
        """
        Passes SIGTERM and SIGUSR1 on to all, in which a run saves a checkpoint and ends. A scheduler may have sent
        them to all itself; a run takes both for one.
        """
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Python sets handlers in the main thread only
        before = {number: signal.signal(number, self._pass_on) for number in SIGNALS if in_main_thread}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, frame):
        self.stopped.set()
        for process in self._begun:
            process.send_signal(number)  # does nothing to one that has ended
