"""A run as a user makes it: the command, its files, reloading them in a fresh process, and mistakes on the way."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_worker import ended_process
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import FLAGS, tiny_model

from modeling_cjepa import CJepaForPreTraining, CJepaModel
from trainers import pretrain_results, pretraining
from trainers.checkpoint_files import write_manifest
from trainers.cli import main
from trainers.datasets import ImageSource
from trainers.publishing import whole_folder
from trainers.recipes import read_recipe

pytestmark = pytest.mark.usefixtures("few_penalties")


def pretrain(output, *flags, recipe="cjepa_scenes") -> int:
    return main(["pretrain", recipe, *FLAGS, "--output_dir", str(output), "--max_steps", "3", *flags])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished tiny run, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "scripts/pretrain.py", "cjepa_scenes", *FLAGS, "--output_dir", str(folder)]
    root = Path(__file__).resolve().parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    result = subprocess.run(
        [*command, "--max_steps", "3"], cwd=root, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, result.stdout, result.stderr


def test_run_leaves_a_whole_folder(run):
    folder, _, _ = run
    names = {path.name for path in (folder / "final").iterdir()}
    expected = {"model.safetensors", "config.json", "preprocessor_config.json", "curves.png", "results.json"}
    assert expected | {"README.md", "modeling_cjepa.py"} <= names
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    with Image.open(folder / "final" / "curves.png") as picture:
        assert picture.size[0] > 800 and np.asarray(picture.convert("L")).std() > 10
    facts = json.loads((folder / "final" / "results.json").read_text())
    assert facts["training"]["steps"] == 3 and facts["training"]["images_seen"] == 48
    assert [row["encoder"] for row in facts["evaluation"]["rows"]] == [
        "target encoder", "random encoder", "raw pixels",
    ]  # fmt: skip


def test_run_says_what_it_does(run):
    folder, stdout, stderr = run
    assert "C-JEPA (I-JEPA + VICReg)" in stdout and f'from_pretrained("{folder}/final"' in stdout
    assert "| target encoder" in stdout and "raw pixels" in stdout
    assert "images/s" in stderr and "RankMe" in stderr and "Traceback" not in stderr


def test_card_tells_what_was_recorded(run):
    folder, _, _ = run
    card = (folder / "final" / "README.md").read_text()
    facts = json.loads((folder / "final" / "results.json").read_text())
    row = facts["evaluation"]["rows"][0]
    assert f"{row['knn']:.1f}" in card and "regularizer `context`" in card and "3 steps of 16 images" in card
    assert card.startswith("---\n") and "{{" not in card and "None" not in card.split("## Settings")[0]
    fades = facts["settings"].get("final_regularizer_weight")
    assert (f", falling to {fades} (" in card) == (fades is not None)
    settings = card.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(settings) == facts["settings"] and facts["settings"]["final_learning_rate"] == 1e-5


def test_recipe_beside_the_run_repeats_it(run, tmp_path):
    folder, _, _ = run
    recipe = tmp_path / "recipe.yaml"
    shutil.copy(folder / "recipe.yaml", recipe)
    assert main(["pretrain", str(recipe), "--output_dir", str(tmp_path / "again")]) == 0
    first, again = (load_file(path / "final" / "model.safetensors") for path in (folder, tmp_path / "again"))
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


LOAD = """
import sys, torch
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoModelForPreTraining,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from PIL import Image
assert not any(name.startswith(("modeling_cjepa", "trainers")) for name in sys.modules)
folder = sys.argv[1]
trust = {"trust_remote_code": True}
processor = AutoImageProcessor.from_pretrained(folder)
inputs = processor(Image.new("L", (50, 40), 90).convert("RGB"), return_tensors="pt")
encoder, info = AutoModel.from_pretrained(folder, output_loading_info=True, **trust)
assert not info["missing_keys"] and not info["unexpected_keys"], info
pretraining = AutoModelForPreTraining.from_pretrained(folder, **trust)
classifier = AutoModelForImageClassification.from_pretrained(folder, num_labels=5, **trust)
# AutoBackbone.from_pretrained reads no folders
backbone = get_class_from_dynamic_module("backbone_cjepa.CJepaBackbone", folder).from_pretrained(folder)
assert AutoConfig.from_pretrained(folder, **trust).hidden_size == 32
assert classifier(**inputs).logits.shape == (1, 5)
with torch.no_grad():
    embedding = encoder(**inputs).pooler_output
    assert torch.equal(embedding, pretraining.cjepa(**inputs).pooler_output)
    torch.testing.assert_close(backbone(**inputs).feature_maps[-1].mean(dim=(2, 3)), embedding)
torch.save(embedding, sys.argv[2])
"""


def test_final_folder_loads_without_the_package(run, tmp_path):
    folder, _, _ = run
    script = tmp_path / "load.py"
    script.write_text(LOAD)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, str(script), str(folder / "final"), str(tmp_path / "embedding.pt")]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    encoder = CJepaModel.from_pretrained(folder / "final")
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder / "final")
    with torch.no_grad():
        image = Image.new("L", (50, 40), 90).convert("RGB")
        expected = encoder(**processor(image, return_tensors="pt")).pooler_output
    torch.testing.assert_close(torch.load(tmp_path / "embedding.pt"), expected, atol=1e-6, rtol=1e-5)


def test_evaluate_repeats_the_figures_of_the_run(run, tmp_path, capsys):
    folder, _, _ = run
    output = tmp_path / "results.json"
    flags = ["--dataset", "scenes", "--num_train_images", "64", "--num_eval_images", "48", "--output", str(output)]
    assert main(["evaluate", str(folder / "final"), *flags]) == 0
    recorded = json.loads((folder / "final" / "results.json").read_text())["evaluation"]["rows"]
    rows = json.loads(output.read_text())["rows"]
    assert [row["knn"] for row in rows] == [row["knn"] for row in recorded]
    said = capsys.readouterr()
    assert "| target encoder" in said.out and "target encoder: train images" in said.err
    assert main(["evaluate", str(folder / "final"), *flags, "--disable_tqdm"]) == 0
    assert capsys.readouterr().err == ""


def test_unlabelled_folder_trains_and_is_not_evaluated(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for index in range(40):
        pixels = np.random.default_rng(index).integers(0, 256, (36, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    assert pretrain(tmp_path / "run", "--dataset", str(tmp_path / "photos")) == 0
    assert "has no labels" in capsys.readouterr().out
    assert "evaluation" not in json.loads((tmp_path / "run" / "final" / "results.json").read_text())
    status = main(["evaluate", str(tmp_path / "run" / "final"), "--dataset", str(tmp_path / "photos")])
    assert status == 2 and "--label_column" in capsys.readouterr().err


def fails_in_one_sentence(capsys, status: int, *words: str):
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("cjepa: ")]
    assert status == 2 and len(sentences) == 1 and "Traceback" not in error, error
    for word in words:
        assert word in sentences[0], sentences[0]


def test_corrupt_image_is_replaced_and_listed(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for index in range(40):
        Image.new("RGB", (40, 40), (index, 0, 0)).save(tmp_path / "photos" / f"{index}.png")
    flags = ["--dataset", str(tmp_path / "photos"), "--dataloader_num_workers", "1"]
    (tmp_path / "photos" / "17.png").write_bytes(b"this is no picture")
    assert pretrain(tmp_path / "run", *flags) == 0
    said = capsys.readouterr().out
    listed = tmp_path / "run" / "quarantine.jsonl"
    assert f"1 image cannot be read ({tmp_path}/photos/17.png: not an image; all in {listed})" in said
    (entry,) = map(json.loads, listed.read_text().splitlines())
    assert entry["file"] == str(tmp_path / "photos" / "17.png") and entry["reason"] == "not an image"
    facts = json.loads((tmp_path / "run" / "final" / "results.json").read_text())
    assert facts["data"]["num_unreadable"] == 1


def test_too_many_corrupt_images_stop_the_run(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for index in range(60):
        file = tmp_path / "photos" / f"{index:02d}.png"
        if index % 4:
            Image.new("RGB", (40, 40), (index, 0, 0)).save(file)
        else:
            file.write_bytes(b"this is no picture")
    status = pretrain(tmp_path / "run", "--dataset", str(tmp_path / "photos"), "--max_steps", "20")
    fails_in_one_sentence(
        capsys, status, "images cannot be read", ".png: not an image; ", "up to 10 would be replaced"
    )
    assert not (tmp_path / "run" / "final").exists()
    assert len((tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()) > 10
    share = ["--max_unreadable_share", "0.5"]
    assert pretrain(tmp_path / "run", "--dataset", str(tmp_path / "photos"), "--max_steps", "20", *share) == 0


def test_finished_and_begun_runs_are_not_overwritten(run, tmp_path, capsys):
    folder, _, _ = run
    fails_in_one_sentence(capsys, pretrain(folder), "finished run", "--output_dir")
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    fails_in_one_sentence(capsys, pretrain(begun), "checkpoint-3", "--resume_from_checkpoint last")
    status = pretrain(tmp_path / "new", "--resume_from_checkpoint", "last")
    fails_in_one_sentence(capsys, status, "no whole checkpoint to resume from")
    status = pretrain(begun, "--resume_from_checkpoint", str(tmp_path))
    fails_in_one_sentence(capsys, status, "no whole checkpoint", "manifest.json")
    (begun / "recipe.yaml").write_text("a: [1")
    fails_in_one_sentence(capsys, pretrain(begun, "--resume_from_checkpoint", "last"), "recipe.yaml", "mend or remove")


def test_checkpoint_of_another_grid_is_refused(run, tmp_path, capsys):
    folder, _, _ = run
    checkpoint = str(folder / "checkpoint-3")
    status = pretrain(tmp_path / "run", "--patch_size", "8", "--min_context_patches", "4", "--resume_from_checkpoint",
                      checkpoint)  # fmt: skip
    fails_in_one_sentence(capsys, status, "patch_size=4", "8")


def test_resuming_goes_on_where_the_run_stopped(run, tmp_path):
    folder, _, _ = run
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    assert pretrain(begun, "--resume_from_checkpoint", "last", "--max_steps", "5") == 0
    facts = json.loads((begun / "final" / "results.json").read_text())
    assert facts["training"]["steps"] == 5
    assert [entry["step"] for entry in facts["history"] if "loss" in entry] == [1, 2, 3, 4, 5]


def test_another_course_leaves_later_checkpoints_aside(run, tmp_path, capsys):
    folder, _, _ = run
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    shutil.copytree(begun / "checkpoint-3", begun / "checkpoint-9")
    flags = ["--resume_from_checkpoint", str(begun / "checkpoint-3"), "--max_steps", "4", "--save_total_limit", "-1"]
    assert pretrain(begun, *flags) == 0
    assert "checkpoint-9 is later than checkpoint-3: it is called superseded-checkpoint-9" in capsys.readouterr().out
    kept = ["checkpoint-3", "checkpoint-4", "superseded-checkpoint-9"]
    assert sorted(path.name for path in begun.glob("*checkpoint-*")) == kept


def test_resuming_a_run_at_its_end_trains_nothing(run, tmp_path):
    folder, _, _ = run
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    assert pretrain(begun, "--resume_from_checkpoint", "last") == 0
    assert not (begun / "checkpoint-4").exists()
    first, again = (load_file(path / "final" / "model.safetensors") for path in (folder, begun))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


@pytest.mark.parametrize("part", ["trainer_state.json", "config.json", "model.safetensors", "optimizer.safetensors",
                                  "manifest.json"])  # fmt: skip
def test_broken_checkpoint_is_passed_over_for_a_whole_one(run, tmp_path, capsys, part):
    folder, _, _ = run
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    shutil.copytree(begun / "checkpoint-3", begun / "checkpoint-10")
    broken = begun / "checkpoint-10" / part
    broken.write_bytes(broken.read_bytes()[:20])
    assert pretrain(begun, "--resume_from_checkpoint", "last") == 0
    printed = capsys.readouterr().out
    assert "checkpoint-10 is passed over" in printed and part in printed and "going on from" in printed
    status = pretrain(tmp_path / "other", "--resume_from_checkpoint", str(begun / "checkpoint-10"))
    fails_in_one_sentence(capsys, status, "no whole checkpoint", part)


def test_damage_inside_a_checkpoint_is_found(run, tmp_path, capsys):
    folder, _, _ = run
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    shutil.copytree(begun / "checkpoint-3", begun / "checkpoint-10")
    damaged = begun / "checkpoint-10" / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 255
    damaged.write_bytes(data)
    assert pretrain(begun, "--resume_from_checkpoint", "last") == 0
    assert "checkpoint-10 is passed over: optimizer.safetensors" in capsys.readouterr().out


def test_other_settings_are_said_on_resuming(run, tmp_path, capsys):
    folder, _, _ = run
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    assert pretrain(begun, "--resume_from_checkpoint", "last", "--seed", "7", "--max_steps", "4") == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "with other settings, so not as an uninterrupted run: max_steps was 3 and is 4; seed was" in said


def test_settings_that_no_weight_depends_on_are_not_spoken_of(run, tmp_path, capsys):
    folder, _, _ = run
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    flags = ["--dataloader_num_workers", "1", "--num_random_encoders", "0", "--logging_steps", "3"]
    assert pretrain(begun, "--resume_from_checkpoint", "last", *flags) == 0
    said = capsys.readouterr().out
    assert "going on from" in said and "other settings" not in said


def test_other_batches_go_on_at_the_same_image(run, tmp_path, capsys):
    folder, _, _ = run
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    halved = ["--per_device_train_batch_size", "8", "--max_steps", "5"]
    assert pretrain(begun, "--resume_from_checkpoint", "last", *halved) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "with 8 images a step in 1 process, before 16 images a step in 1 process, from the image" in said
    assert "number 48 of the order" in said and "per_device_train_batch_size" not in said
    facts = json.loads((begun / "final" / "results.json").read_text())
    assert facts["training"]["images_seen"] == 3 * 16 + 2 * 8
    progress = json.loads((begun / "checkpoint-5" / "progress.json").read_text())
    assert (progress["step"], progress["samples_seen"], progress["batch_size"]) == (5, 64, 8)


def test_other_images_are_refused_on_resuming(run, tmp_path, capsys):
    folder, _, _ = run
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun, ignore=shutil.ignore_patterns("final"))
    status = pretrain(begun, "--resume_from_checkpoint", "last", "--num_train_images", "63", "--max_steps", "4")
    fails_in_one_sentence(capsys, status, "other train images (64 images, ", "now (63 images, ", "--output_dir")
    at_its_end = pretrain(begun, "--resume_from_checkpoint", "last", "--num_train_images", "63")
    fails_in_one_sentence(capsys, at_its_end, "other train images (64 images, ")
    assert "num_train_images: 64" in (begun / "recipe.yaml").read_text()
    (begun / "checkpoint-3" / "progress.json").unlink()
    write_manifest(begun / "checkpoint-3", 3)
    status = pretrain(begun, "--resume_from_checkpoint", "last", "--max_steps", "4")
    fails_in_one_sentence(capsys, status, "progress.json is missing or broken", "another checkpoint")


def test_classes_that_train_lacks_are_said_before_training(tmp_path, capsys):
    for split, name in (("train", "cat"), ("train", "dog"), ("test", "emu")):
        (tmp_path / "pets" / split / name).mkdir(parents=True)
        for index in range(16):
            Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / "pets" / split / name / f"{index}.png")
    assert pretrain(tmp_path / "run", "--dataset", str(tmp_path / "pets")) == 0
    said = capsys.readouterr().out
    assert "not evaluated" in said and "emu" in said
    assert "evaluation" not in json.loads((tmp_path / "run" / "final" / "results.json").read_text())


def test_evaluate_tests_on_what_the_run_held_out(tmp_path, capsys):
    for name, low in (("dark", 0), ("light", 128)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(60):
            pixels = np.random.default_rng(index).integers(low, low + 140, (32, 32, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    flags = ["--dataset", str(tmp_path / "photos"), "--num_train_images", "64"]
    assert pretrain(tmp_path / "run", *flags) == 0
    assert "\n64 train images, chosen by --num_train_images 64 (null takes all)\n" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "run" / "final" / "results.json").read_text())["evaluation"]
    output = tmp_path / "again.json"
    flags += ["--precision", "float32", "--seed", "3", "--output", str(output)]
    assert main(["evaluate", str(tmp_path / "run" / "final"), *flags]) == 0
    again = json.loads(output.read_text())
    assert again["num_test_images"] == recorded["num_test_images"] == 12
    for row, expected in zip(again["rows"], recorded["rows"], strict=True):
        if row["encoder"] != "random encoder":
            assert row["knn"] == expected["knn"] and row["rankme"] == pytest.approx(expected["rankme"])


def test_the_recipe_reaches_the_trainer(tmp_path):
    def trainer(**changes):
        values = {"output_dir": str(tmp_path), "use_cpu": True, "crop_scale": [1.0, 1.0], "horizontal_flip": False}
        recipe = read_recipe("cjepa_scenes", values | changes)
        args = pretraining.training_arguments(recipe)
        return pretraining.build_trainer(recipe, tiny_model(), args, source)

    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    source = ImageSource(pixels)
    plain = trainer(seed=5, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6])
    views = [plain.train_dataset[index]["pixel_values"].permute(1, 2, 0).numpy() for index in range(40)]
    assert np.array_equal(views, pixels)
    assert plain.train_dataset.seed == 5
    torch.testing.assert_close(plain.image_mean, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(plain.image_std, torch.tensor([0.4, 0.5, 0.6]))
    assert tuple(plain.processing_class.image_mean) == (0.1, 0.2, 0.3)
    mirrored = trainer(horizontal_flip=True).train_dataset
    views = [mirrored[index]["pixel_values"].permute(1, 2, 0).numpy() for index in range(40)]
    ways = {
        (np.array_equal(view, image), np.array_equal(view, image[:, ::-1]))
        for view, image in zip(views, pixels, strict=True)
    }
    assert ways == {(True, False), (False, True)}
    cropped = trainer(crop_scale=[0.3, 0.5]).train_dataset
    assert not any(np.array_equal(cropped[i]["pixel_values"].permute(1, 2, 0).numpy(), pixels[i]) for i in range(40))


def test_two_processes_make_one_run(run, tmp_path):
    folder, _, _ = run
    root = Path(__file__).resolve().parent.parent
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
                "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    flags = [*FLAGS, "--per_device_train_batch_size", "8", "--max_steps", "3", "--output_dir", str(tmp_path / "run")]
    if not torch.accelerator.is_available():
        # where there is nothing else, the processes find the CPU by themselves
        flags.remove("--use_cpu")
    result = subprocess.run(
        [*launcher, "scripts/pretrain.py", "cjepa_scenes", *flags], cwd=root, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root)}, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    facts = json.loads((tmp_path / "run" / "final" / "results.json").read_text())
    assert facts["training"]["processes"] == 2 and facts["training"]["images_seen"] == 48
    history = json.loads((folder / "final" / "results.json").read_text())["history"]
    for one, two in zip(history[:3], facts["history"][:3], strict=True):
        for name in ("loss", "loss_prediction", "loss_variance", "loss_covariance"):
            assert two[name] == pytest.approx(one[name], rel=1e-3), (one["step"], name)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--crop_scale", "1", "0.3"], ["crop_scale"]),
        (["--image_std", "0", "0", "0"], ["image_std"]),
        (["--num_train_images", "0"], ["num_train_images"]),
        (["--num_channels", "1"], ["num_channels", "RGB"]),
        (["--per_device_train_batch_size", "1"], ["per_device_train_batch_size"]),
        (
            [
                "--regularizer_weight",
                "0",
                "--upper_levels",
                "[{regularizer_weight: 0.1}]",
                "--per_device_train_batch_size",
                "1",
            ],
            ["per_device_train_batch_size"],
        ),
        (["--report_to", "nowhere"], ["nowhere"]),
        (["--hidden_act", "sharp"], ["hidden_act"]),
        (["--target_scale", "0.2"], ["target_scale"]),
        (["--patch_size", "0"], ["patch_size"]),
        (["--dataset", "*.parquet"], ["*.parquet"]),
        (["--dataloader_drop_last", "false"], ["dataloader_drop_last=False", "all batches are full"]),
        (["--accelerator_config", "{foo: 1}"], ["foo"]),
        (["--attn_implementation", "flex_attention"], ["flex_attention", "sdpa"]),
        (["--seed", "-1"], ["seed=-1"]),
    ],
)
def test_impossible_flags_are_one_sentence(tmp_path, capsys, flags, words):
    fails_in_one_sentence(capsys, pretrain(tmp_path / "run", *flags), *words)


def test_a_checkpoint_is_evaluated_on_the_images_of_its_run(run, tmp_path, capsys):
    checkpoint = run[0] / "checkpoint-3"
    flags = ["--num_train_images", "24", "--num_eval_images", "20", "--disable_tqdm"]
    assert main(["evaluate", str(checkpoint), *flags]) == 0
    assert "20 images of scenes (test)" in capsys.readouterr().out
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    fails_in_one_sentence(capsys, main(["evaluate", str(moved), *flags]), "does not tell which images", "--dataset")


def test_model_with_missing_weights_is_refused(run, tmp_path, capsys):
    folder, _, _ = run
    broken = tmp_path / "broken"
    shutil.copytree(folder / "final", broken)
    weights = load_file(broken / "model.safetensors")
    del weights["cjepa.layernorm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    status = main(["evaluate", str(broken), "--num_train_images", "20", "--num_eval_images", "20"])
    fails_in_one_sentence(capsys, status, "cjepa.layernorm.weight")


def test_batch_larger_than_the_data_is_refused(tmp_path, capsys):
    status = pretrain(tmp_path / "run", "--per_device_train_batch_size", "512")
    fails_in_one_sentence(capsys, status, "64 images", "512", "--per_device_train_batch_size")


def test_full_disk_is_said_and_leaves_no_half_folder(run, tmp_path, capsys, monkeypatch):
    def no_space(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pretrain_results, "draw_curves", no_space)
    fails_in_one_sentence(capsys, pretrain(tmp_path / "run"), "disk is full", str(tmp_path / "run"), "resume")
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-3", "recipe.yaml"]


def test_whole_folder_may_be_read_by_others_and_clears_what_a_killed_run_left(tmp_path):
    killed = tmp_path / f".final.{socket.gethostname()}.{ended_process()}.tmp"
    killed.mkdir()
    (killed / "weights").touch()
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "final") as unfinished:
            (unfinished / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "final", tmp_path / "final" / "weights")]
    assert modes == [0o750, 0o640]


def test_whole_folder_leaves_what_is_not_of_a_run_or_still_written(tmp_path):
    others = [f".final.{socket.gethostname()}.{os.getppid()}.tmp", f".final.other-machine.{ended_process()}.tmp"]
    others = sorted([".final-notes", *others])
    for name in others:
        (tmp_path / name).mkdir()
    with whole_folder(tmp_path / "final"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [*others, "final"]


def test_whole_folder_appears_at_the_end_only(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "final") as unfinished:
        (unfinished / "a").write_text("a")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "final") as unfinished:
        (unfinished / "a").write_text("a")
        assert not (tmp_path / "final").exists()
    assert (tmp_path / "final" / "a").read_text() == "a"


def test_published_weights_hold_all_three_parts(run):
    folder, _, _ = run
    model, info = CJepaForPreTraining.from_pretrained(folder / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    last = CJepaForPreTraining.from_pretrained(folder / "checkpoint-3")
    for (name, tensor), other in zip(model.state_dict().items(), last.state_dict().values(), strict=True):
        assert torch.equal(tensor, other), name
