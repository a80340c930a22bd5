"""The losses against the papers' equations written as loops, with gradients and under mixed precision."""

import pytest
import reference
import torch
from tiny import pair_terms, seeded

from modeling_cjepa.losses_cjepa import (
    append_constant,
    batch_covariances,
    block_vicreg_terms,
    covariance_term,
    exchange_bytes,
    exchange_form,
    gather,
    prediction_loss,
    take,
    variance_term,
)


def embeddings(*shape, seed=0):
    """Correlated features, some with a spread below the hinge of the variance term and some above."""
    z = torch.randn(*shape, generator=seeded(seed))
    mix = torch.randn(shape[-1], shape[-1], generator=seeded(seed + 100)) / shape[-1] ** 0.5
    return 2.0 + z @ mix * torch.linspace(0.2, 1.8, shape[-1])


def assert_terms_and_gradients_match(function, literal, *inputs):
    """Float32 terms of `function` against those of `literal` in float64, each with its own gradient."""
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    terms, expected = function(*ours), literal(*theirs)
    assert list(terms) == list(expected) == ["invariance", "variance", "covariance"]
    for name, term in terms.items():
        assert term.shape == () and term.dtype == torch.float32
        torch.testing.assert_close(term.double(), expected[name], rtol=1e-5, atol=1e-7)
        found = torch.autograd.grad(term, ours, retain_graph=True)
        wanted = torch.autograd.grad(expected[name], theirs, retain_graph=True)
        for a, b in zip(found, wanted, strict=True):
            assert b.abs().max() > 1e-3
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_vicreg_terms_are_those_of_the_paper():
    assert_terms_and_gradients_match(pair_terms, reference.vicreg, embeddings(6, 5), embeddings(6, 5, seed=1))


@pytest.mark.parametrize("num_blocks", [2, 3, 5])
def test_block_terms_are_the_mean_over_ordered_pairs(num_blocks):
    assert_terms_and_gradients_match(block_vicreg_terms, reference.algorithm_1, embeddings(6, num_blocks, 5))


def test_variance_of_equal_embeddings_is_finite():
    z = torch.ones(4, 3, requires_grad=True)
    term = variance_term(batch_covariances(z.unsqueeze(1)))
    term.backward()
    assert term.item() == pytest.approx(0.99)
    assert z.grad.isfinite().all()


def test_terms_are_means_over_matrices():
    blocks = embeddings(6, 3, 5)
    matrices = batch_covariances(blocks)
    for function, literal in ((variance_term, reference.variance), (covariance_term, reference.covariance)):
        expected = sum(literal(block.double()) for block in blocks.unbind(dim=1)) / 3
        torch.testing.assert_close(function(matrices).double(), expected, rtol=1e-5, atol=1e-7)


def test_terms_of_one_image_or_one_block_are_refused():
    with pytest.raises(ValueError, match="batch of 1 image"):
        pair_terms(torch.randn(1, 4), torch.randn(1, 4))
    with pytest.raises(ValueError, match="batch of 1 image"):
        block_vicreg_terms(torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match="num_target_blocks"):
        block_vicreg_terms(torch.randn(3, 1, 4))


def test_prediction_loss_is_the_huber_or_the_squared_distance():
    predictions, targets = 2 * embeddings(3, 2, 4, 5), embeddings(3, 2, 4, 5, seed=1)
    distance = predictions.double() - targets.double()
    assert (distance.abs() < 1).any() and (distance.abs() > 1).any()
    huber = reference.smooth_l1(predictions.double(), targets.double())
    torch.testing.assert_close(prediction_loss(predictions, targets).double(), huber, rtol=1e-6, atol=0)
    squared = (distance**2).sum() / distance.numel()
    torch.testing.assert_close(prediction_loss(predictions, targets, "mse").double(), squared, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["smooth_l1", "mse"])
def test_prediction_loss_of_half_precision_is_computed_in_float32(kind):
    predictions, targets = embeddings(3, 2, 4, 5).bfloat16(), embeddings(3, 2, 4, 5, seed=1)
    loss = prediction_loss(predictions, targets, kind)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, prediction_loss(predictions.float(), targets, kind))


def test_statistics_are_float32_under_autocast_and_of_half_precision():
    a, b = embeddings(8, 16), embeddings(8, 16, seed=1)
    blocks = torch.stack([a, b, a + b], dim=1)
    exact = pair_terms(a, b), block_vicreg_terms(blocks), {"alone": covariance_term(batch_covariances(blocks))}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = pair_terms(a, b), block_vicreg_terms(blocks), {"alone": covariance_term(batch_covariances(blocks))}
    assert mixed == exact
    halves = a.bfloat16(), b.bfloat16()
    assert pair_terms(*halves) == pair_terms(*(half.float() for half in halves))
    assert block_vicreg_terms(blocks.bfloat16()) == block_vicreg_terms(blocks.bfloat16().float())


@pytest.mark.parametrize("shape", [(2, 3), (2, 4, 3)])
def test_take_picks_each_images_own_tokens(shape):
    tokens = torch.randn(2, 7, 5, generator=seeded())
    ids = torch.randint(7, shape, generator=seeded(1))
    taken = take(tokens, ids)
    assert taken.shape == (*shape, 5)
    for image in range(2):
        expected = [tokens[image, position] for position in ids[image].flatten().tolist()]
        assert torch.equal(taken[image].reshape(-1, 5), torch.stack(expected))


def test_gather_in_one_process_is_the_identity():
    x = torch.randn(3, 2)
    assert gather(x) is x


def test_constant_rows_take_part_without_a_gradient():
    rows, other = embeddings(3, 2).requires_grad_(), embeddings(3, 2, seed=1).requires_grad_()
    assert append_constant(rows, []) is rows
    appended = append_constant(rows, [other, other])
    assert torch.equal(appended, torch.cat([rows, other, other]))
    weights = torch.arange(18.0).view(9, 2)
    (appended * weights).sum().backward()
    assert torch.equal(rows.grad, 3 * weights[:3]) and other.grad is None


@pytest.mark.parametrize(
    ("num_rows", "width", "num_processes", "gathered", "reduced"),
    [
        # by hand, 4 bytes a float. Gathered: each row to each other, and a sum of all rows' gradients; reduced: a sum
        # of D + D * D; a ring sums x floats by sending 2 * x * (W - 1) / W
        (128, 384, 1, 0, 0),
        (8, 32, 2, 4 * (8 * 32 + 16 * 32), 4 * (32 + 32 * 32)),
        (128, 384, 4, 4 * (3 * 128 * 384 + 2 * 512 * 384 * 3 // 4), 4 * 2 * (384 + 384 * 384) * 3 // 4),
    ],
)
def test_bytes_are_those_of_rings(num_rows, width, num_processes, gathered, reduced):
    assert exchange_bytes(num_rows, width, num_processes) == {"gathered": gathered, "reduced": reduced}


def test_the_fewer_bytes_are_exchanged():
    # the batch over all processes against two thirds of the width
    assert [exchange_form(rows, 32, 2) for rows in (10, 11, 12)] == ["gathered", "gathered", "reduced"]
    assert [exchange_form(rows, 32, 4) for rows in (5, 6)] == ["gathered", "reduced"]
