"""Ways in from other I-JEPA checkpoints: the authors' layout to [`CJepaForPreTraining`]."""

import re

import torch

from modeling_cjepa import CJepaConfig, CJepaForPreTraining
from modeling_cjepa.encoders_cjepa import sincos_positions
from trainers.errors import InputError

# width of the authors' vision transformers -> attention heads (tiny, small, base, large, huge, giant)
PUBLISHED_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}

_LAYER_NAMES = (
    (r"^(?:predictor_)?blocks\.(\d+)\.", r"layers.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"^(?:predictor_)?norm\.", "layernorm."),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^predictor_pos_embed$", "position_embeddings"),
    (r"^predictor_embed\.", "input_projection."),
    (r"^predictor_proj\.", "output_projection."),
)


def from_ijepa_checkpoint(
    state: dict[str, dict[str, torch.Tensor]], image_size: int = 224, num_attention_heads: int | None = None
) -> CJepaForPreTraining:
    """
    Builds a model from a checkpoint of the authors' I-JEPA code (facebookresearch/ijepa).

    All sizes are read off the tensors. The VICReg weights are the defaults; the layer norms have eps 1e-6, as in the
    authors' code.

    Args:
        state (`dict`): The loaded checkpoint: `encoder`, `target_encoder` and `predictor`, each a state dict with
            fused qkv; keys may carry the `module.` prefix of DDP.
        image_size (`int`): Pixels of a training image's side.
        num_attention_heads (`int`, *optional*): Heads of encoder and predictor; needed where the encoder's width is
            none of the published ones.

    Returns:
        [`CJepaForPreTraining`] with context encoder, target encoder and predictor.

    Raises:
        InputError: A part or a tensor is missing, there are tensors too many, or the sizes do not fit.
    """
    for part in ("encoder", "target_encoder", "predictor"):
        if part not in state:
            raise InputError(f"The checkpoint has no {part!r} (found: {', '.join(state)}); it is not I-JEPA's layout.")
    context, target, predictor = (_rename(state[part]) for part in ("encoder", "target_encoder", "predictor"))
    config = _read_config(target, predictor, image_size, num_attention_heads)
    _check_positions(target.get("embeddings.position_embeddings"), config.grid_size, "target_encoder.pos_embed")
    _check_positions(predictor.get("position_embeddings"), config.grid_size, "predictor.predictor_pos_embed")
    model = CJepaForPreTraining(config)
    for part, module, tensors in (
        ("encoder", model.context_encoder, context),
        ("target_encoder", model.cjepa, target),
        ("predictor", model.predictor, predictor),
    ):
        missing, unexpected = module.load_state_dict(tensors, strict=False)
        if missing or unexpected:
            raise InputError(
                f"The checkpoint's {part!r} does not fit: missing {missing or 'nothing'}, not known "
                f"{unexpected or 'nothing'}; it is not a plain I-JEPA vision transformer."
            )
    return model.eval()


def _rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The authors' names in ours, the fused qkv projections split in three."""
    renamed = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("module.")
        for pattern, replacement in _LAYER_NAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.{projection}.")] = part.clone()
        else:
            renamed[name] = tensor
    return renamed


def _read_config(target, predictor, image_size, num_attention_heads) -> CJepaConfig:
    try:
        projection = target["embeddings.patch_embeddings.projection.weight"]
        intermediate_size = target["layers.0.mlp.fc1.weight"].shape[0]
        predictor_width = predictor["input_projection.weight"].shape[0]
        predictor_intermediate_size = predictor["layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise InputError(f"The checkpoint has no tensor for {error}; it is not I-JEPA's layout.") from error
    width, channels, patch_height, patch_width = projection.shape
    heads = num_attention_heads or PUBLISHED_HEADS.get(width)
    if heads is None:
        raise InputError(f"Width {width} is none of the published ones; say num_attention_heads.")
    return CJepaConfig(
        hidden_size=width,
        num_hidden_layers=_num_layers(target),
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        image_size=image_size,
        patch_size=patch_height if patch_height == patch_width else [patch_height, patch_width],
        num_channels=channels,
        qkv_bias="layers.0.attention.q_proj.bias" in target,
        predictor_hidden_size=predictor_width,
        predictor_num_hidden_layers=_num_layers(predictor),
        predictor_intermediate_size=predictor_intermediate_size,
    )


def _num_layers(tensors) -> int:
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))


def _check_positions(table: torch.Tensor | None, grid_size: tuple[int, int], name: str):
    """The model computes its positions: the checkpoint's must be the same fixed table of the same grid."""
    if table is None:
        return
    num_patches = grid_size[0] * grid_size[1]
    if table.shape[1] != num_patches:
        raise InputError(
            f"{name} has {table.shape[1]} positions, image_size makes a {grid_size[0]}x{grid_size[1]} grid of "
            f"{num_patches}; give the image_size the checkpoint was trained with."
        )
    if not torch.allclose(table[0].float(), sincos_positions(grid_size, table.shape[-1]), atol=1e-4):
        raise InputError(f"{name} is not the fixed 2-D sin-cos table of I-JEPA; learned positions are not supported.")
