"""Trackers that fail (TensorBoard, wandb, trackio, ...): training goes on without them."""

import functools
import logging
from collections import Counter

from transformers import TrainerCallback

from trainers.errors import InputError, first_line

logger = logging.getLogger(__name__)

_MOST_FAILURES = 3


def is_tracker(callback: TrainerCallback) -> bool:
    """Whether a callback is one of transformers' integrations, or made of one."""
    return any(base.__module__.startswith("transformers.integrations") for base in type(callback).__mro__)


def guard_trackers(callbacks: list[TrainerCallback]):
    """
    Makes the trackers among callbacks harmless: an error of theirs is said in a sentence and training goes on; after
    three of an event in a row they are called no more. An [`InputError`] passes.

    Args:
        callbacks (`list[TrainerCallback]`): All of a trainer's; the trackers among them are changed in place.
    """
    for callback in filter(is_tracker, callbacks):
        guard = _Guard(type(callback).__name__)
        # the events themselves, so that the callback keeps its class, by which trainers find and remove it
        for event in dir(TrainerCallback):
            if event.startswith("on_"):
                setattr(callback, event, guard.around(getattr(callback, event)))


class _Guard:
    """Stands between a trainer and a tracker, and counts the failures in a row of each event."""

    def __init__(self, name: str):
        self.name, self.num_failures = name, Counter()

    def around(self, event):
        """An event of the tracker that does not fail."""

        @functools.wraps(event)
        def guarded(args, state, control, **kwargs):
            if _MOST_FAILURES in self.num_failures.values():
                return None
            try:
                result = event(args, state, control, **kwargs)
            except InputError:
                raise
            except Exception as error:
                self._failed(error, event.__name__, state.global_step)
                return None
            self.num_failures[event.__name__] = 0
            return result

        return guarded

    def _failed(self, error: Exception, event: str, step: int):
        self.num_failures[event] += 1
        reason = f"{type(error).__name__}: {first_line(error)}"
        what = f"The tracker {self.name} failed in {event} at step {step} ({reason})"
        if self.num_failures[event] == _MOST_FAILURES:
            logger.warning(f"{what}, {_MOST_FAILURES} times in a row: it is left out, and its later figures are lost.")
        elif self.num_failures[event] == 1:
            logger.warning(f"{what}: training goes on, and the figures that it misses are lost to it.")
