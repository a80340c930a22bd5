"""Predictors of target blocks: narrow transformers over the context's tokens and one mask token for each position to
predict (I-JEPA, arXiv 2301.08243, section 3).

[`CJepaPredictor`] is I-JEPA's. The others, chosen by `predictor_attention`, are other functions of the same
parameters, which cost less.

Shapes: B images, N positions, Nc context patches, M target blocks, K patches a block, D encoder width, P predictor
width.
"""

import torch
from torch import nn

from .configuration_cjepa import CJepaConfig
from .encoders_cjepa import CJepaLayer, positions_for, sincos_positions
from .losses_cjepa import take


class CJepaFirstPredictorLayer(CJepaLayer):
    """
    A layer over the tokens of every block, projected before they are put together: a context's once an image, though
    every block sees them, and a mask token's once a position, as it is the same in all images.
    """

    def forward(self, context, mask_tokens, target_ids) -> torch.Tensor:
        """
        Puts together the tokens of each block and applies the layer.

        Args:
            context (`torch.Tensor` of shape `(B, Nc, P)`): The context's tokens.
            mask_tokens (`torch.Tensor` of shape `(N, P)`): The mask token at each position.
            target_ids (`torch.Tensor` of shape `(B, M, K)`): The positions to predict.

        Returns:
            `torch.Tensor` of shape `(B * M, Nc + K, P)`.
        """

        def together(of_context, of_positions):
            of_context = of_context.unsqueeze(1).expand(-1, target_ids.shape[1], -1, -1)
            return torch.cat([of_context, nn.functional.embedding(target_ids, of_positions)], dim=2).flatten(0, 1)

        normed = self.layernorm_before(context), self.layernorm_before(mask_tokens)
        projections = self.attention.q_proj, self.attention.k_proj, self.attention.v_proj
        projected = [together(*map(projection, normed)) for projection in projections]
        attended, _ = self.attention.attend(*projected)
        return self.add_branches(together(context, mask_tokens), attended)


class CJepaSharedContextLayer(CJepaLayer):
    """A layer in which context tokens attend to the context, and a block's tokens to the context and to the block."""

    def forward(self, hidden_states, block_shape: tuple[int, int], only_blocks: bool = False) -> torch.Tensor:
        """
        Applies the layer to all blocks of an image at once.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, Nc + M * K, P)`): Tokens of the context, then of the blocks.
            block_shape (`(M, K)`): How many blocks, and tokens of each.
            only_blocks (`bool`): Whether no context token is read any more, and so none is computed.

        Returns:
            `torch.Tensor` of the same shape, or of `(B, M * K, P)`.
        """
        num_context = hidden_states.shape[1] - block_shape[0] * block_shape[1]
        first_query = num_context if only_blocks else 0
        normed = self.layernorm_before(hidden_states)
        query = self.attention.q_proj(normed[:, first_query:])
        keys_and_values = self.attention.k_proj(normed), self.attention.v_proj(normed)

        def of_blocks(tokens):
            return tokens.unflatten(1, block_shape).flatten(0, 1)

        def seen_by_blocks(tokens):
            context = tokens[:, None, :num_context].expand(-1, block_shape[0], -1, -1)
            return torch.cat([context, tokens[:, num_context:].unflatten(1, block_shape)], dim=2).flatten(0, 1)

        attended, _ = self.attention.attend(
            of_blocks(query[:, num_context - first_query :]), *map(seen_by_blocks, keys_and_values)
        )
        attended = attended.unflatten(0, (-1, block_shape[0])).flatten(1, 2)
        if not only_blocks:
            of_context, _ = self.attention.attend(
                query[:, :num_context], *(tokens[:, :num_context] for tokens in keys_and_values)
            )
            attended = torch.cat([of_context, attended], dim=1)
        return self.add_branches(hidden_states[:, first_query:], attended)


class CJepaPredictor(nn.Module):
    """
    I-JEPA's predictor.

    Every target block is predicted on its own: blocks are folded into the batch and never see each other.

    Args:
        config ([`CJepaConfig`]): Its configuration.
    """

    first_layer_class, layer_class = CJepaFirstPredictorLayer, CJepaLayer
    _no_split_modules = ["CJepaFirstPredictorLayer"]

    def __init__(self, config: CJepaConfig):
        super().__init__()
        width = config.predictor_hidden_size
        self.config = config
        self.input_projection = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("position_embeddings", sincos_positions(config.grid_size, width).unsqueeze(0))
        classes = [self.first_layer_class] + [self.layer_class] * (config.predictor_num_hidden_layers - 1)
        self.layers = nn.ModuleList(
            layer(config, width, config.predictor_num_attention_heads, config.predictor_intermediate_size)
            for layer in classes
        )
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.output_projection = nn.Linear(width, config.hidden_size)

    def forward(self, context, context_ids, target_ids, grid_size: tuple[int, int]) -> torch.Tensor:
        """
        Predicts the target encoder's tokens.

        Args:
            context (`torch.Tensor` of shape `(B, Nc, D)`): The context encoder's tokens.
            context_ids (`torch.Tensor` of shape `(B, Nc)`): Their positions.
            target_ids (`torch.Tensor` of shape `(B, M, K)`): The positions to predict.
            grid_size (`(rows, columns)`): The grid both count in.

        Returns:
            `torch.Tensor` of shape `(B, M, K, D)`.
        """
        context = self.input_projection(context)
        positions = positions_for(grid_size, self.config.grid_size, self.position_embeddings).to(context.dtype)
        context = context + take(positions.expand(len(context), -1, -1), context_ids)
        mask_tokens = (self.mask_token + positions)[0].to(context.dtype)
        tokens = self.apply_layers(context, mask_tokens, target_ids)
        return self.output_projection(self.layernorm(tokens)).view(*target_ids.shape, -1)

    def apply_layers(self, context, mask_tokens, target_ids) -> torch.Tensor:
        """Context (B, Nc, P), mask tokens of all positions (N, P) and `target_ids` to the blocks' tokens."""
        num_context, (first, *others) = context.shape[1], self.layers
        tokens = first(context, mask_tokens, target_ids)
        for layer in others[:-1]:
            tokens = layer(tokens)
        # of the last layer no context token is read
        return others[-1](tokens, num_context) if others else tokens[:, num_context:]


class CJepaSharedContextPredictor(CJepaPredictor):
    """
    A predictor whose context does not see the mask tokens, so that it is computed once for all blocks of an image.

    Blocks see the context and themselves, as in I-JEPA, where the context sees the block, too, and so is another one
    for every block.
    """

    first_layer_class = layer_class = CJepaSharedContextLayer
    _no_split_modules = ["CJepaSharedContextLayer"]

    def apply_layers(self, context, mask_tokens, target_ids) -> torch.Tensor:
        blocks = nn.functional.embedding(target_ids.flatten(1), mask_tokens)
        tokens, block_shape = torch.cat([context, blocks], dim=1), tuple(target_ids.shape[1:])
        for layer in self.layers[:-1]:
            tokens = layer(tokens, block_shape)
        return self.layers[-1](tokens, block_shape, only_blocks=True)


PREDICTORS = {"per_block": CJepaPredictor, "shared_context": CJepaSharedContextPredictor}
