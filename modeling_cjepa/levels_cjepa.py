"""A level of C-JEPA in pre-training: what it predicts of a batch, and its loss.

Shapes: B images, N patches, Nc context patches, M target blocks, K patches a block, D width.
"""

from typing import NamedTuple

import torch
from torch import nn

from .configuration_cjepa import CJepaConfig
from .losses_cjepa import (
    append_constant,
    batch_covariances,
    block_vicreg_terms,
    count_processes,
    covariance_term,
    gather,
    global_covariances,
    global_vicreg_terms,
    normalize_targets,
    prediction_loss,
    take,
    variance_term,
)
from .predictor_cjepa import CJepaPredictor
from .signs_cjepa import masked_signs


class MaskedLevel(NamedTuple):
    """
    One level's modules and what they read of a batch.

    Args:
        predictor (`CJepaPredictor`): Predicts the target encoder's tokens; its configuration is the level's.
        expander (`nn.Module`): Expands what the regulariser acts on; `nn.Identity` for none.
        context (`torch.Tensor` of shape `(B, Nc, D)`): The context encoder's tokens.
        context_ids (`torch.Tensor` of shape `(B, Nc)`): Their positions.
        target_ids (`torch.Tensor` of shape `(B, M, K)`): The positions to predict.
        grid_size (`(rows, columns)`): The grid both count in.
    """

    predictor: CJepaPredictor
    expander: nn.Module
    context: torch.Tensor
    context_ids: torch.Tensor
    target_ids: torch.Tensor
    grid_size: tuple[int, int]

    @property
    def config(self) -> CJepaConfig:
        return self.predictor.config

    def predict(self) -> torch.Tensor:
        """The predictions (B, M, K, D)."""
        return self.predictor(self.context, self.context_ids, self.target_ids, self.grid_size)

    def targets(self, tokens: torch.Tensor) -> torch.Tensor:
        """What is to be predicted (B, M, K, D) of the target encoder's tokens (B, N, D)."""
        return take(normalize_targets(tokens), self.target_ids)

    def rows(self, predictions: torch.Tensor | None) -> torch.Tensor:
        """
        What the regulariser acts on, (B, G, D) in float32: the mean token of the context (`context`), of all contexts
        of an image (`views`), both of which need no predictions, of each predicted block (`blocks`), or of the context
        and of all blocks (`pair`).
        """
        context = self.context.float().mean(dim=1, keepdim=True)
        if self.config.regularizer == "context":
            return context
        if self.config.regularizer == "views":
            return context.unflatten(0, (-1, self.config.num_views * self.config.num_mask_sets)).squeeze(2)
        blocks = predictions.float().mean(dim=2)
        if self.config.regularizer == "blocks":
            return blocks
        return torch.cat([context, blocks.mean(dim=1, keepdim=True)], dim=1)

    def signs(self, predictions: torch.Tensor, targets: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """The level's signs of collapse, beside the target encoder's tokens (B, N, D) at the context's positions."""
        pairs = self.context, take(tokens, self.context_ids)
        means = (pair.detach().float().mean(dim=1) for pair in pairs)
        return masked_signs(*means, predictions, targets)

    def loss(
        self,
        predictions: torch.Tensor,
        targets: torch.Tensor,
        regularizer_weight: float,
        other_rows: list[torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The level's loss and its unweighted terms, by the rows of other micro-batches, too."""
        prediction = prediction_loss(predictions, targets, self.config.prediction_loss)
        if regularizer_weight == 0:
            with torch.no_grad():
                rows = append_constant(self.rows(predictions), other_rows)
                return prediction, {"prediction": prediction, **self._watched_terms(rows, prediction)}
        terms = self.regularizer_terms(append_constant(self.rows(predictions), other_rows), prediction)
        weighted = [getattr(self.config, f"{name}_weight") * term for name, term in terms.items()]
        return prediction + regularizer_weight * sum(weighted), {"prediction": prediction, **terms}

    def _watched_terms(self, rows, prediction) -> dict[str, torch.Tensor]:
        """The terms without a weight, left out where one image or one block does not define them."""
        has_one = self.config.regularizer in ("blocks", "views") and rows.shape[1] < 2
        if has_one or rows.shape[0] * count_processes() < 2:
            return {}
        return self.regularizer_terms(rows, prediction)

    def regularizer_terms(self, rows, prediction) -> dict[str, torch.Tensor]:
        """
        VICReg's terms of the global batch in the configured reading: (A) `blocks`, (B) `context`, (C) `pair`; or of
        `views`.

        An expander reads the gathered batch, so that its batch norm, too, sees all of it.
        """
        if isinstance(self.expander, nn.Identity):
            covariances_of, terms_of = global_covariances, global_vicreg_terms
        else:
            rows, covariances_of, terms_of = self._expand(gather(rows)), batch_covariances, block_vicreg_terms
        if self.config.regularizer != "context":
            return terms_of(rows)
        covariances = covariances_of(rows)
        return {
            "invariance": prediction,
            "variance": variance_term(covariances),
            "covariance": covariance_term(covariances),
        }

    def _expand(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, G, D) expanded to (B, G, E): all blocks at once, and else each of the G as a batch of its own."""
        if self.config.regularizer == "blocks":
            return self.expander(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        return torch.stack([self.expander(kind) for kind in rows.unbind(dim=1)], dim=1)
