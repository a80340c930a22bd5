"""Linear probes of many settings at once, for features too many to fit exactly: one pass over them an epoch.

As in DINOv2's protocol (arXiv 2304.07193) heads of several learning rates are trained side by side by SGD with
momentum and a cosine schedule, here of several L2 penalties, too; all heads are one matrix product. The best on
held-out train images is trained anew on all of them.

Shapes: n images to fit, m to test, D width of a feature, R principal axes, H heads, K classes, B images of a batch.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from trainers.datasets import sample_seed
from trainers.probes import folds_of, principal_axes

# In units of the longest step that is stable at the start, for the mean loss plus penalty / 2 * |weights|^2.
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)
PENALTIES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_MOMENTUM = 0.9
_BATCH_SIZE = 1024
# As many passes as make at least so many steps: of few images more passes than of many.
_NUM_EPOCHS = 10
_NUM_STEPS = 1000


class SweptProbe(NamedTuple):
    """
    Result of [`sweep_predict`].

    Args:
        predictions (`torch.Tensor` of shape `(m,)`): Class indices.
        learning_rate (`float`), penalty (`float`): Those chosen.
    """

    predictions: torch.Tensor
    learning_rate: float
    penalty: float


def sweep_predict(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, seed: int = 0, progress: bool = False
) -> SweptProbe:
    """
    Classes by the best of many linear heads on standardised features, chosen on held-out train images.

    Each head is multinomial logistic regression of one learning rate and one L2 penalty. Steps are taken along the
    principal axes of the features, each of a length of its own, so that directions of little variance, in which
    plain SGD hardly moves, are learned as fast; the minimum stays where it is. What is held out is a tenth, and
    further ones in turn while it is fewer than 2,000 images, as in [`~probes.linear_predict`].

    Args:
        train_x (`torch.Tensor` of shape `(n, D)`), train_y (`(n,)`, int64): Features to fit, and their classes, on the
            device to compute on.
        test_x (`torch.Tensor` of shape `(m, D)`): The features to classify.
        seed (`int`): Of the tenths that are held out and of the order of the images.
        progress (`bool`): Whether to show a bar.

    Returns:
        [`SweptProbe`].

    Raises:
        InputError: No class has a second train image to hold out.
    """
    classes, targets = train_y.unique(return_inverse=True)
    folds = folds_of(targets, seed)
    std, mean = torch.std_mean(train_x.float(), dim=0, correction=0)
    std = std.where(std > 0, 1)
    x = (train_x.float() - mean) / std
    variances, axes = principal_axes(x)
    x = x @ axes
    heads = list(itertools.product(LEARNING_RATES, PENALTIES))
    best = _best_head(x, targets, heads, variances, folds, seed, progress)
    weight, bias = _train(x, targets, torch.arange(len(x), device=x.device), [best], variances, seed, progress)
    logits = ((test_x.float() - mean) / std) @ (axes @ weight[:, 0]) + bias[0]
    return SweptProbe(classes[logits.argmax(dim=1)], *best)


def _train(x, targets, kept, heads, variances, seed: int, progress: bool):
    """
    Trains heads, each of a learning rate and a penalty, on the rows `kept` of x (n, R), whose columns are along
    principal axes with the given variances (R,).

    A weight is its step length times what SGD moves: with the steps below, the loss is as curved in every direction as
    in every other, 1 at the start, whatever the variances and penalties.

    Returns:
        Weights (R, H, K) and biases (H, K).
    """
    num_classes = int(targets.max()) + 1
    rates, penalties = x.new_tensor(heads).unbind(1)
    curvature = max(num_classes - 1, 1) / num_classes**2
    step = torch.rsqrt(curvature * variances.clamp_min(0)[:, None] + penalties)[..., None]  # (R, H, 1)
    moved, bias = x.new_zeros(x.shape[1], len(heads), num_classes), x.new_zeros(len(heads), num_classes)
    velocities = torch.zeros_like(moved), torch.zeros_like(bias)
    for share, ids in _batches(kept, seed, f"{len(heads)} linear probe{'s' * (len(heads) > 1)}", progress):
        rate = (rates * (1 + math.cos(math.pi * share)) / 2)[:, None]
        weight, rows = step * moved, x[ids]
        residual = torch.softmax(_logits(rows, weight, bias), dim=2)
        residual = residual.sub_(F.one_hot(targets[ids], num_classes)[:, None]).div_(len(ids))
        slope = (rows.T @ residual.flatten(1)).view_as(weight).add_(penalties[:, None] * weight).mul_(step)
        slopes = slope, residual.sum(dim=0) / curvature
        for values, slope, velocity in zip((moved, bias), slopes, velocities, strict=True):
            velocity.mul_(_MOMENTUM).add_(slope)
            values.sub_(rate * velocity)
    return step * moved, bias


def _batches(kept: torch.Tensor, seed: int, description: str, progress: bool) -> Iterator[tuple[float, torch.Tensor]]:
    """The share of the training that is over, and the rows of the next batch; each epoch in an order of its own."""
    size = min(_BATCH_SIZE, len(kept))
    steps_per_epoch = len(kept) // size
    num_epochs = max(_NUM_EPOCHS, math.ceil(_NUM_STEPS / steps_per_epoch))
    num_steps = num_epochs * steps_per_epoch
    with tqdm(total=num_steps, desc=description, unit="step", disable=not progress) as bar:
        for epoch in range(num_epochs):
            generator = torch.Generator().manual_seed(sample_seed(seed, epoch))
            order = kept[torch.randperm(len(kept), generator=generator).to(kept.device)]
            for ids in order[: steps_per_epoch * size].split(size):
                yield bar.n / num_steps, ids
                bar.update()


def _logits(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Those of all heads (B, H, K), of rows (B, R), by one product."""
    return (rows @ weight.flatten(1)).view(len(rows), *bias.shape) + bias


def _best_head(x, targets, heads, variances, folds, seed: int, progress: bool) -> tuple[float, float]:
    """The head that is right most often on the rows held out; of several the one with the least loss."""
    num_correct, losses = x.new_zeros(len(heads)), x.new_zeros(len(heads))
    for kept, held_out in folds:
        weight, bias = _train(x, targets, kept, heads, variances, seed, progress)
        for ids in held_out.split(_BATCH_SIZE):
            logits = _logits(x[ids], weight, bias)
            classes = targets[ids][:, None]
            num_correct += (logits.argmax(dim=2) == classes).sum(dim=0)
            chosen = classes[..., None].expand(-1, len(heads), 1)
            losses -= torch.log_softmax(logits, dim=2).gather(2, chosen).sum(dim=(0, 2))
    # a head whose steps were too long for it is not finite
    num_correct = num_correct.where(losses.isfinite(), -1)
    return heads[int(losses.where(num_correct == num_correct.max(), math.inf).argmin())]
