"""Classifiers on the encoder: their heads, stochastic depth, other image sizes, remote code and the stock Trainer."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny import TRANSFORMER, gradients, images, seeded, sjea_level, tiny_config, tiny_model, tiny_sjea
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_cjepa import (
    CJepaBackbone,
    CJepaForImageClassification,
    CJepaForPreTraining,
    CJepaModel,
    SJeaForImageClassification,
    SJeaForPreTraining,
)
from modeling_cjepa.encoders_cjepa import CJepaLayer, drop_path, sincos_positions
from trainers.publishing import save_model
from trainers.transforms import image_processor

UPPER = {"upper_levels": [{"hidden_size": 16, "num_hidden_layers": 1}], "min_context_patches": 8}


@pytest.fixture
def folder(tmp_path):
    """A saved pre-training model whose encoders differ."""
    tiny_model().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def load(folder, **settings):
    model, info = AutoModelForImageClassification.from_pretrained(
        folder, num_labels=5, output_loading_info=True, **settings
    )
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(name.startswith(("classifier.", "pooling.")) for name in info["missing_keys"])
    return model.eval()


@torch.no_grad()
def test_last_layers_head_reads_the_normed_means_side_by_side(folder):
    model, encoder = load(folder, classifier_pooling="last4"), CJepaModel.from_pretrained(folder)
    layers = encoder(images(), output_hidden_states=True).hidden_states[1:]
    features = torch.cat([encoder.layernorm(tokens).mean(dim=1) for tokens in layers], dim=1)
    assert model.classifier.weight.shape == (5, 64)
    output = model(images())
    torch.testing.assert_close(output.logits, F.linear(features, model.classifier.weight, model.classifier.bias))
    assert output.hidden_states is None and len(model(images(), output_hidden_states=True).hidden_states) == 3


@torch.no_grad()
@pytest.mark.parametrize(("level", "width"), [(0, 2 * 32), (1, 16)])
def test_last_layers_head_of_a_stack(tmp_path, level, width):
    tiny_model(**UPPER).save_pretrained(tmp_path)
    model, encoder = load(tmp_path, classifier_pooling="last4", level=level), CJepaModel.from_pretrained(tmp_path)
    features = encoder.embed_last_layers(images(), 4, level)
    assert features.shape == (4, width)
    torch.testing.assert_close(model(images()).logits, model.classifier(features))


@torch.no_grad()
def test_attentive_head_pools_the_encoders_tokens(folder):
    model, encoder = load(folder, classifier_pooling="attentive"), CJepaModel.from_pretrained(folder)
    tokens = encoder(images()).last_hidden_state
    logits = model(images()).logits
    torch.testing.assert_close(logits, model.classifier(model.pooling(tokens)))
    assert not torch.allclose(logits, model.classifier(tokens.mean(dim=1)))
    assert model.pooling.num_heads == 2


def test_the_query_that_no_checkpoint_has_is_drawn(folder, tmp_path):
    tiny_sjea().save_pretrained(tmp_path / "stack")
    for path, std in ((folder, 0.2), (tmp_path / "stack", 0.02)):
        queries = [load(path, classifier_pooling="attentive").pooling.query.detach() for _ in range(3)]
        assert 0.7 * std < torch.stack(queries).std() < 1.3 * std
        assert not torch.equal(queries[0], queries[1])
        torch.manual_seed(3)
        first = load(path, classifier_pooling="attentive").pooling.query
        torch.manual_seed(3)
        assert torch.equal(load(path, classifier_pooling="attentive").pooling.query, first)


@pytest.mark.parametrize("pooling", ["mean", "last4", "attentive"])
def test_a_trained_head_reloads_exactly_and_every_part_learns(folder, tmp_path, pooling):
    model = load(folder, classifier_pooling=pooling)
    model(images(), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.save_pretrained(tmp_path / "trained")
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["missing_keys"] and again.config.classifier_pooling == pooling
    weights = again.state_dict()
    assert all(torch.equal(weights.pop(name), weight) for name, weight in model.state_dict().items()) and not weights
    # A file's weights are not aligned in memory as drawn ones are, and a row times a matrix may then round otherwise.
    torch.testing.assert_close(again(images()).logits, model(images()).logits)
    encoder, info = CJepaModel.from_pretrained(tmp_path / "trained", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@torch.no_grad()
def test_attentive_head_of_a_stack_reads_maps_and_tokens(tmp_path):
    tokens = sjea_level(stem="standard", input="tokens", backbone=dict(TRANSFORMER))
    tiny_sjea(sjea_level(), tokens).save_pretrained(tmp_path)
    for level in (0, 1):
        model = load(tmp_path, classifier_pooling="attentive", level=level)
        features = model.sjea(images(), level=level).last_hidden_state
        rows = features.reshape(4, 32, -1).transpose(1, 2) if level == 0 else features
        assert rows.shape == (4, 64, 32)
        torch.testing.assert_close(model(images()).logits, model.classifier(model.pooling(rows)))


def test_unknown_heads_are_refused_when_configured_and_when_loaded(folder, tmp_path):
    tiny_sjea().save_pretrained(tmp_path / "stack")
    words = "classifier_pooling='{}' is not known; choose one of {}."
    for wrong, choices, path, config in (
        ("max", "mean, last4, attentive", folder, tiny_config()),
        ("last4", "mean, attentive", tmp_path / "stack", tiny_sjea().config),
    ):
        with pytest.raises(ValueError, match=words.format(wrong, choices)):
            load(path, classifier_pooling=wrong)
        with pytest.raises(ValueError, match=words.format(wrong, choices)):
            type(config)(classifier_pooling=wrong)


LOAD = """
import json, sys
sys.modules["modeling_cjepa"] = None
import torch
from transformers import AutoModelForImageClassification, pipeline

logits, scores = [], []
for folder in sys.argv[1:]:
    trust = {"trust_remote_code": True}
    model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True, **trust)
    assert not info["missing_keys"], info
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        logits.append(model(torch.load(folder + "/images.pt")).logits.tolist())
    classifier = pipeline("image-classification", model=folder, **trust)
    scores.append({row["label"]: row["score"] for row in classifier(folder + "/image.png", top_k=5)})
print(json.dumps([logits, scores]))
"""


def test_heads_load_without_the_package_and_in_the_pipeline(folder, tmp_path):
    tiny_sjea().save_pretrained(tmp_path / "stack")
    paths, expected, probabilities = [], [], []
    for number, (path, pooling) in enumerate(
        [(folder, "attentive"), (folder, "last4"), (tmp_path / "stack", "attentive")]
    ):
        model, final = load(path, classifier_pooling=pooling), tmp_path / f"final{number}"
        processor = image_processor((32, 32), [0.5] * 3, [0.25] * 3)
        save_model(model, processor, final)
        torch.save(images(), final / "images.pt")
        image = Image.effect_noise((40, 36), 90).convert("RGB")
        image.save(final / "image.png")
        paths.append(str(final))
        with torch.no_grad():
            expected.append(model(images()).logits)
            row = model(**processor(image, return_tensors="pt")).logits.softmax(dim=1)[0]
        probabilities.append(dict(zip(model.config.id2label.values(), row.tolist(), strict=True)))
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, script, *paths], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    logits, scores = json.loads(done.stdout.splitlines()[-1])
    for found, tensor in zip(logits, expected, strict=True):
        torch.testing.assert_close(torch.tensor(found), tensor, rtol=1e-5, atol=1e-6)
    for found, row in zip(scores, probabilities, strict=True):
        assert found == pytest.approx(row, rel=1e-4)


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    branch, rate = torch.ones(20_000, 3, 2), 0.3
    dropped = drop_path(branch, rate, training=True)
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    values = dropped[:, 0, 0]
    assert set(values.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    # of a share of 20,000 images the standard deviation is 0.0032
    assert (values == 0).double().mean().item() == pytest.approx(rate, abs=0.013)
    assert torch.equal(drop_path(branch, rate, training=False), branch)


def test_drop_path_in_a_layer_is_that_of_its_formula():
    torch.manual_seed(0)
    layer = CJepaLayer(tiny_config(), 32, 2, 64, drop_path_rate=0.5).train()
    tokens = torch.randn(1, 4, 32, generator=seeded()).expand(4000, -1, -1)
    with torch.no_grad():
        found = layer(tokens)
        attended = tokens[0] + 2 * layer.attention(layer.layernorm_before(tokens[:1]))[0][0]
        only_mlp, both = (x + 2 * layer.mlp(layer.layernorm_after(x)) for x in (tokens[0], attended))
    shares = [
        (found - expected).abs().amax(dim=(1, 2)).lt(1e-4).double().mean().item()
        for expected in (tokens[0], attended, only_mlp, both)
    ]
    assert sum(shares) == 1 and shares == pytest.approx([0.25] * 4, abs=0.03)


def test_drop_path_grows_over_the_layers_of_each_level():
    config = tiny_config(num_hidden_layers=5, drop_path_rate=0.2, **UPPER)
    config.upper_levels[0]["num_hidden_layers"] = 3
    model = CJepaForPreTraining(config)
    rates = [layer.drop_path_rate for layer in model.context_encoder.layers]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    upper = model.context_encoder.upper_levels[0]
    assert [layer.drop_path_rate for layer in upper.layers] == pytest.approx([0, 0.1, 0.2])
    assert not any(layer.drop_path_rate for layer in model.predictor.layers)
    assert [
        layer.drop_path_rate for layer in CJepaModel(tiny_config(num_hidden_layers=1, drop_path_rate=0.5)).layers
    ] == [0]
    for wrong in (1.0, -0.1, "a"):
        with pytest.raises(ValueError, match="drop_path_rate=.* is not a number in"):
            tiny_config(drop_path_rate=wrong)


def test_without_a_rate_training_is_as_it_was():
    """No random number is drawn, and the output is that of evaluation."""
    model = CJepaModel(tiny_config()).train()
    before = torch.get_rng_state()
    output = model(images()).last_hidden_state
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(output, model.eval()(images()).last_hidden_state)
    dropping = CJepaModel(tiny_config(drop_path_rate=0.5))
    dropping.load_state_dict(model.state_dict())
    assert torch.equal(dropping.eval()(images()).last_hidden_state, output)
    assert not torch.allclose(dropping.train()(images()).last_hidden_state, output)


@pytest.mark.parametrize("cls", [CJepaModel, CJepaForImageClassification, CJepaBackbone, CJepaForPreTraining])
@pytest.mark.parametrize("changes", [{}, UPPER], ids=["plain", "stack"])
def test_positions_of_another_image_size_are_computed(tmp_path, cls, changes):
    tiny_model(**changes).save_pretrained(tmp_path)
    with CaptureLogger(logging.get_logger("transformers")) as captured:
        model, info = cls.from_pretrained(tmp_path, image_size=64, output_loading_info=True)
    assert not info["mismatched_keys"] and "mismatch" not in captured.out.lower()
    grids = {64: (16, 16), 16: (8, 8)}
    tables = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("position_embeddings")]
    assert len(tables) == (3 if cls is CJepaForPreTraining else 1) * (2 if changes else 1)
    for name, table in tables:
        grid = (8, 8) if "upper" in name else (16, 16)
        assert torch.equal(table[0], sincos_positions(grid, table.shape[-1])), name
    assert grids[64] == model.config.grid_size
    with torch.no_grad():
        before = CJepaModel.from_pretrained(tmp_path)(images()).last_hidden_state
        encoder = model if cls in (CJepaModel, CJepaBackbone) else model.cjepa
        tokens = encoder.encode(images())[-1].last_hidden_state
    assert torch.equal(tokens, before)
    if cls is CJepaForPreTraining:
        assert model.train()(images(2, 64, 64), generator=seeded()).loss.isfinite()


def test_positions_of_a_stack_of_transformers_are_computed(tmp_path):
    backbone = {"backbone": TRANSFORMER | {"patch_size": 4}, "stem": "standard"}
    tiny_sjea(sjea_level(**backbone)).save_pretrained(tmp_path)
    model = SJeaForPreTraining.from_pretrained(tmp_path, image_size=64)
    table = model.sjea.levels[0].backbone.embeddings.position_embeddings
    assert torch.equal(table[0], sincos_positions((16, 16), 32))


def test_weights_of_another_shape_are_still_an_error(folder):
    with pytest.raises(RuntimeError, match="mismatch"):
        CJepaModel.from_pretrained(folder, image_size=64, hidden_size=16)
    vit = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
           "intermediate_size": 64, "patch_size": 8}  # fmt: skip
    tiny_sjea(sjea_level(stem="standard", backbone=vit)).save_pretrained(folder / "vit")
    with pytest.raises(RuntimeError, match="mismatch"):
        SJeaForPreTraining.from_pretrained(folder / "vit", image_size=64)


@pytest.mark.parametrize("make", [
    lambda: CJepaForImageClassification(tiny_config(num_labels=3, initializer_range=0.05)),
    lambda: SJeaForImageClassification(tiny_sjea().config),
], ids=["cjepa", "sjea"])  # fmt: skip
def test_stock_trainer_divides_a_classifiers_loss_by_the_accumulation_steps(tmp_path, make):
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
            module.requires_grad_(False)
            module.forward = lambda x: x  # statistics of half a batch would differ
    labels = torch.tensor([0, 1, 1, 0])
    model.train()(images(), labels=labels).loss.backward()
    expected = {name: model.get_parameter(name) - 0.5 * gradient for name, gradient in gradients(model).items()}
    model.zero_grad()
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, optim="sgd",
        learning_rate=0.5, max_grad_norm=0.0, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    dataset = [{"pixel_values": image, "labels": label} for image, label in zip(images(), labels, strict=True)]
    Trainer(model, arguments, train_dataset=dataset).train()
    for name, tensor in expected.items():
        torch.testing.assert_close(model.get_parameter(name), tensor, rtol=1e-4, atol=1e-5)
