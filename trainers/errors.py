"""Errors a user is told about in plain words."""

_LONGEST_QUOTE = 300


class InputError(ValueError):
    """
    A mistake of the user's: said in one sentence, without a traceback.

    Attributes:
        status (`int`): The exit status of a command that it ends.
    """

    status = 2


class Stopped(InputError):
    """What was begun was stopped by a signal or a limit of time, and the same command goes on with it."""

    status = 130


def plain_message(error: InputError) -> str:
    """The sentence of an error, also of one that a data loader's worker wrapped in its traceback."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")


def first_line(error: Exception) -> str:
    """The first line of another library's error, cut if it is long, to be quoted in one of ours."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line if len(line) <= _LONGEST_QUOTE else line[:_LONGEST_QUOTE] + " ..."
