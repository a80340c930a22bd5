"""LiDAR of encoders, against its formula written out where crops of an image are all alike."""

import numpy as np
import pytest
import scipy.linalg
import torch
from tiny import tiny_model

from trainers.datasets import ImageDataset, ImageSource
from trainers.embedding import extract_embeddings
from trainers.encoder_lidar import lidar_of_levels
from trainers.evaluation import EvaluationArguments
from trainers.pooling import OneLevel
from trainers.transforms import eval_transform

SIZE, MEAN, STD = 32, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
ARGUMENTS = EvaluationArguments(eval_batch_size=16, precision="float32", disable_tqdm=True)


def plain_images(number=30):
    """Images of one colour each, of which every crop is the whole."""
    colours = np.random.default_rng(0).integers(0, 256, (number, 1, 1, 3), dtype=np.uint8)
    return ImageSource(np.tile(colours, (1, SIZE, SIZE, 1)))


def rank_between(embeddings):
    """The effective rank of the covariance of images, which is LiDAR where nothing varies within them."""
    e = np.linalg.eigvalsh(np.cov(embeddings.double().numpy().T, bias=True)).clip(0)
    p = e / e.sum() + 1e-7
    return np.exp(-(p * np.log(p)).sum())


STACK = {"upper_levels": [{"hidden_size": 16}], "min_context_patches": 8}


@pytest.mark.parametrize("changes", [{}, STACK], ids=["one level", "stack"])
def test_crops_of_an_image_are_its_views(changes):
    model, source = tiny_model(**changes).cjepa.eval(), plain_images()
    found = lidar_of_levels(model, source, (SIZE, SIZE), MEAN, STD, ARGUMENTS)
    images = ImageDataset(source, eval_transform((SIZE, SIZE)))
    levels = []
    for level in range(model.config.num_levels):
        encoder = OneLevel(model, level)
        levels.append(extract_embeddings(encoder, images, MEAN, STD, progress=False)[0])
    assert found == pytest.approx([rank_between(each) for each in levels], rel=1e-2)
    assert found == lidar_of_levels(model, source, (SIZE, SIZE), MEAN, STD, ARGUMENTS)


def test_what_varies_within_an_image_counts_against_what_varies_between():
    noise = ImageSource(np.random.default_rng(0).integers(0, 256, (30, SIZE, SIZE, 3), dtype=np.uint8))
    model, seen = tiny_model().cjepa.eval(), []
    model.register_forward_hook(lambda module, given, output: seen.append(output.pooler_output))
    (found,) = lidar_of_levels(model, noise, (SIZE, SIZE), MEAN, STD, ARGUMENTS)
    crops = torch.cat(seen).double().numpy().reshape(30, 10, -1)
    means = crops.mean(axis=1)
    within = np.mean([np.outer(v, v) for v in (crops - means[:, None]).reshape(300, -1)], axis=0)
    assert np.trace(within) > 0.1 * np.trace(np.cov(means.T))
    e = scipy.linalg.eigvalsh(np.cov(means.T, bias=True), within + 1e-4 * np.eye(len(within))).clip(0)
    p = e / e.sum() + 1e-7
    assert found == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
