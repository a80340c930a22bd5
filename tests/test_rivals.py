"""MAE and labels, with which experiments compare: on a recipe's images, trained like all else."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny import FLAGS, RESNET, SIZES, tiny_config
from transformers import AutoConfig, ViTMAEConfig, ViTMAEForPreTraining

from trainers.cli import main
from trainers.errors import InputError
from trainers.experiment_file import read_experiment
from trainers.recipes import read_recipe
from trainers.rival_training import train_rival
from trainers.rivals import RIVALS, MaeEncoder
from trainers.run_arguments import training_arguments
from trainers.sources import load_sources

SETTINGS = dict(zip((flag[2:] for flag in FLAGS[:-1:2]), map(yaml.safe_load, FLAGS[1:-1:2]), strict=True))
SETTINGS |= {"use_cpu": True, "disable_tqdm": True, "max_steps": 4, "final_regularizer_weight": 0.0}
PLAN = {
    "title": "Others", "dataset": "scenes-64", "recipe": "cjepa_scenes", "seeds": [1], "settings": SETTINGS,
    "methods": {"mae": {"rival": "mae"}, "labels": {"rival": "supervised"}}, "num_checkpoints": 2,
}  # fmt: skip
TWO_VIEWS = {
    "num_views": 2, "regularizer": "views", "stem_hidden_sizes": [8, 16], "color_jitter_probability": 0.8,
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


def a_model(rival="mae", names=None, **changes):
    torch.manual_seed(0)
    return RIVALS[rival].build(tiny_config(**changes), names, "eager").eval()


def test_the_encoder_of_mae_sees_every_patch_and_gives_their_mean(tmp_path):
    model = a_model()
    model.save_pretrained(tmp_path)
    images = torch.randn(3, 3, 32, 32)
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**model.mae.config.to_dict() | {"mask_ratio": 0.0})).eval()
    theirs.load_state_dict(model.mae.state_dict())
    whole = theirs.vit(images, noise=torch.arange(64).expand(3, -1)).last_hidden_state
    found = RIVALS["mae"].load(tmp_path)(images)
    torch.testing.assert_close(found.last_hidden_state, whole[:, 1:])
    torch.testing.assert_close(found.pooler_output, whole[:, 1:].mean(dim=1))


def test_the_loss_is_of_hidden_patches_normalised():
    model = a_model()
    images = torch.randn(3, 3, 32, 32)
    torch.manual_seed(5)
    outputs = model.mae(images)
    assert outputs.mask.sum(dim=1).tolist() == [48.0] * 3
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(3, 64, 48)
    patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (outputs.logits - patches).square().mean(-1)[outputs.mask.bool()].mean()
    torch.manual_seed(5)
    found = model(images)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.loss_terms["reconstruction"], expected)
    torch.manual_seed(5)
    seen = model.mae.vit(images).last_hidden_state[:, 1:]
    assert seen.shape[1] == 16
    torch.testing.assert_close(found.level_embeddings[0], seen.mean(dim=1))
    torch.testing.assert_close(found.level_views[0][:, 0], seen.mean(dim=1))


@pytest.mark.parametrize("kind", ["encoder", "decoder", "encoder before training"])
def test_patches_have_their_places(kind):
    model = a_model()
    if kind == "decoder":
        table = model.mae.decoder.decoder_pos_embed
    else:
        vit = model.mae.vit if kind == "encoder" else MaeEncoder(model.config).vit
        table = vit.embeddings.position_embeddings
        projection = vit.embeddings.patch_embeddings.projection.weight
        # Xavier's, of 48 pixels and 32 features
        assert projection.abs().max() <= (6 / (48 + 32)) ** 0.5 < 1.1 * projection.abs().max()
    if kind != "encoder before training":
        tokens = model.mae.vit.embeddings.cls_token, model.mae.decoder.mask_token
        assert all(0.01 < token.std() < 0.04 for token in tokens)
    # sines and cosines of 64 places
    assert table.shape[1] == 65 and torch.cdist(table[0, 1:], table[0, 1:]).fill_diagonal_(1).min() > 0.1
    torch.testing.assert_close(table[0, 1:].square().sum(dim=1), torch.full((64,), table.shape[2] / 2))


def test_mae_has_the_sizes_of_the_recipe():
    config = a_model().mae.config
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


def test_labels_are_those_of_the_images(tmp_path):
    for name, color in (("blue", (0, 0, 200)), ("red", (200, 0, 0))):
        for part, number in (("train", 32), ("test", 2)):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (32, 32), color).save(tmp_path / "images" / part / name / f"{index:02}.png")
    # the last blue one, in whose place a red one comes
    (tmp_path / "images/train/blue/31.png").write_bytes(b"no image")
    given = {"dataset": str(tmp_path / "images"), "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    given |= {"dataloader_num_workers": 1}
    recipe = a_recipe(tmp_path / "run", **given)
    args, (source, _) = training_arguments(recipe), load_sources(recipe.data, 32, progress=False)
    model, batches = a_model("supervised", source.label_names), []

    def look(model, args, kwargs):
        red, _, blue = args[0].mean(dim=(2, 3)).T
        batches.append(((red > blue).long(), kwargs["labels"]))

    model.register_forward_pre_hook(look, with_kwargs=True)
    RIVALS["supervised"].build_trainer(model, args, recipe.data, source).train()
    assert source.label_names == ["blue", "red"] and len(batches) == 8
    for is_red, labels in batches:
        assert is_red.tolist() == labels.tolist() and 0 < is_red.sum() < 8


@pytest.mark.parametrize("rival", ["mae", "supervised", "supervised stack"])
def test_a_rival_that_is_gone_on_with_is_the_same(tmp_path, capsys, rival):
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    # two passes over the images and a part of a third, colours and crops drawn anew
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10, "per_device_train_batch_size": 16}
    others = {"supervised": TWO_VIEWS, "mae": {}, "supervised stack": {"upper_levels": [{}]}}[rival]
    rival = rival.split()[0]
    train_rival(rival, a_recipe(whole, **saving, **others))
    halved.mkdir()
    shutil.copytree(whole / "checkpoint-6", halved / "checkpoint-6")
    train_rival(rival, a_recipe(halved, **saving, **others, resume_from_checkpoint="last"))
    told = capsys.readouterr().out
    assert told.count(f"rival {rival}, sizes of recipe ") == 2
    assert f"going on from {halved}" in told
    weights = [load_file(folder / "final/model.safetensors") for folder in (whole, halved)]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name
    facts = json.loads((halved / "final/results.json").read_text())
    assert facts["training"]["images_seen"] == 160 and facts["training"]["steps"] == 10


def test_rivals_are_methods_of_an_experiment(tmp_path):
    runs, results = tmp_path / "runs", tmp_path / "results"
    assert main(["experiment", written(tmp_path), "--output", str(runs), "--results", str(results)]) == 0
    assert AutoConfig.from_pretrained(runs / "labels/seed-1/final").architectures == ["CJepaForImageClassification"]
    for name, rival in (("mae", "mae"), ("labels", "supervised")):
        assert yaml.safe_load((runs / name / "seed-1/settings.yaml").read_text())["rival"] == rival
        found = json.loads((runs / name / "seed-1/evaluation.json").read_text())
        assert [point["step"] for point in found["points"]] == [2, 4]
        before, after = found["baselines"][0], found["points"][-1]["rows"][0]
        assert before["dim"] == after["dim"] == 32
        assert before["num_parameters"] == after["num_parameters"]
        assert before["feature_std"] != after["feature_std"]
    loaded = RIVALS["mae"].load(runs / "mae/seed-1/final").state_dict()
    saved = load_file(runs / "mae/seed-1/final/model.safetensors")
    assert all(torch.equal(value, saved[f"mae.{name}"]) for name, value in loaded.items())
    assert len(list((runs / "random_encoders").iterdir())) == 2  # of equal sizes, and not alike
    rows = json.loads((results / "summary.json").read_text())
    assert {"mae", "labels"} < {row["method"] for row in rows}
    assert {row["images_seen"] for row in rows if row["method"] == "mae"} == {64}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": {"a": {"rival": "moco"}}}, "a: rival='moco' is not known; choose one of mae, supervised"),
        ({"methods": {"a": {"rival": ["mae"]}}}, "a: rival=.* is a list"),
        ({"methods": {"a": {"rival": "mae", "stem_hidden_sizes": [8, 16]}}}, "rival mae takes the sizes"),
        ({"methods": {"a": {"rival": "mae", "upper_levels": [{}]}}}, "rival mae takes the sizes"),
        ({"methods": {"a": {"rival": "mae", "image_size": [32, 64]}}}, "rival mae takes the sizes"),
        ({"methods": {"a": {"rival": "mae", "image_size": 30}}}, "rival mae takes the sizes"),
        ({"methods": {"a": {"rival": "mae", "image_size": [32, 8], "patch_size": 8}}}, "rival mae takes the sizes"),
        ({"methods": {"a": {"rival": "mae", "patch_size": [4, 8]}}}, "rival mae takes the sizes"),
        ({"methods": {"a": {"rival": "mae", "drop_path_rate": 0.1}}}, "rival mae takes the sizes"),
        ({"methods": {"a": {"rival": "mae", "exact_accumulation": True}}}, "leave exact_accumulation out"),
        ({"methods": {"a": {"rival": "mae", "start_from": "runs/mine"}}}, "starts anew; leave start_from out"),
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


def test_another_mae_is_not_gone_on_with(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    train_rival("mae", a_recipe(tmp_path, **saving))
    shutil.rmtree(tmp_path / "final")
    with pytest.raises(InputError, match="was trained with num_attention_heads=2, the recipe says 4"):
        train_rival("mae", a_recipe(tmp_path, **saving, num_attention_heads=4, resume_from_checkpoint="last"))


def test_a_broken_mae_is_not_evaluated(tmp_path):
    model = a_model()
    weights = {name: value for name, value in model.state_dict().items() if "layernorm_after" not in name}
    model.save_pretrained(tmp_path, state_dict=weights, save_original_format=False)
    with pytest.raises(InputError, match="lacks weights of an MAE .*layernorm_after"):
        RIVALS["mae"].load(tmp_path)


def test_labels_are_asked_for():
    with pytest.raises(InputError, match="needs labels"):
        a_model("supervised")
