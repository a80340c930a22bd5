"""Levels that start from published weights."""

import pytest
import torch
from tiny import RESNET, sjea_level
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

from trainers.errors import InputError
from trainers.pretraining import build_model
from trainers.recipes import read_recipe
from trainers.run_arguments import training_arguments

FIELDS = {name: value for name, value in RESNET.items() if name != "model_type"}


@pytest.fixture
def resnet(tmp_path):
    model = ResNetModel(ResNetConfig(**FIELDS))
    model.save_pretrained(tmp_path / "resnet")
    return tmp_path / "resnet", model.state_dict()


def build(tmp_path, *levels):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_type: sjea\n")
    recipe = read_recipe(str(recipe), {"levels": list(levels), "output_dir": str(tmp_path / "run"), "use_cpu": True})
    return build_model(recipe, training_arguments(recipe))


def test_a_named_backbone_starts_from_its_weights(resnet, tmp_path):
    path, weights = resnet
    model = build(tmp_path, sjea_level(backbone=str(path), stem="standard"), sjea_level())
    built = model.sjea.levels[0].backbone.state_dict()
    assert built.keys() == weights.keys() and all(torch.equal(built[name], weights[name]) for name in weights)
    # the configuration that is saved describes it, so that no name has to be found again
    assert model.config.levels[0]["backbone"]["hidden_sizes"] == [8, 16, 32]


def test_what_starts_anew_is_said(resnet, tmp_path, caplog):
    path, weights = resnet
    model = build(tmp_path, sjea_level(backbone=str(path)))
    built = model.sjea.levels[0].backbone.state_dict()
    stem = "embedder.embedder.convolution.weight"
    assert f"level 0 starts from {len(weights) - 1} of {len(weights)} tensors of {path}" in caplog.text
    assert f"start anew: {stem}" in caplog.text
    assert all(torch.equal(built[name], weights[name]) for name in weights if name != stem)
    assert built[stem].shape == (8, 3, 3, 3)


def test_a_vision_transformer_reads_the_size_it_was_made_for(tmp_path):
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, patch_size=8,
                       image_size=32)  # fmt: skip
    vit = ViTModel(config)
    vit.save_pretrained(tmp_path / "vit")
    level = sjea_level(backbone=str(tmp_path / "vit"), stem="standard")
    built = build(tmp_path, level).sjea.levels[0].backbone.state_dict()
    assert all(torch.equal(built[name], tensor) for name, tensor in vit.state_dict().items())


def test_no_such_backbone(tmp_path):
    with pytest.raises(InputError, match=r"levels\[0\]: backbone '.*/nothing' is neither a folder with a model nor"):
        build(tmp_path, sjea_level(backbone=str(tmp_path / "nothing")))
