"""Pre-training by C-JEPA: I-JEPA (arXiv 2301.08243) with VICReg's terms (arXiv 2410.19560).

Shapes: B images, C channels, N patches, Nc context patches, M target blocks, K patches a block, D width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_cjepa import CJepaConfig
from .encoders_cjepa import sincos_positions
from .heads_cjepa import CJepaExpander, CJepaPredictor
from .losses_cjepa import (
    block_vicreg_terms,
    covariance_term,
    gather,
    normalize_targets,
    prediction_loss,
    take,
    variance_term,
    vicreg_terms,
)
from .masking_cjepa import sample_block_masks
from .modeling_cjepa import CJepaModel, CJepaPreTrainedModel


@dataclass
class CJepaForPreTrainingOutput(ModelOutput):
    """
    Output of [`CJepaForPreTraining`].

    Args:
        loss (`torch.Tensor`, scalar): prediction + regularizer_weight * weighted VICReg terms.
        loss_terms (`dict[str, torch.Tensor]`): Detached, unweighted `prediction`, `invariance`, `variance`,
            `covariance`.
        predictions (`torch.Tensor` of shape `(B, M, K, D)`): The predictor's output.
        targets (`torch.Tensor` of shape `(B, M, K, D)`): The target encoder's normalised tokens.
        embeddings (`torch.Tensor` of shape `(B, D)`): The target encoder's mean token of each image.
        context_ids (`torch.Tensor` of shape `(B, Nc)`): Positions of the context used.
        target_ids (`torch.Tensor` of shape `(B, M, K)`): Positions of the targets used.
        hidden_states (`tuple` of `torch.Tensor` of shape `(B, N, D)`, *optional*): The target encoder's.
        attentions (`tuple` of `torch.Tensor` of shape `(B, heads, N, N)`, *optional*): The target encoder's.
    """

    loss: torch.Tensor | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    predictions: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    embeddings: torch.Tensor | None = None
    context_ids: torch.Tensor | None = None
    target_ids: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class CJepaForPreTraining(CJepaPreTrainedModel):
    """
    Context encoder, target encoder (`cjepa`, a moving average of the former) and predictor, with the C-JEPA loss.

    The loss gives no gradient to the target encoder: call [`~CJepaForPreTraining.update_target_encoder`] after each
    optimizer step (`CJepaTrainer` does, and `trainers.callbacks.TargetUpdateCallback(0.996)` makes any Trainer do it).

    Args:
        config ([`CJepaConfig`]): Its configuration.
    """

    # forward takes no `num_items_in_batch`: Trainer shall divide the loss by the accumulation steps
    accepts_loss_kwargs = False

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        self.cjepa = CJepaModel(config)
        self.context_encoder = CJepaModel(config)
        self.predictor = CJepaPredictor(config)
        width = config.expander_hidden_size
        has_expander = width is not None and config.regularizer_weight > 0
        self.expander = CJepaExpander(config.hidden_size, width) if has_expander else nn.Identity()
        self.post_init()
        self._copy_target_to_context()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, CJepaPredictor):
            init.trunc_normal_(module.mask_token, mean=0.0, std=self.config.initializer_range)
            table = sincos_positions(self.config.grid_size, self.config.predictor_hidden_size)
            init.copy_(module.position_embeddings, table.unsqueeze(0))

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers; from a checkpoint that holds an encoder only, both encoders start from it."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        contexts = {f"context_encoder.{name}" for name in model.context_encoder.state_dict()}
        if contexts <= set(info["missing_keys"]):
            model._copy_target_to_context()
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _copy_target_to_context(self):
        # positions included: those of a loaded encoder need not be the sines and cosines
        contexts, targets = self.context_encoder.state_dict(), self.cjepa.state_dict()
        for name, target in targets.items():
            contexts[name].copy_(target)

    def tie_weights(self, *args, **kwargs):
        # the last call of both construction and `from_pretrained`, which makes every parameter trainable again
        result = super().tie_weights(*args, **kwargs)
        self.cjepa.requires_grad_(False)
        self.cjepa.eval()
        return result

    def train(self, mode: bool = True):
        """Sets training mode for all but the target encoder, which stays in evaluation mode."""
        super().train(mode)
        self.cjepa.eval()
        return self

    @torch.no_grad()
    def update_target_encoder(self, momentum: float):
        """
        Moves the target encoder towards the context encoder: target = momentum * target + (1 - momentum) * context.

        Args:
            momentum (`float`): Share of the old target that is kept, in [0, 1].
        """
        targets, contexts = list(self.cjepa.parameters()), list(self.context_encoder.parameters())
        torch._foreach_lerp_(targets, contexts, 1 - momentum)

    def sample_masks(self, batch_size: int, grid_size=None, generator=None, device=None):
        """
        Draws masks of the configured geometry, see [`~masking_cjepa.sample_block_masks`].

        Args:
            batch_size (`int`): Number of images B.
            grid_size (`(rows, columns)`, *optional*): The configured image's grid when not given.
            generator (`torch.Generator`, *optional*): The source of randomness.
            device (`torch.device`, *optional*): Where the masks go.

        Returns:
            `context_ids` (B, Nc) and `target_ids` (B, M, K).
        """
        config = self.config
        return sample_block_masks(
            batch_size,
            config.grid_size if grid_size is None else grid_size,
            num_target_blocks=config.num_target_blocks,
            target_scale=config.target_scale,
            target_aspect_ratio=config.target_aspect_ratio,
            context_scale=config.context_scale,
            min_context_patches=config.min_context_patches,
            generator=generator,
            device=device,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        context_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        regularizer_weight: float | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CJepaForPreTrainingOutput:
        """
        Predicts the target encoder's tokens of the target blocks from the context.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images.
            context_ids (`torch.Tensor` of shape `(B, Nc)`, *optional*): Integer positions of the context patches.
            target_ids (`torch.Tensor` of shape `(B, M, K)`, *optional*): Integer positions of the target blocks.
                Both masks are drawn on the images' device when neither is given.
            generator (`torch.Generator`, *optional*): Source of the masks' randomness; torch's default otherwise.
            return_loss (`bool`): Whether to compute the loss.
            regularizer_weight (`float`, *optional*): Of this step, for a schedule; the configuration's when not given.
            output_hidden_states, output_attentions (`bool`, *optional*): Whether to return the target encoder's.

        Returns:
            [`CJepaForPreTrainingOutput`].

        Raises:
            ValueError: One mask was given without the other, or the batch is too small for batch statistics.
        """
        if (context_ids is None) != (target_ids is None):
            raise ValueError("Give both context_ids and target_ids, or neither to have them drawn.")
        for name, ids in (("context_ids", context_ids), ("target_ids", target_ids)):
            if ids is not None and ids.shape[0] != pixel_values.shape[0]:
                raise ValueError(f"{name} has masks of {ids.shape[0]} images, pixel_values {pixel_values.shape[0]}.")
        grid_size = self.cjepa.embeddings.patch_embeddings.grid_size(pixel_values)
        if context_ids is None:
            context_ids, target_ids = self.sample_masks(
                pixel_values.shape[0], grid_size, generator, device=pixel_values.device
            )
        recorded = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        recorded = {name: value for name, value in recorded.items() if value is not None}  # else the configuration's
        with torch.no_grad():
            tokens = self.cjepa(pixel_values, return_dict=True, **recorded)
            targets = take(normalize_targets(tokens.last_hidden_state), target_ids)
        context = self.context_encoder(pixel_values, patch_ids=context_ids, return_dict=True)
        predictions = self.predictor(context.last_hidden_state, context_ids, target_ids, grid_size)
        loss = terms = None
        if return_loss:
            weight = self.config.regularizer_weight if regularizer_weight is None else regularizer_weight
            loss, terms = self._loss(predictions, targets, context.last_hidden_state, weight)
        return CJepaForPreTrainingOutput(
            loss=loss,
            loss_terms=terms,
            predictions=predictions,
            targets=targets,
            embeddings=tokens.pooler_output,
            context_ids=context_ids,
            target_ids=target_ids,
            hidden_states=tokens.hidden_states,
            attentions=tokens.attentions,
        )

    def _loss(self, predictions, targets, context, regularizer_weight):
        """C-JEPA's loss and its detached, unweighted terms (Eq. 21 and 22)."""
        config = self.config
        with torch.autocast(predictions.device.type, enabled=False):
            prediction = prediction_loss(predictions, targets, config.prediction_loss)
            if regularizer_weight == 0:
                with torch.no_grad():
                    terms = self._regularizer_terms(prediction, predictions, context, only_watched=True)
                loss = prediction
            else:
                terms = self._regularizer_terms(prediction, predictions, context)
                weighted = [getattr(config, f"{name}_weight") * term for name, term in terms.items()]
                loss = prediction + regularizer_weight * sum(weighted)
        terms = {"prediction": prediction, **terms}
        return loss, {name: term.detach() for name, term in terms.items()}

    def _regularizer_terms(self, prediction, predictions, context, only_watched=False) -> dict[str, torch.Tensor]:
        """
        VICReg's terms of the global batch in the configured reading: (A) `blocks`, (B) `context`, (C) `pair`.

        The expander reads the gathered batch, so that its batch norm, too, sees all of it. Terms that are only watched
        are left out where one image or one block does not define them.
        """
        blocks = gather(predictions.float().mean(dim=2))  # (B, M, D)
        pooled = gather(context.float().mean(dim=1))
        if only_watched and min(blocks.shape[:2] if self.config.regularizer == "blocks" else pooled.shape[:1]) < 2:
            return {}
        if self.config.regularizer == "blocks":
            return block_vicreg_terms(self.expander(blocks.flatten(0, 1)).unflatten(0, blocks.shape[:2]))
        expanded = self.expander(pooled)
        if self.config.regularizer == "pair":
            return vicreg_terms(expanded, self.expander(blocks.mean(dim=1)))
        return {
            "invariance": prediction,
            "variance": variance_term(expanded),
            "covariance": covariance_term(expanded),
        }
