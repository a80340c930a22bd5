"""The vision transformer of C-JEPA: patch embeddings, fixed 2-D sin-cos positions, pre-norm layers.

Module and parameter names are those of transformers' `IJepaModel`, so that its state dict loads as it is.
Shapes: B images, C channels, N patches, Nc kept patches, D width.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_cjepa import CJepaConfig
from .losses_cjepa import take
from .stems_cjepa import CJepaStemConv, build_stem


def sincos_positions(grid_size: tuple[int, int], width: int) -> torch.Tensor:
    """
    Fixed 2-D sin-cos position embeddings, as in the authors' code: the first half of the features encodes the column,
    the second the row, each as sines then cosines of position / 10000^(i / (width / 4)).

    Args:
        grid_size (`(rows, columns)`): Patches of the image.
        width (`int`): Features; a multiple of 4.

    Returns:
        `torch.Tensor` of shape `(rows * columns, width)`, float32 on the CPU.
    """
    # the device is named because models are built under the meta device by `from_pretrained`
    row, column = (torch.arange(size, dtype=torch.float64, device="cpu") for size in grid_size)
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device="cpu") / (width // 4))
    row, column = torch.meshgrid(row, column, indexing="ij")
    angles = [axis.flatten().unsqueeze(1) * frequency for axis in (column, row)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


def positions_for(grid_size: tuple[int, int], stored_grid_size: tuple[int, int], table: torch.Tensor) -> torch.Tensor:
    """Positions (1, N, D) of a grid: the stored table of its own grid, a computed one of any other."""
    # `torch.export` would bind a graph of any image size to the branch that its example took
    if not torch.compiler.is_exporting() and grid_size == stored_grid_size:
        return table
    return sincos_positions(grid_size, table.shape[-1]).unsqueeze(0).to(table)


def forget_other_grids(model: nn.Module, mismatched_keys: set[tuple]):
    """Takes position tables of another image size off a loading report: the model has computed its own."""
    tables = [key for key in mismatched_keys if key[0].rpartition(".")[2] == "position_embeddings"]
    mismatched_keys.difference_update(key for key in tables if key[0] in dict(model.named_buffers()))


def drop_path(branch: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """
    Stochastic depth (arXiv 1603.09382): the branch of some images becomes zero, that of the others is scaled so that
    the mean stays.

    Args:
        branch (`torch.Tensor` of shape `(B, N, D)`): What is added to the residual stream.
        rate (`float`): Share of images that lose it, in [0, 1).
        training (`bool`): Nothing is dropped otherwise.
    """
    if rate == 0 or not training:
        return branch
    kept = branch.new_empty(len(branch), 1, 1).bernoulli_(1 - rate)
    return branch * kept / (1 - rate)


class CJepaEmbeddings(nn.Module):
    """Patch embeddings plus positions: the stored table for the configured grid, a computed one for any other."""

    def __init__(self, config: CJepaConfig):
        super().__init__()
        self.config = config
        self.patch_embeddings = build_stem(config)
        table = sincos_positions(config.grid_size, config.hidden_size).unsqueeze(0)
        self.register_buffer("position_embeddings", table)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, patch_ids: torch.Tensor | None = None) -> torch.Tensor:
        grid_size = self.patch_embeddings.grid_size(pixel_values)
        positions = positions_for(grid_size, self.config.grid_size, self.position_embeddings)
        if patch_ids is not None:
            positions = take(positions.expand(patch_ids.shape[0], -1, -1), patch_ids)
        embeddings = self.patch_embeddings(pixel_values, patch_ids) + positions
        # the table stays float32 in a model loaded in half precision; under autocast the sum shall stay float32 too
        return self.dropout(embeddings.to(self.patch_embeddings.projection.weight.dtype))


def eager_attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention written out, which also returns its weights; the signature is transformers' attention interface."""
    weights = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = weights.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CJepaAttention(nn.Module):
    """Multi-head self-attention through transformers' attention interface."""

    def __init__(self, config: CJepaConfig, width: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = width // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(width, width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, first_query: int = 0, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of tokens (B, N, D) those from `first_query` on ask all: their outputs, and the weights where known."""
        query = self.q_proj(hidden_states[:, first_query:])
        return self.attend(query, self.k_proj(hidden_states), self.v_proj(hidden_states), **kwargs)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What projected tokens (B, n, D) are told by others (B, N, D), as of `forward`."""
        by_head = (tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for tokens in (query, key, value))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        output, weights = attention(self, *by_head, None, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(query.shape)), weights


class CJepaMLP(nn.Module):
    """Two linear layers with an activation between."""

    def __init__(self, config: CJepaConfig, width: int, intermediate_size: int):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(width, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class CJepaLayer(GradientCheckpointingLayer):
    """Pre-norm transformer layer, of the encoder's size or of the predictor's."""

    def __init__(
        self, config: CJepaConfig, width: int, num_heads: int, intermediate_size: int, drop_path_rate: float = 0.0
    ):
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = CJepaAttention(config, width, num_heads)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = CJepaMLP(config, width, intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: torch.Tensor, first_query: int = 0, **kwargs) -> torch.Tensor:
        """Tokens (B, N, D) to those from `first_query` on, which are all that is computed where no other is read."""
        attended, _ = self.attention(self.layernorm_before(hidden_states), first_query, **kwargs)
        return self.add_branches(hidden_states[:, first_query:], attended)

    def add_branches(self, hidden_states: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D) with what attention has told them, and the MLP's branch of both."""
        hidden_states = hidden_states + drop_path(self.dropout(attended), self.drop_path_rate, self.training)
        transformed = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return hidden_states + drop_path(transformed, self.drop_path_rate, self.training)


def init_weights(module: nn.Module, config: CJepaConfig):
    """I-JEPA's initialisation of one module: truncated normals, zero biases, and the fixed position tables."""
    if isinstance(module, CJepaStemConv):
        module.draw_weights()
    elif isinstance(module, nn.Linear | nn.Conv2d):
        init.trunc_normal_(module.weight, mean=0.0, std=config.initializer_range)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, CJepaEmbeddings):
        table = sincos_positions(config.grid_size, config.hidden_size).unsqueeze(0)
        init.copy_(module.position_embeddings, table)
