"""The pre-training model: its loss against the papers' equations, and a target encoder that only its update moves."""

import copy

import pytest
import reference
import torch
import torch.nn.functional as F
from tiny import gradients, images, seeded, tiny_config, tiny_model

from modeling_cjepa import CJepaForImageClassification, CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import READINGS
from modeling_cjepa.losses_cjepa import prediction_loss


def assert_frozen(model):
    assert not any(parameter.requires_grad for parameter in model.cjepa.parameters())
    assert not any(module.training for module in model.cjepa.modules())
    trained = [*model.context_encoder.parameters(), *model.predictor.parameters(), *model.expander.parameters()]
    assert all(parameter.requires_grad for parameter in trained)


def encoders_are_equal(model):
    context, target = model.context_encoder.state_dict(), model.cjepa.state_dict()
    return context.keys() == target.keys() and all(torch.equal(context[name], target[name]) for name in target)


def test_encoders_start_equal():
    assert encoders_are_equal(CJepaForPreTraining(tiny_config()))


def test_target_encoder_is_frozen_in_evaluation_mode(tmp_path):
    model = CJepaForPreTraining(tiny_config(expander_hidden_size=8))
    assert_frozen(model)
    model.train()
    assert_frozen(model)
    assert all(module.training for module in model.context_encoder.modules())
    model.eval()
    assert not any(module.training for module in model.modules())
    model.save_pretrained(tmp_path)
    assert_frozen(CJepaForPreTraining.from_pretrained(tmp_path))
    assert_frozen(CJepaForPreTraining.from_pretrained(tmp_path).train())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_gives_the_target_encoder_no_gradient(checkpointing):
    model = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert_frozen(model)
    before = copy.deepcopy(model.cjepa.state_dict())
    outputs = [model(images(), generator=seeded()) for _ in range(2)]
    outputs[0].loss.backward()
    trained = {name for name, parameter in model.named_parameters() if not name.startswith("cjepa.")}
    assert gradients(model).keys() == trained
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1).step()
    assert all(torch.equal(value, before[name]) for name, value in model.cjepa.state_dict().items())
    # the targets know no dropout, the predictions do
    assert torch.equal(outputs[0].targets, outputs[1].targets)
    assert not torch.equal(outputs[0].predictions, outputs[1].predictions)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_update_is_a_moving_average(momentum):
    model = tiny_model()
    targets, contexts = (
        {name: p.clone() for name, p in m.named_parameters()} for m in (model.cjepa, model.context_encoder)
    )
    model.update_target_encoder(momentum)
    for name, parameter in model.cjepa.named_parameters():
        expected = momentum * targets[name].double() + (1 - momentum) * contexts[name].double()
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-6, atol=1e-7)
        if momentum in (0.0, 1.0):
            assert torch.equal(parameter, (contexts if momentum == 0.0 else targets)[name])
    for name, parameter in model.context_encoder.named_parameters():
        assert torch.equal(parameter, contexts[name])
    assert_frozen(model)


def test_targets_and_embeddings_are_the_target_encoders():
    model = tiny_model()
    output = model(images(), generator=seeded())
    tokens = model.cjepa(images()).last_hidden_state
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    normalised = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert output.predictions.shape == output.targets.shape == (*output.target_ids.shape, 32)
    for image in range(4):
        expected = normalised[image, output.target_ids[image]]
        torch.testing.assert_close(output.targets[image], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.level_embeddings, (tokens.mean(dim=1),))
    assert not output.targets.requires_grad and not output.level_embeddings[0].requires_grad


def test_blocks_are_predicted_on_their_own_from_the_context_alone():
    model = tiny_model()
    output = model(images(), generator=seeded())
    for block in range(4):
        alone = model(images(), output.context_ids, output.target_ids[:, block : block + 1], return_loss=False)
        torch.testing.assert_close(alone.predictions, output.predictions[:, block : block + 1], rtol=1e-4, atol=1e-5)
    reversed_context = model(images(), output.context_ids.flip(1), output.target_ids)
    torch.testing.assert_close(reversed_context.predictions, output.predictions, rtol=1e-4, atol=1e-5)
    hidden = images()
    for image, ids in enumerate(output.target_ids.flatten(1).tolist()):
        for row, column in ((4 * (i // 8), 4 * (i % 8)) for i in ids):
            hidden[image, :, row : row + 4, column : column + 4] = 7.0
    blind = model(hidden, output.context_ids, output.target_ids)
    assert torch.equal(blind.predictions, output.predictions)
    assert not torch.allclose(blind.targets, output.targets)


@pytest.mark.parametrize("kind", ["smooth_l1", "mse"])
@pytest.mark.parametrize("reading", READINGS)
def test_without_regularizer_it_is_exactly_ijepa(reading, kind):
    model = tiny_model(regularizer=reading, regularizer_weight=0.0, prediction_loss=kind)
    output = model(images(), generator=seeded())
    assert torch.equal(output.loss, prediction_loss(output.predictions, output.targets, kind))
    output.loss.backward()
    ours = gradients(model)
    model.zero_grad()
    output = model(images(), output.context_ids, output.target_ids, return_loss=False)
    {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}[kind](output.predictions, output.targets).backward()
    ijepa = gradients(model)
    assert ours.keys() == ijepa.keys()
    assert all(torch.equal(ours[name], ijepa[name]) for name in ijepa)


@pytest.mark.parametrize("reading", READINGS)
def test_loss_and_gradients_are_those_of_the_paper(reading):
    model = tiny_model(hidden_size=16, regularizer=reading, regularizer_weight=0.01)
    output = model(images(), generator=seeded())
    output.loss.backward()
    ours = gradients(model)
    model.zero_grad()

    again = model(images(), output.context_ids, output.target_ids, return_loss=False)
    context = model.context_encoder(images(), patch_ids=output.context_ids).last_hidden_state
    expected, terms = reference.cjepa_loss(reading, again.predictions, again.targets, context, weight=0.01)
    expected.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    assert expected > 1.05 * terms["prediction"]
    assert output.loss_terms.keys() == terms.keys()
    for name, term in output.loss_terms.items():
        assert not term.requires_grad and term.shape == ()
        torch.testing.assert_close(term, terms[name].detach(), rtol=1e-5, atol=1e-6)
    literal = gradients(model)
    assert ours.keys() == literal.keys()
    for name, gradient in literal.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["invariance", "variance", "covariance"])
def test_each_weight_weighs_its_term(name):
    off = dict.fromkeys(("invariance_weight", "variance_weight", "covariance_weight"), 0.0)
    model = tiny_model(**{**off, f"{name}_weight": 3.0, "regularizer": "pair", "regularizer_weight": 0.5})
    output = model(images(), generator=seeded())
    expected = output.loss_terms["prediction"] + 0.5 * 3.0 * output.loss_terms[name]
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("reading", READINGS)
def test_expander_comes_before_the_regularizer(reading):
    model = tiny_model(regularizer=reading, expander_hidden_size=8, regularizer_weight=0.1)
    output = model(images(), generator=seeded())
    context = model.context_encoder(images(), patch_ids=output.context_ids).last_hidden_state.mean(dim=1)
    expand = copy.deepcopy(model.expander)
    assert [type(layer).__name__ for layer in expand] == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    if reading == "blocks":
        blocks = expand(output.predictions.mean(dim=2).reshape(16, 32))
        expected = reference.algorithm_1(blocks.reshape(4, 4, 8))
    elif reading == "pair":
        expected = reference.vicreg(expand(context), expand(output.predictions.mean(dim=(1, 2))))
    else:
        embeddings = expand(context)
        expected = {"variance": reference.variance(embeddings), "covariance": reference.covariance(embeddings)}
    for name, term in expected.items():
        torch.testing.assert_close(output.loss_terms[name], term.detach(), rtol=1e-4, atol=1e-6)
    output.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.expander[0].parameters())


@pytest.mark.parametrize("expander", [None, 8])
def test_regularizer_stays_float32_under_autocast(expander):
    model = tiny_model(regularizer="pair", expander_hidden_size=expander)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images(), generator=seeded())
        context = model.context_encoder(images(), patch_ids=output.context_ids).last_hidden_state
    assert output.predictions.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    predictions = output.predictions.float().mean(dim=(1, 2))
    expected = reference.vicreg(model.expander(context.float().mean(dim=1)), model.expander(predictions))
    for name, term in expected.items():
        torch.testing.assert_close(output.loss_terms[name], term.detach(), rtol=1e-5, atol=1e-6)


def test_one_mask_without_the_other_is_refused():
    model = tiny_model()
    context_ids, target_ids = model.sample_masks(4)
    for masks in ({"context_ids": context_ids}, {"target_ids": target_ids}):
        with pytest.raises(ValueError, match="both context_ids and target_ids"):
            model(images(), **masks)


def test_masks_follow_generator_configuration_and_images():
    model = tiny_model(num_target_blocks=2, min_context_patches=3)
    first, second = (model(images(), generator=seeded(5)) for _ in range(2))
    drawn = model.sample_masks(4, generator=seeded(5))
    masks = [(first.context_ids, first.target_ids), (second.context_ids, second.target_ids), drawn]
    for one, two, three in zip(*masks, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert torch.equal(first.loss, second.loss)
    assert first.target_ids.shape[:2] == (4, 2)
    other = model(images(), generator=seeded(6))
    assert not torch.equal(other.loss, first.loss)
    wide = model(images(4, 24, 64), generator=seeded(5))
    assert wide.loss.isfinite()
    assert 64 <= max(wide.context_ids.max(), wide.target_ids.max()) < 96


def test_loss_may_be_left_out():
    output = tiny_model()(images(1), generator=seeded(), return_loss=False)
    assert output.loss is None and output.loss_terms is None
    assert output.predictions.shape[0] == 1


def test_tuple_in_the_order_of_the_fields():
    model = tiny_model()
    output, fields = model(images(), generator=seeded()), model(images(), generator=seeded(), return_dict=False)
    assert isinstance(fields, tuple)
    names = ["loss", "loss_terms", "predictions", "targets", "level_embeddings", "context_ids", "target_ids"]
    names += ["level_views", "signs"]
    assert list(output.keys()) == names
    for name, field in zip(names, fields, strict=True):
        if name not in ("loss_terms", "signs"):
            torch.testing.assert_close(output[name], field, rtol=0, atol=0)


def test_hidden_states_and_attentions_are_the_target_encoders():
    model = tiny_model(attn_implementation="eager")
    output = model(images(), generator=seeded(), output_hidden_states=True, output_attentions=True)
    encoder = model.cjepa(images(), output_hidden_states=True, output_attentions=True)
    for ours, theirs in ((output.hidden_states, encoder.hidden_states), (output.attentions, encoder.attentions)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert "hidden_states" not in model(images(), generator=seeded())
    model.config.output_hidden_states = True
    assert len(model(images(), generator=seeded()).hidden_states) == model.config.num_hidden_layers + 1


@pytest.mark.parametrize("head", [CJepaForPreTraining, CJepaForImageClassification])
def test_configuration_may_ask_for_tuples(head):
    model = head(tiny_config(return_dict=False)).eval()
    assert isinstance(model(images()), tuple)


def test_batch_of_one_image_has_no_statistics():
    with pytest.raises(ValueError, match="batch of 1 image"):
        tiny_model()(images(1))
