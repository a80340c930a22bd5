"""The sweep of linear probes, against scikit-learn's logistic regression on the same features."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from tiny import seeded

from trainers import linear_sweep
from trainers.errors import InputError
from trainers.linear_sweep import sweep_predict

GRID = 10.0 ** np.arange(-4, 4)


def clusters(num_images, seed, width=16, num_classes=4, spread=1.5, common=0.0):
    """Overlapping classes, features of very different scales; `common` is the share that all features have alike."""
    centres = torch.randn(num_classes, width, generator=seeded(99))
    generator = seeded(seed)
    y = torch.randint(num_classes, (num_images,), generator=generator)
    x = centres[y] + spread * torch.randn(num_images, width, generator=generator)
    x = x + common * torch.randn(num_images, 1, generator=generator)
    return x * torch.logspace(-2, 2, width) + 3, y


@pytest.mark.parametrize(
    ("num_images", "num_steps", "settings"),
    [
        (20_000, 1000, {"spread": 2.0}),
        (20_000, 1000, {"common": 100.0}),
        (2000, 200, {"width": 100, "spread": 4.0, "num_classes": 3}),  # where the penalty matters
    ],
)
def test_as_good_as_scikit_learn_at_its_best(num_images, num_steps, settings, monkeypatch):
    """20,000 test images: 0.3 points are more than their choice leaves open between probes that agree so often."""
    monkeypatch.setattr(linear_sweep, "_NUM_STEPS", num_steps)
    (train_x, train_y), (test_x, test_y) = clusters(num_images, 0, **settings), clusters(20_000, 1, **settings)
    probe = sweep_predict(train_x, train_y + 2, test_x)  # class indices need not start at 0
    found = 100 * (probe.predictions - 2 == test_y).double().mean().item()
    scaler = StandardScaler().fit(train_x.double())
    scaled, test_scaled = scaler.transform(train_x.double()), scaler.transform(test_x.double())
    best = max(
        100 * LogisticRegression(C=C, max_iter=5000).fit(scaled, train_y).score(test_scaled, test_y) for C in GRID
    )
    assert found > best - 0.3
    assert 40 < best < 99


def test_a_head_is_the_minimum_of_the_penalised_loss(monkeypatch):
    """The predictions of one setting, trained to its end, are those of scikit-learn at C = 1 / (n * penalty)."""
    monkeypatch.setattr(linear_sweep, "LEARNING_RATES", (0.3,))
    monkeypatch.setattr(linear_sweep, "PENALTIES", (0.05,))
    (train_x, train_y), (test_x, _) = clusters(1000, 0), clusters(20_000, 1)
    probe = sweep_predict(train_x, train_y, test_x)
    scaler = StandardScaler().fit(train_x.double())
    reference = LogisticRegression(C=1 / (1000 * 0.05), tol=1e-8, max_iter=5000)
    expected = reference.fit(scaler.transform(train_x.double()), train_y).predict(scaler.transform(test_x.double()))
    assert (probe.predictions.numpy() == expected).mean() > 0.999


def test_settings_are_chosen_on_train_images(monkeypatch):
    """A penalty that leaves nothing of the weights, and steps that end in infinity, are not taken."""
    monkeypatch.setattr(linear_sweep, "LEARNING_RATES", (0.1, 1e30))
    monkeypatch.setattr(linear_sweep, "PENALTIES", (1e-4, 1e9))
    monkeypatch.setattr(linear_sweep, "_NUM_STEPS", 100)
    (train_x, train_y), (test_x, test_y) = clusters(600, 0), clusters(300, 1)
    probe = sweep_predict(train_x, train_y, test_x)
    assert probe[1:] == pytest.approx((0.1, 1e-4))
    assert (probe.predictions == test_y).double().mean() > 0.8
    again = sweep_predict(train_x, train_y, test_x.flip(0))
    assert torch.equal(again.predictions.flip(0), probe.predictions)


def test_one_image_of_each_class_is_too_few():
    with pytest.raises(InputError, match="one train image of each class"):
        sweep_predict(torch.randn(3, 4), torch.arange(3), torch.randn(2, 4))
