"""The convolutional stem in place of the projection of patches, and C-JEPA on several views of an image."""

import json

import pytest
import reference
import torch
import torch.nn.functional as F
from tiny import FLAGS, gradients, images, seeded, tiny_config, tiny_model
from transformers import AutoModel

from modeling_cjepa import CJepaBackbone, CJepaConfig, CJepaForPreTraining, CJepaModel
from modeling_cjepa.stems_cjepa import CJepaConvEmbeddings
from trainers.cli import main
from trainers.flops import model_flops
from trainers.monitor import Monitor

pytestmark = pytest.mark.usefixtures("few_penalties")

STEM = {"stem_hidden_sizes": [8, 12]}


def conv_stem():
    return tiny_model(**STEM).context_encoder.embeddings.patch_embeddings


def test_a_kept_patch_knows_nothing_of_hidden_ones():
    stem, pixels = conv_stem(), images()
    kept = torch.tensor([[9, 10, 11, 17, 18, 19]]).expand(4, -1)  # 2 rows of 3 patches
    hidden = torch.full_like(pixels, 5.0)
    hidden[..., 4:12, 4:16] = pixels[..., 4:12, 4:16]
    tokens = stem(pixels, kept)
    assert tokens.shape == (4, 6, 32)
    assert torch.equal(tokens, stem(hidden, kept))
    whole = stem(pixels)[:, kept[0]]
    assert not torch.allclose(tokens, whole)  # which knows of them
    hidden[..., 4:8, 4:8] += 1.0
    changed = (stem(hidden, kept) - tokens).abs().amax(dim=(0, 2))
    assert (changed[[0, 1, 3, 4]] > 1e-4).all()  # a patch and its neighbours


def test_a_block_reads_nothing_of_what_is_hidden():
    stem, maps = conv_stem(), torch.randn(4, 8, 16, 16, generator=seeded())
    seen = (torch.rand(4, 1, 8, 8, generator=seeded(1)) < 0.5).float()
    finer = seen.repeat_interleave(2, 2).repeat_interleave(2, 3)
    others = maps + (1 - finer) * torch.randn(maps.shape, generator=seeded(2))
    changed = [stem.blocks[0](each, finer) * finer for each in (maps, others)]
    assert torch.equal(*changed)
    block = stem.blocks[0]
    normed = F.layer_norm(maps.permute(0, 2, 3, 1), (8,), *block.layernorm.parameters(), eps=1e-6).permute(0, 3, 1, 2)
    inner = F.gelu(F.conv2d(normed * finer, block.conv1.weight, block.conv1.bias, padding=1)) * finer
    expected = (maps + F.conv2d(inner, block.conv2.weight, block.conv2.bias, padding=1)) * finer
    torch.testing.assert_close(changed[0], expected, rtol=1e-4, atol=1e-5)


def test_all_patches_kept_are_the_whole_image():
    stem, pixels = conv_stem(), images(height=24, width=40)
    everything = torch.arange(6 * 10).expand(4, -1)
    torch.testing.assert_close(stem(pixels, everything), stem(pixels))
    assert torch.equal(stem(F.pad(pixels, (0, 3, 0, 1), value=9.0)), stem(pixels))  # a rest that fills no patch


def test_a_stem_is_its_equations():
    """Stage by stage, on an image of which all is seen."""
    stem, maps = conv_stem(), images()
    for down, block, padding in zip(stem.downsamplings, stem.blocks, (1, 0), strict=True):
        maps = F.conv2d(maps, down.weight, down.bias, stride=2, padding=padding)
        mean, var = maps.mean(dim=1, keepdim=True), maps.var(dim=1, keepdim=True, correction=0)
        scale, shift = (parameter.view(1, -1, 1, 1) for parameter in block.layernorm.parameters())
        normed = (maps - mean) / (var + 1e-6).sqrt() * scale + shift
        inner = F.gelu(F.conv2d(normed, block.conv1.weight, block.conv1.bias, padding=1))
        maps = maps + F.conv2d(inner, block.conv2.weight, block.conv2.bias, padding=1)
    expected = maps.flatten(2).transpose(1, 2) @ stem.projection.weight.T + stem.projection.bias
    torch.testing.assert_close(stem(images()), expected, rtol=1e-4, atol=1e-4)


def test_convolutions_keep_the_size_of_what_they_read():
    model = CJepaModel(tiny_config(stem_hidden_sizes=[64, 128], hidden_size=64, num_attention_heads=4))
    stem = model.embeddings.patch_embeddings
    for block in stem.blocks:
        fan_in = block.conv1.weight[0].numel()
        assert block.conv1.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
        assert block.conv2.weight.std().item() == pytest.approx(0.5 * fan_in**-0.5, rel=0.1)
    assert stem.projection.weight.std().item() == pytest.approx(0.2, rel=0.15)  # the configuration's


def test_a_model_with_a_stem_is_saved_and_loaded(tmp_path):
    model = tiny_model(**STEM).eval()
    model.save_pretrained(tmp_path)
    tokens = model.cjepa(images()).last_hidden_state
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(images()).last_hidden_state, tokens)
    (maps,) = CJepaBackbone.from_pretrained(tmp_path)(images()).feature_maps
    assert torch.equal(maps.flatten(2).transpose(1, 2), tokens)


def test_the_target_encoders_stem_follows_the_contexts():
    model = tiny_model(**STEM)
    stems = [each.embeddings.patch_embeddings for each in (model.cjepa, model.context_encoder)]
    assert all(isinstance(stem, CJepaConvEmbeddings) for stem in stems)
    model.update_target_encoder(0.0)
    assert all(map(torch.equal, *(stem.state_dict().values() for stem in stems)))
    model(images(), generator=seeded()).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in stems[1].parameters())


def test_a_stem_counts_its_products():
    plain, stem = (tiny_config(**changes) for changes in ({}, STEM))
    whole = 2 * (16 * 16 * 8 * 16 * 3)
    later = 2 * (2 * 16 * 16 * 9 * 8 * 8 + 64 * 4 * 8 * 12 + 2 * 64 * 9 * 12 * 12 + 64 * 12 * 32)
    patches = 2 * 64 * 48 * 32
    with_stem, without = model_flops(stem, 30, 4, 9), model_flops(plain, 30, 4, 9)
    assert with_stem["target encoder"] - without["target encoder"] == whole + later - patches
    assert with_stem["context encoder"] - without["context encoder"] == 2 * (whole - patches) + 3 * later
    twice = model_flops(tiny_config(num_views=2), 30, 4, 9)
    assert twice == {part: 2 * number for part, number in without.items()}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stem_hidden_sizes": [8]}, "halve the image 1 times, which makes patches of 2x2 pixels"),
        ({"stem_hidden_sizes": [8, 8], "patch_size": [4, 2]}, "patch_size is 4x2"),
        ({"stem_hidden_sizes": []}, "must be a list of whole numbers"),
        ({"stem_hidden_sizes": [8, 0]}, "must be a list of whole numbers"),
        ({"stem_hidden_sizes": 8}, "must be a list of whole numbers"),
        ({"num_views": 0}, "num_views=0 must be a whole number of 1 or more"),
        ({"regularizer": "views"}, "set num_views to 2 or more"),
    ],
)
def test_what_cannot_be_built_is_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        tiny_config(**changes)


def views(num_images=4):
    return images(2 * num_images).unflatten(0, (num_images, 2))


@pytest.mark.parametrize("num_sets", [1, 3])
def test_vicreg_is_of_the_contexts_of_an_image(num_sets):
    """Of every pair of an image's views and mask sets, by the equations; each predicts its own targets."""
    changes = {"regularizer": "views", "regularizer_weight": 0.5, "num_mask_sets": num_sets}
    model = tiny_model(hidden_size=16, num_views=2, **changes)
    output = model(views(), generator=seeded())
    output.loss.backward()
    ours = gradients(model)
    model.zero_grad()

    sets = views().flatten(0, 1).repeat_interleave(num_sets, dim=0)
    contexts = model.context_encoder(sets, patch_ids=output.context_ids).last_hidden_state.mean(dim=1)
    terms = reference.algorithm_1(contexts.view(4, 2 * num_sets, 16))
    plain = tiny_model(hidden_size=16, regularizer_weight=0.0)
    plain.load_state_dict(model.state_dict())
    prediction = F.smooth_l1_loss(model.predictor(
        model.context_encoder(sets, patch_ids=output.context_ids).last_hidden_state,
        output.context_ids, output.target_ids, (8, 8),
    ), plain(sets, output.context_ids, output.target_ids).targets)  # fmt: skip
    expected = prediction + 0.5 * (25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"])
    expected.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    theirs = gradients(model)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-6)


def test_views_without_a_weight_are_exactly_ijepa_on_each():
    model = tiny_model(regularizer="views", num_views=2, regularizer_weight=0.0)
    output = model(views(), generator=seeded())
    alone = tiny_model(regularizer_weight=0.0)
    again = alone(views().flatten(0, 1), output.context_ids, output.target_ids)
    assert torch.equal(output.loss, again.loss)
    assert output.loss_terms["invariance"] > 0  # watched all the same


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 3, 3, 32, 32)])
def test_another_number_of_views_is_refused(shape):
    model = tiny_model(regularizer="views", num_views=2)
    with pytest.raises(ValueError, match="views of an image, the model num_views=2"):
        model(torch.randn(shape))


def test_one_view_is_enough_without_a_loss():
    model = tiny_model(regularizer="views", num_views=2)
    alone = model(images(), generator=seeded(), return_loss=False)
    assert alone.loss is None
    plain = tiny_model()(images(), alone.context_ids, alone.target_ids)
    assert torch.equal(alone.predictions, plain.predictions)


def test_upper_levels_compare_views_too():
    upper = {"hidden_size": 48, "num_hidden_layers": 1, "predictor_num_hidden_layers": 1}
    model = tiny_model(regularizer="views", num_views=2, min_context_patches=4, upper_levels=[upper], **STEM)
    output = model(views(), generator=seeded())
    assert output.loss_terms["level1_invariance"] > 0
    assert CJepaForPreTraining(CJepaConfig(**model.config.to_dict())).config.level_config(1).stem_hidden_sizes is None


@pytest.mark.parametrize("layout", ["authors", "timm", "ijepa"])
def test_other_layouts_have_no_place_for_a_stem(tmp_path, capsys, layout):
    tiny_model(**STEM).save_pretrained(tmp_path / "model")
    output = tmp_path / ("out.pth.tar" if layout == "authors" else "out")
    assert main(["convert", str(tmp_path / "model"), str(output), "--to", layout]) == 2
    assert "A convolutional stem (stem_hidden_sizes=[8, 12]) does not fit" in capsys.readouterr().err
    assert not output.exists()


def test_views_of_an_image_are_monitored_together():
    model = tiny_model(regularizer="views", num_views=2)
    output = model(views(), generator=seeded())
    (together,) = output.level_views
    assert together.shape == (4, 2 * 4, 32)  # two views of four blocks
    assert torch.equal(together[1, 4:], output.predictions[3].mean(dim=1))
    assert output.level_embeddings[0].shape == (8, 32)
    monitor = Monitor(num_images=100, batch_size=4)
    monitor.add(output)
    assert torch.equal(monitor.embeddings[0][0], output.level_embeddings[0][::2])  # images, not views
    assert torch.equal(monitor.views[0][0], together)


def test_a_run_with_a_stem_and_views(tmp_path, capsys):
    """From the shipped recipe, made small, to a warm start with its architecture; colours changed for the batch."""
    small = [
        "--dataset",
        "scenes",
        "--stem_hidden_sizes",
        "8",
        "12",
        "--expander_hidden_size",
        "16",
        "--max_steps",
        "2",
    ]
    command = ["pretrain", "cjepa_views_cifar10", *FLAGS, *small, "--max_steps", "2", "--disable_tqdm"]
    assert main([*command, "--estimate"]) == 0
    assert main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    results = json.loads((tmp_path / "run/final/results.json").read_text())
    assert results["training"]["images_seen"] == 2 * 16
    logs = [entry for entry in results["history"] if "rankme" in entry]
    assert [entry["monitored_images"] for entry in logs] == [16, 32]
    assert all(entry["lidar"] > 1 and entry["loss_invariance"] > 0 for entry in logs)
    card = (tmp_path / "run/final/README.md").read_text()
    assert "| stem | convolutions of width 8, 12" in card and "| views | 2 crops of an image" in card
    start = ["--start_from", str(tmp_path / "run/final"), "--output_dir", str(tmp_path / "warm")]
    capsys.readouterr()
    assert main(["pretrain", "cjepa_scenes", *FLAGS, "--max_steps", "1", "--disable_tqdm", *start]) == 0
    config = json.loads((tmp_path / "warm/final/config.json").read_text())
    assert config["stem_hidden_sizes"] == [8, 12] and config["num_views"] == 1
