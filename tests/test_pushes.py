"""Checkpoints that a run pushes while it trains, against a server on loopback that speaks the Hub's endpoints."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_worker import Commands
from hub_runs import LOAD, files_of, without_package
from tiny import FLAGS, tiny_model

from trainers import pushed_trainer
from trainers.checkpoint_push import CheckpointPush
from trainers.loading import load_model
from trainers.publishing import save_model
from trainers.trainer_cjepa import CJepaTrainer
from trainers.training_args import CJepaTrainingArguments
from trainers.transforms import image_processor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A saved encoder."""
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_model(), image_processor((32, 32), [0.5] * 3, [0.5] * 3), folder)
    return folder


def push_flags(folder, repo):
    return ["pretrain", "cjepa_scenes", *FLAGS, "--dataset", "scenes", "--num_eval_images", "12", "--max_steps", "3",
            "--num_probe_images", "12", "--save_steps", "1", "--push_to_hub", "true", "--hub_always_push", "true",
            "--hub_model_id", repo, "--output_dir", str(folder), "--disable_tqdm"]  # fmt: skip


def test_every_pushed_checkpoint_loads_and_the_end_is_the_published_model(hub, commands, tmp_path):
    status, out, err = commands.run(*push_flags(tmp_path / "run", "someone/pushed"))
    assert status == 0, err
    repository = hub.repositories["someone/pushed"]
    commits = repository.branches["main"]
    messages = [message for message, _ in commits]
    assert messages == ["initial commit", *(f"Training in progress, step {n}" for n in (1, 2, 3)), "End of training"]
    for number, (_, files) in enumerate(commits[1:4], 1):
        card = files["README.md"].decode()
        assert f"{number} steps of 16 images" in card
        assert ("**Unfinished**: the run was to take 3 steps." in card) == (number < 3)
        assert not any(name.startswith(("optimizer", "scheduler", "manifest")) for name in files)
        assert not any(name.endswith((".pt", ".pth", ".bin", ".pkl")) for name in files)
    sha = repository.sha(commits[2][1], 2)
    found = json.loads(without_package(LOAD, tmp_path, hub, "someone/pushed", sha))
    model = load_model(tmp_path / "run" / "checkpoint-2")
    assert found["weights"] == {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()}
    final = commits[4][1]
    assert final["model.safetensors"] == (tmp_path / "run/final/model.safetensors").read_bytes()
    # twelve images are too few for a probe of twelve classes
    assert "It was not evaluated." in final["README.md"].decode() and "masks.png" in final


def test_slow_pushes_keep_their_checkpoints_and_failures_are_all_told(hub, commands, tmp_path):
    hub.slow = ("POST", "/commit/", 3.0)
    hub.faults = [("POST", "/commit/", 403, "not now", "")]
    flags = ["--save_total_limit", "1", "--max_steps", "4", "--hub_strategy", "checkpoint", "--hub_token", "hf_valid"]
    status, out, err = commands.run(*push_flags(tmp_path / "run", "someone/slowly"), *flags)
    hub.slow, hub.faults = None, []
    assert status == 0, err
    assert "The checkpoint of step 1 was not pushed to someone/slowly" in out
    commits = hub.repositories["someone/slowly"].branches["main"][1:]
    assert [message for message, _ in commits[:3]] == [f"Training in progress, step {n}" for n in (2, 3, 4)]
    for _, files in commits:
        assert "model.safetensors" in files and "last-checkpoint/optimizer.safetensors" in files
        assert not any(b"hf_valid" in data or str(tmp_path).encode() in data for data in files.values())
    assert b"hf_valid" not in b"".join(files_of(tmp_path / "run").values())


def test_another_s_repository_is_not_pushed_into(hub, commands, model, tmp_path):
    assert commands.run("publish", model, "--repo", "someone/precious")[0] == 0
    before = hub.repositories["someone/precious"].files()
    status, _, err = commands.run(*push_flags(tmp_path / "run", "someone/precious"))
    assert status == 2 and "someone/precious exists and holds" in err and "--hub_update" in err
    assert hub.repositories["someone/precious"].files() == before and not (tmp_path / "run/checkpoint-1").exists()
    flags = ["--hub_update", "true", "--max_steps", "1"]
    status, _, err = commands.run(*push_flags(tmp_path / "run", "someone/precious"), *flags)
    assert status == 0, err
    flags = ["--hub_private_repo", "true", "--hub_update", "true"]
    status, _, err = commands.run(*push_flags(tmp_path / "other", "someone/precious"), *flags)
    assert status == 2 and "someone/precious is public, and --hub_private_repo was given" in err


def test_nor_when_the_hub_is_there_only_later(hub, commands, model, tmp_path):
    assert commands.run("publish", model, "--repo", "someone/late")[0] == 0
    before = hub.repositories["someone/late"].files()
    hub.faults = [("POST", "/repos/create", 503, "down", "")]
    status, out, err = commands.run(*push_flags(tmp_path / "run", "someone/late"))
    hub.faults = []
    assert status == 0, err
    assert "the first checkpoint will try again" in out and "someone/late exists and holds" in out
    assert hub.repositories["someone/late"].files() == before and "someone/late --update" not in out


def test_a_branch_of_a_private_repository_is_pushed_to(hub, commands, tmp_path):
    flags = ["--hub_private_repo", "true", "--hub_revision", "wip", "--max_steps", "1"]
    status, out, err = commands.run(*push_flags(tmp_path / "run", "someone/branch"), *flags)
    assert status == 0, err
    repository = hub.repositories["someone/branch"]
    assert repository.private and len(repository.branches["main"]) == 1
    messages = [message for message, _ in repository.branches["wip"]]
    assert messages == ["initial commit", "Training in progress, step 1", "End of training"]


def test_what_is_pushed_when_not_every_checkpoint_is(hub, commands, tmp_path):
    hub.slow = ("POST", "/commit/", 2.0)
    flags = ["--hub_always_push", "false", "--max_steps", "5"]
    status, _, err = commands.run(*push_flags(tmp_path / "run", "someone/some"), *flags)
    hub.slow = None
    assert status == 0, err
    messages = [message for message, _ in hub.repositories["someone/some"].branches["main"]]
    assert messages[1] == "Training in progress, step 1" and messages[-2] == "Training in progress, step 5"
    assert len(messages) < 7
    status, _, err = commands.run(*push_flags(tmp_path / "end", "someone/end"), "--hub_strategy", "end")
    assert status == 0, err
    messages = [message for message, _ in hub.repositories["someone/end"].branches["main"]]
    assert messages == ["initial commit", "End of training"]


def test_a_card_that_cannot_be_made_stops_nothing(tmp_path, capsys):
    args = CJepaTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = CJepaTrainer(tiny_model(), args)
    trainer.describe_run = lambda: {}["training"]
    started = []
    trainer.push = SimpleNamespace(pending=[], settle=list, start=lambda *push: started.append(push))
    trainer._push_from_checkpoint(tmp_path / "checkpoint-1")
    assert started == [(Path(tmp_path / "checkpoint-1"), None)]
    assert (
        "The card cannot be made (KeyError: 'training'): the checkpoint is pushed without a new"
        in capsys.readouterr().out
    )


def test_no_process_waits_long_for_another_s_pushes(tmp_path, monkeypatch):
    monkeypatch.setattr(pushed_trainer, "_TURN", 0.05)
    asked, in_main_process = [], pushed_trainer.in_main_process
    monkeypatch.setattr(pushed_trainer, "in_main_process", lambda *call: asked.append(call) or in_main_process(*call))
    args = CJepaTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = CJepaTrainer(tiny_model(), args)
    trainer.push, trainer.hub_model_id = CheckpointPush(args), "someone/x"
    monkeypatch.setattr(trainer.push, "_upload", lambda *_: time.sleep(0.5))
    (tmp_path / "checkpoint-1").mkdir()
    trainer._push_from_checkpoint(tmp_path / "checkpoint-1")
    trainer._finish_current_push()
    assert len(asked) > 3 and not trainer.push.pending


API = """
import sys
from tiny import tiny_model
from trainers.trainer_cjepa import CJepaTrainer
from trainers.training_args import CJepaTrainingArguments
from trainers.transforms import image_processor

args = CJepaTrainingArguments(output_dir=sys.argv[1], report_to="none", use_cpu=True, hub_model_id="someone/api")
processor = image_processor((32, 32), [0.5] * 3, [0.5] * 3)
trainer = CJepaTrainer(tiny_model(), args, processing_class=processor)
print(trainer.push_to_hub("Once"))
trainer.model.cjepa.layernorm.bias.data += 1
trainer.push_to_hub("Twice")
"""


def test_a_trainer_s_own_push_is_of_the_model_alone(hub, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", API, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"{hub.url}/someone/api", done.stderr
    commits = hub.repositories["someone/api"].branches["main"]
    assert [message for message, _ in commits] == ["initial commit", "Once", "Twice"]
    names = commits[-1][1].keys()
    assert "notes.txt" not in names and not any(name.endswith(".bin") for name in names)
    assert {"README.md", "config.json", "model.safetensors", "modeling_cjepa.py", "preprocessor_config.json"} <= names


def finetune_flags(model, folder, repo):
    return ["finetune", model, "--dataset", "scenes", "--num_train_images", "48", "--num_eval_images", "24",
            "--per_device_train_batch_size", "16", "--precision", "float32", "--use_cpu", "--num_train_epochs", "2",
            "--disable_tqdm", "--push_to_hub", "true", "--hub_always_push", "true", "--hub_model_id", repo,
            "--output_dir", folder]  # fmt: skip


def test_checkpoints_of_a_classifier_are_pushed_without_places_of_this_machine(hub, commands, model, tmp_path):
    flags = ["--hub_strategy", "all_checkpoints"]
    status, _, err = commands.run(*finetune_flags(model, tmp_path / "run", "someone/classifier"), *flags)
    assert status == 0, err
    commits = hub.repositories["someone/classifier"].branches["main"][1:]
    steps = [int(message.split()[-1]) for message, _ in commits[:-1]]
    assert len(steps) == 2
    for step, (_, files) in zip(steps, commits, strict=False):
        assert f"checkpoint-{step}/trainer_state.json" in files
        card = files["README.md"].decode()
        assert card.count("**Unfinished**") == (step < steps[-1]) and "image-classification" in card
    for data in hub.repositories["someone/classifier"].files().values():
        assert str(tmp_path).encode() not in data and str(model).encode() not in data


def test_of_lora_the_merged_model_alone_is_pushed(hub, commands, model, tmp_path):
    pytest.importorskip("peft")
    status, out, err = commands.run(*finetune_flags(model, tmp_path / "run", "someone/lora"), "--mode", "lora")
    assert status == 0, err
    commits = hub.repositories["someone/lora"].branches["main"]
    assert [message for message, _ in commits] == ["initial commit", "End of training"]
    assert not any(name.startswith("adapter") for name in commits[1][1])
    assert out.count("no checkpoint is pushed") == 1


def test_pushes_that_fail_stop_nothing_and_are_made_up_for(hub, commands, tmp_path):
    hub.faults = [("POST", "/commit/", 403, "not now", "")] * 3
    status, out, err = commands.run(*push_flags(tmp_path / "run", "someone/faulty"))
    hub.faults = []
    assert status == 0, err
    assert "The checkpoint of step 1 was not pushed to someone/faulty" in out
    assert "the newest checkpoint is pushed once more" in out
    messages = [message for message, _ in hub.repositories["someone/faulty"].branches["main"]]
    assert messages == ["initial commit", "Training in progress, step 3", "End of training"]


def test_a_hub_that_is_never_there_costs_nothing_but_the_pushes(tmp_path):
    worker = Commands({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_valid", "HF_HUB_OFFLINE": "0"})
    status, out, err = worker.run(*push_flags(tmp_path / "run", "someone/never"), "--hub_private_repo", "true")
    assert status == 0, err
    assert "Training goes on, and the first checkpoint will try again" in out
    assert f"cjepa publish {tmp_path / 'run' / 'final'} --repo someone/never --private`" in out
    assert (tmp_path / "run/final/model.safetensors").is_file()
    status, out, err = worker.run(*push_flags(tmp_path / "other", "bad name!"))
    worker.close()
    assert status == 2 and "Traceback" not in err and not (tmp_path / "other" / "final").exists()
