"""Memory of a process on a CPU."""

import ctypes

# of malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """
    Makes the C library keep the memory that tensors leave for those to come.

    Of its own accord it gives large pieces back to the system, which fills them with zeros, page by page, when the
    next step asks for them again: a twentieth of a training step on a CPU.

    Returns:
        `bool`: Whether it does; not where the library is not the GNU one.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # of other libraries and systems
        return False
    return all(mallopt(option, _NEVER) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
