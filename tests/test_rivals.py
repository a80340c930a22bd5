"""MAE and labels, with which experiments compare: transformers' models on a recipe's images."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import FLAGS, RESNET, SIZES, tiny_config
from transformers import AutoConfig, ViTMAEForPreTraining

from trainers.cli import main
from trainers.errors import InputError
from trainers.experiment_file import read_experiment
from trainers.recipes import read_recipe
from trainers.rivals import RIVALS, train_rival

SETTINGS = dict(zip((flag[2:] for flag in FLAGS[:-1:2]), map(yaml.safe_load, FLAGS[1:-1:2]), strict=True))
SETTINGS |= {"use_cpu": True, "disable_tqdm": True, "max_steps": 4}
PLAN = {
    "title": "Others", "dataset": "scenes-64", "recipe": "cjepa_scenes", "seeds": [1], "settings": SETTINGS,
    "methods": {"mae": {"rival": "mae"}, "labels": {"rival": "supervised"}}, "num_checkpoints": 2,
}  # fmt: skip


def a_recipe(folder, **changes):
    given = SETTINGS | {"output_dir": str(folder), "save_strategy": "no"} | changes
    return read_recipe("cjepa_scenes", given)


def losses(folder):
    history = json.loads((folder / "final/results.json").read_text())["history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def written(folder, **changes):
    path = folder / "others.yaml"
    path.write_text(yaml.dump(PLAN | changes))
    return str(path)


def test_the_encoder_of_mae_sees_every_patch_and_gives_their_mean(tmp_path):
    torch.manual_seed(0)
    model = RIVALS["mae"].build(tiny_config(), None).eval()
    model.save_pretrained(tmp_path)
    images = torch.randn(3, 3, 32, 32)
    whole = ViTMAEForPreTraining.from_pretrained(tmp_path, mask_ratio=0.0).vit(images).last_hidden_state
    found = RIVALS["mae"].load(tmp_path)(images)
    torch.testing.assert_close(found.pooler_output, whole[:, 1:].mean(dim=1))
    assert found.last_hidden_state.shape == (3, 64, 32)


def test_mae_has_the_sizes_of_the_recipe(tmp_path):
    config = RIVALS["mae"].build(tiny_config(), None).config
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size"):
        assert getattr(config, name) == SIZES[name]
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (16, 2)
    assert config.decoder_intermediate_size == 4 * 16
    assert config.mask_ratio == 0.75 and config.norm_pix_loss


@pytest.mark.parametrize("rival", ["mae", "supervised"])
def test_a_rival_learns_what_it_is_asked_for(tmp_path, rival):
    sizes = {"num_train_images": 16, "max_steps": 120, "learning_rate": 5.0e-3, "crop_scale": [1.0, 1.0]}
    train_rival(rival, a_recipe(tmp_path, **sizes, horizontal_flip=False))
    # of normalised pixels, whose variance is 1, more than their mean; sixteen labels by heart (chance: 2.5)
    assert losses(tmp_path)[-1] < {"mae": 0.9, "supervised": 0.5}[rival]


@pytest.mark.parametrize("rival", ["mae", "supervised"])
def test_a_rival_that_is_gone_on_with_is_the_same(tmp_path, rival):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    saving = {"save_strategy": "steps", "save_steps": 2, "horizontal_flip": True}
    train_rival(rival, a_recipe(whole, **saving))
    halved.mkdir()
    shutil.copytree(whole / "checkpoint-2", halved / "checkpoint-2")
    train_rival(rival, a_recipe(halved, **saving, resume_from_checkpoint="last"))
    weights = [load_file(folder / "final/model.safetensors") for folder in (whole, halved)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    facts = json.loads((halved / "final/results.json").read_text())
    assert facts["training"]["images_seen"] == 64 and facts["training"]["steps"] == 4


def test_rivals_are_methods_of_an_experiment(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    assert main(["experiment", written(tmp_path), "--output", str(runs), "--results", str(results)]) == 0
    assert AutoConfig.from_pretrained(runs / "mae/seed-1/final").model_type == "vit_mae"
    assert AutoConfig.from_pretrained(runs / "labels/seed-1/final").architectures == ["CJepaForImageClassification"]
    for name, rival in (("mae", "mae"), ("labels", "supervised")):
        assert yaml.safe_load((runs / name / "seed-1/settings.yaml").read_text())["rival"] == rival
        found = json.loads((runs / name / "seed-1/evaluation.json").read_text())
        assert [point["step"] for point in found["points"]] == [2, 4]
        before, after = found["baselines"][0], found["points"][-1]["rows"][0]
        assert before["dim"] == after["dim"] == 32
        assert before["num_parameters"] == after["num_parameters"]
        assert before["feature_std"] != after["feature_std"]
    assert len(list((runs / "random_encoders").iterdir())) == 2  # of equal sizes, and not alike
    rows = json.loads((results / "summary.json").read_text())
    assert {"mae", "labels"} < {row["method"] for row in rows}
    assert {row["images_seen"] for row in rows if row["method"] == "mae"} == {64}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": {"a": {"rival": "moco"}}}, "a: rival='moco' is not known; choose one of mae, supervised"),
        ({"methods": {"a": {"rival": "mae", "stem_hidden_sizes": [8, 16]}}}, "rival mae takes the sizes"),
        ({"methods": {"a": {"rival": "mae", "upper_levels": [{}]}}}, "rival mae takes the sizes"),
        (
            {
                "methods": {"a": {"rival": "mae", "recipe": "vicreg_cifar10", "levels": [{"backbone": RESNET}]}},
                "settings": {"max_steps": 4},
            },
            "rival mae takes the sizes",
        ),
    ],
)
def test_what_a_rival_cannot_be_is_told_before_any_run(tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        read_experiment(written(tmp_path, **changes))


def test_labels_are_asked_for():
    with pytest.raises(InputError, match="needs labels"):
        RIVALS["supervised"].build(tiny_config(), None)
