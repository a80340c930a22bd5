"""What the processes of a run agree on."""

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from trainers.errors import InputError


def in_main_process(function, *args):
    """
    What a function gives in the main process, or the `InputError` it raises there, in all processes.

    Args:
        function (`Callable`): It is called in the main process alone; what it gives must be picklable.
        args: Its arguments.
    """
    outcome = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = function(*args)
        except InputError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise InputError(outcome[1])
    return outcome[0]
