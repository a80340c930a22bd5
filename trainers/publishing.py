"""The folder that is published: weights, configuration, code, image processor and model card.

The code travels with the weights, so that the Auto classes load the folder with `trust_remote_code=True` where this
package is not installed.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files

import modeling_cjepa
from trainers.errors import InputError
from trainers.files import leftovers, unfinished_beside

AUTO_MAPS = {
    "cjepa": {
        "AutoConfig": "configuration_cjepa.CJepaConfig",
        "AutoModel": "modeling_cjepa.CJepaModel",
        "AutoModelForPreTraining": "pretraining_cjepa.CJepaForPreTraining",
        "AutoModelForImageClassification": "modeling_cjepa.CJepaForImageClassification",
        "AutoBackbone": "backbone_cjepa.CJepaBackbone",
    },
    "sjea": {
        "AutoConfig": "configuration_sjea.SJeaConfig",
        "AutoModel": "modeling_sjea.SJeaModel",
        "AutoModelForPreTraining": "pretraining_sjea.SJeaForPreTraining",
        "AutoModelForImageClassification": "modeling_sjea.SJeaForImageClassification",
    },
}


@contextmanager
def whole_folder(folder: Path):
    """
    A folder that appears whole or not at all: it is filled under another name and renamed at the end.

    Args:
        folder (`Path`): The folder to make.

    Raises:
        InputError: The folder exists, or cannot be made.
    """
    if os.path.lexists(folder):
        raise InputError(f"{folder} exists already; choose another folder or remove it.")
    unfinished = _unfinished_folder(folder)
    try:
        yield unfinished
        _allow_as_usual(unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _unfinished_folder(folder: Path) -> Path:
    """An empty folder beside one that is to be made; what a killed process has left there is removed."""
    unfinished = unfinished_beside(folder)
    try:
        for leftover in leftovers(folder):
            shutil.rmtree(leftover)
        unfinished.mkdir(parents=True)
        return unfinished
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); name another folder.") from error


def _allow_as_usual(folder: Path):
    """Gives a folder and its files the rights of new ones: weights are their owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def save_model(model: PreTrainedModel, processor, folder: Path, weights: dict | None = None, shard_size="5GB"):
    """
    Writes weights, configuration, code and image processor into an existing folder.

    Args:
        model (`PreTrainedModel`): One of this package. Of a [`CJepaForPreTraining`] or [`SJeaForPreTraining`] all
            parts are saved; `AutoModel` loads the target encoder, or the stack, of them.
        processor: The image processor of evaluation; None leaves it out.
        folder (`Path`): Where to.
        weights (`dict`, *optional*): Tensors to save in place of the model's.
        shard_size (`int` or `str`): Bytes of the largest file of weights, such as `"1GB"`.
    """
    model.config.auto_map = dict(AUTO_MAPS[model.config.model_type])
    model.save_pretrained(folder, state_dict=weights, max_shard_size=shard_size)
    if processor is not None:
        processor.save_pretrained(folder)
    for source in code_files(model.config.model_type):
        shutil.copyfile(source, folder / source.name)


def code_files(model_type: str) -> list[Path]:
    """
    The files of code that a published model needs.

    Args:
        model_type (`str`): `cjepa` or `sjea`.

    Returns:
        `list[Path]`: Those of its Auto classes and all that these import, by name.
    """
    package = Path(modeling_cjepa.__file__).parent
    modules = {package / f"{name.partition('.')[0]}.py" for name in AUTO_MAPS[model_type].values()}
    imported = {Path(path) for module in modules for path in get_relative_import_files(module)}
    return sorted(modules | imported)
