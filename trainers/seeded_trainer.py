"""transformers' `Trainer` whose random numbers are a function of (seed, step, micro-step, process).

So no state of random generators has to be saved, and a step is the same whenever it is repeated.
"""

import random

import numpy as np
import torch
from transformers import Trainer

from trainers.datasets import sample_seed


class SeededTrainer(Trainer):
    """transformers' `Trainer`, which seeds the generators of Python, numpy and torch for each micro-batch."""

    _micro_step = 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an optimizer step, whose micro-steps are counted from 0."""
        self._micro_step = 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def seed_micro_step(self, micro_step: int):
        """Seeds the generators of Python, numpy and torch, of all devices, for a micro-batch of the present step."""
        self._micro_step = micro_step
        # the last number tells it from other seeds of a step
        numbers = (self.args.seed, self.state.global_step, micro_step, self.args.process_index, 1)
        seed = sample_seed(*numbers)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward pass of a micro-batch, with the same random numbers whenever it is repeated."""
        self.seed_micro_step(self._micro_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_step += 1
        return loss
