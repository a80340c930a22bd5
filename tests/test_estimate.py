"""What `--estimate` tells of a run, beside the models themselves."""

import pytest
from tiny import FLAGS, RESNET, sjea_level, tiny_config
from training_worker import build_trainer
from transformers import ResNetConfig, ResNetModel

from modeling_cjepa import CJepaForPreTraining
from trainers import estimate as estimate_module
from trainers.cli import main
from trainers.estimate import estimate, format_estimate
from trainers.recipes import read_recipe
from trainers.run_arguments import training_arguments

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
    by_epochs = {"num_train_epochs": 3.0, "per_device_train_batch_size": 8}
    assert found_of(num_train_images=50, **by_epochs)["num_images"] == 152  # the last batch is full, too
    assert found_of("cjepa_scenes", **by_epochs)["num_images"] == 30_000
    unknown = found_of()
    assert unknown["num_images"] is None and "hours a million images" in format_estimate(unknown)


def test_checkpoints_that_are_kept():
    found = found_of(max_steps=100, save_steps=30)
    weights = found["weights"] + found["target_encoder"]
    assert found["disk"] == 4 * found["checkpoint"] + weights
    assert found_of(max_steps=100, save_steps=30, save_total_limit=2)["disk"] == 2 * found["checkpoint"] + weights
    long = found_of(num_train_images=45_000, num_train_epochs=100.0, per_device_train_batch_size=32)
    assert long["disk"] == 282 * found["checkpoint"] + weights  # 140,625 steps, one each 500 and the last
    assert "for 282 checkpoints that the run keeps" in format_estimate(long)


@pytest.mark.parametrize(
    "saves",
    [
        {"max_steps": 7, "save_steps": 2},
        {"max_steps": 7, "save_steps": 0},
        {"max_steps": 7, "save_steps": 0.3},
        {"max_steps": 7, "save_strategy": "no"},
        {"max_steps": 7, "save_strategy": "epoch"},
        {"num_train_epochs": 1.7, "save_strategy": "epoch", "gradient_accumulation_steps": 2},
        {"num_train_epochs": 2.0, "save_strategy": "epoch"},
        {"max_steps": 7, "save_steps": 1, "save_total_limit": 2, "keep_checkpoints_every": 3},
        {"max_steps": 6, "save_steps": 2, "save_total_limit": 1, "keep_checkpoints_every": 3},
        {"max_steps": 4, "save_steps": 3, "save_total_limit": 0},
    ],
    ids=str,
)
def test_as_many_checkpoints_are_told_as_a_run_keeps(tmp_path, saves):
    saves = {"save_strategy": "steps", "per_device_train_batch_size": 8} | saves
    trainer = build_trainer(str(tmp_path), saves, num_images=28)
    trainer.train()
    assert estimate_module._num_checkpoints(trainer.args, 28) == len(list(tmp_path.glob("checkpoint-*")))


def test_checkpoints_of_a_run_whose_images_are_not_counted(monkeypatch):
    found = found_of()
    assert found["num_checkpoints"] is None and found["fits"]
    said = format_estimate(found)
    assert "depends on the number of train images, which is not known" in said
    room = (found["free_disk"] - found["weights"] - found["target_encoder"]) // found["checkpoint"]
    assert f"It fits if no more than {room:,} checkpoints are kept" in said
    assert found_of(save_strategy="epoch", max_steps=9)["num_checkpoints"] is None
    assert found_of(save_total_limit=3)["num_checkpoints"] == 3


def test_processes_share_the_memory_of_a_cpu(monkeypatch):
    monkeypatch.setattr(estimate_module, "free_memory", lambda device: 2**30)
    recipe = read_recipe("cjepa_cifar10", TINY | {"precision": "float32", "use_cpu": True})
    args = training_arguments(recipe)
    monkeypatch.setattr(estimate_module, "training_arguments", lambda recipe: args)
    monkeypatch.setattr(type(args), "world_size", 2)
    found = estimate(recipe)
    assert found["processes"] == 2 and found["free"] == 2**29 + PROGRAM


def test_a_process_may_have_one_image_where_another_has_more(monkeypatch):
    recipe = read_recipe("cjepa_cifar10", TINY | {"use_cpu": True, "per_device_train_batch_size": 1})
    args = training_arguments(recipe)
    monkeypatch.setattr(estimate_module, "training_arguments", lambda recipe: args)
    monkeypatch.setattr(type(args), "world_size", 2)
    assert estimate(recipe)["fits"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--per_device_train_batch_size 1", "A batch of 1 image has no variance"),
        ("--num_train_images 3", "has 3 images, fewer than the 16 of a batch"),
        ("--resume_from_checkpoint nowhere", "nowhere is no whole checkpoint"),
        ("--attn_implementation flex_attention", "'flex_attention' trains on a GPU only"),
        ("--attn_implementation nonsense", '"nonsense"` is not supported'),
        ("--streaming true --num_train_images null", "scenes is no table that can be streamed"),
        ("--fsdp full_shard", "fsdp shards a model over processes"),
        (f"--output_dir {'n' * 300}", "cannot be a folder"),
    ],
)
def test_what_a_run_refuses_before_its_images_has_no_estimate(tmp_path, capsys, flags, said):
    command = ["pretrain", "cjepa_scenes", *FLAGS, "--output_dir", str(tmp_path / "run"), *flags.split()]
    for more in ([], ["--estimate"]):
        assert main([*command, *more]) == 2
        assert said in capsys.readouterr().err


def test_a_folder_of_another_run_has_no_estimate(tmp_path, capsys):
    command = ["pretrain", "cjepa_scenes", *FLAGS, "--output_dir", str(tmp_path), "--estimate"]
    (tmp_path / "checkpoint-3").mkdir()
    assert main(command) == 2
    assert "already holds checkpoint-3" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_a_checkpoint_of_another_model_has_no_estimate(tmp_path, capsys):
    build_trainer(str(tmp_path), {"max_steps": 1, "save_strategy": "steps"}).train()
    command = ["pretrain", "cjepa_scenes", *FLAGS, "--output_dir", str(tmp_path), "--estimate"]
    assert main([*command, "--resume_from_checkpoint", "last"]) == 2
    assert "was trained with" in capsys.readouterr().err


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
    full = {"checkpoint": 9, "num_checkpoints": 1, "disk": 9, "free_disk": 8}
    monkeypatch.setattr(estimate_module, "_disk", lambda step, args, known: full)
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
