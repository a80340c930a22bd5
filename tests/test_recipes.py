"""Recipes and flags: what is shipped is valid, flags override, mistakes are named."""

import argparse

import pytest
import torch
import yaml

from trainers.cli import main
from trainers.errors import InputError
from trainers.flags import fits, flag_value, plain_number
from trainers.objectives import OBJECTIVES
from trainers.pretraining import build_model
from trainers.recipe_files import write_recipe
from trainers.recipes import add_recipe_flags, overrides_of, read_recipe, section_fields
from trainers.resources import recipe_names
from trainers.run_arguments import training_arguments


def parse(*flags: str) -> dict:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_recipe_flags(parser)
    return overrides_of(parser.parse_args(flags))


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipe_builds_a_model(name, tmp_path):
    recipe = read_recipe(name, {"output_dir": str(tmp_path)})
    model = build_model(recipe, training_arguments(recipe))
    for key, value in recipe.model.items():
        built = getattr(model.config, key)
        if key == "levels":  # which are filled up with defaults
            built = [{name: level[name] for name in given} for level, given in zip(built, value, strict=True)]
        assert built == value


def test_the_authors_default_folds_what_the_expander_gives(tmp_path):
    recipe = read_recipe("sjea_simple_cifar10", {"output_dir": str(tmp_path)})
    model = build_model(recipe, training_arguments(recipe)).eval()
    lower, upper = model.sjea.levels
    expanded, read = [], []
    lower.expander.register_forward_hook(lambda module, inputs, output: expanded.append(output))
    upper.backbone.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    with torch.no_grad():
        model(torch.randn(2, 2, 3, 32, 32), return_loss=False)
    assert expanded[0].shape[1] == 256
    assert torch.equal(read[0], expanded[0].reshape(-1, 1, 16, 16))
    layers = [module for module in model.expanders["1"].modules() if not list(module.children())]
    assert [(type(layer), layer.in_features, layer.out_features) for layer in layers] == [(torch.nn.Linear, 512, 1000)]


def test_values_reach_their_sections(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "hidden_size: 48\nnum_attention_heads: 3\ncrop_scale: [0.5, 1]\nlearning_rate: 2.0e-3\nnum_neighbors: 7\n"
    )
    recipe = read_recipe(str(file), {"learning_rate": 3e-3, "dataset": "photos"})
    assert recipe.name == "mine"
    assert recipe.model == {"hidden_size": 48, "num_attention_heads": 3}
    assert (recipe.data.crop_scale, recipe.data.dataset) == ([0.5, 1], "photos")
    assert recipe.training == {"learning_rate": 3e-3} and recipe.evaluation.num_neighbors == 7
    write_recipe(recipe.values, tmp_path / "again.yaml")
    assert read_recipe(str(tmp_path / "again.yaml")).values == recipe.values


def test_levels_that_share_a_backbone_are_written_out(tmp_path):
    recipe = read_recipe("sjea_resnet18_cifar10")
    write_recipe(recipe.values, tmp_path / "again.yaml")
    assert "&" not in (tmp_path / "again.yaml").read_text()
    assert read_recipe(str(tmp_path / "again.yaml")).values == recipe.values


def test_keys_of_another_objective_are_named(tmp_path):
    with pytest.raises(InputError, match="'ema_momentum' is a key of model_type cjepa, not of this one; leave it out"):
        read_recipe("sjea_cifar10", {"ema_momentum": 0.9})
    with pytest.raises(InputError, match="'levels' is a key of model_type sjea"):
        read_recipe("cjepa_scenes", {"levels": []})
    with pytest.raises(InputError, match="model_type='ijepa' is not known; choose one of cjepa, sjea"):
        read_recipe("cjepa_scenes", {"model_type": "ijepa"})


def test_flags_are_typed_like_yaml():
    assert parse("--learning_rate", "1e-3", "--max_steps", "5", "--horizontal_flip", "--crop_scale", "0.2", "1") == {
        "learning_rate": 1e-3, "max_steps": 5, "horizontal_flip": True, "crop_scale": [0.2, 1],
    }  # fmt: skip
    assert parse("--horizontal_flip", "false", "--dataset", "my/photos", "--report_to", "tensorboard") == {
        "horizontal_flip": False, "dataset": "my/photos", "report_to": "tensorboard",
    }  # fmt: skip
    assert parse("--dataset", "2024", "--run_name", "a: b") == {"dataset": "2024", "run_name": "a: b"}
    assert parse() == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1e-3", r"learning_rate='1e-3' is a str, not float. Write 1.0e-3"),
        ("hidden_size: '192'", r"hidden_size='192' is a str, not int. Write 192"),
        ("hidden_size: 192.5", "hidden_size=192.5 is a float, not int"),
        ("horizontal_flip: 1", "horizontal_flip=1 is a int, not bool"),
        ("crop_scale: 0.3", "crop_scale=0.3 is a float"),
        ("hiden_size: 192", "unknown key 'hiden_size' .did you mean 'hidden_size'"),
        ("- a\n- b", "not a mapping"),
        ("a: [1", "is not YAML"),
        ("max_steps: true", "max_steps=True is a bool, not int"),
        ("save_strategy: sometimes", "save_strategy='sometimes' is not known; choose one of no, steps, epoch, best"),
        ("optim: 5", "optim=5 is not known; choose one of adamw_torch"),
        ("target_scale: [1e-1, 0.2]", r"target_scale=\['1e-1', 0.2\] .* Write \[1.0e-1, 0.2\], without quotes"),
    ],
)
def test_mistakes_in_a_recipe_are_named(tmp_path, text, message):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(str(file))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 50}, "hidden_size=50 must be a multiple of 4"),
        ({"patch_size": 64}, "image_size=32 is smaller than patch_size=64"),
        ({"patch_size": 16}, "2x2 grid has 4 patches"),
        ({"regularizer": "vicreg"}, "regularizer='vicreg' is not known"),
        ({"ema_momentum": 2}, "ema_momentum=2 is not in"),
        ({"covariance_weight": -1}, "covariance_weight=-1 is not a loss weight"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be above 0"),
        ({"weight_decay": -1}, "weight_decay=-1 is not a number from 0 up"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 must be above 0"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 0}, "needs workers"),
        ({"accelerator_config": {"foo": 1}}, "foo"),
    ],
)
def test_impossible_values_are_one_sentence(tmp_path, values, message):
    recipe = read_recipe("cjepa_scenes", {"output_dir": str(tmp_path), **values})
    with pytest.raises(InputError, match=message) as caught:
        build_model(recipe, training_arguments(recipe))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_sections_share_no_field_with_two_meanings(objective):
    owners = {}
    for section, fields in section_fields(objective).items():
        for name in fields:
            owners.setdefault(name, []).append(section)
    shared = {name for name, sections in owners.items() if len(sections) > 1}
    assert shared == {"seed", "dataloader_num_workers", "disable_tqdm", "precision"}, (
        "these mean the same in training and evaluation"
    )


def test_every_model_field_is_documented_and_listed(capsys):
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser)
    parser.print_help()
    help_text = " ".join(capsys.readouterr().out.split())
    for objective in OBJECTIVES.values():
        for name in section_fields(objective)["model"]:
            assert f"--{name} " in help_text
            assert f"{name} (`" in objective.config_class.__doc__, f"{name} is not documented"
    assert "beta_vicreg" in help_text and "share of the old target encoder" in help_text


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True), (True, float, False), (True, int, False), (None, int | None, True), ("a", int | None, False),
        ([1, 2.5], list[float], True), ([1, "a"], list[float], False), ([1, 2], tuple[int, int], True),
        ([1], tuple[int, int], False), ({"a": 1}, dict | str | None, True),
    ],
)  # fmt: skip
def test_types(value, hint, expected):
    assert fits(value, hint) is expected


def test_no_is_a_word_where_it_is_a_choice(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("save_strategy: no\nhorizontal_flip: no\n")
    recipe = read_recipe(str(file))
    assert recipe.values == {"save_strategy": "no", "horizontal_flip": False}
    assert parse("--save_strategy", "no") == {"save_strategy": "no"}


@pytest.mark.parametrize("word", ["1e-3", "1E5", "2.5e-4", "12", "-3e2"])
def test_advised_number_is_the_number_in_yaml(word):
    assert yaml.safe_load(plain_number(word)) == float(word) == flag_value(word)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("pretrain cjepa_scenes --learning_rat 3", "'--learning_rat' is not known; did you mean --learning_rate?"),
        ("pretrain cjepa_scenes --zzz", "'--zzz' is not known; see --help."),
        ("evaluate somewhere --crop_scale 0.3 1", "'--crop_scale' is not known"),
        ("evaluate somewhere --num_neighbors 0", "num_neighbors=0 is too small; set it to 1 or more."),
        ("evaluate somewhere --temperature 0", "temperature=0 divides similarities"),
        ("pretrain --max_steps 3 cjepa_scenes", "required: RECIPE"),
    ],
)
def test_a_mistyped_command_ends_with_what_to_do(command, said, capsys):
    try:
        status = main(command.split())
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert said in capsys.readouterr().err
