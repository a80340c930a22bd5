"""One run at a time in a folder: two that wrote their checkpoints into it would resume each other's."""

import os
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trainers.errors import InputError
from trainers.files import make_place
from trainers.processes import in_main_process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_LOCK = ".lock"


@contextmanager
def only_run_in(output: Path):
    """
    Keeps other runs out of a folder as long as this one is in it; all processes enter it.

    The system drops the lock with the main process, however that ends. Windows has no such locks: nothing is kept out.

    Args:
        output (`Path`): The run's folder, which is made, and removed again if nothing was written into it.

    Raises:
        InputError: Another run is in it, or it cannot be made or written to.
    """
    with ExitStack() as stack:
        in_main_process(_lock, output, stack)
        yield


def _lock(output: Path, stack: ExitStack):
    path = output / _LOCK
    if not os.path.exists(output):
        stack.callback(_remove_if_empty, output)
    make_place(path, "--output_dir")
    while fcntl is not None:
        file = stack.enter_context(open(path, "w"))
        try:
            # of the process alone: workers that outlive it for a moment do not hold it, as they would by `flock`
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise InputError(
                f"Another run is writing into {output}; wait until it has ended, or name another --output_dir."
            ) from error
        except OSError as error:
            print(f"{output} is not locked ({error.strerror}): see that no other run writes into it.", flush=True)
        stack.callback(path.unlink, missing_ok=True)
        # else the run before has removed it meanwhile
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return


def _remove_if_empty(folder: Path):
    with suppress(OSError):
        folder.rmdir()
