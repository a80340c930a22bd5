"""Stops that lose nothing: at SIGTERM, SIGUSR1 or the end of a budget of hours training saves a checkpoint and ends.

All processes do so at the same step, whichever was told.
"""

import math
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from trainers.errors import InputError
from trainers.pushed_trainer import PushedTrainer
from trainers.trackers import guard_trackers

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))
# launchers pass on a signal that the workers were sent, too
_SECONDS_OF_ONE_SIGNAL = 5.0


class StopCallback(TrainerCallback):
    """
    Ends training with a checkpoint when it is asked to; without one if the step was the last anyway.

    Several processes tell each other at the end of a step, on a group of their own and in the background, and read
    what was said at the end of the next: they stop one step later than one process would, and never wait.

    Args:
        max_hours (`float`, *optional*): Hours of training after which to stop; no limit when not given.

    Attributes:
        reason (`str`): What stopped the last training; None if nothing did.
    """

    def __init__(self, max_hours: float | None = None):
        self.reason: str | None = None
        self._reasons = (None, *(number.name for number in SIGNALS), f"--max_hours {max_hours}")
        self._seconds = math.inf if max_hours is None else 3600 * max_hours

    @contextmanager
    def watching(self):
        """Listens for signals and watches the clock; afterwards signals do again what they did before."""
        self.reason, self._asked, self._received = None, 0, {}
        self._deadline = time.monotonic() + self._seconds
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group, self._exchange = dist.new_group(backend="gloo") if several else None, None
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Python sets handlers in the main thread only
        self._before = {number: signal.signal(number, self._receive) for number in SIGNALS if in_main_thread}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            if self._group is not None:
                dist.destroy_process_group(self._group)

    def _receive(self, number: int, frame):
        """Notes a signal; one that is sent again does what it would have done without this."""
        first = self._received.setdefault(number, time.monotonic())
        if time.monotonic() - first > _SECONDS_OF_ONE_SIGNAL:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        self._asked = self._asked or 1 + SIGNALS.index(number)

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        outlive_signals(train_dataloader)

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self._deadline:
            self._asked = self._asked or len(self._reasons) - 1
        agreed = self._agreed()
        if state.global_step >= state.max_steps:
            return
        if agreed:
            self.reason = self._reasons[agreed]
            control.should_training_stop = True
            control.should_save = not ends_epoch(state)
        elif self._group is not None:
            flag = torch.tensor(self._asked)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
            self._exchange = work, flag

    def _agreed(self) -> int:
        """Number of the reason for which all processes stop after this step; 0 if there is none."""
        if self._group is None:
            return self._asked
        if self._exchange is None:
            return 0
        work, flag = self._exchange
        work.wait()
        return int(flag)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.reason is None:
            return
        if ends_epoch(state):
            control.should_save = True  # once what belongs to the end of an epoch is done
        else:
            control.should_evaluate = control.should_save = control.should_log = False


def ends_epoch(state) -> bool:
    """Whether a step was the last of an epoch; never where a stream does not tell how long one is."""
    return state.epoch is not None and float(state.epoch).is_integer()


class WorkerSignals:
    """
    The `worker_init_fn` of a data loader whose workers outlive signals that a whole process group is sent, such as by
    `scancel`: training needs them up to the step at which it stops.

    Args:
        init (`Callable`, *optional*): Another one, which is called first.
    """

    def __init__(self, init=None):
        self.init = init

    def __call__(self, worker: int):
        if self.init is not None:
            self.init(worker)
        for number in SIGNALS:
            if number != signal.SIGTERM:
                signal.signal(number, signal.SIG_IGN)
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=self._end_by_parent, daemon=True).start()

    @staticmethod
    def _end_by_parent():
        """Ends the worker at a SIGTERM of the loader's own, and at no other."""
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)


def outlive_signals(loader):
    """Gives a data loader workers that outlive signals, see [`WorkerSignals`]."""
    inside = getattr(loader, "base_dataloader", loader)  # of Accelerate's
    if not isinstance(inside.worker_init_fn, WorkerSignals):
        inside.worker_init_fn = WorkerSignals(inside.worker_init_fn)
    return loader


class StoppableTrainer(PushedTrainer):
    """
    A [`PushedTrainer`] that stops with a checkpoint at SIGTERM, SIGUSR1 or after `args.max_hours` (see
    [`StopCallback`], which is `self.stop`), and not because a tracker fails.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        guard_trackers(self.callback_handler.callbacks)
        self.stop = StopCallback(self.args.max_hours)
        self.add_callback(self.stop)

    def train(self, *args, **kwargs):
        """Trains; what stopped it is in `self.stop.reason`."""
        with self.stop.watching():
            return super().train(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset=None):
        """As in transformers; an evaluation during training ends before a signal stops the run."""
        return outlive_signals(super().get_eval_dataloader(eval_dataset))


def stopped_sentence(trainer: StoppableTrainer) -> str:
    """
    What a user is told of a training that was stopped.

    Args:
        trainer ([`StoppableTrainer`]): It has stopped.

    Returns:
        `str`: What stopped it, where, and how to go on.

    Raises:
        InputError: There is no checkpoint of its last step.
    """
    state, checkpoint = trainer.state, Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")
    where = f"stopped by {trainer.stop.reason} at step {state.global_step} of {state.max_steps}"
    if not checkpoint.is_dir():
        raise InputError(f"{where}, and {checkpoint} could not be saved; go on from the checkpoint before, if any.")
    return f"{where}; saved {checkpoint.name}; go on with --resume_from_checkpoint last"
