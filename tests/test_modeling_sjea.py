"""The stack of S-JEA: what each level reads, VICReg at each, and the errors of what cannot be built."""

import pytest
import reference
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN
from tiny import RESNET, TRANSFORMER, gradients, images, seeded, sjea_level, tiny_model, tiny_sjea
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForPreTraining, ResNetConfig, ResNetModel
from transformers import pipeline as build_pipeline

from modeling_cjepa import CJepaModel, SJeaConfig, SJeaForImageClassification, SJeaForPreTraining, SJeaModel
from modeling_cjepa.levels_sjea import fold_size
from trainers.transforms import image_processor

VIT = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
       "intermediate_size": 64, "patch_size": 8}  # fmt: skip
# pairs of levels, the second reading the first in every way there is, and what it reads
STACKS = {
    "vector": ([sjea_level(), sjea_level()], (1, 4, 8)),
    "expanded vector": ([sjea_level(), sjea_level(reads="expanded", expander_sizes=[10])], (1, 4, 6)),
    "vector of 2 rows": ([sjea_level(), sjea_level(fold_height=2)], (1, 2, 16)),
    "map": ([sjea_level(), sjea_level(input="map")], (32, 8, 8)),
    "tokens of a map": ([sjea_level(), sjea_level(stem="standard", backbone=TRANSFORMER, input="tokens")], (32, 8, 8)),
    "tokens of tokens": (
        [sjea_level(stem="standard", backbone=TRANSFORMER | {"patch_size": 4}),
         sjea_level(stem="standard", backbone=TRANSFORMER, input="tokens")],
        (32, 8, 8),
    ),
    "tokens beside a class token": (
        [sjea_level(stem="standard", backbone=VIT),
         sjea_level(stem="standard", backbone=TRANSFORMER, input="tokens")],
        (32, 4, 4),
    ),
    "map of tokens": ([sjea_level(stem="standard", backbone=VIT), sjea_level(input="map")], (32, 4, 4)),
}  # fmt: skip


def views(batch_size=6, seed=0):
    return torch.randn(batch_size, 2, 3, 32, 32, generator=seeded(seed))


@pytest.mark.parametrize("name", STACKS)
def test_every_form_of_input_trains_and_reloads(name, tmp_path):
    levels, input_shape = STACKS[name]
    model = tiny_sjea(*levels)
    assert model.sjea.levels[1].input_shape == input_shape
    output = model(views())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.sjea.levels[0].backbone.get_submodule("").training
    model.eval().save_pretrained(tmp_path)
    loaded, info = AutoModelForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(loaded(views()).loss, model(views()).loss, rtol=0, atol=0)
    for level in range(2):
        encoder, info = AutoModel.from_pretrained(tmp_path, level=level, output_loading_info=True)
        assert isinstance(encoder, SJeaModel) and not info["missing_keys"] and not info["unexpected_keys"]
        features = encoder(images(2)).pooler_output
        torch.testing.assert_close(features, model.sjea(images(2)).level_embeddings[level], rtol=0, atol=0)


def test_one_level_is_vicreg():
    """The authors' steps, one after the other, with our layers: encoder, expander, terms by their equations."""
    model = tiny_sjea(sjea_level(invariance_weight=20.0, variance_weight=10.0, covariance_weight=2.0))
    loss = model(views()).loss
    level, expander = model.sjea.levels[0], model.expanders["0"]
    expanded = []
    for view in views().unbind(dim=1):
        map_ = level.backbone.encoder(level.backbone.embedder(view)).last_hidden_state
        expanded.append(expander(map_.mean(dim=(2, 3))))
    terms = reference.vicreg(*expanded)
    written_out = 20 * terms["invariance"] + 10 * terms["variance"] + 2 * terms["covariance"]
    torch.testing.assert_close(loss, written_out, rtol=1e-5, atol=1e-5)


def test_golden_vicreg_is_the_loss_of_a_level():
    golden = load_file(GOLDEN / "vicreg.safetensors")
    x, y = (golden[name].clone().requires_grad_() for name in "xy")
    loss, _ = tiny_sjea(sjea_level())._loss([torch.stack([x, y], dim=1)])
    loss.backward()
    torch.testing.assert_close(loss, golden["loss"], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(x.grad, golden["grad_x"], atol=1e-4, rtol=0)


def test_the_small_stem_is_a_resnet_for_small_images():
    level = tiny_sjea(sjea_level()).sjea.levels[0]
    fields = {name: value for name, value in RESNET.items() if name != "model_type"}
    whole = ResNetModel(ResNetConfig(**fields))
    assert level.backbone.embedder(images()).shape == (4, 8, 32, 32)
    assert whole.embedder(images()).shape == (4, 8, 8, 8)
    spread = level.backbone.embedder.embedder.convolution.weight.std().item()
    # as the other convolutions: normal with variance 2 / (outputs * 3 * 3)
    assert spread == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.15)


def test_a_vector_is_folded_row_by_row():
    model = tiny_sjea().eval()
    seen = []
    model.sjea.levels[1].backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    embedding = model.sjea(images()).level_embeddings[0]
    (folded,) = seen
    assert folded.shape == (4, 1, 4, 8)
    for row in range(4):
        assert torch.equal(folded[:, 0, row], embedding[:, 8 * row : 8 * row + 8])


@pytest.mark.parametrize("name", ["tokens beside a class token", "map of tokens"])
def test_patch_tokens_lie_on_their_grid(name):
    model = tiny_sjea(*STACKS[name][0]).eval()
    seen = []
    model.sjea.levels[1].backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens = model.sjea(images(), level=-1, output_hidden_states=True).hidden_states[0]
    assert tokens.shape == (4, 17, 32) and seen[0].shape == (4, 32, 4, 4)
    for patch in range(16):  # after the class token
        assert torch.equal(seen[0][:, :, patch // 4, patch % 4], tokens[:, 1 + patch])


SWIN = {"model_type": "swin", "patch_size": 4, "embed_dim": 8, "depths": [1], "num_heads": [1], "window_size": 4}
HIERA = {"model_type": "hiera", "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 1], "patch_size": [3, 3],
         "patch_stride": [2, 2], "patch_padding": [1, 1], "masked_unit_size": [4, 4]}  # fmt: skip


@pytest.mark.parametrize(
    ("backbone", "image_size", "side", "first"),
    [
        (VIT | {"model_type": "dinov3_vit", "num_register_tokens": 3}, 32, 4, 4),
        (VIT | {"model_type": "deit"}, 32, 4, 2),
        (SWIN, 30, 8, 0),  # edges are padded
        (SWIN | {"depths": [1, 1], "num_heads": [1, 1]}, 32, 4, 0),
        (HIERA | {"num_query_pool": 2}, 32, 4, 0),
    ],
)
def test_patch_tokens_are_found_among_others(backbone, image_size, side, first):
    below = sjea_level(stem="standard", backbone=backbone)
    model = tiny_sjea(below, sjea_level(input="map"), image_size=image_size).sjea.eval()
    seen = []
    model.levels[1].backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens = model(images(2, image_size, image_size), output_hidden_states=True).hidden_states[0]
    assert tokens.shape[1] == first + side * side
    for patch in range(side * side):
        assert torch.equal(seen[0][:, :, patch // side, patch % side], tokens[:, first + patch])


@pytest.mark.parametrize(
    "backbone",
    [
        VIT | {"model_type": "yolos", "num_detection_tokens": 1},  # which come after the patches
        HIERA | {"num_query_pool": 1},  # whose units stay apart
    ],
)
def test_tokens_on_no_known_grid_are_refused(backbone):
    with pytest.raises(ValueError, match="lie on no grid that is known; let the level above read input='vector'"):
        tiny_sjea(sjea_level(stem="standard", backbone=backbone), sjea_level(input="map"))


def test_images_of_another_shape_are_refused_where_their_tokens_would_lie_elsewhere():
    model = tiny_sjea(*STACKS["tokens of tokens"][0]).sjea.eval()
    with pytest.raises(ValueError, match="has read 16x64 and not 32x32.*give images of the configured image_size"):
        model(images(2, 16, 64))
    assert model(images(2, 16, 64), level=0).last_hidden_state.shape == (2, 64, 32)


def test_merged_tokens_of_a_folded_vector_lie_as_it_does():
    """Swin's stages merge the 16x32 patches of a vector of 512 to 8x16, which level 2 reads."""
    swin = {"model_type": "swin", "patch_size": 1, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 1],
            "window_size": 4, "image_size": [16, 32], "num_channels": 1}  # fmt: skip
    below = sjea_level(backbone=RESNET | {"hidden_sizes": [8, 8, 512]})
    model = tiny_sjea(below, sjea_level(stem="standard", backbone=swin), sjea_level(input="map")).eval()
    assert model.sjea.levels[1].input_shape == (1, 16, 32) and model.sjea.levels[2].input_shape == (16, 8, 16)


def test_images_are_cast_to_the_precision_of_the_weights():
    model = tiny_sjea().sjea.eval()
    expected = model(images()).pooler_output
    output = model.to(torch.bfloat16)(images()).pooler_output
    assert output.dtype == torch.bfloat16 and (output - expected).abs().max() < 0.1 * expected.abs().max()
    with pytest.raises(ValueError, match="pixel_values is torch.uint8; give normalised images in floating point"):
        model(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="pixel_values is torch.uint8; give normalised images in floating point"):
        tiny_sjea()(views().to(torch.uint8))


def test_the_level_above_reads_what_the_expander_made():
    model = tiny_sjea(*STACKS["expanded vector"][0]).eval()
    seen = []
    model.sjea.levels[1].backbone.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    embedding = model.sjea(images()).level_embeddings[0]
    torch.testing.assert_close(seen[0].flatten(1), model.sjea.levels[0].expander(embedding))
    # the one expander serves the loss, too
    assert list(model.expanders) == ["1"]
    both = views(4)
    expanded = model(both).expanded[0][:, 0]
    torch.testing.assert_close(expanded, model.sjea.levels[0].expander(model.sjea.encode(both[:, 0])[0].embedding))


def test_loss_is_the_weighted_sum_of_levels():
    levels = [sjea_level(level_weight=0.5), sjea_level(level_weight=2.0, covariance_weight=0.04, variance_weight=5)]
    output = tiny_sjea(*levels)(views())
    terms = {name: term.item() for name, term in output.loss_terms.items()}
    first = 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]
    second = 25 * terms["level1_invariance"] + 5 * terms["level1_variance"] + 0.04 * terms["level1_covariance"]
    assert output.loss.item() == pytest.approx(0.5 * first + 2 * second, rel=1e-5)
    for number in range(2):
        a, b = output.expanded[number].unbind(dim=1)
        for name, value in reference.vicreg(a, b).items():
            term = output.loss_terms[name if number == 0 else f"level1_{name}"]
            torch.testing.assert_close(term, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["vector", "expanded vector", "map", "tokens of a map"])
def test_stop_gradient_leaves_the_levels_below_alone(form):
    below, above = STACKS[form][0]

    def gradients_of(**changes):
        model = tiny_sjea(below | {"level_weight": 0.0}, above | changes)
        model(views()).loss.backward()
        return gradients(model)

    flowing, stopped = gradients_of(), gradients_of(stop_gradient=True)
    below = [name for name in flowing if name.startswith("sjea.levels.0.")]
    assert below and all(flowing[name].abs().max() > 0 for name in below if name.endswith("convolution.weight"))
    assert all(name not in stopped or stopped[name].abs().max() == 0 for name in below)
    assert all(torch.equal(flowing[name], stopped[name]) for name in flowing if name.startswith("sjea.levels.1."))


def test_a_classifier_trains_the_levels_below_whatever_pre_training_stopped():
    model = SJeaForImageClassification(tiny_sjea(sjea_level(), sjea_level(stop_gradient=True)).config)
    model(images(), labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    below = model.sjea.levels[0].backbone.named_parameters()
    assert all(weight.grad.abs().max() > 0 for name, weight in below if name.endswith("convolution.weight"))


def test_widths_that_a_backbone_makes_itself_are_not_compared():
    focalnet = {"model_type": "focalnet", "embed_dim": 8, "depths": [1, 1], "patch_size": 4}
    model = tiny_sjea(sjea_level(stem="standard", backbone=focalnet))
    assert model.sjea(images()).pooler_output.shape == (4, 16)


def test_views_have_their_own_batch_statistics():
    model = tiny_sjea(sjea_level())
    norm = next(module for module in model.sjea.modules() if isinstance(module, nn.BatchNorm2d))
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.mean(dim=(0, 2, 3))))
    model(views() + torch.tensor([0.0, 5.0]).view(1, 2, 1, 1, 1))
    assert len(seen) == 2
    for mean in seen:
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)


def test_levels_are_chosen_when_loading_and_when_calling(tmp_path):
    tiny_sjea(sjea_level(), sjea_level(), sjea_level()).eval().save_pretrained(tmp_path)
    top = AutoModel.from_pretrained(tmp_path)
    output = top(images(), output_hidden_states=True)
    assert [states.shape for states in output.hidden_states] == [(4, 32, 8, 8), (4, 32, 1, 2), (4, 32, 1, 2)]
    assert output.last_hidden_state is output.hidden_states[2] and output.pooler_output is output.level_embeddings[2]
    middle = AutoModel.from_pretrained(tmp_path, level=-2)(images())
    assert len(middle.level_embeddings) == 2 and middle.hidden_states is None
    torch.testing.assert_close(middle.pooler_output, top(images(), level=1).pooler_output, rtol=0, atol=0)
    for level in (3, -4, "top"):
        with pytest.raises(ValueError, match=f"level={level!r} is not in this model, which has 3 levels, 0 to 2"):
            AutoModel.from_pretrained(tmp_path, level=level)
        with pytest.raises(ValueError, match="is not in this model"):
            top(images(), level=level)


@pytest.mark.parametrize(("level", "width"), [(0, 16), (1, 32)])
def test_classifier_on_any_level(level, width, tmp_path):
    narrow = sjea_level(backbone=RESNET | {"hidden_sizes": [8, 16], "depths": [1, 1]})
    tiny_sjea(narrow, sjea_level()).save_pretrained(tmp_path / "run")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run", level=level, num_labels=3)
    assert isinstance(model, SJeaForImageClassification) and model.classifier.in_features == width
    output = model(images(), labels=torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, torch.tensor([0, 1, 2, 0])))
    output.loss.backward()
    assert model.sjea.levels[0].backbone.embedder.embedder.convolution.weight.grad.abs().max() > 0
    model.eval().save_pretrained(tmp_path / "classifier")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "classifier")
    torch.testing.assert_close(again(images()).logits, model(images()).logits, rtol=0, atol=0)


def test_pipeline_gives_the_features_of_the_level(tmp_path):
    from PIL import Image

    model = tiny_sjea().eval()
    model.save_pretrained(tmp_path)
    image_processor((32, 32), [0.5] * 3, [0.25] * 3).save_pretrained(tmp_path)
    gray = Image.new("RGB", (40, 30), (200, 100, 50))
    for level in range(2):
        encoder = AutoModel.from_pretrained(tmp_path, level=level)
        pipe = build_pipeline("image-feature-extraction", encoder, image_processor=str(tmp_path), pool=True)
        pixel_values = pipe.image_processor(gray, return_tensors="pt").pixel_values
        expected = model.sjea(pixel_values).level_embeddings[level]
        torch.testing.assert_close(torch.tensor(pipe(gray)), expected, rtol=1e-5, atol=1e-5)


def test_a_batch_of_one_image_is_refused():
    model = tiny_sjea()
    with pytest.raises(ValueError, match="a batch of 1 image are undefined; use a batch of 2 images or more"):
        model(views(1))
    assert model(views(2)).loss.isfinite()
    model.eval()
    assert model.sjea(images(1)).pooler_output.shape == (1, 32)


@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 3, 3, 32, 32), (4, 1, 3, 32, 32)])
def test_pre_training_needs_two_views(shape):
    with pytest.raises(ValueError, match="give two views of each image"):
        tiny_sjea(sjea_level())(torch.zeros(shape))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([sjea_level(backbone=RESNET | {"hidden_sizes": [8, 16, 31]}), sjea_level()],
         r"levels\[1\]: An embedding of width 31 cannot be folded to a map: the width has no divisor"),
        ([sjea_level(), sjea_level(fold_height=5)], r"levels\[1\]: .*32 cannot be folded to fold_height=5 rows"),
        ([sjea_level(), sjea_level(reads="expanded", fold_height=7)], "width 24 cannot be folded to fold_height=7"),
        ([sjea_level(stem="standard", backbone=VIT | {"model_type": "vit_mae"})],
         r"levels\[0\]: backbone 'vit_mae' gives no pooled features"),
        ([sjea_level(backbone={"model_type": "bert"}, stem="standard")], "'bert' is no encoder of images"),
        ([sjea_level(backbone={"model_type": "resnit"})], "model_type='resnit' is not transformers'"),
        ([sjea_level(backbone=VIT)], "stem='small' is one of a resnet, and the backbone is 'vit'"),
        ([sjea_level(backbone=RESNET | {"depth": [1]})], "a 'resnet' has no field 'depth'"),
        ([sjea_level(backbone=RESNET | {"to_dict": 1})], "a 'resnet' has no field 'to_dict'"),
        ([sjea_level(backbone=TRANSFORMER | {"hiden_size": 8}, stem="standard")], "'cjepa' has no field 'hiden_size'"),
        ([sjea_level(backbone=RESNET | {"depths": [1]})], r"hidden_sizes=\[8, 16, 32\] and depths=\[1\] differ"),
        ([sjea_level(backbone=RESNET | {"hidden_sizes": 5})], r"levels\[0\]: .*cannot be made of .*hidden_sizes"),
        ([sjea_level(backbone=RESNET | {"layer_type": "foo"})], r"levels\[0\]: .*cannot be made of .*layer_type=foo"),
        ([sjea_level(backbone=RESNET | {"hidden_act": "foo"})], r"levels\[0\]: .*cannot be built: 'foo' \(KeyError\)"),
        ([sjea_level(backbone=RESNET | {"embedding_size": -8})], r"levels\[0\]: .*cannot be built: .*-8"),
        ([sjea_level(backbone={"model_type": ["resnet"]})], r"backbone=.* must be a mapping"),
        ([sjea_level(backbone={"model_type": "sjea"})], "a stack \\('sjea'\\) cannot be a level of another"),
        ([sjea_level(backbone={"model_type": "clip"}, stem="standard")], "'clip' is no encoder of images alone"),
        ([sjea_level(stop_gradient=True)], r"levels\[0\]: stop_gradient=True says what is read of the level below"),
        ([sjea_level(input="map")], r"levels\[0\]: input='map' says what is read of the level below"),
        ([sjea_level(level_weight=float("inf"))], "level_weight=inf is not a loss weight"),
        ([sjea_level(backbone=RESNET | {"num_channels": 4})], "num_channels=4, but the level reads 3"),
        ([sjea_level(), sjea_level(input="tokens")], "'tokens' is read by transformer blocks, not by a 'resnet'"),
        ([sjea_level(), sjea_level(input="map", reads="expanded")], "reads and fold_height belong to input='vector'"),
        ([sjea_level(input="picture")], r"levels\[0\]: input='picture' is not known; choose one of vector"),
        ([sjea_level(expander_sizes=[])], "expander_sizes=.* must be a list of widths"),
        ([sjea_level(covariance_weight=-1)], "covariance_weight=-1 is not a loss weight"),
        ([sjea_level(weight=1)], r"levels\[0\]: unknown key 'weight'; a level has backbone, stem"),
        ([sjea_level(level_weight=0), sjea_level(level_weight=0.0)], "level_weight is 0 at every level"),
        ([], "levels=.* must be a list with an entry for each level"),
        (["resnet"], r"levels\[0\]='resnet' must be a mapping"),
        ([{"backbone": "resnet"}], "backbone='resnet' must be a mapping"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_named(levels, message):
    with pytest.raises(ValueError, match=message):
        SJeaModel(SJeaConfig(levels=levels))


def test_attention_is_chosen_in_every_level_that_has_it(tmp_path):
    levels = [sjea_level(), sjea_level(backbone=TRANSFORMER, stem="standard", input="tokens"),
              sjea_level(backbone=VIT | {"patch_size": 2}, stem="standard")]  # fmt: skip

    def chosen(model):
        """Of the stack, of its ResNet and of its two transformers."""
        return [model.config, *(level.backbone.config for level in model.base_model.levels)]

    def names(model):
        return [config._attn_implementation for config in chosen(model)]

    model = SJeaForPreTraining._from_config(SJeaConfig(levels=levels), attn_implementation="eager")
    assert names(model) == ["eager"] * 4
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        assert names(model) == [implementation, "eager", implementation, implementation]
    model.save_pretrained(tmp_path)
    for implementation in ("sdpa", "eager"):
        loaded = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
        assert names(loaded) == [implementation, "eager", implementation, implementation]
    with pytest.raises(ValueError, match="nonsense"):
        model.set_attn_implementation("nonsense")
    assert names(model) == ["eager"] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_an_expander_gives_is_read_in_half_precision(tmp_path, dtype):
    model = tiny_sjea(sjea_level(), sjea_level(reads="expanded")).eval()
    model.save_pretrained(tmp_path)
    half = AutoModel.from_pretrained(tmp_path, dtype=dtype)
    embedding = half(images(4).to(dtype)).pooler_output
    assert embedding.dtype == dtype
    torch.testing.assert_close(embedding.float(), model.sjea(images(4)).pooler_output, rtol=0.1, atol=0.1)


def test_a_model_of_the_other_kind_is_refused(tmp_path):
    tiny_sjea().save_pretrained(tmp_path / "sjea")
    tiny_model().save_pretrained(tmp_path / "cjepa")
    with pytest.raises(ValueError, match="This is an S-JEA model, no C-JEPA one; load it with AutoModel or SJeaModel"):
        CJepaModel.from_pretrained(tmp_path / "sjea")
    with pytest.raises(ValueError, match="This is a 'cjepa' model, no S-JEA one; load it with AutoModel"):
        SJeaModel.from_pretrained(tmp_path / "cjepa")


def test_configuration_round_trip(tmp_path):
    config = SJeaConfig(levels=[sjea_level(), {"backbone": TRANSFORMER, "input": "tokens"}], level=0, image_size=24)
    config.save_pretrained(tmp_path)
    loaded = SJeaConfig.from_pretrained(tmp_path)
    assert loaded.levels == config.levels and (loaded.level, loaded.image_size, loaded.num_levels) == (0, 24, 2)
    assert loaded.level_configs[1].expander_sizes == [512, 512, 512]
    assert fold_size(512) == (16, 32) and fold_size(256) == (16, 16) and fold_size(512, 8) == (8, 64)
