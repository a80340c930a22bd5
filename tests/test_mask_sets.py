"""Several mask sets of an image are so many images that share the target encoder's pass."""

import pytest
import torch
from tiny import images, seeded, tiny_model

UPPER = {"num_hidden_layers": 1, "hidden_size": 48, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.mark.parametrize("changes", [
    {}, {"regularizer": "blocks", "regularizer_weight": 0.1}, {"predictor_attention": "shared_context"},
    {"upper_levels": [UPPER], "num_target_blocks": 1, "min_context_patches": 4},
], ids=["context", "blocks", "shared", "stack"])  # fmt: skip
def test_they_are_images_under_masks_of_their_own(changes):
    """The truth: every image twice in the batch, each time with one of its mask sets."""
    model, plain = (tiny_model(num_mask_sets=number, **changes).double() for number in (2, 1))
    pixel_values = images().double()
    masks = model.sample_masks(8, model.grid_sizes(pixel_values)[-1], generator=seeded())
    twice = pixel_values[torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])]
    found, expected = model(pixel_values, *masks), plain(twice, *masks)
    for name in ("predictions", "targets", "loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-12, rtol=1e-9)
    for name, term in (expected.loss_terms | expected.signs).items():
        torch.testing.assert_close((found.loss_terms | found.signs)[name], term, atol=1e-6, rtol=1e-6)
    for views, alone in zip(found.level_views, expected.level_views, strict=True):
        assert views.shape[:2] == (4, 2 * masks[1].shape[1])
        assert torch.equal(views[1], alone[2:4].flatten(0, 1))
    for embeddings, alone in zip(found.level_embeddings, expected.level_embeddings, strict=True):
        torch.testing.assert_close(embeddings, alone[::2], atol=1e-12, rtol=0)
    found.loss.backward()
    expected.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-6, msg=name)


def test_the_target_encoder_sees_each_image_once():
    model, seen = tiny_model(num_mask_sets=3), {}
    for name in ("cjepa", "context_encoder"):
        layer = getattr(model, name).layers[0]
        layer.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: len(output)}))
    output = model(images(), generator=seeded())
    assert seen == {"cjepa": 4, "context_encoder": 12}
    assert len(output.context_ids) == len(output.target_ids) == 12
    assert not torch.equal(*output.target_ids[:2])  # of one image


def test_statistics_of_other_micro_batches_have_a_row_for_each_set():
    model = tiny_model(num_mask_sets=2)
    masks = model.sample_masks(8, generator=seeded())
    assert model.statistic_rows(images(), *masks)[0].shape == (8, 1, 32)


def test_masks_of_another_number_are_refused():
    model = tiny_model(num_mask_sets=2)
    with pytest.raises(ValueError, match="context_ids has 4 masks; give 8, num_mask_sets of each image"):
        model(images(), *model.sample_masks(4))
    with pytest.raises(ValueError, match="num_mask_sets=0 must be a whole number of 1 or more"):
        tiny_model(num_mask_sets=0)
