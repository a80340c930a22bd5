"""Groups of the optimizer in fine-tuning, against cases worked by hand."""

import pytest
import torch
from tiny import sjea_level, tiny_config, tiny_sjea

from modeling_cjepa import CJepaForImageClassification, SJeaForImageClassification
from trainers.layer_decay import depth_of, head_depth, parameter_groups

UPPER = {"upper_levels": [{"hidden_size": 16, "num_hidden_layers": 1}], "min_context_patches": 8}


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("cjepa.embeddings.patch_embeddings.projection.weight", 0),
        ("cjepa.layers.0.layernorm_before.weight", 1),
        ("cjepa.layers.1.mlp.fc1.bias", 2),
        ("cjepa.layernorm.weight", 3),
        ("pooling.layernorm_tokens.weight", 3),
        ("pooling.q_proj.weight", 3),
        ("classifier.weight", 3),
        ("base_model.model.cjepa.layers.1.attention.q_proj.lora_A.default.weight", 2),
        ("base_model.model.classifier.modules_to_save.default.bias", 3),
    ],
)
def test_depths_of_two_layers(name, depth):
    assert depth_of(name, tiny_config()) == depth and head_depth(tiny_config()) == 3


@pytest.mark.parametrize(
    ("name", "of_top", "of_lowest"),
    [
        ("cjepa.embeddings.patch_embeddings.projection.bias", 0, 0),
        ("cjepa.layers.1.mlp.fc1.bias", 2, 2),
        ("cjepa.layernorm.weight", 2, 3),
        ("cjepa.upper_levels.0.embeddings.patch_embeddings.projection.bias", 3, 3),
        ("cjepa.upper_levels.0.layers.0.mlp.fc1.bias", 4, 3),
        ("cjepa.upper_levels.0.layernorm.weight", 5, 3),
        ("classifier.weight", 5, 3),
    ],
)
def test_depths_of_a_stack_go_on_level_by_level(name, of_top, of_lowest):
    assert depth_of(name, tiny_config(**UPPER)) == of_top
    assert depth_of(name, tiny_config(**UPPER, level=0)) == of_lowest


def test_depths_of_two_views_are_levels():
    config = tiny_sjea().config
    names = ["sjea.levels.0.backbone.encoder.stages.2.layers.0.layer.0.convolution.weight",
             "sjea.levels.1.backbone.embedder.embedder.convolution.weight", "classifier.weight"]  # fmt: skip
    assert [depth_of(name, config) for name in names] == [0, 1, 2]
    config.level = 0
    assert [depth_of(name, config) for name in names] == [0, 1, 1]


def test_rates_and_decay_of_every_parameter():
    model = CJepaForImageClassification(tiny_config(classifier_pooling="attentive", num_labels=3))
    model.cjepa.layers[0].mlp.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), model.config, 0.8, 0.05, 0.5)
    assert groups[0]["lr"] == 0.8
    found = {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}
    named = {name: found.get(id(parameter)) for name, parameter in model.named_parameters()}
    assert named["classifier.weight"] == (0.8, 0.05) and named["classifier.bias"] == (0.8, 0.0)
    assert named["pooling.query"] == (0.8, 0.0) and named["pooling.fc1.weight"] == (0.8, 0.05)
    assert named["cjepa.layers.1.attention.q_proj.weight"] == (0.4, 0.05)
    assert named["cjepa.layers.0.attention.q_proj.weight"] == (0.2, 0.05)
    assert named["cjepa.layers.0.layernorm_after.weight"] == (0.2, 0.0)
    assert named["cjepa.layers.0.mlp.fc1.weight"] is None
    assert named["cjepa.embeddings.patch_embeddings.projection.weight"] == (0.1, 0.05)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    torch.optim.AdamW(groups)


def test_learned_positions_and_tokens_do_not_decay():
    vit = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
           "intermediate_size": 64, "patch_size": 8}  # fmt: skip
    level = sjea_level(stem="standard", backbone=vit)
    model = SJeaForImageClassification(tiny_sjea(level).config)
    groups = parameter_groups(model.named_parameters(), model.config, 1.0, 0.05, 0.5)
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    free = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.ndim > 1 and decays[id(p)] == 0}
    assert free == {"position_embeddings", "cls_token"}
    assert {group["lr"] for group in groups} == {1.0, 0.5}
