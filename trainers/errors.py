"""Errors a user is told about in plain words."""


class InputError(ValueError):
    """A mistake of the user's: said in one sentence, without a traceback."""


def plain_message(error: InputError) -> str:
    """The sentence of an error, also of one that a data loader's worker wrapped in its traceback."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")
