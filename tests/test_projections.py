"""Layouts in the plane and sub-clusters of a class: planted groups, and the definitions written out."""

import numpy as np
import pytest
import torch
from levels import balanced, planted, silhouette_written_out
from tiny import seeded

from trainers.errors import InputError
from trainers.projections import project
from trainers.structure import unit_vectors
from trainers.subclusters import find_subclusters, subcluster_silhouettes


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_projections_keep_planted_groups_apart(method):
    y = balanced(3, 30)
    points = project(planted(y), method)
    assert points.shape == (90, 2) and points.dtype == np.float32
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    np.fill_diagonal(distances, np.inf)
    # not only the nearest: each point's own group is nearer than any other
    own = y[:, None] == y
    assert (np.where(own, np.where(np.isinf(distances), 0, distances), 0).max(1) < distances[~own].min()).all()


def test_pca_is_the_singular_value_decomposition():
    x = torch.randn(40, 6, generator=seeded()) * torch.arange(1, 7)
    unit = unit_vectors(x).astype(np.float64)
    u, s, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    expected, points = u[:, :2] * s[:2], project(x, "pca")
    for axis in (0, 1):
        sign = np.sign(expected[0, axis] * points[0, axis])
        np.testing.assert_allclose(points[:, axis], sign * expected[:, axis], atol=1e-5)
    flat = project(x[:, :2], "pca")  # as many components as features
    np.testing.assert_allclose(np.linalg.norm(flat, axis=1), np.linalg.norm(
        unit_vectors(x[:, :2]) - unit_vectors(x[:, :2]).mean(0), axis=1), atol=1e-5)  # fmt: skip


def test_tsne_is_the_same_at_every_call_and_hangs_on_directions_only():
    x = torch.randn(30, 6, generator=seeded())
    points = project(x, "tsne", seed=1)
    assert np.array_equal(points, project(x, "tsne", seed=1))
    # powers of two, so that scaling rounds nothing
    scales = 2.0 ** torch.randint(-3, 4, (30, 1), generator=seeded())
    np.testing.assert_allclose(points, project(x * scales, "tsne", seed=1), rtol=1e-3, atol=1e-3)


def test_layouts_of_few_and_of_equal_images():
    assert np.isfinite(project(torch.randn(4, 3, generator=seeded()), "tsne")).all()
    for method in ("tsne", "pca"):
        assert np.array_equal(project(torch.ones(9, 3), method), np.zeros((9, 2)))
    with pytest.raises(InputError, match="3 embeddings of width 5"):
        project(torch.randn(3, 5))
    with pytest.raises(InputError, match="of width 1 cannot"):
        project(torch.randn(9, 1))
    with pytest.raises(InputError, match="no projection 'umap'; choose one of tsne, pca"):
        project(torch.randn(9, 3), "umap")


def test_subclusters_are_the_planted_ones_the_largest_first():
    groups = torch.tensor([2] * 5 + [0] * 12 + [3] * 20 + [1] * 9)
    x = planted(groups)
    for seed in range(4):  # each numbers the groups in an order of its own
        found = find_subclusters(x, seed)
        assert found.clusters.tolist() == [3] * 5 + [1] * 12 + [0] * 20 + [2] * 9
    unit = unit_vectors(x).astype(np.float64)
    for number, nearest in enumerate(found.nearest):
        members = np.flatnonzero(found.clusters == number)
        distances = np.linalg.norm(unit[members] - unit[members].mean(0), axis=1)
        assert nearest.tolist() == members[np.argsort(distances)][:8].tolist()
    assert [len(nearest) for nearest in found.nearest] == [8, 8, 8, 5]
    assert found.silhouette == pytest.approx(silhouette_written_out(unit, found.clusters.tolist()), abs=1e-5)


def test_subclusters_of_equal_images_are_one():
    found = find_subclusters(torch.ones(10, 4))
    assert found.clusters.tolist() == [0] * 10 and len(found.nearest) == 1 and found.silhouette == 0


def test_subcluster_silhouettes_of_classes_with_images_enough():
    labels = np.array([0] * 16 + [1] * 7 + [2] * 16)
    grouped = planted(torch.arange(39) % 4)
    noise = torch.randn(39, 16, generator=seeded())
    found = subcluster_silhouettes([noise, grouped], labels)
    assert list(found) == [0, 2]
    for label, (low, high) in found.items():
        assert low < 0.3 < 0.7 < high
        assert high == find_subclusters(grouped[labels == label]).silhouette
