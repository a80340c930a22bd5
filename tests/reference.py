"""The papers' equations, literal and slow: the truth that the tests of masks, losses and models compare with."""

import math
import random

import torch


def variance(z):
    """VICReg (arXiv 2105.04906), v(Z): hinge on the standard deviation of each feature, one feature at a time."""
    total = 0.0
    for feature in z.unbind(dim=1):
        mean = sum(feature) / len(feature)
        spread = sum((value - mean) ** 2 for value in feature) / (len(feature) - 1)
        total = total + torch.clamp(1 - torch.sqrt(spread + 1e-4), min=0)
    return total / z.shape[1]


def covariance(z):
    """VICReg, c(Z): squared covariance of every ordered pair of different features, summed, over their number."""
    total = 0.0
    deviations = [feature - sum(feature) / len(feature) for feature in z.unbind(dim=1)]
    for i, first in enumerate(deviations):
        for j, second in enumerate(deviations):
            if i != j:
                total = total + ((first * second).sum() / (len(first) - 1)) ** 2
    return total / z.shape[1]


def vicreg(a, b):
    """VICReg's unweighted terms of a pair of views."""
    return {
        "invariance": ((a - b) ** 2).sum() / a.numel(),
        "variance": (variance(a) + variance(b)) / 2,
        "covariance": covariance(a) + covariance(b),
    }


def algorithm_1(blocks):
    """C-JEPA (arXiv 2410.19560), Algorithm 1: VICReg's terms averaged over all ordered pairs of blocks (B, M, D)."""
    views = blocks.unbind(dim=1)
    pairs = [vicreg(views[i], views[j]) for i in range(len(views)) for j in range(len(views)) if i != j]
    return {name: sum(terms[name] for terms in pairs) / len(pairs) for name in pairs[0]}


def smooth_l1(predictions, targets):
    """Huber's loss with its knee at 1, the mean over all entries."""
    distance = (predictions - targets).abs()
    return torch.where(distance < 1, 0.5 * distance**2, distance - 0.5).sum() / distance.numel()


def cjepa_loss(reading, predictions, targets, context, weight):
    """C-JEPA, Eq. 21 and 22 with the paper's 25, 25 and 1, in each reading of its VICReg term."""
    prediction = smooth_l1(predictions, targets)
    if reading == "blocks":
        terms = algorithm_1(predictions.mean(dim=2))
    elif reading == "pair":
        terms = vicreg(context.mean(dim=1), predictions.flatten(1, 2).mean(dim=1))
    else:
        mean = context.mean(dim=1)
        terms = {"invariance": prediction, "variance": variance(mean), "covariance": covariance(mean)}
    regularizer = 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]
    return prediction + weight * regularizer, {"prediction": prediction, **terms}


def sincos(rows, columns, width):
    """I-JEPA's position embeddings, number by number: sines and cosines of the column, then of the row."""
    table = []
    for row in range(rows):
        for column in range(columns):
            features = []
            for place in (column, row):
                angles = [place / 10000 ** (4 * i / width) for i in range(width // 4)]
                features += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            table.append(features)
    return torch.tensor(table)


def patch_tokens(pixel_values, projection):
    """Patch embeddings (B, N, D) by the convolution that the literature writes."""
    return projection(pixel_values).flatten(2).transpose(1, 2)


def block_masks(rng: random.Random, batch_size, rows, columns):
    """
    I-JEPA's masks as sets of patches, image by image, by the law that `sample_block_masks` states.

    Returns the target blocks' (height, width), a list of target blocks for each image, and the images' contexts, cut
    to one length.
    """
    share, aspect = rng.uniform(0.15, 0.2), rng.uniform(0.75, 1.5)
    target_size = round(rows * math.sqrt(share * aspect)), round(columns * math.sqrt(share / aspect))
    share = rng.uniform(0.85, 1.0)
    context_size = round(rows * math.sqrt(share)), round(columns * math.sqrt(share))

    def place(height, width):
        top, left = rng.randint(0, rows - height), rng.randint(0, columns - width)
        return {(top + r) * columns + left + c for r in range(height) for c in range(width)}

    layouts = []
    for _ in range(math.ceil(batch_size * 4 / 3)):
        targets = [place(*target_size) for _ in range(4)]
        layouts.append((targets, place(*context_size) - set().union(*targets)))
    layouts.sort(key=lambda layout: len(layout[1]), reverse=True)
    layouts = layouts[:batch_size]

    bucket = 2 ** int(math.log2(rows * columns / 16))
    length = min(len(context) for _, context in layouts) // bucket * bucket
    contexts = [set(rng.sample(sorted(context), length)) for _, context in layouts]
    return target_size, [targets for targets, _ in layouts], contexts
