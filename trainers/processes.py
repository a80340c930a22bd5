"""What the processes of a run agree on."""

import gc

import torch.distributed as dist
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


def end_processes():
    """
    Ends what several processes talk through, if there is any, while the interpreter still lives.

    A thread of Gloo's that lets go of its last tensor after that aborts the process, and its launcher says that the
    training failed (PyTorch's issue 190489).
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()  # the threads end with the groups, which trainers refer to in circles
