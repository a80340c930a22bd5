"""Probes of frozen embeddings: weighted kNN, logistic regression, and the interval of an accuracy.

The kNN is the weighted one of InstDisc and DINO (arXiv 1805.01978, 2104.14294). The linear probe is multinomial
logistic regression with an L2 penalty on standardised embeddings; no choice is made on the test images.

Shapes: n images to vote or fit, m test images, D width of an embedding, K classes.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import minimize
from tqdm import tqdm

from trainers.errors import InputError
from trainers.threads import threads

# Of the test images, by the bootstrap.
NUM_RESAMPLES = 1000
# Up to 10,000: embeddings with few strong directions, such as a random encoder's, need weak penalties.
C_GRID = tuple(10.0**power for power in range(-4, 5))
# Fewer images to choose C on choose it at random.
_NUM_HELD_OUT = 2000
_SIMILARITIES_AT_ONCE = 2**25
# Of a fit, below which one thread is used: more wait for each other, on busy cores many times as long as they work.
_NUMBERS_FOR_THREADS = 10_000_000


class LinearProbe(NamedTuple):
    """
    Result of [`linear_predict`].

    Args:
        predictions (`torch.Tensor` of shape `(m,)`): Class indices.
        C (`float`): The inverse penalty chosen, in scikit-learn's sense.
        converged (`bool`): Whether the last fit converged.
    """

    predictions: torch.Tensor
    C: float
    converged: bool


def knn_predict(
    train_x: torch.Tensor,
    train_y: torch.Tensor,
    test_x: torch.Tensor,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> torch.Tensor:
    """
    Classes by the vote of the k nearest train embeddings, weighted by exp(cosine similarity / temperature).

    Args:
        train_x (`torch.Tensor` of shape `(n, D)`), train_y (`(n,)`, int64): The voters and their classes.
        test_x (`torch.Tensor` of shape `(m, D)`): The embeddings to classify.
        num_classes (`int`): Number of classes K.
        k (`int`): Number of neighbours; all train embeddings if there are fewer.
        temperature (`float`): T > 0.

    Returns:
        `torch.Tensor` of shape `(m,)`: Class indices, int64.
    """
    train_x, test_x = F.normalize(train_x.float(), dim=1), F.normalize(test_x.float(), dim=1)
    predictions = []
    for rows in test_x.split(max(1, _SIMILARITIES_AT_ONCE // len(train_x))):
        nearest = (rows @ train_x.T).topk(min(k, len(train_x)), dim=1)
        # relative to the nearest one, which changes no vote and cannot overflow
        weights = ((nearest.values - nearest.values[:, :1]) / temperature).exp()
        votes = weights.new_zeros(len(rows), num_classes).scatter_add_(1, train_y[nearest.indices], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def linear_predict(
    train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, seed: int = 0, progress: bool = False
) -> LinearProbe:
    """
    Classes by logistic regression on standardised embeddings, with C chosen on held-out train embeddings.

    A tenth of the train embeddings is held out; if that is fewer than 2,000, a second tenth in turn, and so on up to
    all ten. C goes up `C_GRID` until three in a row do worse than the best by more than a standard error; the fit with
    the best C is then made on all train embeddings. The objective is that of scikit-learn's `LogisticRegression`.

    Args:
        train_x (`torch.Tensor` of shape `(n, D)`), train_y (`(n,)`, int64): Embeddings to fit, and their classes.
        test_x (`torch.Tensor` of shape `(m, D)`): The embeddings to classify.
        seed (`int`): Chooses the tenths that are held out.
        progress (`bool`): Whether to show a bar.

    Returns:
        [`LinearProbe`].

    Raises:
        InputError: No class has a second train image to hold out.
    """
    classes, targets = train_y.unique(return_inverse=True)
    folds = folds_of(targets, seed)
    is_small = min(train_x.shape) * len(train_x) * len(classes) < _NUMBERS_FOR_THREADS
    with threads(1 if is_small else torch.get_num_threads()):
        std, mean = torch.std_mean(train_x.float(), dim=0, correction=0)
        std = std.where(std > 0, 1)
        x = (train_x.float() - mean) / std
        variances, axes = principal_axes(x)
        x = x @ axes
        C = _choose_C(x, targets, len(classes), variances, folds, progress)
        weight, bias, converged = _fit(x, targets, len(classes), C, variances)
        logits = ((test_x.float() - mean) / std) @ axes @ weight + bias
    return LinearProbe(classes[logits.argmax(dim=1)], C, converged)


def _choose_C(x: torch.Tensor, targets: torch.Tensor, num_classes: int, variances, folds, progress: bool) -> float:
    """The C of `C_GRID` that predicts the held-out rows of x (n, R) best."""
    num_held_out = sum(len(held_out) for _, held_out in folds)
    best_score, best_C, num_worse = -1.0, C_GRID[0], 0
    starts = [None] * len(folds)  # a fit begins where that of the C before ended
    for C in tqdm(C_GRID, desc="linear probe", unit="fit", disable=not progress):
        num_correct = 0
        for at, (kept, held_out) in enumerate(folds):
            weight, bias, _ = _fit(x[kept], targets[kept], num_classes, C, variances, starts[at])
            starts[at] = (weight, bias)
            num_correct += int(((x[held_out] @ weight + bias).argmax(dim=1) == targets[held_out]).sum())
        score = num_correct / num_held_out
        standard_error = math.sqrt(score * (1 - score) / num_held_out)
        num_worse = num_worse + 1 if score < best_score - standard_error else 0
        if score > best_score:
            best_score, best_C = score, C
        if num_worse == 3:
            break
    return best_C


def spare_positions(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Which of some images can be held out so that one of each class stays.

    Args:
        labels (`np.ndarray` of shape `(n,)`): Class indices.
        seed (`int`): Of the order, and of the choice within a class.

    Returns:
        The positions that can be held out, in random order, and those of the one image of each class that stays.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    _, first_of_class = np.unique(labels[order], return_index=True)
    return np.delete(order, first_of_class), order[first_of_class]


def share_of_each_class(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """
    A random choice of so large a share of the images of each class, at least one; a smaller share is part of a larger.

    Args:
        labels (`np.ndarray` of shape `(n,)`): Class indices.
        share (`float`): In (0, 1]; 1 is all of them.
        seed (`int`): Of the choice.

    Returns:
        `np.ndarray`: Positions, in order.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    of_class = [order[labels[order] == label] for label in np.unique(labels)]
    return np.sort(np.concatenate([images[: max(round(share * len(images)), 1)] for images in of_class]))


def folds_of(targets: torch.Tensor, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Random tenths of train images to choose settings on: one of 2,000 images or more, or up to ten.

    Args:
        targets (`torch.Tensor` of shape `(n,)`): Class indices.
        seed (`int`): Of the choice.

    Returns:
        `list`: For each tenth the positions of the rest, to fit on, in which are all classes, and its own.

    Raises:
        InputError: No class has a second image to hold out.
    """
    spare, needed = spare_positions(targets.cpu().numpy(), seed)
    if len(spare) == 0:
        raise InputError("There is one train image of each class, and the linear probe needs more; give more images.")
    size = max(len(targets) // 10, 1)
    num_folds = min(math.ceil(_NUM_HELD_OUT / size), 10, math.ceil(len(spare) / size))
    folds = []
    for start in range(0, num_folds * size, size):
        kept = np.sort(np.concatenate([spare[:start], spare[start + size :], needed]))
        folds.append(tuple(torch.from_numpy(ids).to(targets.device) for ids in (kept, spare[start : start + size])))
    return folds


def principal_axes(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Variances (R,) and directions (D, R) of the principal axes of x (n, D), with R = min(n, D)."""
    if len(x) < x.shape[1]:
        _, singular_values, axes = torch.linalg.svd(x, full_matrices=False)
        return singular_values.square() / len(x), axes.T
    return torch.linalg.eigh(x.T @ x / len(x))


def _fit(x: torch.Tensor, targets: torch.Tensor, num_classes: int, C: float, variances: torch.Tensor, start=None):
    """
    The minimum of sum of losses * C + |weights|^2 / 2: weights (R, K), bias (K,), and whether it was reached. It is
    looked for from a start on, weights and bias, or from zero on.

    scikit-learn's solvers take thousands of steps where few directions carry most of the variance, as in the
    embeddings of a random or collapsed encoder. The columns of x (n, R) are along principal axes with the given
    variances, so here each gets a step length of its own, which leaves the minimum where it is.
    """
    num_images, width = x.shape
    penalty = 1 / (num_images * C)
    curvature = max(num_classes - 1, 1) / num_classes**2  # of the loss, when nothing is known yet
    step = torch.rsqrt(curvature * variances.clamp_min(0) + penalty)[:, None]
    one_hot = F.one_hot(targets, num_classes).to(x)

    def unpack(flat):
        scaled = torch.from_numpy(flat).to(x).view(width + 1, num_classes)
        return scaled[:-1] * step, scaled[-1]

    def loss_and_gradient(flat):
        weight, bias = unpack(flat)
        log_probabilities = torch.log_softmax(x @ weight + bias, dim=1)
        loss = -(log_probabilities * one_hot).sum(dtype=torch.float64) / num_images
        loss = loss + penalty / 2 * weight.double().square().sum()
        residual = (log_probabilities.exp() - one_hot) / num_images
        gradient = torch.cat([step * (x.T @ residual + penalty * weight), residual.sum(0, keepdim=True)])
        return loss.item(), gradient.double().flatten().cpu().numpy()

    # a loss that changes by less than a millionth changes no prediction that matters
    options = {"maxiter": 1000, "maxcor": 20, "ftol": 1e-6}
    weight, bias = start or (x.new_zeros(width, num_classes), x.new_zeros(num_classes))
    scaled = torch.cat([weight / step, bias[None]]).double().flatten().cpu().numpy()
    result = minimize(loss_and_gradient, scaled, jac=True, method="L-BFGS-B", options=options)
    return *unpack(result.x), bool(result.success)


def top_accuracies(ranked: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """
    The share of images whose class is the likeliest one, and among the likeliest five where as many are given.

    Args:
        ranked (`np.ndarray` of shape `(m, k)`): Class indices of each image, the likeliest first.
        labels (`np.ndarray` of shape `(m,)`): The right ones.

    Returns:
        `dict`: `accuracy`, and with five columns or more `top5_accuracy`, from 0 to 1.
    """
    is_right = np.asarray(ranked) == np.asarray(labels)[:, None]
    found = {"accuracy": float(is_right[:, 0].mean())}
    if is_right.shape[1] >= 5:
        found["top5_accuracy"] = float(is_right[:, :5].any(axis=1).mean())
    return found


def accuracy_interval(num_correct: int, num_total: int) -> tuple[float, float]:
    """
    The 95 % Wilson score interval of an accuracy: what chance in the choice of the test images leaves open.

    Args:
        num_correct (`int`), num_total (`int`): Correct predictions of how many, at least 1.

    Returns:
        `(float, float)`: Low and high, in percent.
    """
    z = NormalDist().inv_cdf(0.975)
    share, weight = num_correct / num_total, z * z / num_total
    centre = (share + weight / 2) / (1 + weight)
    half = math.sqrt(share * (1 - share) * weight + weight * weight / 4) / (1 + weight)
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)


def mean_interval(values: Sequence[float]) -> list[float] | None:
    """The 95 % interval of a mean, low and high, by Student's t; None of one value, which says nothing of others."""
    if len(values) < 2:
        return None
    mean, half = fmean(values), float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return [mean - half, mean + half]


def bootstrap_interval(num_correct: int, num_total: int, seed: int = 0):
    """
    The 95 % interval of an accuracy by bootstrap over the test images: percentiles of what resamples of them give.

    Where all predictions are correct, or none, so are those of every resample, which says nothing about other images;
    the interval is then [`accuracy_interval`].

    Args:
        num_correct (`int`), num_total (`int`): Correct predictions of how many, at least 1.
        seed (`int`): Of the `NUM_RESAMPLES` resamples.

    Returns:
        `(float, float)`: Low and high, in percent.
    """
    if num_correct in (0, num_total):
        return accuracy_interval(num_correct, num_total)
    # images drawn with replacement are correct or not independently of each other: a binomial number of them is
    correct = np.random.default_rng(seed).binomial(num_total, num_correct / num_total, NUM_RESAMPLES)
    low, high = np.percentile(100 * correct / num_total, [2.5, 97.5])
    return float(low), float(high)


def times_drawn(number: int, seed: int) -> np.ndarray:
    """How often each of so many images is drawn in `NUM_RESAMPLES` resamples (NUM_RESAMPLES, number) of as many."""
    return np.random.default_rng(seed).multinomial(number, np.full(number, 1 / number), NUM_RESAMPLES)
