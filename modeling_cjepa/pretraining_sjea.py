"""Pre-training by S-JEA (arXiv 2305.11701): VICReg (arXiv 2105.04906) at every level of a stack of encoders.

Shapes: B images, V = 2 views, C channels, D width of a level's embedding, E expanded width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_sjea import SJeaConfig
from .heads_cjepa import CJepaExpander
from .levels_sjea import LevelOutput
from .losses_cjepa import gather, level_term, vicreg_terms
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
    """

    loss: torch.Tensor | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    level_embeddings: tuple[torch.Tensor, ...] | None = None
    expanded: tuple[torch.Tensor, ...] | None = None


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
    def forward(self, pixel_values: torch.Tensor, return_loss: bool = True) -> SJeaForPreTrainingOutput:
        """
        Compares two views of each image at every level.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 2, C, H, W)`): Two normalised views of each image.
            return_loss (`bool`): Whether to compute the loss.

        Returns:
            [`SJeaForPreTrainingOutput`].

        Raises:
            ValueError: There are not two views, or the batch has one image only, over all processes.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; give two views of each image, (B, 2, C, H, W)."
            )
        if self.training and pixel_values.shape[0] * _num_processes() < 2:
            raise ValueError("The statistics over a batch of 1 image are undefined; use a batch of 2 images or more.")
        # one view at a time, so that a batch norm's statistics are those of one view, as in VICReg
        views = [self.sjea.encode(view, stop_gradients=True) for view in pixel_values.unbind(dim=1)]
        expanded = [[self._expand(number, output) for number, output in enumerate(view)] for view in views]
        loss = terms = None
        if return_loss:
            loss, terms = self._loss(*expanded)
        return SJeaForPreTrainingOutput(
            loss=loss,
            loss_terms=terms,
            level_embeddings=tuple(output.embedding for output in views[0]),
            expanded=tuple(torch.stack(pair, dim=1) for pair in zip(*expanded, strict=True)),
        )

    def _expand(self, number: int, output: LevelOutput) -> torch.Tensor:
        return self.expanders[str(number)](output.embedding) if output.expanded is None else output.expanded

    def _loss(self, first, second) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum over levels, and each level's detached terms, of the global batch."""
        loss, terms = 0.0, {}
        for number, config in enumerate(self.config.level_configs):
            of_level = vicreg_terms(gather(first[number]), gather(second[number]))
            weighted = [getattr(config, f"{name}_weight") * term for name, term in of_level.items()]
            loss = loss + config.level_weight * sum(weighted)
            terms |= {level_term(name, number): term.detach() for name, term in of_level.items()}
        return loss, terms


def _num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
