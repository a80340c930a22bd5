"""Evaluation of stacks: a row a level, all side by side, other models in the same table, and the command's flags."""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from test_evaluation import ARGUMENTS, MEAN, SIZE, STD, as_dataset, scenes
from tiny import RESNET, sjea_level, tiny_model, tiny_sjea

from trainers.cli import main
from trainers.cli_models import named_models
from trainers.errors import InputError
from trainers.evaluation import embed, evaluate_levels, evaluate_model, probe
from trainers.loading import load_model
from trainers.pooling import OneLevel
from trainers.transforms import image_processor


@pytest.fixture(scope="module")
def train():
    return scenes(80, 0)


@pytest.fixture(scope="module")
def test():
    return scenes(40, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a plain model."""
    path = tmp_path_factory.mktemp("plain")
    tiny_model(image_size=SIZE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """The folder of a stack of two levels of 32 and 16 features."""
    path = tmp_path_factory.mktemp("stack")
    narrow = RESNET | {"hidden_sizes": [8, 16], "depths": [1, 1]}
    tiny_sjea(sjea_level(), sjea_level(backbone=narrow), image_size=SIZE).eval().save_pretrained(path)
    return path


def test_levels_of_a_stack(stack, train, test):
    arguments = dataclasses.replace(ARGUMENTS, num_random_encoders=1)
    rows = evaluate_model(stack, train, test, arguments, level="all")["rows"]
    assert [row["encoder"] for row in rows] == [
        "encoder, level 0", "encoder, level 1", "encoder, all levels",
        "random encoder, level 0", "random encoder, level 1", "random encoder, all levels", "raw pixels",
    ]  # fmt: skip
    assert [row["dim"] for row in rows[:3]] == [32, 16, 48]
    arguments = dataclasses.replace(ARGUMENTS, num_random_encoders=0)
    for level in (0, 1):
        row, _ = evaluate_model(stack, train, test, arguments, level=level)["rows"]
        assert row == rows[level]
    default, _ = evaluate_model(stack, train, test, arguments)["rows"]
    assert default == rows[1]
    top, _ = evaluate_model(stack, train, test, arguments, level=-1)["rows"]
    assert top == rows[1]
    with pytest.raises(InputError, match="which has 2 levels, 0 to 1; choose one of its own, or say all.$"):
        evaluate_model(stack, train, test, arguments, level=2)


def test_all_levels_side_by_side_are_normalised_each(stack, train, test):
    """One level a thousand times the size of the other counts no more than it."""
    model = load_model(stack)
    arguments = dataclasses.replace(ARGUMENTS, num_random_encoders=0)
    datasets = (as_dataset(train), as_dataset(test))
    parts = [embed(OneLevel(model.sjea, level), *datasets, MEAN, STD, ARGUMENTS, "level") for level in (0, 1)]
    joined = [torch.cat([F.normalize(part[side], dim=1) for part in parts], dim=1) for side in (0, 2)]
    expected = probe(joined[0], parts[0][1], joined[1], parts[0][3], ARGUMENTS, "encoder, all levels")
    rows = evaluate_levels(model.sjea, *datasets, MEAN, STD, arguments, "all")
    assert rows[2] == expected | {
        "num_parameters": sum(level.backbone.num_parameters() for level in model.sjea.levels)
    }


def test_parameters_are_those_of_the_encoders_up_to_the_level(train, test):
    """Those that a loss on the level's features gives a gradient."""
    models = {
        "sjea": tiny_sjea(sjea_level(expander_sizes=[24, 16]), sjea_level(reads="expanded"), sjea_level()).sjea,
        "cjepa": tiny_model(
            image_size=SIZE, patch_size=3, upper_levels=[{"hidden_size": 16}] * 2, min_context_patches=16
        ).cjepa,
    }
    for model in models.values():
        model.requires_grad_(True)
        images = torch.randn(4, 3, *[model.config.image_size] * 2)
        for level in range(3):
            model.zero_grad()
            (model(images, level=level).pooler_output ** 2).sum().backward()
            reached = sum(parameter.numel() for parameter in model.parameters() if parameter.grad is not None)
            assert model.num_parameters_up_to(level) == reached


def test_models_beside_have_rows_of_their_own(stack, folder, train, test):
    arguments = dataclasses.replace(ARGUMENTS, num_random_encoders=0)
    rows = evaluate_model(stack, train, test, arguments, level="all", beside={"plain": folder})["rows"]
    assert [row["encoder"] for row in rows][2:] == ["encoder, all levels", "plain", "raw pixels"]
    (alone, _) = evaluate_model(folder, train, test, arguments)["rows"]
    assert rows[3] == alone | {"encoder": "plain"}


def test_a_model_beside_reads_images_in_its_own_way(stack, train, test, tmp_path):
    tiny_model(image_size=32).save_pretrained(tmp_path)
    image_processor((32, 32), [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]).save_pretrained(tmp_path)
    arguments = dataclasses.replace(ARGUMENTS, num_random_encoders=0)
    rows = evaluate_model(stack, train, test, arguments, MEAN, STD, beside={"other": tmp_path})["rows"]
    (alone, _) = evaluate_model(tmp_path, train, test, arguments)["rows"]
    assert rows[1] == alone | {"encoder": "other"}


def test_a_context_encoder_that_is_not_there_is_refused(stack, train, test):
    with pytest.raises(InputError, match="context_encoder is set, and a SJeaForPreTraining has none; leave it out"):
        evaluate_model(stack, train, test, dataclasses.replace(ARGUMENTS, context_encoder=True))


def test_stacked_cjepa_has_levels_too(train, test):
    model = tiny_model(image_size=SIZE, patch_size=6, upper_levels=[{"hidden_size": 16}], min_context_patches=4)
    arguments = dataclasses.replace(ARGUMENTS, num_random_encoders=0, context_encoder=True)
    rows = evaluate_model(model, train, test, arguments, MEAN, STD, level="all")["rows"]
    assert [(row["encoder"], row["dim"]) for row in rows[:6]] == [
        (f"{encoder}, {level}", dim)
        for encoder in ("target encoder", "context encoder")
        for level, dim in (("level 0", 32), ("level 1", 16), ("all levels", 48))
    ]


def test_command(stack, folder, tmp_path, capsys):
    assert main(["evaluate", str(stack)]) == 2
    assert "does not tell which images it was made of; name some with --dataset" in capsys.readouterr().err
    small = ["--dataset", "scenes", "--num_train_images", "60", "--num_eval_images", "30",
             "--num_random_encoders", "0", "--disable_tqdm"]  # fmt: skip
    output = tmp_path / "results.json"
    flags = ["--level", "all", "--beside", f"plain={folder}", "--beside", f"again={folder}", "--output", str(output)]
    assert main(["evaluate", str(stack), *small, *flags]) == 0
    names = [row["encoder"] for row in json.loads(output.read_text())["rows"]]
    assert names == ["encoder, level 0", "encoder, level 1", "encoder, all levels", "plain", "again", "raw pixels"]
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in names)
    # mistakes are told before the images, of which there are none, are looked for
    nowhere = ["--dataset", str(tmp_path / "no images")]
    assert main(["evaluate", str(stack), *nowhere, "--level", "2"]) == 2
    assert "has 2 levels, 0 to 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(stack), "--level", "top"])
    assert "'top' is no level; give a number from 0, or all" in capsys.readouterr().err
    for command in (["evaluate"], ["visualize", "levels"]):
        assert main([*command, str(stack), *nowhere, "--beside", str(tmp_path / "not")]) == 2
        assert "neither a folder" in capsys.readouterr().err


def test_names_of_models():
    assert named_models(["runs/vicreg/final", "two=runs/two/final/"]) == {
        "vicreg": "runs/vicreg/final", "two": "runs/two/final/",
    }  # fmt: skip
    for wrong in (["=x"], ["a="]):
        with pytest.raises(InputError, match="give a name and a model"):
            named_models(wrong)
    for wrong in (["a=1", "a=2"], ["b=1", "stack=2"], ["runs/stack/final"]):
        with pytest.raises(InputError, match="already; give another name, as in other="):
            named_models(wrong, taken=["stack"])


def test_images_are_those_of_the_run_where_none_are_named(stack, tmp_path, capsys):
    """Of a run that read its images from the column `family`; what is given on the command line goes first."""
    run = tmp_path / "run"
    shutil.copytree(stack, run)
    settings = {"dataset": "scenes", "label_column": "family", "num_train_images": 60, "num_eval_images": 30,
                "num_probe_images": 50, "learning_rate": 0.1, "seed": 7}  # fmt: skip
    (run / "results.json").write_text(json.dumps({"settings": settings}))
    output = tmp_path / "results.json"
    few = ["--num_random_encoders", "0", "--disable_tqdm", "--output", str(output)]

    def sizes(*flags):
        assert main(["evaluate", str(run), *few, *flags]) == 0
        results = json.loads(output.read_text())
        return results["num_train_images"], results["num_test_images"], results["num_classes"], results["seed"]

    assert sizes() == (50, 30, 4, 0)
    assert sizes("--num_eval_images", "20", "--label_column", "kind") == (50, 20, 12, 0)
    assert sizes("--dataset", "scenes", "--num_train_images", "70", "--num_eval_images", "20") == (70, 20, 12, 0)
    (run / "results.json").write_text("{")
    assert main(["evaluate", str(run), *few]) == 2
    assert "results.json" in capsys.readouterr().err
