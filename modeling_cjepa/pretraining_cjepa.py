"""Pre-training by C-JEPA: I-JEPA (arXiv 2301.08243) with VICReg's terms (arXiv 2410.19560).

A stack predicts at every level, under masks that lie over each other: they are drawn on the coarsest grid.

Shapes: B images, or views of images where there are several of each, R mask sets of one, C channels, N patches, Nc
context patches, M target blocks, K patches a block, D width. Masks and what is predicted under them have B * R rows,
those of an image side by side.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .configuration_cjepa import CJepaConfig
from .encoders_cjepa import sincos_positions
from .heads_cjepa import CJepaExpander
from .levels_cjepa import MaskedLevel
from .losses_cjepa import level_term
from .masking_cjepa import check_ids, grids_by_level, ids_by_level, sample_block_masks
from .modeling_cjepa import CJepaModel, CJepaPreTrainedModel, combine
from .outputs_cjepa import CJepaForPreTrainingOutput
from .predictor_cjepa import PREDICTORS, CJepaPredictor
from .signs_cjepa import block_means


class CJepaForPreTraining(CJepaPreTrainedModel):
    """
    Context encoder, target encoder (`cjepa`, a moving average of the former) and predictor, with the C-JEPA loss.

    The loss gives no gradient to the target encoder: call [`~CJepaForPreTraining.update_target_encoder`] after each
    optimizer step (`CJepaTrainer` does, and `trainers.callbacks.TargetUpdateCallback(0.996)` makes any Trainer do it).

    Args:
        config ([`CJepaConfig`]): Its configuration.

    Raises:
        ValueError: `stop_gradient` is set of level 0, which has no level below.
    """

    # forward takes no `num_items_in_batch`: Trainer shall divide the loss by the accumulation steps
    accepts_loss_kwargs = False

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        if config.stop_gradient:
            raise ValueError("stop_gradient=True, but level 0 has no level below; set it in an entry of upper_levels.")
        self.cjepa = CJepaModel(config)
        self.context_encoder = CJepaModel(config)
        self.predictor, self.expander = _predictor(config), _expander(config)
        # the very configurations of the encoders, so that a change of the attention reaches the predictors, too
        upper_configs = [upper.config for upper in self.context_encoder.upper_levels]
        self.upper_predictors = nn.ModuleList(_predictor(upper) for upper in upper_configs)
        self.upper_expanders = nn.ModuleList(_expander(upper) for upper in upper_configs)
        self.post_init()
        self._copy_target_to_context()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, CJepaPredictor):
            init.trunc_normal_(module.mask_token, mean=0.0, std=module.config.initializer_range)
            table = sincos_positions(module.config.grid_size, module.config.predictor_hidden_size)
            init.copy_(module.position_embeddings, table.unsqueeze(0))

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers; what a checkpoint lacks of the context encoder starts as in the target encoder."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        prefix = "context_encoder."
        model._copy_target_to_context(
            [name.removeprefix(prefix) for name in info["missing_keys"] if name.startswith(prefix)]
        )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _copy_target_to_context(self, names=None):
        # positions included: those of a loaded encoder need not be the sines and cosines
        contexts, targets = self.context_encoder.state_dict(), self.cjepa.state_dict()
        for name in targets if names is None else names:
            contexts[name].copy_(targets[name])

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

        Of a model in shards every process moves its own, as both encoders are cut alike.

        Args:
            momentum (`float`): Share of the old target that is kept, in [0, 1].
        """
        targets, contexts = list(self.cjepa.parameters()), list(self.context_encoder.parameters())
        torch._foreach_lerp_(targets, contexts, 1 - momentum)
        if hasattr(targets[0], "ds_tensor"):
            # DeepSpeed's ZeRO-3: a parameter is empty but for small ones, kept whole beside the shards they come from
            shards = ([parameter.ds_tensor for parameter in each] for each in (targets, contexts))
            torch._foreach_lerp_(*shards, 1 - momentum)

    def sample_masks(self, batch_size: int, grid_size=None, generator=None, device=None):
        """
        Draws masks of the configured geometry, see [`~masking_cjepa.sample_block_masks`].

        Args:
            batch_size (`int`): How many: `num_mask_sets` times the number of images or views.
            grid_size (`(rows, columns)`, *optional*): The top level's grid; the configured image's when not given.
            generator (`torch.Generator`, *optional*): The source of randomness.
            device (`torch.device`, *optional*): Where the masks go.

        Returns:
            `context_ids` (`batch_size`, Nc) and `target_ids` (`batch_size`, M, K).
        """
        config = [self.predictor, *self.upper_predictors][-1].config  # of the top level
        geometry = {
            name: getattr(config, name)
            for name in ("num_target_blocks", "target_scale", "target_aspect_ratio", "context_scale")
        }
        grid_size, fewest = config.grid_size if grid_size is None else grid_size, config.min_context_patches
        try:
            return sample_block_masks(
                batch_size, grid_size, **geometry, min_context_patches=fewest, generator=generator, device=device
            )
        except ValueError as error:
            if fewest == self.config.min_context_patches:
                raise
            raise ValueError(
                f"Masks are drawn on the top level's grid, where min_context_patches="
                f"{self.config.min_context_patches} of level 0 make {fewest}: {error}"
            ) from error

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        context_ids: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        return_loss: bool = True,
        regularizer_weight: float | None = None,
        other_rows: list[tuple[torch.Tensor, ...]] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> CJepaForPreTrainingOutput:
        """
        Predicts the target encoder's tokens of the target blocks from the context.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images; of several views of each,
                `(B / num_views, num_views, C, H, W)`. Where no loss is asked for, one view is enough.
            context_ids (`torch.Tensor` of shape `(B * R, Nc)`, *optional*): Integer positions of the context patches,
                on the top level's grid; R is the configuration's `num_mask_sets`.
            target_ids (`torch.Tensor` of shape `(B * R, M, K)`, *optional*): Integer positions of the target blocks,
                on the top level's grid; the levels below mask the patches below these. Both masks are drawn on the
                images' device when neither is given.
            generator (`torch.Generator`, *optional*): Source of the masks' randomness; torch's default otherwise.
            return_loss (`bool`): Whether to compute the loss.
            regularizer_weight (`float`, *optional*): Of this step, for a schedule; the configuration's when not given.
                Those of upper levels change in proportion.
            other_rows (`list` of what [`~CJepaForPreTraining.statistic_rows`] gives, *optional*): Those of the step's
                other micro-batches, so that VICReg's statistics are those of all of the step's images.
            output_hidden_states, output_attentions (`bool`, *optional*): Whether to return the target encoder's.

        Returns:
            [`CJepaForPreTrainingOutput`].

        Raises:
            ValueError: One mask was given without the other or does not fit the images, there are more or fewer views
                of an image than `num_views`, or the batch is too small for batch statistics.
        """
        if (context_ids is None) != (target_ids is None):
            raise ValueError("Give both context_ids and target_ids, or neither to have them drawn.")
        num_images, pixel_values = len(pixel_values), self._flat_views(pixel_values, one_will_do=not return_loss)
        grid_sizes, num_rows = self.grid_sizes(pixel_values), len(pixel_values) * self.config.num_mask_sets
        for name, ids in (("context_ids", context_ids), ("target_ids", target_ids)):
            check_ids(name, ids, num_rows, grid_sizes[-1])
        if context_ids is None:
            context_ids, target_ids = self.sample_masks(
                num_rows, grid_sizes[-1], generator, device=pixel_values.device
            )
        with torch.no_grad():
            tokens = self.cjepa.encode(
                pixel_values, output_hidden_states=output_hidden_states, output_attentions=output_attentions
            )
        levels = self._levels(pixel_values, context_ids, target_ids)
        predictions = [level.predict() for level in levels]
        level_tokens = [self._for_each_set(encoded.last_hidden_state) for encoded in tokens]
        targets = [level.targets(encoded) for level, encoded in zip(levels, level_tokens, strict=True)]
        loss = terms = signs = None
        if return_loss:
            loss, terms = self._loss(levels, predictions, targets, regularizer_weight, other_rows or [])
            of_levels = zip(levels, predictions, targets, level_tokens, strict=True)
            signs = {
                level_term(name, number): sign
                for number, (level, predicted, target, encoded) in enumerate(of_levels)
                for name, sign in level.signs(predicted, target, encoded).items()
            }
        outputs = combine(tokens, self.config.num_levels)
        return CJepaForPreTrainingOutput(
            loss=loss,
            loss_terms=terms,
            predictions=predictions[0],
            targets=targets[0],
            level_embeddings=outputs.level_embeddings,
            context_ids=context_ids,
            target_ids=target_ids,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            level_views=tuple(
                block_means(predicted).reshape(num_images, -1, predicted.shape[-1]) for predicted in predictions
            ),
            signs=signs,
        )

    @torch.no_grad()
    def statistic_rows(self, pixel_values, context_ids, target_ids) -> tuple[torch.Tensor, ...]:
        """
        What VICReg's statistics are made of, without the target encoder's forward pass, for `other_rows` of `forward`.

        Args:
            pixel_values, context_ids, target_ids: As of `forward`, all of them needed.

        Returns:
            `tuple` of `torch.Tensor` of shape `(B * R, G, D)`: Level by level the G embeddings under a mask set; with
            `views` `(B / V, V * R, D)`, those of an image.
        """
        levels = self._levels(self._flat_views(pixel_values), context_ids, target_ids)
        # all or none, so that their dropout is drawn as in `forward`
        predicts = any(level.config.regularizer not in ("context", "views") for level in levels)
        return tuple(level.rows(level.predict() if predicts else None) for level in levels)

    def grid_sizes(self, pixel_values: torch.Tensor) -> list[tuple[int, int]]:
        """The grid (rows, columns) of each level for images (B, C, H, W), from the image up."""
        return grids_by_level(self.cjepa.embeddings.patch_embeddings.grid_size(pixel_values), self.cjepa.merges)

    def statistic_shapes(self) -> list[tuple[int, int, bool]]:
        """Of each level: on how many embeddings of an image VICReg acts, how wide, whether an expander reads all."""
        shapes = []
        for predictor, expander in zip(*self._heads(), strict=True):
            config = predictor.config
            num_kinds = {
                "context": 1, "blocks": config.num_target_blocks, "pair": 2,
                "views": config.num_views * config.num_mask_sets,
            }  # fmt: skip
            shapes.append((num_kinds[config.regularizer], config.hidden_size, isinstance(expander, CJepaExpander)))
        return shapes

    def _flat_views(self, pixel_values: torch.Tensor, one_will_do: bool = False) -> torch.Tensor:
        """Images (B, C, H, W), the views of one (B / V, V, C, H, W) side by side; `ValueError` for another V."""
        num_views = pixel_values.shape[1] if pixel_values.ndim == 5 else 1
        if num_views != self.config.num_views and not (num_views == 1 and one_will_do):
            raise ValueError(
                f"pixel_values has {num_views} views of an image, the model num_views={self.config.num_views}; give "
                "(B, num_views, C, H, W), or (B, C, H, W) for one."
            )
        return pixel_values.flatten(0, 1) if pixel_values.ndim == 5 else pixel_values

    def _heads(self) -> tuple[list[CJepaPredictor], list[nn.Module]]:
        """Each level's predictor and expander, from the image up."""
        return [self.predictor, *self.upper_predictors], [self.expander, *self.upper_expanders]

    def _for_each_set(self, rows: torch.Tensor) -> torch.Tensor:
        """What there is of each image (B, ...) for each of its mask sets (B * R, ...)."""
        num_sets = self.config.num_mask_sets
        return rows if num_sets == 1 else rows.repeat_interleave(num_sets, dim=0)

    def _levels(self, pixel_values, context_ids, target_ids) -> list[MaskedLevel]:
        """What each level reads of a batch, from the image up."""
        contexts = self.context_encoder.encode(self._for_each_set(pixel_values), context_ids, stop_gradients=True)
        grid_sizes = self.grid_sizes(pixel_values)
        ids = (ids_by_level(each, grid_sizes[0], self.cjepa.merges) for each in (context_ids, target_ids))
        tokens = [context.last_hidden_state for context in contexts]
        return [MaskedLevel(*parts) for parts in zip(*self._heads(), tokens, *ids, grid_sizes, strict=True)]

    def _loss(self, levels: list[MaskedLevel], predictions, targets, regularizer_weight: float | None, other_rows):
        """C-JEPA's loss (Eq. 21 and 22) summed over levels, and its detached, unweighted terms."""
        configured = self.config.regularizer_weight
        scale = 1.0 if regularizer_weight is None or configured == 0 else regularizer_weight / configured
        losses, terms = [], {}
        with torch.autocast(predictions[0].device.type, enabled=False):
            for number, level in enumerate(levels):
                weight = level.config.regularizer_weight * scale
                if number == 0 and regularizer_weight is not None:
                    weight = regularizer_weight  # itself, not what a division leaves of it
                others = [rows[number] for rows in other_rows]
                loss, of_level = level.loss(predictions[number], targets[number], weight, others)
                losses.append(level.config.level_weight * loss)
                terms |= {level_term(name, number): term.detach() for name, term in of_level.items()}
        return sum(losses), terms


def _predictor(config: CJepaConfig) -> CJepaPredictor:
    return PREDICTORS[config.predictor_attention](config)


def _expander(config: CJepaConfig) -> nn.Module:
    width = config.expander_hidden_size
    if width is None or config.regularizer_weight == 0:
        return nn.Identity()
    return CJepaExpander(config.hidden_size, [width] * 3)
