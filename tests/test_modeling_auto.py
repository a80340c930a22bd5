"""The models among transformers' own tools: configuration, Auto classes, checkpoints, remote code and Trainer."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import images, seeded, tiny_config, tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    Trainer,
    TrainingArguments,
)

from modeling_cjepa import CJepaConfig, CJepaForImageClassification, CJepaForPreTraining, CJepaModel

AUTO_MAP = {
    "AutoConfig": "configuration_cjepa.CJepaConfig",
    "AutoModel": "modeling_cjepa.CJepaModel",
    "AutoModelForPreTraining": "modeling_cjepa.CJepaForPreTraining",
    "AutoModelForImageClassification": "modeling_cjepa.CJepaForImageClassification",
}

LOAD_REMOTE_CODE = """
import json, sys
sys.modules["modeling_cjepa"] = None  # even where the package is installed, it cannot be imported
import torch
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining

folder, trust = sys.argv[1], {"trust_remote_code": True}
pixel_values = torch.load(folder + "/images.pt")
with torch.no_grad():
    model = AutoModelForPreTraining.from_pretrained(folder, **trust).train()
    loss = model(pixel_values, generator=torch.Generator().manual_seed(0)).loss.item()
    embeddings = AutoModel.from_pretrained(folder, **trust)(pixel_values).pooler_output
    logits = AutoModelForImageClassification.from_pretrained(folder, **trust)(pixel_values).logits
print(json.dumps({
    "loss": loss,
    "embeddings": embeddings.tolist(),
    "logits": list(logits.shape),
    "module": type(model).__module__,
    "frozen": not any(p.requires_grad for p in model.cjepa.parameters()),
}))
"""


@pytest.fixture
def checkpoint(tmp_path):
    """A pre-training model whose encoders differ, and the folder it was saved in."""
    model = tiny_model(num_target_blocks=3, target_scale=(0.1, 0.15)).eval()
    model.save_pretrained(tmp_path / "checkpoint")
    return model, tmp_path / "checkpoint"


def assert_complete(info, missing=()):
    assert sorted(info["missing_keys"]) == sorted(missing)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]


def test_pretraining_round_trip(checkpoint):
    model, folder = checkpoint
    loaded, info = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is CJepaForPreTraining
    assert_complete(info)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(images(), generator=seeded()).loss, model(images(), generator=seeded()).loss)


def test_configuration_round_trip(checkpoint):
    model, folder = checkpoint
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is CJepaConfig
    assert config.num_target_blocks == 3 and list(config.target_scale) == [0.1, 0.15]
    assert config.grid_size == (8, 8)
    loaded, saved = (json.loads(c.to_json_string(use_diff=False)) for c in (config, model.config))
    # only the loaded one says where it was read
    assert loaded | {"_name_or_path": ""} == saved


def test_auto_model_is_the_target_encoder(checkpoint):
    model, folder = checkpoint
    encoder, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(encoder) is CJepaModel
    assert_complete(info)
    with torch.no_grad():
        tokens = encoder(images()).last_hidden_state
        assert torch.equal(tokens, model.cjepa(images()).last_hidden_state)
        assert not torch.allclose(tokens, model.context_encoder(images()).last_hidden_state)
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_classifier_starts_from_the_target_encoder(checkpoint, tmp_path):
    model, folder = checkpoint
    classifier, info = AutoModelForImageClassification.from_pretrained(folder, num_labels=5, output_loading_info=True)
    assert type(classifier) is CJepaForImageClassification
    assert_complete(info, missing=["classifier.weight", "classifier.bias"])
    labels = torch.tensor([0, 4, 2, 2])
    output = classifier(images(), labels=labels)
    pooled = model.cjepa(images()).last_hidden_state.mean(dim=1)
    torch.testing.assert_close(output.logits, pooled @ classifier.classifier.weight.T + classifier.classifier.bias)
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())
    assert classifier(images()).loss is None
    loss, logits = classifier(images(), labels=labels, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)

    classifier.save_pretrained(tmp_path / "classifier")
    encoder, info = AutoModel.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert_complete(info)
    assert torch.equal(encoder(images()).last_hidden_state, model.cjepa(images()).last_hidden_state)


def test_classifier_returns_what_the_encoder_records():
    classifier = CJepaForImageClassification(tiny_config(num_labels=3))
    classifier.set_attn_implementation("eager")
    output = classifier(images(), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2


def test_encoder_alone_starts_both_encoders(tmp_path):
    encoder = tiny_model().cjepa
    encoder.embeddings.position_embeddings += 1.0
    encoder.save_pretrained(tmp_path)
    model, info = CJepaForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert any(name.startswith("context_encoder.") for name in info["missing_keys"])
    assert not any(name.startswith("cjepa.") for name in info["missing_keys"])
    for part in (model.cjepa, model.context_encoder):
        assert all(torch.equal(value, part.state_dict()[name]) for name, value in encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.cjepa.parameters())
    assert all(parameter.requires_grad for parameter in model.context_encoder.parameters())
    assert model.predictor.mask_token.abs().max() > 0


def test_a_trained_context_encoder_that_lacks_a_tensor_is_kept(tmp_path):
    saved = tiny_model()
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["context_encoder.layernorm.bias"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, info = CJepaForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"context_encoder.layernorm.bias"}
    loaded = dict(model.context_encoder.named_parameters())
    for name, parameter in saved.context_encoder.named_parameters():
        if name != "layernorm.bias":
            assert torch.equal(loaded[name], parameter), name


def test_positions_missing_from_a_checkpoint_are_computed(tmp_path):
    encoder = tiny_model().cjepa.eval()
    weights = {name: value for name, value in encoder.state_dict().items() if "position" not in name}
    encoder.save_pretrained(tmp_path, state_dict=weights)
    loaded = CJepaModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).last_hidden_state, encoder(images()).last_hidden_state)


@pytest.mark.parametrize("expander", [None, 8])
def test_bfloat16_checkpoints_load_and_run(expander, tmp_path):
    tiny_model(expander_hidden_size=expander).save_pretrained(tmp_path)
    model = CJepaForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.cjepa(images()).last_hidden_state.dtype == torch.bfloat16
    output = model.train()(images(), generator=seeded())
    assert output.predictions.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    output.loss.backward()
    exact = CJepaForPreTraining.from_pretrained(tmp_path).train()(images(), generator=seeded())
    torch.testing.assert_close(output.loss, exact.loss, rtol=0.05, atol=0.0)


def test_remote_code_needs_no_package(tmp_path, monkeypatch):
    for model_class in (CJepaConfig, CJepaForPreTraining):
        monkeypatch.setattr(model_class, "_auto_class", None)
    CJepaConfig.register_for_auto_class()
    CJepaForPreTraining.register_for_auto_class("AutoModelForPreTraining")
    model = tiny_model()
    model.config.auto_map = AUTO_MAP
    folder = tmp_path / "published"
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    torch.save(images(), folder / "images.pt")

    script = tmp_path / "load.py"
    script.write_text(LOAD_REMOTE_CODE)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, script, folder], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(model(images(), generator=seeded()).loss.item(), rel=1e-5)
        expected = model.cjepa(images()).pooler_output
    torch.testing.assert_close(torch.tensor(found["embeddings"]), expected, rtol=1e-5, atol=1e-6)
    assert found["logits"] == [4, 2]
    assert found["module"].startswith("transformers_modules.")
    assert found["frozen"]


def stock_trainer(model, dataset, folder, **arguments):
    arguments = TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        **arguments,
    )
    return Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset)


def test_stock_trainer_trains_all_but_the_target_encoder(tmp_path):
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dataset = [{"pixel_values": image} for image in images(12)]
    trainer = stock_trainer(model, dataset, tmp_path, max_steps=3, learning_rate=1e-2)
    trainer.train()
    assert trainer.state.global_step == 3
    assert trainer.evaluate()["eval_loss"] > 0
    for name, value in model.state_dict().items():
        is_fixed = name.startswith("cjepa.") or name.endswith("position_embeddings")
        assert torch.equal(value.cpu(), before[name]) == is_fixed, name


def test_stock_trainer_divides_the_loss_by_the_accumulation_steps(tmp_path):
    sizes = {"regularizer_weight": 0.0, "initializer_range": 0.05}
    context_ids, target_ids = tiny_model(**sizes).sample_masks(4, generator=seeded())
    pixel_values = images()
    dataset = [
        {"pixel_values": image, "context_ids": context, "target_ids": targets}
        for image, context, targets in zip(pixel_values, context_ids, target_ids, strict=True)
    ]
    by_hand = tiny_model(**sizes)
    loss = by_hand(pixel_values, context_ids, target_ids).loss
    loss.backward()
    torch.optim.SGD([p for p in by_hand.parameters() if p.requires_grad], lr=0.5).step()

    model = tiny_model(**sizes)
    trainer = stock_trainer(model, dataset, tmp_path, max_steps=1, optim="sgd", learning_rate=0.5, max_grad_norm=0.0)
    logged = trainer.train().training_loss
    assert logged == pytest.approx(loss.item(), rel=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, by_hand.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size=30.*multiple of 4"),
        ({"hidden_size": 36, "num_attention_heads": 8}, "num_attention_heads=8"),
        ({"predictor_hidden_size": 20, "predictor_num_attention_heads": 3}, "predictor_num_attention_heads=3"),
        ({"image_size": 3}, "image_size=3 is smaller than patch_size=4"),
        ({"regularizer": "both"}, "regularizer='both'.*blocks, context, pair"),
        ({"prediction_loss": "l1"}, "prediction_loss='l1'.*smooth_l1, mse"),
        ({"variance_weight": -1.0}, "variance_weight=-1.0 is not a loss weight"),
        ({"initializer_range": -1.0}, "initializer_range=-1.0 must be a number above 0"),
        ({"covariance_weight": float("nan")}, "covariance_weight=nan is not a loss weight"),
        ({"image_size": [32]}, r"image_size=\[32\] must be a whole number of 1 or more, or two of them"),
        ({"patch_size": [4, 4, 4]}, r"patch_size=\[4, 4, 4\] must be a whole number"),
        ({"hidden_size": "x"}, "hidden_size='x' must be a whole number of 1 or more[.]"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 must be a number above 0"),
        ({"hidden_dropout_prob": 2.0}, "hidden_dropout_prob=2.0 is not a number in"),
    ],
)
def test_unfit_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)
