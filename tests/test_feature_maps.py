"""The encoder as a backbone: its maps are the layers' tokens on their grid; segmenters and detectors train on it."""

import json

import pytest
import torch
from tiny import gradients, images, tiny_config, tiny_model
from transformers import (
    AutoBackbone,
    DetrConfig,
    DetrForObjectDetection,
    IJepaConfig,
    IJepaModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from modeling_cjepa import CJepaBackbone, CJepaConfig, CJepaModel

STAGES = ["stem", "stage1", "stage2"]
UPPER = {"upper_levels": [{"hidden_size": 16, "num_hidden_layers": 1}], "min_context_patches": 8}


@pytest.fixture
def folder(tmp_path):
    """A saved pre-training model whose encoders differ."""
    tiny_model().save_pretrained(tmp_path / "run")
    return tmp_path / "run"


def test_maps_are_the_normalised_layers_of_transformers_own_encoder(folder):
    backbone, info = CJepaBackbone.from_pretrained(folder, out_features=STAGES, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert backbone.channels == [32, 32, 32] and backbone.out_indices == [0, 1, 2]
    config = backbone.config
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps",
             "image_size", "patch_size")  # fmt: skip
    theirs = IJepaModel(IJepaConfig(**{name: getattr(config, name) for name in names}), add_pooling_layer=False).eval()
    theirs.load_state_dict({name: tensor for name, tensor in backbone.state_dict().items()}, strict=False)
    theirs.embeddings.position_embeddings.data = backbone.embeddings.position_embeddings
    pixel_values = images()
    with torch.no_grad():
        maps = backbone.eval()(pixel_values).feature_maps
        expected = theirs(pixel_values, output_hidden_states=True).hidden_states
        for stage in range(3):
            tokens = theirs.layernorm(expected[stage]).reshape(4, 8, 8, 32)
            torch.testing.assert_close(maps[stage].permute(0, 2, 3, 1), tokens, atol=1e-5, rtol=1e-4)
    assert all(feature_map.is_contiguous() for feature_map in maps)


def test_the_last_layer_of_the_target_encoder_is_given_at_any_resolution(folder):
    backbone, encoder = CJepaBackbone.from_pretrained(folder), CJepaModel.from_pretrained(folder)
    assert backbone.out_features == ["stage2"]
    pixel_values = images(2, 50, 39)  # 12 rows and 9 columns of patches, and a rest
    output = backbone(pixel_values)
    (feature_map,) = output.feature_maps
    assert output.hidden_states is None and output.attentions is None
    tokens = encoder(pixel_values).last_hidden_state
    for row, column in ((0, 0), (0, 8), (11, 8), (5, 3)):
        torch.testing.assert_close(feature_map[:, :, row, column], tokens[:, 9 * row + column])
    assert len(backbone(pixel_values, output_hidden_states=True).hidden_states) == 3
    eager = CJepaBackbone.from_pretrained(folder, attn_implementation="eager")
    assert [weights.shape for weights in eager(pixel_values, output_attentions=True).attentions] == [
        (2, 2, 108, 108), (2, 2, 108, 108)
    ]  # fmt: skip


def test_levels_of_a_stack_give_coarser_maps(tmp_path):
    tiny_model(**UPPER).save_pretrained(tmp_path)
    backbone = CJepaBackbone.from_pretrained(tmp_path, out_indices=[1, 2, 4]).eval()
    assert backbone.stage_names == [*STAGES, "level1_stem", "level1_stage1"]
    assert backbone.out_features == ["stage1", "stage2", "level1_stage1"] and backbone.channels == [32, 32, 16]
    _, below, above = backbone(images(2, 48, 32)).feature_maps
    encoder = CJepaModel.from_pretrained(tmp_path).eval()
    for level, feature_map, shape in ((0, below, (2, 32, 12, 8)), (1, above, (2, 16, 6, 4))):
        tokens = encoder(images(2, 48, 32), level=level).last_hidden_state
        assert feature_map.shape == shape
        torch.testing.assert_close(feature_map.flatten(2).transpose(1, 2), tokens)
    lowest = CJepaBackbone.from_pretrained(tmp_path, out_features=["stage2"])
    ran = []
    lowest.upper_levels[0].layers[0].register_forward_hook(lambda *_: ran.append(1))
    lowest(images())
    assert not ran


def test_stages_are_saved_and_wrong_ones_refused(folder, tmp_path):
    CJepaBackbone.from_pretrained(folder, out_features=["stem", "stage2"]).save_pretrained(tmp_path / "backbone")
    saved = json.loads((tmp_path / "backbone" / "config.json").read_text())
    assert saved["out_features"] == ["stem", "stage2"]
    assert CJepaBackbone.from_pretrained(tmp_path / "backbone").out_indices == [0, 2]
    for wrong in ({"out_features": ["stage3"]}, {"out_indices": [3]}, {"out_features": ["stage2", "stem"]}):
        with pytest.raises(ValueError, match="out_(features|indices) must be"):
            CJepaConfig(num_hidden_layers=2, **wrong)
    # where none were chosen, another depth has other stages
    config = CJepaConfig.from_pretrained(folder, num_hidden_layers=1)
    config.save_pretrained(tmp_path / "shallow")
    assert AutoBackbone.from_config(CJepaConfig.from_pretrained(tmp_path / "shallow")).out_features == ["stage1"]


def test_a_segmenter_trains_on_it_and_reloads(folder, tmp_path):
    torch.manual_seed(0)
    config = UperNetConfig(
        backbone_config=CJepaConfig.from_pretrained(folder, out_features=STAGES), hidden_size=16, pool_scales=[1, 2],
        auxiliary_in_channels=32, auxiliary_channels=8, num_labels=5,
    )  # fmt: skip
    model = UperNetForSemanticSegmentation(config)
    model.backbone = CJepaBackbone.from_pretrained(folder, out_features=STAGES)
    labels = (torch.arange(64) // 13).expand(2, 64, 64)  # upright stripes
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        output = model(images(2, 64, 64), labels=labels)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.item())
    assert output.logits.shape == (2, 5, 64, 64) and losses[-1] < 0.9 * losses[0]
    model.eval().save_pretrained(tmp_path / "segmenter")
    reloaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path / "segmenter")
    assert isinstance(reloaded.backbone, CJepaBackbone) and reloaded.backbone.out_features == STAGES
    ours, theirs = model.state_dict(), reloaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    torch.testing.assert_close(reloaded(images(2, 64, 64)).logits, model(images(2, 64, 64)).logits)


def test_a_detector_trains_on_it():
    config = DetrConfig(
        backbone_config=tiny_config(), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5, num_labels=3,
        use_timm_backbone=False,
    )  # fmt: skip
    model = DetrForObjectDetection(config)
    boxes = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
    output = model(images(2, 64, 48), labels=[boxes, boxes])
    output.loss.backward()
    found = {name: gradient for name, gradient in gradients(model).items() if "layers.0.mlp.fc1.weight" in name}
    assert found and all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in found.values())
    assert output.pred_boxes.shape == (2, 5, 4)
