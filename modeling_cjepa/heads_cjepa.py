"""Heads on the encoder: the regulariser's expander in pre-training, and the attentive pooling of classifiers.

Shapes: B images, N tokens, D width.
"""

import torch
from torch import nn
from transformers import initialization as init


class CJepaExpander(nn.Sequential):
    """
    VICReg's expander: linear layers with batch norm and ReLU after all but the last, which has no bias.

    Args:
        in_features (`int`): Width D of an embedding.
        sizes (`list[int]`): Widths of the linear layers' outputs; VICReg has three alike.
    """

    def __init__(self, in_features: int, sizes: list[int]):
        layers = []
        for size in sizes[:-1]:
            layers += [nn.Linear(in_features, size), nn.BatchNorm1d(size), nn.ReLU()]
            in_features = size
        super().__init__(*layers, nn.Linear(in_features, sizes[-1], bias=False))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Expands embeddings (B, D) to (B, E) in the weights' precision; returns float32."""
        return super().forward(embeddings.to(self[0].weight.dtype)).float()


class CJepaAttentivePooling(nn.Module):
    """
    One embedding an image from all of its tokens: a learned query attends to them, then an MLP, both residual.

    The pooling of the attentive probe (V-JEPA, arXiv 2404.08471), for tokens that have no class token among them.

    Args:
        width (`int`): Features D of the embedding.
        num_heads (`int`): Attention heads; a divisor of `width`.
        eps (`float`): Of the norms.
        token_width (`int`, *optional*): Features T of a token; as many as D when not given.
    """

    def __init__(self, width: int, num_heads: int, eps: float = 1e-6, token_width: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        token_width = token_width or width
        self.layernorm_tokens = nn.LayerNorm(token_width, eps=eps)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(token_width, width, bias=False)  # one would add the same to every token's logit
        self.v_proj = nn.Linear(token_width, width)
        self.o_proj = nn.Linear(width, width)
        self.layernorm_mlp = nn.LayerNorm(width, eps=eps)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def init_query(self, std: float):
        """Draws the query, which is no module's of its own, from a truncated normal distribution."""
        init.trunc_normal_(self.query, mean=0.0, std=std)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Pools tokens (B, N, T) to embeddings (B, D)."""
        tokens = self.layernorm_tokens(tokens)
        by_head = (self.num_heads, -1)
        # One query meets all tokens, so that it is projected back to their features, instead of them to keys, and
        # values are projected once pooled: the same numbers, without products of N x T x D.
        query = self.q_proj(self.query).view(by_head)  # (H, D / H)
        asked = torch.einsum("hc,hct->ht", query, self.k_proj.weight.unflatten(0, by_head))
        attention = (tokens @ asked.T * query.shape[1] ** -0.5).softmax(dim=1)  # (B, N, H)
        pooled = attention.transpose(1, 2) @ tokens  # (B, H, T)
        values = torch.einsum("bht,hct->bhc", pooled, self.v_proj.weight.unflatten(0, by_head))
        attended = values.flatten(1) + self.v_proj.bias
        pooled = self.query[0] + self.o_proj(attended)
        return pooled + self.fc2(nn.functional.gelu(self.fc1(self.layernorm_mlp(pooled))))
