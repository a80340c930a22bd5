"""Embeddings laid out in the plane, to be looked at: t-SNE (van der Maaten and Hinton 2008) and PCA.

Shapes: n images, D width of an embedding.
"""

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from trainers.errors import InputError
from trainers.structure import unit_vectors

METHODS = {"tsne": "t-SNE", "pca": "PCA"}
"""The projections, and what a reader calls them."""
MIN_IMAGES = 4
_MAX_PERPLEXITY = 30


def project(embeddings: torch.Tensor | np.ndarray, method: str = "tsne", seed: int = 0) -> np.ndarray:
    """
    Embeddings, scaled to length 1, in the plane; the same at every call.

    Args:
        embeddings (`torch.Tensor` or `np.ndarray` of shape `(n, D)`): At least 4 images and 2 features.
        method (`"tsne"` or `"pca"`): t-SNE, which keeps neighbours, starts from the principal components and has a
            perplexity of 30, or of a third of the other images if that is less; or the principal components, which
            keep large distances.
        seed (`int`): Of t-SNE.

    Returns:
        `np.ndarray` of shape `(n, 2)`, float32; all zeros if the embeddings are all the same.

    Raises:
        InputError: There is no such method, there are too few images or features, or embeddings are not finite.
    """
    if method not in METHODS:
        raise InputError(f"There is no projection {method!r}; choose one of {', '.join(METHODS)}.")
    unit_x = unit_vectors(embeddings)
    num_images, width = unit_x.shape
    if num_images < MIN_IMAGES or width < 2:
        raise InputError(f"{num_images} embeddings of width {width} cannot be laid out; give at least {MIN_IMAGES} "
                         "images and an encoder of width 2 or more.")  # fmt: skip
    if np.ptp(unit_x, axis=0).max() == 0:
        # of a collapsed encoder, which shall be seen as such: t-SNE would divide by their deviation
        return np.zeros((num_images, 2), np.float32)
    if method == "pca":
        projection = PCA(2, svd_solver="full" if width == 2 else "arpack", random_state=seed)
    else:
        perplexity = min(_MAX_PERPLEXITY, (num_images - 1) / 3)
        projection = TSNE(2, init="pca", perplexity=perplexity, random_state=seed)
    # one thread: the order in which several add up is chance, and t-SNE makes another picture of the last bits
    with threadpool_limits(1):
        return projection.fit_transform(unit_x).astype(np.float32)
