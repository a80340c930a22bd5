"""The folder of a run of S-JEA and of stacked C-JEPA: trained by the command, loaded where the package is not."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import FLAGS, RESNET, TRANSFORMER, images, sjea_level
from transformers import AutoModelForImageClassification

from trainers.cli import main
from trainers.loading import load_model

pytestmark = pytest.mark.usefixtures("few_penalties")

LEVELS = [sjea_level(), sjea_level(reads="expanded", expander_sizes=[10])]
SMALL = ["--num_train_images", "64", "--num_eval_images", "48", "--logging_steps", "1", "--precision", "float32",
         "--per_device_train_batch_size", "16", "--use_cpu", "--max_steps", "3"]  # fmt: skip
UPPER = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}
RUNS = {
    "sjea": ["sjea_cifar10", *SMALL, "--dataset", "scenes", "--levels", json.dumps(LEVELS)],
    "sjea of a transformer": [
        "sjea_cifar10", *SMALL, "--dataset", "scenes", "--level", "0", "--levels",
        json.dumps([sjea_level(stem="standard", backbone=TRANSFORMER | {"patch_size": 4}),
                    sjea_level(input="map", backbone=RESNET)]),
    ],
    "stacked cjepa": ["cjepa_scenes", *FLAGS, "--max_steps", "3", "--min_context_patches", "8",
                      "--upper_levels", json.dumps([UPPER])],
}  # fmt: skip
WIDTHS = {"sjea": (32, 32), "sjea of a transformer": (32, 32), "stacked cjepa": (32, 48)}
LOAD = """
import json, sys
import torch
from PIL import Image
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
                          AutoModelForPreTraining, pipeline)

folder = sys.argv[1]
images = torch.load(f"{folder}/images.pt")
remote = {"trust_remote_code": True}
picture = Image.new("RGB", (40, 30), (200, 100, 50))
pixel_values = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt").pixel_values
found = {"model_type": AutoConfig.from_pretrained(folder, **remote).model_type, "levels": []}
for level in (0, 1):
    model, info = AutoModel.from_pretrained(folder, level=level, output_loading_info=True, **remote)
    outputs = model(images, output_hidden_states=True)
    found["levels"].append(outputs.pooler_output.tolist())
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert len(outputs.level_embeddings) == level + 1, outputs.level_embeddings
    features = pipeline("image-feature-extraction", model=folder, model_kwargs={"level": level}, pool=True, **remote)
    torch.testing.assert_close(torch.tensor(features(picture)), model(pixel_values).pooler_output)
    classifier = AutoModelForImageClassification.from_pretrained(folder, level=level, num_labels=3, **remote)
    assert classifier(images).logits.shape == (len(images), 3)
found["default"] = AutoModel.from_pretrained(folder, **remote)(images).pooler_output.tolist()
whole, info = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True, **remote)
assert not info["missing_keys"] and not info["unexpected_keys"], info
found["parameters"] = sum(p.numel() for p in whole.parameters())
found["module"] = type(whole).__module__
print(json.dumps(found))
"""
CLASSIFY = """
import json, sys
import torch
from transformers import AutoModelForImageClassification

classifier = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps(classifier(torch.load(f"{sys.argv[1]}/images.pt")).logits.tolist()))
"""


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    """The name of a run and the folder it left."""
    folder = tmp_path_factory.mktemp("run") / "mine"
    assert main(["pretrain", *RUNS[request.param], "--output_dir", str(folder), "--disable_tqdm"]) == 0
    return request.param, folder / "final"


def run_without_the_package(code, tmp_path, *arguments) -> dict:
    """What code prints as JSON in a process that does not find this package."""
    script = tmp_path / "load.py"
    script.write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-P", script, *arguments]
    if sys.version_info < (3, 11):
        command.remove("-P")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_auto_classes_load_it_in_a_process_without_the_package(run, tmp_path):
    name, folder = run
    torch.save(images(), folder / "images.pt")
    found = run_without_the_package(LOAD, tmp_path, folder)
    assert found["module"].startswith("transformers_modules.")
    model = load_model(folder).eval()
    with torch.no_grad():
        expected = model.base_model(images(), level=1).level_embeddings
    for level, embedding in enumerate(expected):
        assert embedding.shape == (4, WIDTHS[name][level])
        torch.testing.assert_close(torch.tensor(found["levels"][level]), embedding, rtol=1e-5, atol=1e-5)
    default = 0 if name == "sjea of a transformer" else 1  # the level the recipe names, or the top
    assert found["default"] == found["levels"][default]
    assert found["parameters"] == model.num_parameters()


def test_a_classifier_saved_from_it_loads_in_a_process_without_the_package(run, tmp_path):
    classifier = AutoModelForImageClassification.from_pretrained(run[1], level=0, num_labels=3).eval()
    assert not type(classifier).__module__.startswith("transformers_modules")
    classifier.save_pretrained(tmp_path / "classifier")
    torch.save(images(), tmp_path / "classifier" / "images.pt")
    with torch.no_grad():
        expected = classifier(images()).logits
    found = run_without_the_package(CLASSIFY, tmp_path, tmp_path / "classifier")
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-5, atol=1e-5)


def test_the_folder_tells_of_its_levels(run):
    name, folder = run
    results = json.loads((folder / "results.json").read_text())
    rows = [row["encoder"] for row in results["evaluation"]["rows"]]
    encoder = "target encoder" if name == "stacked cjepa" else "encoder"
    assert rows[:3] == [f"{encoder}, level 0", f"{encoder}, level 1", f"{encoder}, all levels"]
    card = (folder / "README.md").read_text()
    assert "{{" not in card and "None" not in card.split("## Settings")[0]
    ranks, logged = results["training"]["rankme"], [entry for entry in results["history"] if "rankme" in entry]
    assert ranks == [[entry[name] for entry in (logged[0], logged[-1])] for name in ("rankme", "level1_rankme")]
    for level, (first, last) in enumerate(ranks):
        assert f"level {level} {first:.1f} at the first log, {last:.1f} at the last" in card
    assert ("stack of 2 levels" if name == "stacked cjepa" else "A stack of 2 image encoders") in card
    assert ("features of level 0" if name == "sjea of a transformer" else "the top level") in " ".join(card.split())
    logged = [entry for entry in results["history"] if "loss" in entry]
    assert len(logged) == 3 and all(entry["level1_rankme"] > 0 for entry in logged)


def test_resume_of_a_finished_level_stack_is_the_whole_run(tmp_path):
    """The command stopped in the middle and resumed leaves the weights of one that was not."""
    arguments = ["pretrain", *RUNS["sjea"], "--disable_tqdm", "--save_strategy", "steps", "--save_steps", "2"]
    assert main([*arguments, "--output_dir", str(tmp_path / "whole")]) == 0
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "part" / "checkpoint-2")
    assert main([*arguments, "--output_dir", str(tmp_path / "part"), "--resume_from_checkpoint", "last"]) == 0
    whole, part = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "part"))
    assert whole.keys() == part.keys() and all(torch.equal(whole[key], part[key]) for key in whole)


def test_gradient_checkpointing_where_no_layer_can_is_one_sentence(tmp_path, capsys):
    flags = [*RUNS["sjea"], "--output_dir", str(tmp_path / "run"), "--gradient_checkpointing", "true"]
    assert main(["pretrain", *flags]) == 2
    error = capsys.readouterr().err
    assert "gradient_checkpointing: no layer of this model can do it; leave it out." in error
    assert "Traceback" not in error
