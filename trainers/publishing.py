"""The folder that is published: weights, configuration, code, image processor and model card.

The code travels with the weights, so that the Auto classes load the folder with `trust_remote_code=True` where this
package is not installed.
"""

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import modeling_cjepa
from modeling_cjepa import CJepaForPreTraining, SJeaForPreTraining
from trainers.errors import InputError

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
        InputError: The folder exists.
    """
    if folder.exists():
        raise InputError(f"{folder} exists already; choose another folder or remove it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{folder.name}-unfinished-"
    for leftover in folder.parent.iterdir():
        if leftover.name.startswith(prefix):
            shutil.rmtree(leftover)  # of a run that was killed here
    unfinished = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        yield unfinished
        _allow_as_usual(unfinished)
        os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _allow_as_usual(folder: Path):
    """Gives a folder and its files the rights of new ones: temporary folders and weights are their owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def save_model(model: CJepaForPreTraining | SJeaForPreTraining, processor, folder: Path):
    """
    Writes weights, configuration, code and image processor into an existing folder.

    Args:
        model ([`CJepaForPreTraining`] or [`SJeaForPreTraining`]): All parts are saved; `AutoModel` loads the target
            encoder, or the stack, of them.
        processor: The image processor of evaluation; None writes none.
        folder (`Path`): Where to.
    """
    model.config.auto_map = dict(AUTO_MAPS[model.config.model_type])
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    for source in Path(modeling_cjepa.__file__).parent.glob("*_*.py"):
        if not source.name.startswith("__"):
            shutil.copyfile(source, folder / source.name)
