"""Pre-training by S-JEA: two views of each image, batch statistics over all processes."""

import torch

from modeling_cjepa import SJeaForPreTraining
from trainers.batch_norm import synchronize_batch_norms
from trainers.exact_accumulation import check_no_batch_norm
from trainers.trainer import JepaTrainer
from trainers.training_args import SJeaTrainingArguments


class SJeaTrainer(JepaTrainer):
    """
    Pre-trains a [`SJeaForPreTraining`].

    Under several processes every batch norm of the model is replaced by one over the global batch. Parameters without
    a part in the loss are not trained.

    Args:
        model ([`SJeaForPreTraining`]): What to train.
        args ([`SJeaTrainingArguments`]): How.
        kwargs: Further arguments of [`JepaTrainer`].

    Raises:
        InputError: `exact_accumulation` is asked for, and a backbone has batch norms.
    """

    def __init__(self, model: SJeaForPreTraining, args: SJeaTrainingArguments, **kwargs):
        if args.exact_accumulation:
            check_no_batch_norm(model.sjea)
        for level in model.sjea.levels:
            for parameter in level.unused_parameters():
                parameter.requires_grad_(False)  # several processes would wait for its gradient
        if args.world_size > 1:
            model = synchronize_batch_norms(model, args.device)
        # convolutions are up to twice as fast so, on CPUs and GPUs
        super().__init__(model.to(memory_format=torch.channels_last), args, **kwargs)

    def model_inputs(self, inputs) -> tuple[torch.Tensor]:
        """Two views of each image (B, 2, C, H, W), normalised."""
        return (self.views(inputs),)
