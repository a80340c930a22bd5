"""A real step of the authors' I-JEPA code and the authors' VICReg loss, stored as tensors, against ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import pair_terms

from modeling_cjepa.losses_cjepa import prediction_loss
from trainers.conversion.ijepa_authors import _rename, from_ijepa_checkpoint

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "ijepa_step.safetensors")


@pytest.fixture(scope="module")
def step(golden):
    """Our model with the golden weights, and its output on the golden images and masks, after backward."""
    with safe_open(GOLDEN / "ijepa_step.safetensors", "pt") as file:
        sizes = json.loads(file.metadata()["config"])
    model = from_ijepa_checkpoint(parts(golden), image_size=sizes["image_size"], num_attention_heads=3).train()
    model.config.regularizer_weight = 0.0
    output = model(golden["pixel_values"], golden["context_mask"][:, 0], golden["target_masks"])
    output.loss.backward()
    return model, output


def parts(tensors, prefix=""):
    names = ("encoder", "target_encoder", "predictor")
    return {
        part: {
            name.removeprefix(f"{prefix}{part}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{prefix}{part}.")
        }
        for part in names
    }


def by_image(tensor, num_images=3):
    """The authors stack blocks outermost (M * B, K, D); ours is (B, M, K, D)."""
    return tensor.unflatten(0, (-1, num_images)).transpose(0, 1)


def test_encoders_match(golden, step):
    model, _ = step
    target = model.cjepa(golden["pixel_values"]).last_hidden_state
    context = model.context_encoder(golden["pixel_values"]).last_hidden_state
    kept = model.context_encoder(golden["pixel_values"], golden["context_mask"][:, 0]).last_hidden_state
    torch.testing.assert_close(target, golden["target_encoder_output"], atol=1e-5, rtol=0)
    torch.testing.assert_close(context, golden["full_context_encoder_output"], atol=1e-5, rtol=0)
    torch.testing.assert_close(kept, golden["context_output"], atol=1e-5, rtol=0)


def test_targets_and_predictions_match(golden, step):
    _, output = step
    torch.testing.assert_close(output.targets, by_image(golden["normalized_targets"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.predictions, by_image(golden["predictions"]), atol=1e-5, rtol=0)


def test_losses_match(golden, step):
    _, output = step
    torch.testing.assert_close(output.loss, golden["loss_smooth_l1"], atol=1e-5, rtol=0)
    mse = prediction_loss(output.predictions, output.targets, "mse")
    torch.testing.assert_close(mse, golden["loss_mse"], atol=1e-5, rtol=0)


def test_gradients_match(golden, step):
    model, _ = step
    gradients = parts(golden, prefix="grad.")
    assert not gradients["target_encoder"]
    for module, part in ((model.context_encoder, "encoder"), (model.predictor, "predictor")):
        parameters = dict(module.named_parameters())
        expected = _rename(gradients[part])
        assert expected.keys() == parameters.keys()
        for name, gradient in expected.items():
            # relative to the tensor's own size: many of them are smaller than any fixed tolerance
            scale = gradient.abs().max()
            assert scale > 0 or name.endswith("k_proj.bias")
            assert (parameters[name].grad - gradient).abs().max() <= 1e-4 * scale + 1e-8, name
    assert all(parameter.grad is None for parameter in model.cjepa.parameters())


def test_vicreg_terms_and_gradients_match():
    golden = load_file(GOLDEN / "vicreg.safetensors")
    x, y = (golden[name].clone().requires_grad_() for name in "xy")
    terms = pair_terms(x, y)
    loss = 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]
    loss.backward()
    for name, term in {**terms, "loss": loss}.items():
        torch.testing.assert_close(term, golden[name], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(x.grad, golden["grad_x"], atol=1e-4, rtol=0)
    torch.testing.assert_close(y.grad, golden["grad_y"], atol=1e-4, rtol=0)
