"""ResNets by torchvision's names, such as the `resnet50.pth` of facebookresearch/vicreg, as a level of S-JEA.

torchvision's bottleneck has its stride in the 3x3 convolution, as transformers' without `downsample_in_bottleneck`.
"""

from dataclasses import replace

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from modeling_cjepa import SJeaConfig, SJeaForPreTraining
from trainers.conversion.checks import Converted, compare, random_images
from trainers.conversion.formats import ReadOptions, Source
from trainers.conversion.names import NameTable, some_names, without_prefix
from trainers.conversion.weight_files import check_tensors
from trainers.errors import InputError

_NUM_STAGES = 4
_COUNTER = "num_batches_tracked"

RESNET = NameTable((
    ("embedder.embedder.convolution.", "conv1."),
    ("embedder.embedder.normalization.", "bn1."),
    *(
        (f"encoder.stages.{stage}.layers.{{}}.{ours}.", f"layer{stage + 1}.{{}}.{theirs}.")
        for stage in range(_NUM_STAGES)
        for ours, theirs in (
            ("shortcut.convolution", "downsample.0"),
            ("shortcut.normalization", "downsample.1"),
            *((f"layer.{number}.convolution", f"conv{number + 1}") for number in range(3)),
            *((f"layer.{number}.normalization", f"bn{number + 1}") for number in range(3)),
        )
    ),
))  # fmt: skip


def from_vicreg_checkpoint(
    state: dict[str, torch.Tensor], image_size: int | None = None, expander_sizes: list[int] | None = None
) -> Converted:
    """
    Builds a stack of one level, which is VICReg, on a ResNet of torchvision's layout.

    Args:
        state (`dict[str, torch.Tensor]`): Its state dict; a classifier `fc` is left out.
        image_size (`int`, *optional*): Pixels of a training image's side; 224 when not given, or 32 of a ResNet whose
            first convolution is 3x3.
        expander_sizes (`list[int]`, *optional*): Widths of the expander, which starts anew; [`SJeaLevelConfig`]'s when
            not given.

    Returns:
        [`Converted`]: An [`SJeaForPreTraining`]; the check is by torchvision's own class.

    Raises:
        InputError: Tensors are missing, too many, of other shapes or not finite.
    """
    tensors, notes = without_classifier(state)
    fields, stem = resnet_fields(tensors)
    notes.append("The expander starts anew: the file has the backbone alone.")
    if stem == "small":
        notes.append("The first convolution is 3x3: taken to be of stride 1, without a pooling after it.")
    level = {"backbone": fields, "stem": stem}
    if expander_sizes is not None:
        level["expander_sizes"] = list(expander_sizes)
    config = SJeaConfig(
        levels=[level],
        image_size=image_size or (32 if stem == "small" else 224),
        num_channels=tensors["conv1.weight"].shape[1],
    )
    reference = torchvision_resnet(tensors)
    model = SJeaForPreTraining(config).eval()
    load_backbone(model, 0, reference)
    images = random_images(config)
    with torch.no_grad():
        check = compare(
            "torchvision's ResNet on 2 random images", [model.sjea(images).pooler_output], [reference(images)]
        )
    return Converted(model, notes, check, anew=("expanders.",))


def unwrapped(tensors: dict) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    A backbone's tensors out of what a training script saved around them, and a sentence on what else was there.

    Args:
        tensors (`dict`): As [`read_weight_file`] gives them: the tensors, or a `state_dict` or `model` of them, with
            the prefixes of DDP (`module.`) and of VICReg's training (`backbone.`) or without.
    """
    inner = next((tensors[name] for name in ("state_dict", "model") if isinstance(tensors.get(name), dict)), tensors)
    plain = without_prefix(inner)
    backbone = {name.removeprefix("backbone."): each for name, each in plain.items() if name.startswith("backbone.")}
    if not backbone:
        return plain, []
    others = sorted({name.partition(".")[0] for name in plain} - {"backbone"})
    return backbone, [f"Beside the backbone there was {', '.join(others)}, which is left out."] if others else []


def holds_resnet(tensors: dict) -> bool:
    """Whether a file's tensors are a ResNet's by torchvision's names."""
    return {"conv1.weight", "layer1.0.conv1.weight"} <= unwrapped(tensors)[0].keys()


def read_resnet(source: Source, options: ReadOptions) -> Converted:
    """Reads a file by [`from_vicreg_checkpoint`]."""
    tensors, notes = unwrapped(source.tensors)
    converted = from_vicreg_checkpoint(tensors, options.image_size)
    return replace(converted, notes=notes + converted.notes)


def without_classifier(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """A state dict without its `fc`, if it has one, and a sentence that says so."""
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    return tensors, ["Its classifier fc is left out."] if len(tensors) < len(state) else []


def resnet_fields(tensors: dict[str, torch.Tensor]) -> tuple[dict, str]:
    """
    The architecture of a ResNet as its tensors tell it.

    Args:
        tensors (`dict[str, torch.Tensor]`): By torchvision's names.

    Returns:
        `(fields, stem)`: Of transformers' `ResNetConfig`, and `"small"` where the first convolution is 3x3.

    Raises:
        InputError: It is no ResNet of four stages.
    """
    embedding_size, _, *kernel = _shape(tensors, "conv1.weight")
    if kernel not in ([7, 7], [3, 3]):
        raise InputError(
            f"conv1.weight has a kernel of {kernel}, a ResNet's is 7x7 or 3x3; give one of torchvision's."
        )
    is_bottleneck = "layer1.0.conv3.weight" in tensors
    last = "conv3" if is_bottleneck else "conv2"
    stages = range(1, _NUM_STAGES + 1)
    fields = {
        "model_type": "resnet",
        "embedding_size": embedding_size,
        "hidden_sizes": [_shape(tensors, f"layer{stage}.0.{last}.weight")[0] for stage in stages],
        "depths": [len({name.split(".")[1] for name in tensors if name.startswith(f"layer{s}.")}) for s in stages],
        "layer_type": "bottleneck" if is_bottleneck else "basic",
    }
    return fields, "small" if kernel == [3, 3] else "standard"


def _shape(tensors: dict[str, torch.Tensor], name: str) -> list[int]:
    if not isinstance(tensors.get(name), torch.Tensor) or tensors[name].ndim != 4:
        raise InputError(f"There is no convolution {name!r}; give the state dict of a ResNet by torchvision's names.")
    return list(tensors[name].shape)


def torchvision_resnet(tensors: dict[str, torch.Tensor]) -> ResNet:
    """
    torchvision's own class with the tensors, which gives the pooled features (B, D).

    Args:
        tensors (`dict[str, torch.Tensor]`): By torchvision's names, without `fc`.

    Returns:
        `torchvision.models.resnet.ResNet` in evaluation mode.

    Raises:
        InputError: Tensors are missing, too many, of other shapes or not finite.
    """
    fields, stem = resnet_fields(tensors)
    block = Bottleneck if fields["layer_type"] == "bottleneck" else BasicBlock
    model = ResNet(block, [1] * _NUM_STAGES)
    model.inplanes, channels = fields["embedding_size"], tensors["conv1.weight"].shape[1]
    kernel, stride, padding = (3, 1, 1) if stem == "small" else (7, 2, 3)
    model.conv1 = nn.Conv2d(channels, model.inplanes, kernel, stride, padding, bias=False)
    model.bn1 = nn.BatchNorm2d(model.inplanes)
    if stem == "small":
        model.maxpool = nn.Identity()
    for stage, (width, depth) in enumerate(zip(fields["hidden_sizes"], fields["depths"], strict=True), start=1):
        layers = model._make_layer(block, width // block.expansion, depth, stride=1 if stage == 1 else 2)
        setattr(model, f"layer{stage}", layers)
    model.fc = nn.Identity()
    load_exactly(model, tensors, "The ResNet")
    return model.eval()


def load_exactly(module: nn.Module, tensors: dict[str, torch.Tensor], where: str):
    """
    Loads a module from tensors by its own names.

    Args:
        module (`nn.Module`): Changed in place.
        tensors (`dict[str, torch.Tensor]`): One for each of the module's; counters of batch norms may be left out, as
            files of early torch have none.
        where (`str`): Where they are from, for the sentence.

    Raises:
        InputError: Tensors are missing, too many, of other shapes or not finite.
    """
    check_tensors(tensors, where)
    expected = module.state_dict()
    missing = [name for name in expected if name not in tensors and not name.endswith(_COUNTER)]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        raise InputError(f"{where} does not fit: missing {some_names(missing)}, not known {some_names(unknown)}.")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{where} does not fit: {name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}."
            )
    module.load_state_dict({**expected, **tensors})


def load_backbone(model: SJeaForPreTraining, level: int, resnet: ResNet):
    """Copies a ResNet of torchvision's class, batch norms' statistics included, into that of a level's backbone."""
    model.sjea.levels[level].backbone.load_state_dict(RESNET.to_ours(resnet.state_dict()))
