"""What the ways out share: the packages they need, and what a model is converted for."""

import importlib

from transformers import PreTrainedModel

from trainers.errors import InputError
from trainers.model_facts import is_classifier


def require(extra: str, *modules: str) -> list:
    """
    Imports what an extra of the package installs.

    Args:
        extra (`str`): Its name in setup.cfg.
        modules (`str`): Modules it brings.

    Returns:
        `list` of the modules.

    Raises:
        InputError: One is not installed; the message says how to install it.
    """
    imported = []
    for module in modules:
        try:
            imported.append(importlib.import_module(module))
        except ModuleNotFoundError as error:
            raise InputError(f'This needs {module}, which is not installed: pip install "cjepa[{extra}]".') from error
    return imported


def output_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What a classifier, or an encoder, is converted for; what is of an image as a whole comes last."""
    return ("logits",) if is_classifier(model) else ("last_hidden_state", "pooler_output")
