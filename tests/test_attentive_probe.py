"""The attentive probe on tokens whose mean says nothing, and the training of several at once."""

import pytest
import torch
from tiny import seeded

from trainers import attentive_probe
from trainers.attentive_probe import EncodedTokens, StoredTokens, attentive_predict, new_probe
from trainers.errors import InputError
from trainers.probes import linear_predict


def marked(num_images, seed, num_tokens=6, width=16):
    """One token of each image, which a mark tells, points to its class; all others to another class each."""
    directions = torch.linalg.qr(torch.randn(width, width, generator=seeded(7)))[0]
    generator = seeded(seed)
    classes = torch.randint(3, (num_images, num_tokens), generator=generator)
    place = torch.randint(num_tokens, (num_images,), generator=generator)
    rows = torch.arange(num_images)
    tokens = 2 * directions[classes] + 0.3 * torch.randn(num_images, num_tokens, width, generator=generator)
    tokens[rows, place] += 2 * directions[5]
    return tokens, classes[rows, place]


def test_reads_what_the_mean_does_not_say(monkeypatch):
    monkeypatch.setattr(attentive_probe, "_NUM_STEPS", 200)
    (train, train_y), (test, test_y) = marked(1000, 0), marked(400, 1)
    state = torch.get_rng_state()
    found = attentive_predict(StoredTokens(train), train_y + 4, StoredTokens(test), 400)
    assert torch.equal(torch.get_rng_state(), state)
    of_mean = linear_predict(train.mean(1), train_y, test.mean(1)).predictions
    assert (of_mean == test_y).float().mean() < 0.75
    assert (found.predictions - 4 == test_y).float().mean() > 0.93
    encoded = [
        EncodedTokens(lambda ids, size, tokens=tokens: iter(tokens[ids].split(size)), tokens.shape[2])
        for tokens in (train, test)
    ]
    again = attentive_predict(encoded[0], train_y + 4, encoded[1], 400)
    assert torch.equal(again.predictions, found.predictions) and again.learning_rate == found.learning_rate


def test_each_probe_is_trained_as_if_alone(monkeypatch):
    monkeypatch.setattr(attentive_probe, "_NUM_STEPS", 20)
    tokens, y = marked(300, 0)
    settings = (lambda: new_probe(16, 3), StoredTokens(tokens), y, torch.arange(300), 0, False)
    together = attentive_probe._train(*settings)
    for probe, rate in zip(together, attentive_probe.LEARNING_RATES, strict=True):
        monkeypatch.setattr(attentive_probe, "LEARNING_RATES", (rate,))
        (alone,) = attentive_probe._train(*settings)
        for name, values in alone.state_dict().items():
            torch.testing.assert_close(probe.state_dict()[name], values)


def test_the_learning_rate_is_chosen_on_train_images(monkeypatch):
    """One that moves nothing is not taken, and neither the test images nor their order change the choice."""
    monkeypatch.setattr(attentive_probe, "_NUM_STEPS", 100)
    (train, train_y), (test, _) = marked(600, 0), marked(50, 1)
    for rates in ((1e-9, 3e-3), (3e-3, 1e-9)):
        monkeypatch.setattr(attentive_probe, "LEARNING_RATES", rates)
        found = attentive_predict(StoredTokens(train), train_y, StoredTokens(test), 50)
        assert found.learning_rate == 3e-3
        turned = attentive_predict(StoredTokens(train), train_y, StoredTokens(test.flip(0)), 50)
        assert torch.equal(turned.predictions.flip(0), found.predictions)


def test_held_out_images_are_not_fitted(monkeypatch):
    monkeypatch.setattr(attentive_probe, "_NUM_STEPS", 2)
    seen = []

    class Watched(StoredTokens):
        def batches(self, ids, batch_size):
            seen.append(ids.clone())
            return super().batches(ids, batch_size)

    tokens, y = marked(100, 0)
    attentive_predict(Watched(tokens), y, StoredTokens(tokens), 100)
    *fitted, held_out = seen
    assert sorted(torch.cat([fitted[-1], held_out]).tolist()) == list(range(100))
    assert not set(torch.cat(fitted).tolist()) & set(held_out.tolist())


@pytest.mark.parametrize(("width", "num_heads"), [(384, 6), (32, 1), (200, 2), (130, 2), (194, 2), (211, 1)])
def test_heads_divide_the_width(width, num_heads):
    assert new_probe(width, 5)[0].num_heads == num_heads
    assert new_probe(width, 5)(torch.randn(2, 3, width)).shape == (2, 5)
    wide = new_probe(4 * width, 5, width)
    assert wide(torch.randn(2, 3, 4 * width)).shape == (2, 5) and wide[1].in_features == width
    assert wide[0].num_heads == num_heads


def test_one_image_of_each_class_is_too_few():
    tokens = StoredTokens(torch.randn(3, 2, 8))
    with pytest.raises(InputError, match="one train image of each class"):
        attentive_predict(tokens, torch.arange(3), tokens, 3)
