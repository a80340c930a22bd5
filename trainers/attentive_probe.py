"""The attentive probe: an attentive pooling and a linear classifier trained on the tokens of a frozen encoder.

The probe of V-JEPA (arXiv 2404.08471), with [`~modeling_cjepa.heads_cjepa.CJepaAttentivePooling`]. One is trained for
each of a few learning rates, all on the same batches; the best on held-out train images is taken.

Shapes: n images, B images of a batch, N tokens, D width of a token, K classes.
"""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from modeling_cjepa.heads_cjepa import CJepaAttentivePooling
from trainers.datasets import sample_seed, seeded
from trainers.precision import probes_in_bf16
from trainers.probes import folds_of

LEARNING_RATES = (3e-4, 1e-3, 3e-3)
_WEIGHT_DECAY = 0.05
_BATCH_SIZE = 128
# As many passes as make at least so many steps: of few images more passes than of many.
_NUM_EPOCHS = 5
_NUM_STEPS = 400


class AttentiveProbe(NamedTuple):
    """
    Result of [`attentive_predict`].

    Args:
        predictions (`torch.Tensor` of shape `(m,)`): Class indices.
        learning_rate (`float`): The one chosen.
    """

    predictions: torch.Tensor
    learning_rate: float


class StoredTokens:
    """
    Tokens that are kept.

    Args:
        tokens (`torch.Tensor` of shape `(n, N, D)`): Of each image, in any float type.
    """

    def __init__(self, tokens: torch.Tensor):
        self.tokens, self.width = tokens, tokens.shape[2]

    def batches(self, ids: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
        """The tokens (B, N, D), float32, of the images at some positions, in their order."""
        for chosen in ids.to(self.tokens.device).split(batch_size):
            yield self.tokens[chosen].float()


class EncodedTokens:
    """
    Tokens that are made each time anew, for more images than memory holds the tokens of.

    Args:
        encode (`Callable`): Takes positions of images and a batch size, and gives batches of tokens without gradients,
            of D features or more.
        width (`int`): D; the last so many features are taken.
    """

    def __init__(self, encode: Callable[[torch.Tensor, int], Iterator[torch.Tensor]], width: int):
        self.encode, self.width = encode, width

    def batches(self, ids: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
        """As [`StoredTokens.batches`]."""
        for tokens in self.encode(ids, batch_size):
            yield tokens[..., -self.width :].float()


def attentive_predict(
    train: StoredTokens | EncodedTokens,
    train_y: torch.Tensor,
    test: StoredTokens | EncodedTokens,
    num_test_images: int,
    seed: int = 0,
    progress: bool = False,
    width: int | None = None,
) -> AttentiveProbe:
    """
    Classes by the best of a few attentive probes, trained on nine tenths of the train images and chosen on the rest.

    AdamW with a cosine schedule; the first tenth of the steps is a linear warm-up.

    Args:
        train, test ([`StoredTokens`] or [`EncodedTokens`]): Tokens of the images to fit on and of those to classify,
            on the device to compute on.
        train_y (`torch.Tensor` of shape `(n,)`, int64): Classes of the former.
        num_test_images (`int`): How many the latter are.
        seed (`int`): Of the first weights, of the tenth that is held out and of the order of the images.
        progress (`bool`): Whether to show a bar.
        width (`int`, *optional*): Features of the pooled embedding; as many as a token has when not given.

    Returns:
        [`AttentiveProbe`].

    Raises:
        InputError: No class has a second train image to hold out.
    """
    classes, targets = train_y.unique(return_inverse=True)
    kept, held_out = folds_of(targets, seed)[0]
    probe = partial(new_probe, train.width, len(classes), width)
    probes = _train(probe, train, targets, kept, seed, progress)
    held_out_logits = _logits(probes, train, held_out)
    num_correct = (held_out_logits.argmax(dim=2) == targets[held_out, None].to(held_out_logits.device)).sum(dim=0)
    best = int(num_correct.argmax())
    logits = _logits(probes[best : best + 1], test, torch.arange(num_test_images))
    return AttentiveProbe(classes[logits[:, 0].argmax(dim=1).to(classes.device)], LEARNING_RATES[best])


def new_probe(token_width: int, num_classes: int, width: int | None = None) -> nn.Sequential:
    """An attentive pooling of heads some 64 features wide, and a linear classifier, with torch's initial weights."""
    width = width or token_width
    num_heads = next(number for number in range(max(width // 64, 1), 0, -1) if width % number == 0)
    return nn.Sequential(
        CJepaAttentivePooling(width, num_heads, token_width=token_width), nn.Linear(width, num_classes)
    )


def _train(new: Callable, tokens, targets: torch.Tensor, kept: torch.Tensor, seed: int, progress: bool):
    """A trained probe for each learning rate, of the images at positions `kept`."""
    first = next(tokens.batches(kept[:1], 1))
    with seeded(sample_seed(seed)):
        probe = new().to(first.device)
    probes = nn.ModuleList(copy.deepcopy(probe) for _ in LEARNING_RATES)
    groups = [{"params": probe.parameters(), "lr": rate} for probe, rate in zip(probes, LEARNING_RATES, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=_WEIGHT_DECAY)
    steps_per_epoch = math.ceil(len(kept) / _BATCH_SIZE)
    num_epochs = max(_NUM_EPOCHS, math.ceil(_NUM_STEPS / steps_per_epoch))
    num_steps = num_epochs * steps_per_epoch
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) * 10 / num_steps, 1) * (1 + math.cos(math.pi * step / num_steps)) / 2
    )
    bf16 = probes_in_bf16(first.device)
    with tqdm(total=num_steps, desc="attentive probe", unit="step", disable=not progress) as bar:
        for epoch in range(num_epochs):
            generator = torch.Generator().manual_seed(sample_seed(seed, epoch))
            order = kept[torch.randperm(len(kept), generator=generator).to(kept.device)]
            for ids, batch in zip(order.split(_BATCH_SIZE), tokens.batches(order, _BATCH_SIZE), strict=True):
                y = targets[ids].to(batch.device)
                with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
                    # the gradients of a sum of losses that share no weight are those of each
                    loss = sum(F.cross_entropy(probe(batch), y) for probe in probes)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return probes


@torch.no_grad()
def _logits(probes: nn.ModuleList, tokens, ids: torch.Tensor) -> torch.Tensor:
    """Those of each probe, (n, probes, K), for the images at positions `ids` (n,)."""
    return torch.cat([
        torch.stack([probe(batch) for probe in probes], dim=1) for batch in tokens.batches(ids, _BATCH_SIZE)
    ])  # fmt: skip
