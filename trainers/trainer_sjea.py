"""Pre-training by S-JEA: two views of each image, batch statistics over all processes."""

import torch

from modeling_cjepa import SJeaForPreTraining
from trainers.batch_norm import synchronize_batch_norms
from trainers.datasets import sample_seed, seeded
from trainers.exact_accumulation import check_no_batch_norm
from trainers.trainer import JepaTrainer
from trainers.training_args import SJeaTrainingArguments
from trainers.transforms import normalize
from trainers.two_views import DeviceColors


class SJeaTrainer(JepaTrainer):
    """
    Pre-trains a [`SJeaForPreTraining`].

    Under several processes every batch norm of the model is replaced by one over the global batch. Parameters without
    a part in the loss are not trained.

    Args:
        model ([`SJeaForPreTraining`]): What to train.
        args ([`SJeaTrainingArguments`]): How.
        colors ([`DeviceColors`], *optional*): Changes the views' colours on the device, where workers only crop.
        kwargs: Further arguments of [`JepaTrainer`].

    Raises:
        InputError: `exact_accumulation` is asked for, and a backbone has batch norms.
    """

    def __init__(
        self, model: SJeaForPreTraining, args: SJeaTrainingArguments, *, colors: DeviceColors | None = None, **kwargs
    ):
        if args.exact_accumulation:
            check_no_batch_norm(model.sjea)
        for level in model.sjea.levels:
            for parameter in level.unused_parameters():
                parameter.requires_grad_(False)  # several processes would wait for its gradient
        if args.world_size > 1:
            model = synchronize_batch_norms(model, args.device)
        # convolutions are up to twice as fast so, on CPUs and GPUs
        super().__init__(model.to(memory_format=torch.channels_last), args, **kwargs)
        self.colors = colors

    def model_inputs(self, inputs) -> tuple[torch.Tensor]:
        """Two views of each image (B, 2, C, H, W), coloured where workers have not done so, normalised."""
        views = inputs["pixel_values"]
        if self.colors is not None:
            # the views of this process: their colours are its own, and the same again after a resume
            with seeded(sample_seed(*self.seed_numbers(), self.args.process_index)):
                views = self.colors(views.flatten(0, 1)).unflatten(0, views.shape[:2])
        pixels = normalize(views.flatten(0, 1), self.image_mean, self.image_std)
        return (pixels.unflatten(0, views.shape[:2]),)
