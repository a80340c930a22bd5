"""Pre-training by S-JEA (arXiv 2305.11701): VICReg (arXiv 2105.04906) at every level of a stack of encoders.

Shapes: B images, V = 2 views, C channels, D width of a level's embedding, E expanded width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_sjea import SJeaConfig
from .heads_cjepa import CJepaExpander
from .levels_sjea import LevelOutput
from .losses_cjepa import append_constant, count_processes, global_vicreg_terms, level_term
from .modeling_sjea import SJeaModel, SJeaPreTrainedModel


@dataclass
class SJeaForPreTrainingOutput(ModelOutput):
    """
    Output of [`SJeaForPreTraining`].

    Args:
        loss (`torch.Tensor`, scalar): The sum over levels of level_weight times VICReg's weighted terms.
        loss_terms (`dict[str, torch.Tensor]`): Detached and unweighted: `invariance`, `variance` and `covariance` of
            level 0, `level1_invariance` and so on of those above.
        level_embeddings (`tuple` of `torch.Tensor` of shape `(B, D)`): Each level's embeddings of the first view.
        expanded (`tuple` of `torch.Tensor` of shape `(B, V, E)`): Each level's expanded embeddings of both views.
        level_views (`tuple` of `torch.Tensor` of shape `(B, V, D)`): Each level's embeddings of both views, detached.
    """

    loss: torch.Tensor | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    level_embeddings: tuple[torch.Tensor, ...] | None = None
    expanded: tuple[torch.Tensor, ...] | None = None
    level_views: tuple[torch.Tensor, ...] | None = None


class SJeaForPreTraining(SJeaPreTrainedModel):
    """
    The stack (`sjea`) and an expander for each level, with VICReg's loss at every level.

    The loss sees the embeddings of all processes. Batch norms see those of one process, unless they are replaced by
    synchronised ones: `SJeaTrainer` does that, `torch.nn.SyncBatchNorm.convert_sync_batchnorm` on GPUs, too.

    Args:
        config ([`SJeaConfig`]): Its configuration.
    """

    # forward takes no `num_items_in_batch`: Trainer shall divide the loss by the accumulation steps
    accepts_loss_kwargs = False

    def __init__(self, config: SJeaConfig):
        super().__init__(config)
        self.sjea = SJeaModel(config)
        # those that the level above reads are parts of the stack
        self.expanders = nn.ModuleDict(
            {
                str(number): CJepaExpander(level.width, level.config.expander_sizes)
                for number, level in enumerate(self.sjea.levels)
                if level.expander is None
            }
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        return_loss: bool = True,
        other_rows: list[tuple[torch.Tensor, ...]] | None = None,
    ) -> SJeaForPreTrainingOutput:
        """
        Compares two views of each image at every level.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 2, C, H, W)`): Two normalised views of each image.
            return_loss (`bool`): Whether to compute the loss.
            other_rows (`list` of what [`~SJeaForPreTraining.statistic_rows`] gives, *optional*): Those of the step's
                other micro-batches, so that VICReg's statistics are those of all of the step's images.

        Returns:
            [`SJeaForPreTrainingOutput`].

        Raises:
            ValueError: There are not two views, or the batch has one image only, over all processes.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; give two views of each image, (B, 2, C, H, W)."
            )
        if self.training and pixel_values.shape[0] * count_processes() < 2:
            raise ValueError("The statistics over a batch of 1 image are undefined; use a batch of 2 images or more.")
        views = self._encode(pixel_values)
        num_images, expanded = pixel_values.shape[0], []
        for number, rows in enumerate(self._rows(views)):
            rows = append_constant(rows, [others[number] for others in other_rows or []])
            expanded.append(self._expand(number, rows))
        loss = terms = None
        if return_loss:
            loss, terms = self._loss(expanded)
        return SJeaForPreTrainingOutput(
            loss=loss,
            loss_terms=terms,
            level_embeddings=tuple(output.embedding for output in views[0]),
            expanded=tuple(rows[:num_images] for rows in expanded),
            level_views=tuple(
                torch.stack([output.embedding.detach() for output in pair], dim=1) for pair in zip(*views, strict=True)
            ),
        )

    @torch.no_grad()
    def statistic_rows(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        What VICReg's statistics are made of, for `other_rows` of `forward`.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 2, C, H, W)`): As of `forward`.

        Returns:
            `tuple` of `torch.Tensor` of shape `(B, V, D)`: Level by level the embeddings of both views, before the
            expander where it is no part of the stack.
        """
        return tuple(self._rows(self._encode(pixel_values)))

    def statistic_shapes(self) -> list[tuple[int, int, bool]]:
        """Of each level: VICReg acts on two expanded views, how wide they are, that nothing has to read all."""
        return [(2, config.expander_sizes[-1], False) for config in self.config.level_configs]

    def _encode(self, pixel_values: torch.Tensor) -> list[list[LevelOutput]]:
        """Each view's levels; one at a time, so that a batch norm's statistics are those of one view, as in VICReg."""
        return [self.sjea.encode(view, stop_gradients=True) for view in pixel_values.unbind(dim=1)]

    def _rows(self, views: list[list[LevelOutput]]) -> list[torch.Tensor]:
        """Of each level what is expanded here, or has been in the stack, of both views (B, V, D)."""
        return [
            torch.stack([out.embedding if out.expanded is None else out.expanded for out in outputs], dim=1)
            for outputs in zip(*views, strict=True)
        ]

    def _expand(self, number: int, rows: torch.Tensor) -> torch.Tensor:
        """Rows (B, V, D) of a level expanded to (B, V, E), a view at a time; as they are where the stack did it."""
        if str(number) not in self.expanders:
            return rows
        return torch.stack([self.expanders[str(number)](view) for view in rows.unbind(dim=1)], dim=1)

    def _loss(self, expanded: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum over levels, and each level's detached terms, of the global batch."""
        loss, terms = 0.0, {}
        for number, (config, rows) in enumerate(zip(self.config.level_configs, expanded, strict=True)):
            of_level = global_vicreg_terms(rows)
            weighted = [getattr(config, f"{name}_weight") * term for name, term in of_level.items()]
            loss = loss + config.level_weight * sum(weighted)
            terms |= {level_term(name, number): term.detach() for name, term in of_level.items()}
        return loss, terms
