"""The authors' I-JEPA written out from a file's own tensors: no class of ours, so that a mistake in ours shows.

Shapes: B images, N patches, Nc context patches, M target blocks, K patches a block, D width, P predictor width.
"""

import torch
from torch.nn import functional

from modeling_cjepa.encoders_cjepa import sincos_positions

LAYER_NORM_EPS = 1e-6

Tensors = dict[str, torch.Tensor]


def encode(tensors: Tensors, images: torch.Tensor, heads: int, grid_size, ids: torch.Tensor | None = None):
    """
    Encodes images.

    Args:
        tensors (`dict[str, torch.Tensor]`): An encoder's, under the authors' names.
        images (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images.
        heads (`int`): Attention heads.
        grid_size (`(rows, columns)`): Patches, whose positions are computed where the file has none.
        ids (`torch.Tensor` of shape `(B, Nc)`, *optional*): The patches that are seen; all when not given.

    Returns:
        `torch.Tensor` of shape `(B, N or Nc, D)`.
    """
    weight = _like(images, tensors["patch_embed.proj.weight"])
    bias = _like(images, tensors["patch_embed.proj.bias"])
    tokens = functional.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    tokens = tokens + _positions(tensors, "pos_embed", grid_size, tokens)
    if ids is not None:
        tokens = _take(tokens, ids)
    return _norm(tensors, "norm", _blocks(tensors, "blocks", tokens, heads))


def predict(tensors: Tensors, context: torch.Tensor, heads: int, grid_size, seen, hidden) -> torch.Tensor:
    """
    Predicts tokens of the target encoder.

    Args:
        tensors (`dict[str, torch.Tensor]`): The predictor's, under the authors' names.
        context (`torch.Tensor` of shape `(B, Nc, D)`): The context encoder's tokens.
        heads, grid_size: As in [`encode`].
        seen (`torch.Tensor` of shape `(B, Nc)`), hidden (`torch.Tensor` of shape `(B, M, K)`): The positions of the
            context, and those to predict.

    Returns:
        `torch.Tensor` of shape `(B, M, K, D)`.
    """
    tokens = _linear(tensors, "predictor_embed", context)
    positions = _positions(tensors, "predictor_pos_embed", grid_size, tokens).expand(len(tokens), -1, -1)
    queries = _like(tokens, tensors["mask_token"]) + _take(positions, hidden.flatten(1))
    context = (tokens + _take(positions, seen)).unsqueeze(1).expand(-1, hidden.shape[1], -1, -1)
    tokens = torch.cat([context, queries.unflatten(1, hidden.shape[1:])], dim=2).flatten(0, 1)  # (B * M, Nc + K, P)
    tokens = _norm(tensors, "predictor_norm", _blocks(tensors, "predictor_blocks", tokens, heads))
    return _linear(tensors, "predictor_proj", tokens[:, seen.shape[1] :]).unflatten(0, hidden.shape[:2])


def _blocks(tensors: Tensors, prefix: str, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    number = 0
    while f"{prefix}.{number}.norm1.weight" in tensors:
        block = f"{prefix}.{number}"
        tokens = tokens + _attention(tensors, f"{block}.attn", _norm(tensors, f"{block}.norm1", tokens), heads)
        wide = functional.gelu(_linear(tensors, f"{block}.mlp.fc1", _norm(tensors, f"{block}.norm2", tokens)))
        tokens = tokens + _linear(tensors, f"{block}.mlp.fc2", wide)
        number += 1
    return tokens


def _attention(tensors: Tensors, name: str, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    query, key, value = _linear(tensors, f"{name}.qkv", tokens).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return _linear(tensors, f"{name}.proj", (weights @ value).transpose(1, 2).flatten(2))


def _linear(tensors: Tensors, name: str, tokens: torch.Tensor) -> torch.Tensor:
    bias = tensors.get(f"{name}.bias")
    weight = _like(tokens, tensors[f"{name}.weight"])
    return functional.linear(tokens, weight, None if bias is None else _like(tokens, bias))


def _norm(tensors: Tensors, name: str, tokens: torch.Tensor) -> torch.Tensor:
    weight, bias = (_like(tokens, tensors[f"{name}.{part}"]) for part in ("weight", "bias"))
    return functional.layer_norm(tokens, tokens.shape[-1:], weight, bias, LAYER_NORM_EPS)


def _positions(tensors: Tensors, name: str, grid_size, tokens: torch.Tensor) -> torch.Tensor:
    table = tensors.get(name)
    if table is None:
        table = sincos_positions(grid_size, tokens.shape[-1]).unsqueeze(0)
    return _like(tokens, table)


def _like(tokens: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the file, as float32 holds it, in float64 where that is computed in."""
    return tensor.float().to(torch.promote_types(tokens.dtype, torch.float32))


def _take(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return tokens[torch.arange(len(ids)).unsqueeze(1), ids]
