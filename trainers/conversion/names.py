"""The names that tensors have in other layouts, in one table for both directions, and the fused qkv projections."""

import re
from dataclasses import dataclass

import torch
from torch import nn

from modeling_cjepa.encoders_cjepa import sincos_positions
from trainers.conversion.weight_files import flat
from trainers.errors import InputError

ROUNDED_NOTE = "Its weights are float64 and are rounded to float32."
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
_JOINED = "attention.qkv."
POSITIONS = "position_embeddings"


@dataclass(frozen=True)
class NameTable:
    """
    Beginnings of names in our layout and in another, `{}` for a layer's number.

    Args:
        rows (`tuple` of `(str, str)`): Ours and theirs. Where theirs has query, key and value in one projection, ours
            is called `attention.qkv`.
    """

    rows: tuple[tuple[str, str], ...]

    def to_ours(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Their tensors by our names, fused projections split; a name that is in no row stays."""
        named = {_replace(name, [row[::-1] for row in self.rows]): tensor for name, tensor in tensors.items()}
        return _split(named)

    def to_theirs(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Our tensors by their names, projections fused where theirs are."""
        if any(_JOINED in ours for ours, _ in self.rows):
            tensors = _join(tensors)
        return {_replace(name, self.rows): tensor for name, tensor in tensors.items()}


def _replace(name: str, rows) -> str:
    for before, after in rows:
        pattern = re.escape(before).replace(r"\{\}", r"(\d+)")
        found = re.match(pattern, name)
        if found:
            return after.format(*found.groups()) + name[found.end() :]
    return name


def _split(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    split = {}
    for name, tensor in tensors.items():
        if _JOINED not in name:
            split[name] = tensor
            continue
        if tensor.ndim == 0 or tensor.shape[0] % 3:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, which is no fused query, key and value.")
        for projection, part in zip(_PROJECTIONS, tensor.chunk(3), strict=True):
            split[name.replace(_JOINED, f"attention.{projection}.")] = part
    return split


def _join(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    joined = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace("q_proj", projection)] for projection in _PROJECTIONS]
            joined[name.replace("attention.q_proj.", _JOINED)] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            joined[name] = tensor
    return joined


def _layers(ours: str, theirs: str) -> tuple[tuple[str, str], ...]:
    """The rows of pre-norm layers as Dosovitskiy's vision transformers are usually written."""
    names = (
        ("layernorm_before.", "norm1."),
        (_JOINED, "attn.qkv."),
        ("attention.o_proj.", "attn.proj."),
        ("layernorm_after.", "norm2."),
        ("mlp.", "mlp."),
    )
    return tuple((f"{ours}.{{}}.{our}", f"{theirs}.{{}}.{their}") for our, their in names)


# the encoders of the authors of I-JEPA, and timm's
FUSED_ENCODER = NameTable((
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.position_embeddings", "pos_embed"),
    *_layers("layers", "blocks"),
    ("layernorm.", "norm."),
))  # fmt: skip

# the predictor of the authors of I-JEPA
FUSED_PREDICTOR = NameTable((
    ("input_projection.", "predictor_embed."),
    ("mask_token", "mask_token"),
    ("position_embeddings", "predictor_pos_embed"),
    *_layers("layers", "predictor_blocks"),
    ("layernorm.", "predictor_norm."),
    ("output_projection.", "predictor_proj."),
))  # fmt: skip

# transformers' DINOv2, with registers or without
DINOV2 = NameTable((
    ("layers.{}.layernorm_before.", "encoder.layer.{}.norm1."),
    ("layers.{}.layernorm_after.", "encoder.layer.{}.norm2."),
    ("layers.{}.", "encoder.layer.{}."),
))  # fmt: skip


def count_layers(tensors: dict[str, torch.Tensor], where: str) -> int:
    """The number of layers by the names of a state dict, which must be those from 0 on."""
    numbers = {int(name.split(".")[1]) for name in tensors if re.match(r"layers\.\d+\.", name)}
    if numbers != set(range(len(numbers))):
        raise InputError(f"{where} lacks layers between the first and the last; it is not whole.")
    return len(numbers)


def build(model_class, config, tensors: dict[str, torch.Tensor], where: str) -> nn.Module:
    """
    A model of ours with the tensors of another.

    Args:
        model_class: Its class.
        config ([`CJepaConfig`]): Its configuration.
        tensors (`dict[str, torch.Tensor]`): Every tensor by our name; position tables may be left out.
        where (`str`): Where they are from, for the sentence.

    Returns:
        A model of that class in evaluation mode.

    Raises:
        InputError: Tensors are missing, too many or of other shapes.
    """
    with torch.device("meta"):  # nothing of the sizes a file claims is made before they are known to be its tensors'
        expected = model_class(config).state_dict()
    missing = [name for name in expected if name not in tensors and not name.endswith(POSITIONS)]
    unknown = [name for name in tensors if name not in expected]
    if missing or unknown:
        raise InputError(
            f"{where} does not fit: missing {some_names(missing)}, not known {some_names(unknown)}; it is not a plain "
            "vision transformer without class token."
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{where} does not fit: {name} has shape {tuple(tensor.shape)}, not {tuple(expected[name].shape)}."
            )
    model = model_class(config)
    # positions are the table that ours computes, which that of a file may be rounded from
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(POSITIONS)}
    model.load_state_dict(weights, strict=False)
    return model.eval()


def has_fixed_positions(grid_size: tuple[int, int], table: torch.Tensor) -> bool:
    """
    Whether positions are the fixed 2-D sin-cos table, which ours computes for any grid; they may have been rounded.

    Args:
        grid_size (`(rows, columns)`): Patches of an image.
        table (`torch.Tensor` of shape `(1, N, D)`): Their positions.
    """
    if table.ndim != 3 or table.shape[:2] != (1, grid_size[0] * grid_size[1]) or table.shape[2] % 4:
        return False
    fixed = sincos_positions(grid_size, table.shape[2]).unsqueeze(0)
    stored = (fixed.to(dtype).float() for dtype in (torch.float32, torch.float16, torch.bfloat16))
    return any(torch.allclose(table.float(), each, atol=1e-4) for each in stored)


def exact_positions(grid_size: tuple[int, int], table: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """
    The fixed table in the place of one that was rounded, so that an image of any size has the positions of one table.

    Args:
        grid_size, table: As of [`has_fixed_positions`], which holds for them.

    Returns:
        `(table, notes)`: In float32, and a sentence where it is another one than was given.
    """
    exact = sincos_positions(grid_size, table.shape[2]).unsqueeze(0)
    note = "Its table of positions was rounded: the exact one takes its place, here and in the check."
    return exact, [] if torch.equal(exact, table.float()) else [note]


def without_prefix(tensors: dict, prefix: str = "module.") -> dict:
    """
    Tensors by their names without a prefix, such as that of DDP.

    Raises:
        InputError: Two of them have the same name then.
    """
    plain = {name.removeprefix(prefix): each for name, each in tensors.items()}
    twice = [name for name in plain if name in tensors and f"{prefix}{name}" in tensors]
    if twice:
        raise InputError(f"There is both {prefix}{twice[0]} and {twice[0]}, of which one is right; remove the other.")
    return plain


def rounding_notes(tensors: dict) -> list[str]:
    """A sentence on numbers that ours has no place for; none where there are none."""
    is_double = any(tensor.dtype == torch.float64 for _, tensor in flat(tensors))
    return [ROUNDED_NOTE] if is_double else []


def some_names(names: list[str]) -> str:
    """A list of names for a sentence, cut where it is long."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
