"""Pre-training by C-JEPA: seeded masks, the regulariser's schedule, the moving average of the target encoder.

Every process draws the masks of the global batch and keeps its rows, so that several processes compute the gradients
of one.
"""

import torch

from modeling_cjepa import CJepaForPreTraining
from trainers.callbacks import TargetUpdateCallback
from trainers.datasets import sample_seed
from trainers.schedules import cosine
from trainers.trainer import JepaTrainer
from trainers.training_args import CJepaTrainingArguments


class CJepaTrainer(JepaTrainer):
    """
    Pre-trains a [`CJepaForPreTraining`].

    Logged beside what [`JepaTrainer`] logs: the regulariser's weight and the target encoder's momentum.

    Args:
        model ([`CJepaForPreTraining`]): What to train.
        args ([`CJepaTrainingArguments`]): How.
        kwargs: Further arguments of [`JepaTrainer`].

    Raises:
        ValueError: The regulariser's weight shall rise from 0.
    """

    def __init__(self, model: CJepaForPreTraining, args: CJepaTrainingArguments, **kwargs):
        if model.config.regularizer_weight == 0 and args.final_regularizer_weight:
            raise ValueError(
                f"final_regularizer_weight={args.final_regularizer_weight} cannot follow a model's "
                "regularizer_weight=0; set --final_regularizer_weight 0, too."
            )
        super().__init__(model, args, **kwargs)
        self.target_update = TargetUpdateCallback(
            args.ema_momentum, args.final_ema_momentum, args.schedule_scale, self.clock
        )
        self.add_callback(self.target_update)

    def model_inputs(self, inputs) -> tuple[torch.Tensor, ...]:
        """A batch (B, C, H, W), or (B, V, C, H, W), normalised, under masks seeded by (seed, step, micro-step)."""
        pixel_values = self.views(inputs)
        return pixel_values, *self._masks(pixel_values)

    def loss_options(self, training: bool) -> dict:
        """Beside other micro-batches' rows the regulariser's weight in this step."""
        options = super().loss_options(training)
        if training:
            options["regularizer_weight"] = self._regularizer_weight(*self.schedule_place(self.state.global_step))
        return options

    def step_facts(self, step: float, num_steps: int) -> dict[str, float]:
        """Beside weight decay the regulariser's weight and the target encoder's momentum."""
        return super().step_facts(step, num_steps) | {
            "regularizer_weight": self._regularizer_weight(step, num_steps),
            "ema_momentum": self.target_update.momentum_at(step, num_steps),
        }

    def _masks(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the global batch's masks that belong to this process."""
        model, args = self.accelerator.unwrap_model(self.model), self.args
        generator = torch.Generator().manual_seed(sample_seed(*self.seed_numbers()))
        grid_size = model.grid_sizes(pixel_values.flatten(end_dim=-4))[-1]
        num_sets = model.config.num_views * model.config.num_mask_sets  # of an image
        images = slice(args.process_index, None, args.world_size)  # as they are dealt
        masks = model.sample_masks(len(pixel_values) * args.world_size * num_sets, grid_size, generator)
        mine = (ids.unflatten(0, (-1, num_sets))[images].flatten(0, 1) for ids in masks)
        return tuple(ids.to(pixel_values.device, non_blocking=True) for ids in mine)

    def _regularizer_weight(self, step: float, num_steps: int) -> float:
        """The regulariser's weight in the step that follows `step` finished ones."""
        args, start = self.args, self.accelerator.unwrap_model(self.model).config.regularizer_weight
        if args.final_regularizer_weight is None:
            return start
        return cosine(step, num_steps * args.schedule_scale, start, args.final_regularizer_weight)
