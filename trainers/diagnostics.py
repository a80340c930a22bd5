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
    embeddings = _where_float64_is(embeddings)
    if embeddings.shape[0] < embeddings.shape[1]:
        embeddings = embeddings.T
    gram = sum(rows.T @ rows for rows in (part.double() for part in embeddings.split(_ROWS)))
    if not gram.isfinite().all():
        return math.nan
    return _effective_rank(torch.linalg.eigvalsh(gram).clamp_min(0).sqrt())


def _where_float64_is(embeddings: torch.Tensor) -> torch.Tensor:
    """Without their graph, and not on a device that has no float64."""
    embeddings = embeddings.detach()
    return embeddings.cpu() if embeddings.device.type == "mps" else embeddings


def _effective_rank(values: torch.Tensor) -> float:
    """exp of the entropy of p = values / sum(values) + 1e-7, of values (D,) in float64 from 0 up."""
    # all values zero: every p is the 1e-7 alone, and the rank 1
    p = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
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


def correlation(embeddings: torch.Tensor) -> float:
    """
    How much features repeat each other: mean |c_ij| over i != j of their correlation matrix c.

    Covariances divided by standard deviations, so that it does not depend on the features' size; those of a feature
    that never varies count as 0. Independent features give about 0.8 / sqrt(n), n images drawn from one line 1.

    Args:
        embeddings (`torch.Tensor` of shape `(n, D)`): One embedding an image, at least 2.

    Returns:
        `float`: From 0 to 1; 0 of a single feature.
    """
    centred = embeddings.detach().float()
    centred = centred - centred.mean(dim=0)
    lengths = centred.norm(dim=0)
    unit = centred / lengths.clamp_min(torch.finfo(torch.float32).tiny)
    width = unit.shape[1]
    off_diagonal = (unit.T @ unit).abs().fill_diagonal_(0)
    return (off_diagonal.sum() / max(width * (width - 1), 1)).item()


def lidar(embeddings: torch.Tensor, delta: float = 1e-4) -> float:
    """
    LiDAR, the effective rank of what tells images apart and views of an image do not (arXiv 2312.04000).

    exp(-sum p log p) with p = e / sum(e) + 1e-7, where e are the eigenvalues of S_w^-1/2 S_b S_w^-1/2: S_b is the
    covariance of the images' means, S_w that of views around the mean of their image, plus delta on its diagonal.

    Args:
        embeddings (`torch.Tensor` of shape `(n, q, D)`): Of n images q views each, at least 2 of both; the paper has
            1,000 images and 10 to 50 views.
        delta (`float`): Above 0.

    Returns:
        `float`: From 1 (collapsed) to min(n - 1, D), and a trace more; NaN if an embedding is not finite.

    Raises:
        ValueError: Another shape, or fewer than 2 images or views.
    """
    if embeddings.ndim != 3 or min(embeddings.shape[:2]) < 2:
        raise ValueError(
            f"embeddings has shape {tuple(embeddings.shape)}; give (n, q, D), of 2 images or more 2 views or more."
        )
    embeddings = _where_float64_is(embeddings).double()
    if not embeddings.isfinite().all():
        return math.nan
    means = embeddings.mean(dim=1)
    within = (embeddings - means.unsqueeze(1)).flatten(0, 1)
    between = means - means.mean(dim=0)
    variances, axes = torch.linalg.eigh(within.T @ within / len(within))
    whitened = between @ axes * (variances.clamp_min(0) + delta).rsqrt()
    return _effective_rank(torch.linalg.eigvalsh(whitened.T @ whitened / len(whitened)).clamp_min(0))
