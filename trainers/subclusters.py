"""Finer groups inside a class, found by k-means without labels, as Fig. 3 of S-JEA (arXiv 2305.11701) looks for.

Shapes: n images of one class, D width of an embedding, K sub-clusters, T nearest images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from trainers.structure import unit_vectors

NUM_SUBCLUSTERS = 4
NUM_NEAREST = 8
MIN_CLASS_IMAGES = 2 * NUM_SUBCLUSTERS
"""Images of a class below which its sub-clusters mean nothing."""
_NUM_STARTS = 10


@dataclass
class Subclusters:
    """
    The sub-clusters of a class, the largest first.

    Args:
        clusters (`np.ndarray` of shape `(n,)`, int64): The sub-cluster of each image.
        nearest (`list` of `np.ndarray` of shape `(T,)`): Of each sub-cluster the images nearest to its centre, nearest
            first; fewer where it has fewer.
        silhouette (`float`): How far apart the sub-clusters are, from -1 to 1. No labels are in it: it says that there
            are groups, not that they mean something.
    """

    clusters: np.ndarray
    nearest: list[np.ndarray]
    silhouette: float


def find_subclusters(embeddings: torch.Tensor | np.ndarray, seed: int = 0) -> Subclusters:
    """
    Four groups of the images of one class, by k-means on embeddings scaled to length 1; the same at every call.

    Args:
        embeddings (`torch.Tensor` or `np.ndarray` of shape `(n, D)`): Of the images of one class, at least 8.
        seed (`int`): Of k-means.

    Returns:
        [`Subclusters`]: One alone, of silhouette 0, if the embeddings are all the same.
    """
    unit_x = unit_vectors(embeddings)
    num_clusters = min(NUM_SUBCLUSTERS, len(np.unique(unit_x, axis=0)))
    with threadpool_limits(1):  # as in structure.py
        k_means = KMeans(num_clusters, n_init=_NUM_STARTS, random_state=seed).fit(unit_x)
        has_silhouette = 1 < num_clusters < len(unit_x)
        silhouette = float(silhouette_score(unit_x, k_means.labels_)) if has_silhouette else 0.0
    distances = k_means.transform(unit_x)
    by_size = np.argsort(-np.bincount(k_means.labels_), kind="stable")
    nearest = []
    for cluster in by_size:
        members = np.flatnonzero(k_means.labels_ == cluster)
        nearest.append(members[np.argsort(distances[members, cluster], kind="stable")][:NUM_NEAREST])
    return Subclusters(np.argsort(by_size)[k_means.labels_], nearest, silhouette)


def subcluster_silhouettes(levels: Sequence[torch.Tensor], labels: np.ndarray, seed: int = 0) -> dict[int, np.ndarray]:
    """
    How far apart the sub-clusters of each class are, level by level.

    Args:
        levels (`list` of `torch.Tensor` of shape `(n, D)`): The embeddings of all images at each level.
        labels (`np.ndarray` of shape `(n,)`): Class indices.
        seed (`int`): Of k-means.

    Returns:
        `dict` by class index, of the classes with at least 8 images: a silhouette for each level.
    """
    silhouettes = {}
    for label, count in zip(*np.unique(labels, return_counts=True), strict=True):
        if count >= MIN_CLASS_IMAGES:
            members = labels == label
            silhouettes[int(label)] = np.array([find_subclusters(x[members], seed).silhouette for x in levels])
    return silhouettes
