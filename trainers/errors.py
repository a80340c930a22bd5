"""Errors a user is told about in plain words."""


class InputError(ValueError):
    """A mistake of the user's: said in one sentence, without a traceback."""
