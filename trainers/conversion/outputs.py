"""What the ways out share: what they hand back, and the packages they need."""

import importlib
from dataclasses import dataclass

from transformers import PreTrainedModel

from modeling_cjepa import CJepaForImageClassification, SJeaForImageClassification
from trainers.errors import InputError

from .checks import Check


@dataclass(frozen=True)
class Written:
    """
    A folder written in another format.

    Args:
        check ([`Check`]): What the files give, read again, beside the model.
        notes (`list[str]`): Sentences that say what the files hold and how they are to be read.
    """

    check: Check
    notes: list[str]


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
    is_classifier = isinstance(model, CJepaForImageClassification | SJeaForImageClassification)
    return ("logits",) if is_classifier else ("last_hidden_state", "pooler_output")
