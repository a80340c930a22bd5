"""Signs of collapse that need no labels. Shapes: n images, D width."""

import math

import torch

_ROWS = 8192


def rankme(embeddings: torch.Tensor) -> float:
    """
    RankMe, the effective rank of embeddings (arXiv 2210.02885): exp of the entropy of their singular values.

    exp(-sum p log p) with p = s / sum(s) + 1e-7, where s are the singular values of the embeddings, not centred.
    They are the roots of the eigenvalues of the smaller Gram matrix in float64: what that loses, 1e-8 of the
    largest, is below the 1e-7 of the formula.

    Args:
        embeddings (`torch.Tensor` of shape `(n, D)`): One embedding an image, of any float type and device.

    Returns:
        `float`: From 1 (collapsed) to min(n, D); NaN if an embedding is not finite.
    """
    embeddings = embeddings.detach()
    if embeddings.device.type == "mps":  # which has no float64
        embeddings = embeddings.cpu()
    if embeddings.shape[0] < embeddings.shape[1]:
        embeddings = embeddings.T
    gram = sum(rows.T @ rows for rows in (part.double() for part in embeddings.split(_ROWS)))
    if not gram.isfinite().all():
        return math.nan
    singular_values = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    # all embeddings zero: every p is the 1e-7 alone, and the rank 1
    p = singular_values / singular_values.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return torch.exp(-(p * p.log()).sum()).item()


def feature_std(embeddings: torch.Tensor) -> float:
    """
    The standard deviation of each feature over the images, averaged over the features; 0 when collapsed.

    Args:
        embeddings (`torch.Tensor` of shape `(n, D)`): One embedding an image, at least 2.

    Returns:
        `float`: The mean of D unbiased standard deviations.
    """
    return embeddings.detach().float().std(dim=0).mean().item()
