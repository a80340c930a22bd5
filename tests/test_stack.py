"""Stacked C-JEPA: a level on the merged tokens of the one below, masks that lie over each other, one level as ever."""

import pytest
import torch
from tiny import SIZES, gradients, images, seeded, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

from modeling_cjepa import CJepaConfig, CJepaForImageClassification, CJepaForPreTraining, CJepaModel
from modeling_cjepa.losses_cjepa import batch_covariances, covariance_term, prediction_loss, variance_term
from modeling_cjepa.masking_cjepa import ids_by_level, tokens_on_grid

UPPER = {"hidden_size": 48, "num_attention_heads": 3, "num_hidden_layers": 1, "predictor_hidden_size": 24}
MASKS = {"min_context_patches": 8}


def stack(*upper_levels, **changes):
    return tiny_model(upper_levels=list(upper_levels) or [dict(UPPER)], **MASKS, **changes)


def test_positions_below_a_position():
    """A 2x3 grid over a 4x6 one over an 8x12 one: each position stands for the 2x2 below it."""
    coarse = torch.tensor([[0, 5]])
    lowest, middle, top = ids_by_level(coarse, (8, 12), [(2, 2), (2, 2)])
    assert torch.equal(top, coarse)
    assert middle.tolist() == [[0, 1, 6, 7, 16, 17, 22, 23]]
    grid = torch.arange(96).view(8, 12)
    assert sorted(lowest[0, :16].tolist()) == sorted(grid[:4, :4].flatten().tolist())
    assert sorted(lowest[0, 16:].tolist()) == sorted(grid[4:, 8:].flatten().tolist())
    assert ids_by_level(coarse, (2, 3), []) == [coarse] and ids_by_level(None, (4, 4), [(2, 2)]) == [None, None]
    # blocks (B, M, K) keep their shape
    assert ids_by_level(coarse.view(1, 2, 1), (4, 6), [(2, 2)])[0].shape == (1, 2, 4)
    with pytest.raises(ValueError, match="A 5x4 grid of tokens cannot be merged by 2x2"):
        ids_by_level(coarse, (5, 4), [(2, 2)])


def test_tokens_lie_at_their_positions():
    tokens = torch.randn(2, 3, 5, generator=seeded())
    ids = torch.tensor([[5, 0, 2], [1, 4, 3]])
    grid = tokens_on_grid(tokens, ids, (2, 3))
    assert grid.shape == (2, 5, 2, 3) and grid.abs().sum().item() == pytest.approx(tokens.abs().sum().item())
    for image in range(2):
        for number, position in enumerate(ids[image].tolist()):
            assert torch.equal(grid[image, :, position // 3, position % 3], tokens[image, number])


def test_one_level_is_plain_to_the_bit():
    """The lowest level of a stack whose upper level sends no gradient down, against a model without one."""
    model = stack({**UPPER, "stop_gradient": True}, regularizer_weight=0.01)
    plain = tiny_model(regularizer_weight=0.01, **MASKS)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    context_ids, target_ids = model.sample_masks(4, generator=seeded())
    output = model(images(), context_ids, target_ids)
    below = [ids_by_level(ids, (8, 8), [(2, 2)])[0] for ids in (context_ids, target_ids)]
    expected = plain(images(), *below)
    output.loss.backward()
    expected.loss.backward()
    for name, term in expected.loss_terms.items():
        assert torch.equal(output.loss_terms[name], term)
    assert torch.equal(output.predictions, expected.predictions) and torch.equal(output.targets, expected.targets)
    of_stack, of_plain = gradients(model), gradients(plain)
    assert of_plain and all(torch.equal(of_stack[name], gradient) for name, gradient in of_plain.items())
    assert plain.config.num_levels == 1 and not [name for name in plain.state_dict() if "upper" in name]


def test_upper_level_written_out():
    """Level 1 by its parts: the tokens below on their grid, patches of 2x2 of them, its own predictor and terms."""
    model = stack({**UPPER, "regularizer_weight": 0.02, "level_weight": 0.5}, regularizer_weight=0.01)
    output = model(images(), generator=seeded())
    context_ids, target_ids = output.context_ids, output.target_ids
    upper_target, upper_context = model.cjepa.upper_levels[0], model.context_encoder.upper_levels[0]
    grid = model.cjepa(images(), level=0).last_hidden_state.view(4, 8, 8, 32).permute(0, 3, 1, 2)
    targets = upper_target(grid).last_hidden_state
    targets = torch.nn.functional.layer_norm(targets, (48,))
    targets = torch.stack([image[ids] for image, ids in zip(targets, target_ids, strict=True)])
    contexts = []
    for image, ids in zip(images(), context_ids, strict=True):  # one image at a time
        below = torch.tensor([[(c // 4 * 2 + i) * 8 + c % 4 * 2 + j for c in ids.tolist() for i in (0, 1)
                               for j in (0, 1)]])  # fmt: skip
        tokens = model.context_encoder(image[None], below, level=0).last_hidden_state[0]
        grid = torch.zeros(64, 32).index_copy(0, below[0], tokens).view(1, 8, 8, 32).permute(0, 3, 1, 2)
        contexts.append(upper_context(grid, ids[None]).last_hidden_state)
    context = torch.cat(contexts)
    predictions = model.upper_predictors[0](context, context_ids, target_ids, (4, 4))
    prediction = prediction_loss(predictions, targets)
    torch.testing.assert_close(output.loss_terms["level1_prediction"], prediction, rtol=1e-5, atol=1e-6)
    spread = batch_covariances(context.mean(dim=1, keepdim=True))
    level1 = prediction + 0.02 * (25 * prediction + 25 * variance_term(spread) + covariance_term(spread))
    terms = {name: output.loss_terms[name] for name in ("prediction", "variance", "covariance")}
    level0 = 1.25 * terms["prediction"] + 0.01 * (25 * terms["variance"] + terms["covariance"])
    torch.testing.assert_close(output.loss, level0 + 0.5 * level1, rtol=1e-5, atol=1e-6)


def test_masks_lie_over_each_other():
    model = stack()
    context_ids, target_ids = model.sample_masks(16, generator=seeded())
    assert context_ids.max() < 16 and target_ids.max() < 16
    contexts, targets = (ids_by_level(ids, (8, 8), [(2, 2)]) for ids in (context_ids, target_ids))
    for context, target in zip(contexts, targets, strict=True):
        for image in range(16):
            assert not set(context[image].tolist()) & set(target[image].flatten().tolist())


def test_no_level_of_the_context_sees_a_target():
    model = stack(regularizer_weight=0.0).eval()
    context_ids, target_ids = model.sample_masks(4, generator=seeded())
    (seen, _) = ids_by_level(context_ids, (8, 8), [(2, 2)])
    changed = images().unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).clone()  # (B, C, N, 4, 4)
    for image in range(4):
        unseen = [patch for patch in range(64) if patch not in seen[image].tolist()]
        changed[image, :, unseen] += 7.0
    changed = changed.unflatten(2, (8, 8)).permute(0, 1, 2, 4, 3, 5).reshape(4, 3, 32, 32)
    before = model.context_encoder.encode(images(), context_ids)
    after = model.context_encoder.encode(changed, context_ids)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, rtol=0, atol=1e-6)
    assert (images() - changed).abs().max() > 6


def test_targets_of_every_level_move_and_get_no_gradient():
    model = stack()
    model(images(), generator=seeded()).loss.backward()
    assert all(p.grad is None for p in model.cjepa.parameters())
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    old = model.cjepa.upper_levels[0].layers[0].mlp.fc1.weight.clone()
    new = model.context_encoder.upper_levels[0].layers[0].mlp.fc1.weight
    model.update_target_encoder(0.75)
    moved = model.cjepa.upper_levels[0].layers[0].mlp.fc1.weight
    torch.testing.assert_close(moved, 0.75 * old + 0.25 * new)
    assert (moved - old).abs().max() > 0


def test_upper_gradient_reaches_the_level_below_unless_stopped():
    def gradient_below(**changes):
        # level 0 has no loss of its own
        model = stack({**UPPER, "level_weight": 1.0, **changes}, level_weight=0.0, regularizer_weight=0.0)
        model(images(), generator=seeded()).loss.backward()
        return model.context_encoder.layers[0].mlp.fc1.weight.grad

    assert gradient_below().abs().max() > 0
    assert gradient_below(stop_gradient=True).abs().max() == 0


def test_a_classifier_trains_the_levels_below_whatever_pre_training_stopped():
    model = CJepaForImageClassification(stack({**UPPER, "stop_gradient": True}).config)
    model(images(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    assert model.cjepa.layers[0].mlp.fc1.weight.grad.abs().max() > 0


def test_three_levels_reload_and_choose(tmp_path):
    model = stack(dict(UPPER), {"hidden_size": 64, "num_attention_heads": 4}, num_target_blocks=1).eval()
    assert [encoded.last_hidden_state.shape for encoded in model.cjepa.encode(images())] == [
        (4, 64, 32), (4, 16, 48), (4, 4, 64),
    ]  # fmt: skip
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    for level, width in enumerate((32, 48, 64)):
        encoder, info = AutoModel.from_pretrained(tmp_path, level=level, output_loading_info=True)
        assert isinstance(encoder, CJepaModel) and not info["missing_keys"] and not info["unexpected_keys"]
        output = encoder(images(), output_hidden_states=True)
        assert output.pooler_output.shape == (4, width)
        assert [states.shape[1] for states in output.hidden_states] == [64, 16, 4][: level + 1]
        torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean(dim=1))
        classifier = AutoModelForImageClassification.from_pretrained(tmp_path, level=level, num_labels=3)
        assert classifier(images()).logits.shape == (4, 3) and classifier.classifier.in_features == width
    assert AutoModel.from_pretrained(tmp_path)(images()).pooler_output.shape == (4, 64)
    with pytest.raises(ValueError, match="level=3 is not in this model, which has 3 levels, 0 to 2"):
        AutoModel.from_pretrained(tmp_path, level=3)
    with pytest.raises(ValueError, match="level=1 is not in this model, which has one level, 0"):
        CJepaModel(tiny_config(level=1))


def test_the_configuration_may_ask_for_what_every_level_records(tmp_path):
    stack(dict(UPPER), {"hidden_size": 64, "num_attention_heads": 4}, num_target_blocks=1).save_pretrained(tmp_path)
    asked = {"output_hidden_states": True, "output_attentions": True, "attn_implementation": "eager"}
    for level in (0, 1, 2):
        output = AutoModel.from_pretrained(tmp_path, level=level, **asked)(images())
        assert [states.shape[1] for states in output.hidden_states] == [64, 16, 4][: level + 1]
        assert [attention.shape[2] for attention in output.attentions] == [64 // 4**level] * (2, 1, 2)[level]


def test_levels_added_to_a_trained_model_start_equal(tmp_path):
    """The trained level keeps a context encoder and a target encoder that differ, the new ones start alike."""
    plain = tiny_model(**MASKS)
    plain.save_pretrained(tmp_path)
    model = CJepaForPreTraining.from_pretrained(tmp_path, upper_levels=[UPPER])
    targets, contexts = model.cjepa.state_dict(), model.context_encoder.state_dict()
    assert not torch.equal(contexts["layernorm.bias"], targets["layernorm.bias"])
    trained = plain.context_encoder.state_dict()
    assert all(torch.equal(contexts[name], trained[name]) for name in trained)
    above = [name for name in targets if name.startswith("upper_levels.")]
    assert above and all(torch.equal(contexts[name], targets[name]) for name in above)


def test_masks_beside_the_grid_are_refused():
    model = stack()
    context_ids, target_ids = model.sample_masks(4, generator=seeded())
    with pytest.raises(ValueError, match="target_ids has positions from -1 to .* has 4x4: give 0 to 15"):
        model(images(), context_ids, target_ids - target_ids.min() - 1)
    context_ids[0, -1] = 16
    with pytest.raises(ValueError, match="context_ids has positions from .* to 16, and the grid of the top level"):
        model(images(), context_ids, target_ids)


def test_attention_is_set_in_every_part():
    model = stack()
    model.set_attn_implementation("eager")
    chosen = [part.config._attn_implementation for part in model.modules() if hasattr(part, "config")]
    assert len(chosen) > 10 and set(chosen) == {"eager"}
    output = model(images(), generator=seeded(), output_attentions=True)
    assert [weights.shape for weights in output.attentions] == [(4, 3, 16, 16)]


def test_fields_are_those_of_the_level_below_unless_given():
    config = tiny_config(
        upper_levels=[{"hidden_size": 48, "num_attention_heads": 3, "regularizer": "pair"}],
        min_context_patches=9, variance_weight=3.0, image_size=[32, 48],
    )  # fmt: skip
    upper = config.level_config(1)
    assert (upper.hidden_size, upper.regularizer, upper.variance_weight) == (48, "pair", 3.0)
    assert (upper.num_channels, list(upper.image_size), list(upper.patch_size)) == (32, [8, 12], [2, 2])
    assert upper.grid_size == (4, 6) and upper.min_context_patches == 3
    assert CJepaConfig.from_dict(config.to_dict()).upper_levels == config.upper_levels


@pytest.mark.parametrize(
    ("upper", "message"),
    [
        ([{"hidden_size": 50}], r"upper_levels\[0\]: hidden_size=50 must be a multiple of 4"),
        ([{"width": 48}], r"upper_levels\[0\]: 'width' is no field of an upper level; it has hidden_size"),
        (5, "upper_levels=5 must be a list of mappings, one a level"),
        ({"hidden_size": 48}, "upper_levels={'hidden_size': 48} must be a list of mappings"),
        (["big"], r"upper_levels\[0\]='big' must be a mapping"),
        ([{}, {}, {}, {}], r"upper_levels\[3\]: the 1x1 tokens below cannot be merged by 2x2"),
        ([{"patch_size": 3}], r"upper_levels\[0\]: the 8x8 tokens below cannot be merged by 3x3"),
        ([{"regularizer": "none"}], r"upper_levels\[0\]: regularizer='none' is not known"),
        ([{"patch_size": "a"}], r"upper_levels\[0\]: patch_size='a' must be a whole number of 1 or more, or two"),
        ([{"patch_size": [2]}], r"upper_levels\[0\]: patch_size=\[2\] must be a whole number"),
        ([{"patch_size": 0}], r"upper_levels\[0\]: patch_size=0 must be a whole number"),
        ([{"stop_gradient": "no"}], r"upper_levels\[0\]: stop_gradient='no' must be true or false"),
        ([{"level_weight": "a"}], r"upper_levels\[0\]: level_weight='a' is not a loss weight"),
        # which is how YAML reads 1e-6
        (
            [{"layer_norm_eps": "1e-6"}],
            r"upper_levels\[0\]: layer_norm_eps='1e-6' must be a number above 0, such as 1.0e-6",
        ),
        ([{"hidden_dropout_prob": "a"}], r"upper_levels\[0\]: hidden_dropout_prob='a' is not a number in"),
        ([{"qkv_bias": "a"}], r"upper_levels\[0\]: qkv_bias='a' must be true or false"),
        ([{"level_weight": float("inf")}], r"upper_levels\[0\]: level_weight=inf is not a loss weight"),
    ],
)
def test_unfit_levels_are_named(upper, message):
    with pytest.raises(ValueError, match=message):
        CJepaConfig(**{**SIZES, "upper_levels": upper})


def test_some_level_has_a_loss():
    assert tiny_config(level_weight=0.0, upper_levels=[UPPER]).num_levels == 2
    with pytest.raises(ValueError, match="level_weight is 0 at every level"):
        tiny_config(level_weight=0.0, upper_levels=[{**UPPER, "level_weight": 0}])


def test_masks_that_do_not_fit_the_top_grid_are_told_in_the_words_of_the_recipe():
    model = tiny_model(upper_levels=[UPPER], min_context_patches=60)
    with pytest.raises(ValueError, match="min_context_patches=60 of level 0 make 15: A 4x4 grid has 16 patches"):
        model.sample_masks(2)


def test_the_lowest_level_stops_no_gradient():
    with pytest.raises(ValueError, match="level 0 has no level below; set it in an entry of upper_levels"):
        tiny_model(stop_gradient=True)


def test_weights_of_upper_regularizers_follow_the_schedule_in_proportion():
    model = stack({**UPPER, "regularizer_weight": 0.04}, regularizer_weight=0.01)
    masks = model.sample_masks(4, generator=seeded())

    def loss(**weights):
        return model(images(), *masks, **weights).loss

    def regularizer(prefix):
        terms = model(images(), *masks).loss_terms
        variance, covariance = terms[f"{prefix}variance"], terms[f"{prefix}covariance"]
        return 25 * terms[f"{prefix}prediction"] + 25 * variance + covariance

    expected = loss(regularizer_weight=0.0) + 0.005 * regularizer("") + 0.02 * regularizer("level1_")
    torch.testing.assert_close(loss(regularizer_weight=0.005), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(regularizer_weight=0.01), loss(), rtol=0, atol=0)
