"""What a run's log tells of its features: signs of the model, the window between two logs, the latest embeddings."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tiny import images, seeded, tiny_model, tiny_sjea

from modeling_cjepa.signs_cjepa import masked_signs
from trainers.diagnostics import correlation, feature_std, lidar, rankme
from trainers.monitor import MAX_LIDAR_WIDTH, Monitor, embedding_figures, finite_rows, projection


def test_correlation_is_that_of_numpy():
    embeddings = torch.randn(50, 7, generator=seeded()) @ torch.randn(7, 7, generator=seeded(1))
    c = np.corrcoef(embeddings.double().numpy().T)
    expected = np.abs(c[~np.eye(7, dtype=bool)]).mean()
    assert correlation(embeddings) == pytest.approx(expected, rel=1e-5)
    assert correlation(embeddings * torch.logspace(-3, 3, 7) + 5) == pytest.approx(expected, rel=1e-2)


def test_correlation_at_its_ends():
    line = torch.randn(30, 1, generator=seeded()) * torch.tensor([1.0, -2.0, 3.0])
    assert correlation(line) == pytest.approx(1)
    still = torch.cat([line[:, :1], torch.ones(30, 2)], dim=1)
    assert correlation(still) == 0
    assert correlation(line[:, :1]) == 0


def test_signs_by_hand():
    target = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
    # images 0 and 1, one block of two patches each: the blocks' means are +-2, of deviation 2
    targets = torch.tensor([2.0, -2.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    signs = masked_signs(target + torch.tensor([0.0, 3.0]), target, 0.25 * targets, targets)
    assert signs["context_distance"] == pytest.approx((3 / 5 + 3 / 10) / 2)
    assert signs["prediction_norm"] == pytest.approx(0.25) and signs["prediction_std"] == pytest.approx(0.25)
    same = masked_signs(target, target, torch.ones(2, 1, 2, 2), targets)
    assert same["context_distance"] == 0 and same["prediction_std"] == 0
    assert same["prediction_norm"] == pytest.approx(0.5)


def test_the_model_gives_signs_and_views_of_every_level():
    model = tiny_model(upper_levels=[{"hidden_size": 48}], min_context_patches=8)
    output = model(images(), generator=seeded())
    assert [views.shape for views in output.level_views] == [(4, 4, 32), (4, 4, 48)]
    torch.testing.assert_close(output.level_views[0], output.predictions.mean(dim=2))
    assert {"context_distance", "prediction_std", "level1_prediction_norm"} <= output.signs.keys()
    assert not any(value.requires_grad for value in (*output.level_views, *output.signs.values()))
    assert model(images(), generator=seeded(), return_loss=False).signs is None


def test_context_distance_is_0_of_a_copy_that_sees_all():
    model = tiny_model()
    model.context_encoder.load_state_dict(model.cjepa.state_dict())
    everything, target_ids = torch.arange(64).expand(4, 64), torch.arange(8).view(1, 2, 4).expand(4, 2, 4)
    assert model(images(), everything, target_ids).signs["context_distance"] < 1e-5


def test_context_distance_is_taken_where_the_context_is():
    model, context_ids = tiny_model(), torch.arange(0, 64, 5).expand(4, 13)
    signs = model(images(), context_ids, torch.arange(8).view(1, 2, 4).expand(4, 2, 4)).signs
    target = model.cjepa(images()).last_hidden_state[:, context_ids[0]].mean(dim=1)
    context = model.context_encoder(images(), context_ids).last_hidden_state.mean(dim=1)
    expected = ((context - target).norm(dim=1) / target.norm(dim=1)).mean()
    torch.testing.assert_close(signs["context_distance"], expected)


def test_views_of_two_views_are_their_embeddings():
    model = tiny_sjea().eval()
    pixels = torch.randn(4, 2, 3, 32, 32, generator=seeded())
    output = model(pixels)
    for views, embeddings in zip(output.level_views, output.level_embeddings, strict=True):
        torch.testing.assert_close(views[:, 0], embeddings)
    swapped = model(pixels.flip(1))
    torch.testing.assert_close(output.level_views[1][:, 1], swapped.level_embeddings[1])
    assert not output.level_views[0].requires_grad


class Output(dict):
    """What a model of pre-training returns."""

    __getattr__ = dict.__getitem__


def batch(loss: float, embeddings: torch.Tensor, **signs: float) -> Output:
    return Output(
        loss_terms={"prediction": torch.tensor(loss)},
        signs={name: torch.tensor(value) for name, value in signs.items()},
        level_embeddings=(embeddings,),
        level_views=(torch.stack([embeddings, embeddings + 0.1], dim=1),),
    )


def test_window_and_latest_images():
    rows = torch.randn(12, 5, generator=seeded())
    monitor = Monitor(num_images=8, batch_size=4)
    for number, loss in enumerate((1.0, math.nan, 2.0)):
        monitor.add(batch(loss, rows[4 * number : 4 * number + 4], prediction_std=loss / 2))
    summary = monitor.summary(Accelerator(cpu=True))
    assert summary["loss_prediction"] == 1.5 and summary["prediction_std"] == 0.75
    assert summary["rankme"] == pytest.approx(rankme(rows[4:])) and "lidar" in summary
    assert summary["feature_std"] == pytest.approx(feature_std(rows[4:]))
    monitor.reset()
    monitor.add(batch(4.0, rows[:4]))
    summary = monitor.summary(Accelerator(cpu=True))
    assert summary["loss_prediction"] == 4 and "prediction_std" not in summary
    assert summary["feature_std"] == pytest.approx(feature_std(torch.cat([rows[8:], rows[:4]])))


def test_embeddings_that_are_not_finite_are_left_out():
    rows = torch.randn(20, 5, generator=seeded())
    broken = rows.clone()
    broken[3, 1], broken[7] = math.nan, math.inf
    kept = torch.cat([rows[:3], rows[4:7], rows[8:]])
    assert torch.equal(finite_rows(broken), kept)
    assert embedding_figures(broken)["rankme"] == rankme(kept)
    assert all(
        math.isnan(value) for value in embedding_figures(broken[7:8], broken[7:8, None].expand(1, 2, 5)).values()
    )


def test_lidar_of_wide_views_keeps_what_it_tells():
    # 8 directions tell the images apart; a projection to 256 of 600 dimensions keeps them all
    width, axes = 600, torch.linalg.qr(torch.randn(600, 8, generator=seeded())).Q
    means = torch.randn(400, 1, 8, generator=seeded(1)) @ axes.T
    views = means + 0.05 * torch.randn(400, 4, width, generator=seeded(2))
    # of far more images than directions that views differ in
    narrow = embedding_figures(views[:, 0], views)["lidar"]
    assert narrow == pytest.approx(lidar(views), rel=0.25) and 8 < narrow < 12
    columns = projection(width, MAX_LIDAR_WIDTH)
    torch.testing.assert_close(columns.T @ columns, torch.eye(MAX_LIDAR_WIDTH), atol=1e-5, rtol=0)
    assert torch.equal(columns, projection(width, MAX_LIDAR_WIDTH))
    assert "lidar" not in embedding_figures(views[:, 0], views[:, :1])


@pytest.mark.parametrize("batch_size", [6, 10, 24])
def test_as_many_images_are_watched_whatever_the_batch(batch_size):
    monitor, model = Monitor(20, batch_size), tiny_model()
    outputs = [model(images(batch_size, seed=seed), generator=seeded(seed)) for seed in range(5)]
    for output in outputs:
        monitor.add(output)
    summary = monitor.summary(Accelerator(cpu=True))
    assert summary["monitored_images"] == 20
    last = torch.cat([output.level_embeddings[0] for output in outputs])[-20:]
    assert summary["rankme"] == pytest.approx(rankme(last), rel=1e-4)
