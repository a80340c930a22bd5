"""What the C-JEPA models give.

Shapes: B images or views, V views of an image, R mask sets of one, N patches, Nc encoded patches, M target blocks, K
patches a block, D width.
"""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput


@dataclass
class CJepaModelOutput(BaseModelOutputWithPooling):
    """
    Output of [`CJepaModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, N or Nc, D)`): The chosen level's tokens after its final norm.
        pooler_output (`torch.Tensor` of shape `(B, D)`): Their mean.
        hidden_states (`tuple` of `torch.Tensor`, *optional*): The input of the first layer and the output of each; in
            a stack the last tokens of each level up to the chosen one.
        attentions (`tuple` of `torch.Tensor` of shape `(B, heads, N, N)`, *optional*): Those of the chosen level.
        level_embeddings (`tuple` of `torch.Tensor` of shape `(B, D)`): The mean token of each level up to the chosen.
    """

    level_embeddings: tuple[torch.Tensor, ...] | None = None


@dataclass
class CJepaForPreTrainingOutput(ModelOutput):
    """
    Output of [`CJepaForPreTraining`].

    Args:
        loss (`torch.Tensor`, scalar): prediction + regularizer_weight * weighted VICReg terms, summed over levels by
            their weights.
        loss_terms (`dict[str, torch.Tensor]`): Detached, unweighted `prediction`, `invariance`, `variance`,
            `covariance` of level 0, `level1_prediction` and so on of those above.
        predictions (`torch.Tensor` of shape `(B * R, M, K, D)`): The predictor's output at level 0.
        targets (`torch.Tensor` of shape `(B * R, M, K, D)`): The target encoder's normalised tokens at level 0.
        level_embeddings (`tuple` of `torch.Tensor` of shape `(B, D)`): The target encoder's mean token of each image,
            level by level.
        context_ids (`torch.Tensor` of shape `(B * R, Nc)`): Positions of the context used, on the top level's grid.
        target_ids (`torch.Tensor` of shape `(B * R, M, K)`): Positions of the targets used, on the top level's grid.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, N, D)`, *optional*): The target encoder's.
        attentions (`tuple` of `torch.Tensor` of shape `(B, heads, N, N)`, *optional*): The target encoder's.
        level_views (`tuple` of `torch.Tensor` of shape `(B / V, V * R * M, D)`): The mean prediction of each target
            block, detached, level by level, of all V views of an image together.
        signs (`dict[str, torch.Tensor]`): Detached scalars that tell of collapse, of
            [`~signs_cjepa.masked_signs`], named as the loss terms.
    """

    loss: torch.Tensor | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    predictions: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    level_embeddings: tuple[torch.Tensor, ...] | None = None
    context_ids: torch.Tensor | None = None
    target_ids: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    level_views: tuple[torch.Tensor, ...] | None = None
    signs: dict[str, torch.Tensor] | None = None
