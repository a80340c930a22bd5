"""The checkpoints of S-JEA's authors (AlzbetaM/S-JEA) as an [`SJeaForPreTraining`].

They hold `encoder_online` and, of a stack, `encoder_stacked`, each a ResNet whose last layer `fc` is an expander (two
linear layers with batch norm and ReLU, then a third), torch's linear layer of 1,000 features, or nothing, as their
setting `projection` says. The second ResNet reads what `fc` of the first gives, folded to 16 rows of one channel:

    projection   fc of the first    the second reads    fc of the second
    simple       expander           Z, 16 x 16          linear, 1,000 features
    both         expander           Z, 16 x 16          expander
    stacked      nothing            Y, 16 x 32          expander
    none         nothing            Y, 16 x 32          linear, 1,000 features
"""

from collections import OrderedDict

import torch
from torch import nn

from modeling_cjepa import SJeaConfig, SJeaForPreTraining
from trainers.conversion.checks import Check, Converted, compare, random_images
from trainers.conversion.formats import ReadOptions, Source
from trainers.conversion.vicreg_resnet import load_backbone, load_exactly, resnet_fields, torchvision_resnet
from trainers.errors import InputError

_ROWS = 16
_STEM = {"stem.conv0.": "conv1.", "stem.BN1.": "bn1."}
_PROJECTIONS = {
    ("expander", None): "VICReg alone",
    ("expander", "linear"): "simple",
    ("expander", "expander"): "both",
    ("nothing", "expander"): "stacked",
    ("nothing", "linear"): "none",
}


def from_sjea_checkpoint(state: dict, image_size: int | None = None) -> Converted:
    """
    Builds a model from a checkpoint of the authors' S-JEA code.

    All sizes are read off the tensors. The last layer of their heads has a bias and ours has none. Where the level
    above reads its output, the bias becomes the weights of one more hidden unit that is always 1, which is exactly the
    same; elsewhere it is left out, as VICReg's terms do not see it.

    Args:
        state (`dict`): The loaded checkpoint, or its `state_dict` alone.
        image_size (`int`, *optional*): Pixels of a training image's side; 32 of a ResNet with the stem for CIFAR, else
            64, that of their STL-10, when not given.

    Returns:
        [`Converted`]: The check is by the authors' forward pass with torchvision's ResNets.

    Raises:
        InputError: It is no such checkpoint, or tensors are missing, too many, of other shapes or not finite.
    """
    encoders = [_Encoder(part, tensors) for part, tensors in _split(state.get("state_dict", state)).items()]
    projection = _projection(encoders)
    levels, notes = [], [f"The checkpoint's projection is {projection!r}."]
    for number, encoder in enumerate(encoders):
        is_read = number + 1 < len(encoders)
        level = {"backbone": encoder.fields, "stem": encoder.stem, "expander_sizes": encoder.expander_sizes(is_read)}
        if number:
            reads = "embedding" if encoders[0].kind == "nothing" else "expanded"
            level |= {"input": "vector", "reads": reads, "fold_height": _ROWS}
        levels.append(level)
        notes += encoder.notes(number, is_read)
    size = image_size or (32 if encoders[0].stem == "small" else 64)
    config = SJeaConfig(levels=levels, image_size=size, num_channels=encoders[0].num_channels)
    model = SJeaForPreTraining(config).eval()
    for number, encoder in enumerate(encoders):
        load_backbone(model, number, encoder.resnet)
        inside = model.sjea.levels[number].expander
        expander = model.expanders[str(number)] if inside is None else inside
        is_read = number + 1 < len(encoders)
        expander.load_state_dict(encoder.expander_tensors(is_read))
    return Converted(model, notes, _check(model, encoders))


def holds_sjea(tensors: dict) -> bool:
    """Whether a file's tensors are a checkpoint of the authors' S-JEA code."""
    inner = tensors.get("state_dict", tensors)
    return isinstance(inner, dict) and any(name.startswith("encoder_online.") for name in inner)


def read_sjea(source: Source, options: ReadOptions) -> Converted:
    """Reads a file by [`from_sjea_checkpoint`]."""
    return from_sjea_checkpoint(source.tensors, options.image_size)


def _split(tensors: dict) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each encoder by torchvision's names, those of its `fc` among them."""
    parts = {}
    for name, tensor in tensors.items():
        part, _, name = name.partition(".")
        for theirs, torchvisions in _STEM.items():
            if name.startswith(theirs):
                name = torchvisions + name.removeprefix(theirs)
        parts.setdefault(part, {})[name] = tensor
    known = [part for part in ("encoder_online", "encoder_stacked") if part in parts]
    if "encoder_online" not in parts or len(known) < len(parts):
        raise InputError(
            f"The checkpoint has {', '.join(parts) or 'nothing'} where one of S-JEA's pre-training has encoder_online "
            "and encoder_stacked; give such a latest_checkpoint.ckpt."
        )
    return {part: parts[part] for part in known}


class _Encoder:
    """One of the authors' encoders: torchvision's ResNet and the layers `fc` after it."""

    def __init__(self, part: str, tensors: dict[str, torch.Tensor]):
        backbone = {name: tensor for name, tensor in tensors.items() if not name.startswith("fc.")}
        head = {name.removeprefix("fc."): tensor for name, tensor in tensors.items() if name.startswith("fc.")}
        try:
            self.fields, self.stem = resnet_fields(backbone)
            self.resnet = torchvision_resnet(backbone)
        except InputError as error:
            raise InputError(f"{part}: {error}") from error
        self.num_channels = self.resnet.conv1.in_channels
        self.width = self.fields["hidden_sizes"][-1]
        self.kind = "nothing" if not head else "linear" if "weight" in head else "expander"
        self.head = _build_head(self.kind, head, self.width, f"{part}.fc").eval()

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What their encoder gives for images: `fc` of the pooled features, and these."""
        pooled = self.resnet(images)
        return self.head(pooled), pooled

    @property
    def output_width(self) -> int:
        return self.width if self.kind == "nothing" else list(self.head.children())[-1].out_features

    @property
    def bias(self) -> torch.Tensor:
        """Of the last layer of `fc`; 0 where there is none."""
        return torch.zeros(1) if self.kind == "nothing" else list(self.head.children())[-1].bias

    def expander_sizes(self, is_read: bool) -> list[int]:
        """Widths of the equal expander; `is_read` says whether the level above reads its output."""
        if self.kind != "expander":
            return [self.output_width]
        return [self.head.fc1.out_features, self.head.fc2.out_features + is_read, self.head.fc3.out_features]

    def expander_tensors(self, is_read: bool) -> dict[str, torch.Tensor]:
        """The equal expander's tensors; `is_read` as above."""
        if self.kind == "nothing":
            return {"0.weight": torch.eye(self.width)}
        if self.kind == "linear":
            return {"0.weight": self.head.fc.weight}
        layers = {"0": self.head.fc1, "1": self.head.bn1, "3": self.head.fc2, "4": self.head.bn2, "6": self.head.fc3}
        tensors = {f"{ours}.{n}": t for ours, layer in layers.items() for n, t in layer.state_dict().items()}
        bias = tensors.pop("6.bias")
        if is_read:
            # a unit whose batch norm gives 1 for whatever it reads
            constant = {"3.bias": 0.0, "4.weight": 0.0, "4.bias": 1.0, "4.running_mean": 0.0, "4.running_var": 1.0}
            for name, value in constant.items():
                tensors[name] = torch.cat([tensors[name], tensors[name].new_tensor([value])])
            tensors["3.weight"] = torch.cat([tensors["3.weight"], torch.zeros_like(tensors["3.weight"][:1])])
            tensors["6.weight"] = torch.cat([tensors["6.weight"], bias.unsqueeze(1)], dim=1)
        return tensors

    def notes(self, number: int, is_read: bool) -> list[str]:
        """What of the head has no counterpart, or another shape."""
        if self.kind == "nothing":
            return [f"Level {number} has no expander there; here it is a linear layer that starts as the identity."]
        if self.kind == "expander" and is_read:
            return [f"The bias of level {number}'s last expander layer is a hidden unit of its own, always 1."]
        return [f"The bias of level {number}'s last expander layer is left out; VICReg's terms do not see it."]


def _build_head(kind: str, tensors: dict[str, torch.Tensor], width: int, where: str) -> nn.Module:
    """Their layers after the pooling, by their names."""
    if kind == "nothing":
        return nn.Identity()
    if kind == "linear":
        layers = {"fc": nn.Linear(width, _num_outputs(tensors, "weight", where))}
        tensors = {f"fc.{name}": tensor for name, tensor in tensors.items()}
    else:
        if not any(name.startswith("bn1.") for name in tensors):
            raise InputError(
                f"{where} has no batch norms (their setting use_bn), and our expanders do; it cannot map."
            )
        hidden, narrow, last = (_num_outputs(tensors, f"fc{number}.weight", where) for number in (1, 2, 3))
        layers = {
            "fc1": nn.Linear(width, hidden),
            "bn1": nn.BatchNorm1d(hidden),
            "relu1": nn.ReLU(),
            "fc2": nn.Linear(hidden, narrow),
            "bn2": nn.BatchNorm1d(narrow),
            "relu2": nn.ReLU(),
            "fc3": nn.Linear(narrow, last),
        }
    head = nn.Sequential(OrderedDict(layers))
    load_exactly(head, tensors, where)
    return head


def _num_outputs(tensors: dict[str, torch.Tensor], name: str, where: str) -> int:
    if name not in tensors or tensors[name].ndim != 2:
        raise InputError(f"{where} has no matrix {name!r}, which a head of S-JEA's has; the checkpoint is not whole.")
    return tensors[name].shape[0]


def _projection(encoders: list[_Encoder]) -> str:
    """The authors' name of the heads there are; refuses what their code cannot have made."""
    lowest, second = encoders[0], encoders[1] if len(encoders) > 1 else None
    kinds = (lowest.kind, second and second.kind)
    if kinds not in _PROJECTIONS:
        raise InputError(
            f"The encoders end in {kinds[0]} and {kinds[1]}, which no projection of S-JEA's is (simple, both, "
            "stacked, none); the checkpoint is not whole, or of an early version."
        )
    if second is not None:
        folded = _ROWS * (32 if lowest.kind == "nothing" else 16)
        if second.num_channels != 1 or lowest.output_width != folded:
            raise InputError(
                f"The second encoder reads {second.num_channels} channels and the first gives {lowest.output_width} "
                f"features, where S-JEA folds {folded} to one channel; it is of an early version or another width."
            )
    return _PROJECTIONS[kinds]


def _check(model: SJeaForPreTraining, encoders: list[_Encoder]) -> Check:
    """Our levels' embeddings and what their expanders make of them, beside the authors' forward pass."""
    images = random_images(model.config)
    read, ours, theirs = images, [], []
    with torch.no_grad():
        outputs = model.sjea.encode(images)
        for number, (output, encoder) in enumerate(zip(outputs, encoders, strict=True)):
            if number:
                read = theirs[-1].reshape(len(images), 1, _ROWS, -1)
            expanded, pooled = encoder(read)
            if output.expanded is None:
                # our last layer has no bias
                ours_expanded = model.expanders[str(number)](output.embedding) + encoder.bias
            else:
                ours_expanded = output.expanded
            ours += [output.embedding, ours_expanded]
            theirs += [pooled, expanded]
    return compare("the authors' forward pass with torchvision's ResNets on 2 random images", ours, theirs)
