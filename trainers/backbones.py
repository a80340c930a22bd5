"""Backbones of S-JEA that start from published weights: a recipe names them where it could describe one.

A name is that of a model of transformers, on the Hub or in a folder, or of a file of a ResNet by torchvision's names,
such as VICReg's `resnet50.pth`.
"""

import inspect

from transformers import AutoConfig, AutoModel

from modeling_cjepa import SJeaForPreTraining
from trainers.conversion.vicreg_resnet import RESNET, resnet_fields, torchvision_resnet, unwrapped, without_classifier
from trainers.conversion.weight_files import check_folder, check_tensors, read_weight_file
from trainers.source_configs import no_model_named, read_config

# files, where others are models of transformers
_FILE_ENDINGS = (".pth", ".pt")
# set by what the level reads
_SET_BY_INPUT = ("num_channels", "image_size")


def describe_backbones(levels: list) -> tuple[list, dict[int, str]]:
    """
    Levels whose named backbones are described by their configurations.

    Args:
        levels (`list[dict]`): As in [`SJeaConfig`], but a `backbone` may be the id of a model on the Hub, a folder, or
            a `.pth` file of a ResNet by torchvision's names.

    Returns:
        `(levels, names)`: The levels with a configuration each, and the names by the levels' numbers.

    Raises:
        InputError: There is no such model.
    """
    described, names = [], {}
    for number, level in enumerate(levels):
        name = level.get("backbone") if isinstance(level, dict) else None
        if isinstance(name, str):
            names[number] = name
            level = level | {"backbone": _fields(name, number)}
        described.append(level)
    return described, names


def _fields(name: str, number: int) -> dict:
    """The fields of a named model's configuration that make its architecture."""
    if name.endswith(_FILE_ENDINGS):
        return resnet_fields(_read_resnet(name))[0]
    with no_model_named(
        f"levels[{number}]: backbone {name!r} is neither a folder with a model nor the id of one on the Hub",
        "mend it, or describe one by its model_type",
    ):
        read_config(name)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    own = [field for field in inspect.get_annotations(type(config)) if field not in _SET_BY_INPUT]
    saved = config.to_dict()
    return {"model_type": config.model_type, **{field: saved[field] for field in own if field in saved}}


def _read_resnet(path: str) -> dict:
    """The tensors of a ResNet's file by torchvision's names."""
    tensors, _ = without_classifier(unwrapped(read_weight_file(path))[0])
    return tensors


def _read_weights(name: str) -> dict:
    """The tensors of a named model by transformers' names."""
    if name.endswith(_FILE_ENDINGS):
        return RESNET.to_ours(torchvision_resnet(_read_resnet(name)).state_dict())
    check_folder(name)
    with no_model_named(f"The weights of {name} cannot be loaded", "copy or save them again"):
        tensors = AutoModel.from_pretrained(name, trust_remote_code=False, weights_only=True).state_dict()
    check_tensors(tensors, name)
    return tensors


def load_backbones(model: SJeaForPreTraining, names: dict[int, str]) -> list[str]:
    """
    Loads published weights into the backbones of a stack.

    Args:
        model ([`SJeaForPreTraining`]): Changed in place.
        names (`dict[int, str]`): Models by the numbers of the levels they start, as [`describe_backbones`] gives them.

    Returns:
        `list[str]`: A sentence a level that says which of its tensors start anew, such as those of a small stem.

    Raises:
        InputError: The weights cannot be loaded.
    """
    sentences = []
    for number, name in names.items():
        backbone = model.sjea.levels[number].backbone
        tensors = _read_weights(name)
        ours = backbone.state_dict()
        fitting = {key: tensor for key, tensor in tensors.items() if key in ours and ours[key].shape == tensor.shape}
        backbone.load_state_dict(fitting, strict=False)
        anew = [key for key in ours if key not in fitting]
        rest = f"; these start anew: {', '.join(anew)}" if anew else ""
        sentences.append(f"level {number} starts from {len(fitting)} of {len(ours)} tensors of {name}{rest}")
    return sentences
