"""Runs that start from weights that are there: ours, other packages', with a predictor and without."""

import json
import shutil

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from tiny import FLAGS, seeded, sjea_level, tiny_config, tiny_model, tiny_sjea
from transformers import IJepaConfig, IJepaModel, ViTConfig, ViTModel

from modeling_cjepa import CJepaModel
from trainers.cli import main
from trainers.conversion.converting import convert
from trainers.errors import InputError
from trainers.pretraining import build_model
from trainers.publishing import save_model
from trainers.recipes import read_recipe
from trainers.resources import recipe_path
from trainers.run_arguments import training_arguments
from trainers.transforms import image_processor

pytestmark = pytest.mark.usefixtures("few_penalties")

RUN = {"use_cpu": True, "precision": "float32"}
VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 4,
}  # fmt: skip


def save(model, folder):
    folder.mkdir()
    save_model(model, image_processor((32, 32), [0.5] * 3, [0.5] * 3), folder)
    return folder


def build(start, tmp_path, recipe="cjepa_scenes", **changes):
    """The model of a recipe that starts from somewhere."""
    values = RUN | {"output_dir": str(tmp_path / "run"), "start_from": str(start)} | changes
    recipe = read_recipe(recipe, values)
    return build_model(recipe, training_arguments(recipe)), recipe


def same(tensors, others):
    return tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_a_run_s_weights_are_taken_whole_and_its_sizes_with_them(tmp_path, capsys):
    start = tiny_model(regularizer_weight=0.5)
    model, recipe = build(save(start, tmp_path / "start"), tmp_path)
    assert same(model.state_dict(), start.state_dict())
    assert recipe.values["hidden_size"] == 32 and recipe.values["predictor_hidden_size"] == 16
    assert model.config.regularizer_weight == recipe.model["regularizer_weight"] == 0.003  # the recipe's
    assert "anew" not in capsys.readouterr().out


def test_an_encoder_alone_becomes_both_encoders(tmp_path, capsys):
    start = tiny_model().cjepa
    model, recipe = build(save(start, tmp_path / "start"), tmp_path, predictor_hidden_size=24)
    assert same(model.cjepa.state_dict(), start.state_dict())
    assert same(model.context_encoder.state_dict(), start.state_dict())
    recipe.run.start_from = None
    fresh = build_model(recipe, training_arguments(recipe))
    assert (
        same(model.predictor.state_dict(), fresh.predictor.state_dict()) and model.config.predictor_hidden_size == 24
    )
    assert "- predictor starts anew\n" in capsys.readouterr().out


def test_another_predictor_starts_anew_as_a_whole(tmp_path, capsys):
    start = tiny_model()
    model, recipe = build(save(start, tmp_path / "start"), tmp_path, predictor_num_hidden_layers=3)
    assert same(model.context_encoder.state_dict(), start.context_encoder.state_dict())
    recipe.run.start_from = None
    fresh = build_model(recipe, training_arguments(recipe))
    assert same(model.predictor.state_dict(), fresh.predictor.state_dict())
    assert "- predictor starts anew\n" in capsys.readouterr().out


def test_images_of_another_size_are_trained_on(tmp_path):
    start = tiny_model()
    model, _ = build(save(start, tmp_path / "start"), tmp_path, image_size=48)
    assert model.config.grid_size == (12, 12)
    assert torch.equal(model.cjepa.layers[0].mlp.fc1.weight, start.cjepa.layers[0].mlp.fc1.weight)


def test_transformers_i_jepa_is_a_start(tmp_path, capsys):
    torch.manual_seed(0)
    native = IJepaModel(IJepaConfig(**VIT, layer_norm_eps=1e-6)).eval()
    ours = CJepaModel(tiny_config(layer_norm_eps=1e-6))
    with torch.no_grad():
        native.embeddings.position_embeddings.copy_(ours.embeddings.position_embeddings)
    native.save_pretrained(tmp_path / "ijepa")
    model, _ = build(tmp_path / "ijepa", tmp_path)
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval().cjepa(images).last_hidden_state, native(images).last_hidden_state, atol=1e-5, rtol=1e-5
        )
    said = capsys.readouterr().out
    assert "checked against transformers' IJepaModel" in said and "- predictor starts anew\n" in said


def test_a_plain_vit_is_a_start_and_what_does_not_map_is_said(tmp_path, capsys):
    ViTModel(ViTConfig(**VIT)).save_pretrained(tmp_path / "vit")
    model, _ = build(tmp_path / "vit", tmp_path)
    assert same(model.cjepa.state_dict(), model.context_encoder.state_dict())
    said = capsys.readouterr().out
    assert "class token" in said and "position" in said


def test_a_lower_level_is_the_start_of_a_stack(tmp_path, capsys):
    start = tiny_sjea(sjea_level())
    levels = [sjea_level(expander_sizes=[7], covariance_weight=3.0), sjea_level(expander_sizes=[9])]
    recipe = tmp_path / "stack.yaml"
    recipe.write_text(f"model_type: sjea\nimage_size: 32\nlevels: {json.dumps(levels)}\n")
    model, _ = build(save(start, tmp_path / "start"), tmp_path, str(recipe))
    assert same(model.sjea.levels[0].state_dict(), start.sjea.levels[0].state_dict())
    assert same(model.expanders["0"].state_dict(), start.expanders["0"].state_dict())
    assert model.config.levels[0]["covariance_weight"] == 3.0 and len(model.config.levels) == 2
    assert "- sjea.levels.1, expanders.1 start anew\n" in capsys.readouterr().out


def stack_recipe(tmp_path, *levels):
    path = tmp_path / "levels.yaml"
    path.write_text(f"model_type: sjea\nimage_size: 32\nlevels: {json.dumps(levels)}\n")
    return str(path)


def test_of_a_resnet_s_file_the_backbone_is_taken_and_the_expander_is_the_recipe_s(tmp_path, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    recipe = stack_recipe(tmp_path, {"backbone": {"model_type": "resnet"}, "stem": "small", "expander_sizes": [24, 8]})
    model, read = build(tmp_path / "resnet18.pth", tmp_path, recipe)
    assert model.config.levels[0]["expander_sizes"] == [24, 8]
    said = capsys.readouterr().out
    assert "levels[0].stem standard (the recipe says small)" in said and "- expanders.0 starts anew\n" in said
    again, _ = build(tmp_path / "resnet18.pth", tmp_path, recipe)
    assert same(model.state_dict(), again.state_dict())  # by the recipe's seed


def test_an_s_jea_encoder_alone_leaves_the_expander_to_the_recipe(tmp_path):
    recipe = stack_recipe(tmp_path, sjea_level(expander_sizes=[7]), sjea_level(expander_sizes=[5]))
    start = save(tiny_sjea(sjea_level(), sjea_level(reads="expanded", expander_sizes=[9])).sjea, tmp_path / "start")
    model, _ = build(start, tmp_path, recipe)
    # the lower one is part of the encoder, as the level above reads it
    assert [level["expander_sizes"] for level in model.config.levels] == [[24, 24, 24], [5]]


@pytest.mark.parametrize(("said", "wide"), [({}, 96), ({"predictor_intermediate_size": 40}, 40)])
def test_another_width_of_the_predictor_is_that_of_its_mlps_too(tmp_path, said, wide):
    model, _ = build(save(tiny_model(), tmp_path / "start"), tmp_path, predictor_hidden_size=24, **said)
    config = model.config
    assert (config.predictor_hidden_size, config.predictor_intermediate_size) == (24, wide)


def test_the_size_the_predictor_has_makes_no_other(tmp_path):
    start = tiny_model()
    model, _ = build(save(start, tmp_path / "start"), tmp_path, predictor_hidden_size=16)
    assert same(model.predictor.state_dict(), start.predictor.state_dict())


@pytest.mark.parametrize("in_file", [True, False])
def test_i_jepa_goes_on_with_an_expander_and_keeps_its_predictor(tmp_path, capsys, in_file):
    start = tiny_model()
    recipe, changes = "cjepa_scenes", {"expander_hidden_size": 24}
    if in_file:
        recipe, changes = str(tmp_path / "recipe.yaml"), {}
        text = recipe_path("cjepa_scenes").read_text(encoding="utf-8")
        (tmp_path / "recipe.yaml").write_text(f"{text}\nexpander_hidden_size: 24\n")
    model, _ = build(save(start, tmp_path / "start"), tmp_path, recipe, **changes)
    assert same(model.predictor.state_dict(), start.predictor.state_dict())
    assert model.config.expander_hidden_size == 24
    assert "- expander starts anew\n" in capsys.readouterr().out


def test_an_expander_that_the_recipe_has_not_is_left_out(tmp_path, capsys):
    model, _ = build(save(tiny_model(expander_hidden_size=24), tmp_path / "start"), tmp_path)
    assert model.config.expander_hidden_size is None
    assert "- expander of the start is left out\n" in capsys.readouterr().out


def test_levels_above_those_of_the_start_start_anew(tmp_path, capsys):
    start = tiny_model()
    upper = [{"num_hidden_layers": 1, "stop_gradient": True}, {"num_hidden_layers": 1}]
    model, _ = build(save(start, tmp_path / "one"), tmp_path, upper_levels=upper, image_size=64)
    assert same(model.cjepa.layers.state_dict(), start.cjepa.layers.state_dict())
    assert model.config.num_levels == 3 and model.config.upper_levels[0]["stop_gradient"]
    assert "context_encoder.upper_levels.1, upper_predictors.0, upper_predictors.1" in capsys.readouterr().out
    two = tiny_model(upper_levels=[{"num_hidden_layers": 2, "regularizer_weight": 9.0}])
    recipe = tmp_path / "stack.yaml"
    text = recipe_path("cjepa_scenes").read_text(encoding="utf-8")
    recipe.write_text(f"{text}\nupper_levels: {json.dumps(upper)}\n")
    model, _ = build(save(two, tmp_path / "two"), tmp_path, str(recipe), image_size=64)
    # sizes of the start, loss of the recipe
    assert model.config.num_levels == 3
    assert model.config.upper_levels[0] == {"num_hidden_layers": 2, "stop_gradient": True}
    assert same(model.cjepa.upper_levels[0].layers.state_dict(), two.cjepa.upper_levels[0].layers.state_dict())
    assert "upper_levels[0].num_hidden_layers 2 (the recipe says 1)" in capsys.readouterr().out


def test_heads_of_an_authors_file_are_those_of_a_recipe_as_wide(tmp_path):
    start = tiny_model()
    convert(str(save(start, tmp_path / "start")), tmp_path / "a.pth.tar", to="authors")
    recipe = tmp_path / "own.yaml"
    for width, fits in ((32, True), (48, False)):
        recipe.write_text(f"hidden_size: {width}\nnum_attention_heads: 2\nimage_size: 32\ndataset: scenes\n")
        if fits:
            model, _ = build(tmp_path / "a.pth.tar", tmp_path, str(recipe))
            assert model.config.num_attention_heads == 2 and same(model.state_dict(), start.state_dict())
        else:
            with pytest.raises(InputError, match="Width 32 is none of the published ones; say num_attention_heads"):
                build(tmp_path / "a.pth.tar", tmp_path, str(recipe))


def test_what_the_weights_compute_with_is_taken_and_how_images_were_normalised_is_said(tmp_path, capsys):
    model, _ = build(save(tiny_model(layer_norm_eps=1e-3), tmp_path / "start"), tmp_path)
    assert model.config.layer_norm_eps == 1e-3 and model.cjepa.layernorm.eps == 1e-3
    said = capsys.readouterr().out
    assert "normalised by the recipe's mean" in said and "and were by [0.5, 0.5, 0.5]" in said


def test_it_trains_resumes_and_tells_where_it_started(tmp_path):
    start = save(tiny_model(), tmp_path / "start")
    flags = ["pretrain", "cjepa_scenes", "--num_train_images", "64", "--num_eval_images", "48", "--use_cpu",
             "--per_device_train_batch_size", "16", "--logging_steps", "1", "--precision", "float32", "--disable_tqdm",
             "--start_from", str(start), "--max_steps", "4", "--save_steps", "2", "--label_column", "null",
             "--num_probe_images", "12"]  # fmt: skip
    assert main([*flags, "--output_dir", str(tmp_path / "whole")]) == 0
    (tmp_path / "part").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-2", tmp_path / "part/checkpoint-2")
    assert main([*flags, "--output_dir", str(tmp_path / "part"), "--resume_from_checkpoint", "last"]) == 0
    whole, part = (load_file(tmp_path / name / "final/model.safetensors") for name in ("whole", "part"))
    assert same(whole, part) and not same(whole, load_file(start / "model.safetensors"))
    assert "It started from the weights of `start`." in (tmp_path / "whole/final/README.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 64},
            "--hidden_size 64 contradicts start_from=.*start, whose hidden_size is 32; leave it out",
        ),
        ({"recipe": "sjea_cifar10"}, "is a model of type 'cjepa'; give a recipe of model_type cjepa"),
        ({"start_from": "nowhere/at/all"}, "nowhere/at/all is no file"),
        ({"start_from": "gray"}, "gray reads images of 1 channels, .* start from a model of 3"),
    ],
)
def test_what_cannot_start_is_one_sentence(tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    ViTModel(ViTConfig(**VIT, num_channels=1)).save_pretrained("gray")
    start = save(tiny_model(), tmp_path / "start")
    with pytest.raises(InputError, match=message):
        build(start, tmp_path, **changes)


def test_the_command_says_it(tmp_path, capsys):
    flags = [*FLAGS, "--start_from", str(save(tiny_sjea(), tmp_path / "start")), "--output_dir", str(tmp_path / "run")]
    assert main(["pretrain", "cjepa_scenes", *flags]) == 2
    error = capsys.readouterr().err
    assert "is a model of type 'sjea'" in error and "Traceback" not in error and not (tmp_path / "run").exists()
