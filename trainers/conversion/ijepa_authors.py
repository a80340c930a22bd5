"""Checkpoints of the authors' I-JEPA code (facebookresearch/ijepa), in and out.

The file holds the state dicts `encoder` (context encoder), `target_encoder` and `predictor`, with fused qkv
projections and the `module.` prefix of DDP, without which neither their code on several GPUs nor timm reads it. Heads,
activation and layer norm eps are not in it: they are those of the authors' code.
"""

import math
from pathlib import Path

import torch

from modeling_cjepa import CJepaConfig, CJepaForPreTraining, CJepaModel
from modeling_cjepa.configuration_cjepa import pair
from trainers.conversion.checks import Check, Converted, Written, compare, in_float64, random_images
from trainers.conversion.formats import ReadOptions, Source
from trainers.conversion.ijepa_forward import LAYER_NORM_EPS, encode, predict
from trainers.conversion.names import (
    FUSED_ENCODER,
    FUSED_PREDICTOR,
    build,
    count_layers,
    exact_positions,
    has_fixed_positions,
    without_prefix,
)
from trainers.conversion.transformers_models import predictor_heads
from trainers.conversion.weight_files import read_weight_file
from trainers.errors import InputError, first_line

# width of the authors' vision transformers -> attention heads (tiny, small, base, large, huge, giant)
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
_ENCODERS = {"target": "target_encoder", "context": "encoder"}
_POSITIONS = {"pos_embed", "predictor_pos_embed"}
_IMAGE_SIZE = 224
# what the constructors of the authors' code build; ViT-g's MLPs are wider
_CHANNELS, _MLP_RATIO, _MLP_RATIOS = 3, 4, {1408: 48 / 11}


def holds_authors(tensors: dict) -> bool:
    """Whether a file's tensors are in this layout: the three state dicts, or an encoder alone."""
    named = [tensors, *(part for part in tensors.values() if isinstance(part, dict))]
    return any("patch_embed.proj.weight" in (name.removeprefix("module.") for name in part) for part in named)


def read_authors(source: Source, options: ReadOptions) -> Converted:
    """
    Reads a checkpoint of the authors and compares it with a forward pass written out from its tensors.

    Args:
        source ([`Source`]): The file and its tensors.
        options ([`ReadOptions`]): `encoder` counts where the file has no predictor.

    Returns:
        [`Converted`]: [`CJepaForPreTraining`] with context encoder, target encoder and predictor; [`CJepaModel`] where
        the file has no predictor.

    Raises:
        InputError: As [`from_ijepa_checkpoint`], or the comparison fails.
    """
    state = source.tensors
    if "encoder" not in state and "target_encoder" not in state:
        if options.encoder == "context":
            raise InputError(
                f"--encoder context: {source.name} has one encoder, which is read as target; leave it out."
            )
        state = {"target_encoder": state, "encoder": state}
    state, notes = _known_parts(state)
    asked = (options.image_size, options.num_attention_heads, options.heads_by_width)
    if "predictor" in state:
        model = from_ijepa_checkpoint(state, *asked)
    else:
        part = _ENCODERS[options.encoder]
        if part not in state:
            raise InputError(f"{source.name} has no {part!r} (found: {', '.join(state)}); give the other --encoder.")
        model = _from_encoder(state[part], *asked)
        state = {"target_encoder": state[part]}
        notes.append("The file has no predictor, so that this is an encoder alone; a predictor starts anew.")
    notes += _put_exact_positions(state, model.config.grid_size)
    return Converted(model, notes, _check(model, state))


def _known_parts(state: dict) -> tuple[dict[str, dict], list[str]]:
    """Encoders and predictor by plain names, and a sentence on what else there is."""
    others = sorted(set(state) - {*_ENCODERS.values(), "predictor"})
    notes = [f"Beside encoders and predictor there was {', '.join(others)}, which is left out."] if others else []
    return {part: without_prefix(tensors) for part, tensors in state.items() if part not in others}, notes


def _put_exact_positions(state: dict[str, dict], grid_size: tuple[int, int]) -> list[str]:
    """Changes the tables of positions in place; a sentence where one was rounded."""
    notes = []
    for tensors in state.values():
        for name in _POSITIONS & tensors.keys():
            tensors[name], rounded = exact_positions(grid_size, tensors[name])
            notes += rounded
    return notes[:1]


def write_authors(model: CJepaForPreTraining | CJepaModel, processor, path: Path) -> Written:
    """
    Writes a checkpoint that the authors' code, timm and transformers' script of conversion read.

    Args:
        model ([`CJepaForPreTraining`] or [`CJepaModel`]): An encoder alone is written as both encoders.
        processor: Not written; the layout has no place for it.
        path (`Path`): The file to write.

    Returns:
        [`Written`]: The check is of the file, read again, by a forward pass written out from its tensors.

    Raises:
        InputError: The model has what the authors' code has not.
    """
    whole = isinstance(model, CJepaForPreTraining)
    _check_authors_have(model.config, whole)
    parts = {
        "encoder": (FUSED_ENCODER, model.context_encoder if whole else model),
        "predictor": (FUSED_PREDICTOR, model.predictor if whole else None),
        "target_encoder": (FUSED_ENCODER, model.cjepa if whole else model),
    }
    state = {
        part: {f"module.{name}": tensor.contiguous() for name, tensor in table.to_theirs(module.state_dict()).items()}
        for part, (table, module) in parts.items()
        if module is not None
    }
    torch.save(state | {"epoch": 0}, path)
    return Written(_check(model, _known_parts(read_weight_file(path))[0]))


def notes_of_authors(model: CJepaForPreTraining | CJepaModel) -> list[str]:
    """What of a model has no place in the layout."""
    config, notes = model.config, []
    if config.num_attention_heads != PUBLISHED_HEADS.get(config.hidden_size):
        notes.append(
            f"The layout does not say the number of heads: read it with --num_attention_heads "
            f"{config.num_attention_heads}."
        )
    unknown = _beyond_constructors(config, isinstance(model, CJepaForPreTraining))
    if unknown:
        notes.append(
            f"The authors' own constructors have no place for {', '.join(unknown)}: the file is for other readers."
        )
    if isinstance(model, CJepaModel):
        notes.append("There is no predictor to write; the file holds the encoder as both encoders.")
    elif config.expander_hidden_size:
        notes.append("The expander of the regulariser has no place in the layout and was left out.")
    return notes


def _beyond_constructors(config: CJepaConfig, with_predictor: bool) -> list[str]:
    """Fields in which a model is none of those that the authors' code builds, though it would compute the same."""
    width, predictor_width = config.hidden_size, config.predictor_hidden_size
    built = {
        "qkv_bias": True,
        "num_channels": _CHANNELS,
        "intermediate_size": int(width * _MLP_RATIOS.get(width, _MLP_RATIO)),
    }
    if with_predictor:
        built["predictor_intermediate_size"] = _MLP_RATIO * predictor_width
    fields = {name: getattr(config, name) for name in built}
    return [f"{name}={value}" for name, value in fields.items() if value != built[name]]


def from_ijepa_checkpoint(
    state: dict[str, dict[str, torch.Tensor]],
    image_size: int | None = None,
    num_attention_heads: int | None = None,
    heads_by_width: dict[int, int] | None = None,
) -> CJepaForPreTraining:
    """
    Builds a model from a checkpoint of the authors' I-JEPA code (facebookresearch/ijepa).

    All sizes are read off the tensors. The VICReg weights are the defaults; the layer norms have eps 1e-6, as in the
    authors' code.

    Args:
        state (`dict`): The loaded checkpoint: `encoder`, `target_encoder` and `predictor`, each a state dict with
            fused qkv; keys may carry the `module.` prefix of DDP.
        image_size (`int`, *optional*): Pixels of a training image's side; as the positions say when not given.
        num_attention_heads (`int`, *optional*): Heads of encoder and predictor; needed where the encoder's width is
            none of the published ones.
        heads_by_width (`dict[int, int]`, *optional*): The same for encoders of these widths, if not published.

    Returns:
        [`CJepaForPreTraining`] with context encoder, target encoder and predictor.

    Raises:
        InputError: A part or a tensor is missing, there are tensors too many, or the sizes do not fit.
    """
    for part in ("encoder", "target_encoder", "predictor"):
        if not isinstance(state.get(part), dict):
            raise InputError(f"The checkpoint has no {part!r} (found: {', '.join(state)}); it is not I-JEPA's layout.")
    context, target, predictor = (_rename(state[part]) for part in ("encoder", "target_encoder", "predictor"))
    config = _read_config(target, image_size, num_attention_heads, heads_by_width, predictor)
    _check_positions(target.get("embeddings.position_embeddings"), config.grid_size, "target_encoder.pos_embed")
    _check_positions(context.get("embeddings.position_embeddings"), config.grid_size, "encoder.pos_embed")
    _check_positions(predictor.get("position_embeddings"), config.grid_size, "predictor.predictor_pos_embed")
    tensors = {
        f"{prefix}.{name}": tensor
        for prefix, part in (("cjepa", target), ("context_encoder", context), ("predictor", predictor))
        for name, tensor in part.items()
    }
    return build(CJepaForPreTraining, config, tensors, "The checkpoint")


def _from_encoder(tensors, image_size, num_attention_heads, heads_by_width) -> CJepaModel:
    tensors = _rename(tensors)
    config = _read_config(tensors, image_size, num_attention_heads, heads_by_width)
    _check_positions(tensors.get("embeddings.position_embeddings"), config.grid_size, "pos_embed")
    return build(CJepaModel, config, tensors, "The checkpoint")


def _rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' names in ours, those of encoder or predictor, the fused qkv projections split in three."""
    tensors = without_prefix(tensors)
    table = FUSED_PREDICTOR if any(name.startswith("predictor_") for name in tensors) else FUSED_ENCODER
    return table.to_ours(tensors)


def _read_config(tensors, image_size, num_attention_heads, heads_by_width, predictor=None) -> CJepaConfig:
    try:
        projection = tensors["embeddings.patch_embeddings.projection.weight"]
        sizes = {"intermediate_size": len(tensors["layers.0.mlp.fc1.weight"])}
        if predictor is not None:
            sizes["predictor_hidden_size"] = len(predictor["input_projection.weight"])
            sizes["predictor_intermediate_size"] = len(predictor["layers.0.mlp.fc1.weight"])
            sizes["predictor_num_hidden_layers"] = count_layers(predictor, "The checkpoint's predictor")
        width, channels, height, patch_width = projection.shape
    except KeyError as error:
        raise InputError(f"The checkpoint has no tensor for {error}; it is not I-JEPA's layout.") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"The checkpoint has weights of other shapes ({first_line(error)}).") from error
    heads = num_attention_heads or ((heads_by_width or {}) | PUBLISHED_HEADS).get(width)
    if heads is None:
        raise InputError(f"Width {width} is none of the published ones; say num_attention_heads.")
    positions = tensors.get("embeddings.position_embeddings")
    if image_size is None:
        image_size = _IMAGE_SIZE if positions is None else _image_size(positions, (height, patch_width))
    if predictor is None:
        sizes |= predictor_heads(heads)
    try:
        return CJepaConfig(
            hidden_size=width,
            num_hidden_layers=count_layers(tensors, "The checkpoint"),
            num_attention_heads=heads,
            image_size=image_size,
            patch_size=height if height == patch_width else [height, patch_width],
            num_channels=channels,
            qkv_bias="layers.0.attention.q_proj.bias" in tensors,
            layer_norm_eps=LAYER_NORM_EPS,
            **sizes,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"The checkpoint's sizes make no model ({first_line(error)}).") from error


def _image_size(positions: torch.Tensor, patch_size: tuple[int, int]) -> int | list[int]:
    """Pixels of the square grid of patches that a table is of."""
    side = math.isqrt(positions.shape[1]) if positions.ndim == 3 else 0
    if side < 1 or side * side != positions.shape[1]:
        raise InputError(f"pos_embed has shape {tuple(positions.shape)}, which is no table of a square grid.")
    height, width = (side * size for size in patch_size)
    return height if height == width else [height, width]


def _check_positions(table: torch.Tensor | None, grid_size: tuple[int, int], name: str):
    """The model computes its positions: the checkpoint's must be the same fixed table of the same grid."""
    if table is None:
        return
    num_patches = grid_size[0] * grid_size[1]
    if table.ndim != 3 or table.shape[:2] != (1, num_patches) or table.shape[2] % 4:
        raise InputError(
            f"{name} has shape {tuple(table.shape)}, not {num_patches} positions, those of the {grid_size[0]}x"
            f"{grid_size[1]} grid of image_size; give the image_size the checkpoint was trained with."
        )
    if not has_fixed_positions(grid_size, table):
        raise InputError(f"{name} is not the fixed 2-D sin-cos table of I-JEPA; learned positions are not supported.")


def _check_authors_have(config: CJepaConfig, with_predictor: bool):
    """Refuses what the authors' code computes otherwise, and what its layout cannot say."""
    fixed = {"hidden_act": "gelu", "layer_norm_eps": LAYER_NORM_EPS}
    if with_predictor and config.predictor_num_attention_heads != config.num_attention_heads:
        raise InputError(
            f"predictor_num_attention_heads={config.predictor_num_attention_heads}: the authors' code has "
            f"{config.num_attention_heads}, as in the encoder; leave the predictor out by --encoder target."
        )
    if with_predictor and config.predictor_attention != "per_block":
        raise InputError(
            f"predictor_attention={config.predictor_attention}: the authors' predictor computes another function of "
            "these weights; leave it out by --encoder target."
        )
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise InputError(f"{name}={getattr(config, name)!r}: the authors' code has {value!r}; use another --to.")
    for name in ("image_size", "patch_size"):
        height, width = pair(getattr(config, name))
        if height != width:
            raise InputError(f"{name} is {height}x{width}: the authors' code reads squares alone; use another --to.")


@torch.no_grad()
def _check(model: CJepaForPreTraining | CJepaModel, state: dict) -> Check:
    """Compares a model with the forward pass of the authors' tensors, under their own names without prefix."""
    images, config = random_images(model.config, dtype=torch.float64), model.config
    heads, whole = config.num_attention_heads, isinstance(model, CJepaForPreTraining)
    encoder = model.cjepa if whole else model
    with in_float64(encoder):
        ours = [encoder(images).last_hidden_state]
    theirs = [encode(state["target_encoder"], images, heads, config.grid_size)]
    if whole:
        num_patches = ours[0].shape[1]
        order = torch.rand(len(images), num_patches, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
        seen, hidden = order[:, : (num_patches + 1) // 2], order[:, None, num_patches // 2 :]
        with in_float64(model.context_encoder):
            context = model.context_encoder(images, seen).last_hidden_state
        with in_float64(model.predictor):
            ours += [context, model.predictor(context, seen, hidden, config.grid_size)]
        tokens = encode(state["encoder"], images, heads, config.grid_size, seen)
        theirs += [tokens, predict(state["predictor"], tokens, heads, config.grid_size, seen, hidden)]
    parts = "both encoders and predictor" if whole else "the encoder"
    return compare(f"the authors' forward pass, written out, of {parts} on 2 random images", ours, theirs)
