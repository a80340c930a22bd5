"""Batch statistics of all images of an optimizer step: what they are made of is computed once more, before the step.

Micro-batches, one by one, know of their own images only. So a first pass without gradients computes the rows that
VICReg's statistics are made of, under the masks and dropout of the second, in which each micro-batch takes those of
the others as constants. The gradients of all micro-batches then add up to those of one batch.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainers.errors import InputError


def check_no_batch_norm(encoder: nn.Module):
    """Refuses, by an [`InputError`], an encoder whose features are themselves made of statistics of a micro-batch."""
    if any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise InputError(
            "exact_accumulation=true, but the encoder has batch norms, which see one micro-batch only; leave it out, "
            "or choose backbones without them, such as vit or cjepa."
        )


def check_is_whole(trainer):
    """Refuses, by an [`InputError`], a model in shards, which works in its forward pass alone."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise InputError(
            "exact_accumulation=true computes parts of the model outside its forward pass, which FSDP and DeepSpeed "
            "do not allow; leave it out, or launch without them."
        )


@torch.no_grad()
def rows_of_step(trainer, batches: list[dict]) -> list[tuple[torch.Tensor, ...]]:
    """
    The rows that batch statistics are made of, for each micro-batch of the step to come.

    Args:
        trainer ([`JepaTrainer`]): Whose model and randomness it is.
        batches (`list[dict]`): The micro-batches.

    Returns:
        `list` of what the model's `statistic_rows` gives.
    """
    model, rows = trainer.accelerator.unwrap_model(trainer.model).train(), []
    for micro_step, batch in enumerate(batches):
        trainer.seed_micro_step(micro_step)
        with trainer.accelerator.autocast():
            rows.append(model.statistic_rows(*trainer.model_inputs(trainer._prepare_inputs(batch))))
    trainer._micro_step = 0
    return rows
