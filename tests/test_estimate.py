"""What `--estimate` tells of a run, beside the models themselves."""

import pytest
from tiny import FLAGS, RESNET, sjea_level, tiny_config
from transformers import ResNetConfig, ResNetModel

from modeling_cjepa import CJepaForPreTraining
from trainers import estimate as estimate_module
from trainers.cli import main
from trainers.estimate import estimate, format_estimate
from trainers.recipes import read_recipe

TINY = {name.removeprefix("--"): int(value) for name, value in zip(FLAGS[:14:2], FLAGS[1:14:2], strict=True)}


PROGRAM = 10 * 2**20


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(estimate_module, "matmul_rate", lambda device, precision: 2e9)
    monkeypatch.setattr(estimate_module, "program_memory", lambda device: PROGRAM)


def found_of(name="cjepa_cifar10", **overrides) -> dict:
    return estimate(read_recipe(name, TINY | {"precision": "float32", "use_cpu": True} | overrides))


def test_weights_gradients_and_averages_are_those_of_the_model():
    found = found_of()
    model = CJepaForPreTraining(tiny_config(predictor_num_hidden_layers=1, predictor_num_attention_heads=2))
    target = sum(p.numel() for p in model.cjepa.parameters())
    trained = sum(p.numel() for p in model.parameters()) - target
    assert found["parameters"] == {"encoder": target, "predictor": trained - target}
    buffers = 4 * sum(buffer.numel() for buffer in model.buffers())
    assert found["weights"] == 4 * trained + buffers and found["target_encoder"] == 4 * target
    assert found["gradients"] == 4 * trained
    assert found["optimizer"] == found["checkpoint"] - 4 * (trained + target) - buffers
    assert found["optimizer"] == pytest.approx(8 * trained, rel=0.01)


def test_the_largest_batch_fits_and_a_larger_one_does_not(monkeypatch):
    monkeypatch.setattr(estimate_module, "free_memory", lambda device: 40 * 2**20)
    found = found_of(per_device_train_batch_size=64)
    largest = found["largest_batch_size"]
    assert found_of(per_device_train_batch_size=int(0.9 * largest))["fits"]
    assert not found_of(per_device_train_batch_size=int(1.15 * largest))["fits"]


def test_steps_and_the_program_are_the_peak(monkeypatch):
    monkeypatch.setattr(estimate_module, "free_memory", lambda device: 7)
    found = found_of()
    parts = ("weights", "target_encoder", "gradients", "optimizer", "activations", "margin", "program")
    assert found["peak"] == sum(found[name] for name in parts)
    assert found["program"] == PROGRAM and found["free"] == 7 + PROGRAM


def test_time_is_operations_over_the_assumed_rate():
    found = found_of(max_steps=100, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert found["num_images"] == 1600
    assert found["hours"] == pytest.approx(1600 * found["flops_per_image"] / (found["assumed_mfu"] * 2e9) / 3600)
    assert found_of(num_train_images=50, num_train_epochs=3.0)["num_images"] == 150
    unknown = found_of()
    assert unknown["num_images"] is None and "hours a million images" in format_estimate(unknown)


def test_checkpoints_that_are_kept():
    found = found_of(max_steps=100, save_steps=30)
    weights = found["weights"] + found["target_encoder"]
    assert found["disk"] == 4 * found["checkpoint"] + weights
    assert found_of(max_steps=100, save_steps=30, save_total_limit=2)["disk"] == 2 * found["checkpoint"] + weights


@pytest.mark.parametrize("name", ["cjepa_stack_scenes", "sjea_cifar10", "vicreg_cifar10"])
def test_stacks_and_two_views(name):
    found = estimate(read_recipe(name, {"use_cpu": True, "per_device_train_batch_size": 4, "precision": "float32"}))
    assert found["fits"] and found["flops_per_image"] > 0
    assert found["peak"] > found["weights"] + found["target_encoder"] + found["gradients"] + found["optimizer"]


def test_a_backbone_that_is_named_has_its_own_sizes(tmp_path):
    named = {name: value for name, value in RESNET.items() if name != "model_type"}
    ResNetModel(ResNetConfig(**named)).save_pretrained(tmp_path / "resnet")
    found = [
        found_of_levels([sjea_level(backbone=backbone, stem="standard")])
        for backbone in (str(tmp_path / "resnet"), RESNET)
    ]
    assert found[0]["parameters"] == found[1]["parameters"] and found[0]["peak"] == found[1]["peak"]


def found_of_levels(levels: list[dict]) -> dict:
    flags = {"use_cpu": True, "per_device_train_batch_size": 4, "precision": "float32", "levels": levels}
    return estimate(read_recipe("sjea_cifar10", flags))


def test_the_command_trains_nothing_and_says_whether_it_fits(tmp_path, capsys, monkeypatch):
    output = tmp_path / "run"
    command = ["pretrain", "cjepa_cifar10", *FLAGS, "--output_dir", str(output), "--estimate"]
    assert main(command) == 0
    assert "It fits; so would batches of about" in capsys.readouterr().out and not output.exists()
    monkeypatch.setattr(estimate_module, "free_memory", lambda device: 2**21)
    assert main(command) == 1
    said = capsys.readouterr().out
    assert (
        "It does not fit in memory" in said
        and "give --gradient_checkpointing, or lower --per_device_train_batch_size" in said
    )


def test_a_device_that_is_not_known_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(estimate_module, "MARGIN", {"cuda": 1.1})
    assert main(["pretrain", "cjepa_cifar10", *FLAGS, "--estimate"]) == 2
    assert "--estimate knows no cpu" in capsys.readouterr().err


def test_a_full_disk_is_said(capsys, monkeypatch):
    monkeypatch.setattr(estimate_module, "_disk", lambda step, args: {"checkpoint": 9, "disk": 9, "free_disk": 8})
    assert main(["pretrain", "cjepa_cifar10", *FLAGS, "--estimate"]) == 1
    assert "It does not fit on the disk" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_a_convolutional_stack_is_not_told_to_checkpoint(capsys, monkeypatch):
    command = ["pretrain", "sjea_cifar10", "--use_cpu", "--precision", "float32", "--estimate"]
    monkeypatch.setattr(estimate_module, "free_memory", lambda device: 2**20)
    assert main(command) == 1
    assert "gradient_checkpointing" not in capsys.readouterr().out
    assert main([*command, "--gradient_checkpointing"]) == 2
    assert "no layer of this model can do it" in capsys.readouterr().err
