"""`cjepa doctor`, and the doctor in a run: a real collapse is told, stopped and explained; weights without a log."""

import contextlib
import io
import json
import shutil

import pytest
import torch
from PIL import Image
from tiny import FLAGS, images
from training_worker import build_trainer

from modeling_cjepa import CJepaModel
from trainers.cli import main

COLLAPSING = [
    "--regularizer_weight", "0", "--final_regularizer_weight", "0", "--ema_momentum", "0", "--final_ema_momentum", "0",
    "--learning_rate", "3e-3", "--start_learning_rate", "3e-3", "--max_grad_norm", "0", "--logging_steps", "3",
    "--disable_tqdm", "--max_steps", "90",
]  # fmt: skip


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    """The folder of a run that collapsed and was stopped, and what its end said."""
    run, said = tmp_path_factory.mktemp("runs") / "mine", io.StringIO()
    with contextlib.redirect_stderr(said):
        command = ["pretrain", "cjepa_scenes", *FLAGS, *COLLAPSING, "--stop_on_collapse", "--output_dir", str(run)]
        assert main(command) == 2
    return run, said.getvalue().splitlines()[-1]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """The `final` folder of a few steps, too few to tell."""
    run = tmp_path_factory.mktemp("runs") / "short"
    assert main(["pretrain", "cjepa_scenes", *FLAGS, "--max_steps", "3", "--output_dir", str(run)]) == 0
    return run / "final"


def said(capsys, *arguments) -> tuple[int, str]:
    status = main(["doctor", *map(str, arguments)])
    return status, capsys.readouterr().out


def test_a_collapsed_run_is_stopped_with_a_checkpoint(collapsed):
    run, sentence = collapsed
    (checkpoint,) = run.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 9 < step < 90 and not (run / "final").exists()
    assert sentence.startswith(f"cjepa: Stopped at step {step}: collapsed: the loss fell")
    assert "To change: --regularizer_weight 0.001" in sentence and f"checkpoint-{step} in {run} is saved" in sentence
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    assert [entry["collapsed"] for entry in log] == [0] * (len(log) - 1) + [1]
    assert log[-1]["step"] == step


def test_the_verdict_on_a_run_and_on_a_checkpoint(collapsed, capsys, tmp_path):
    run, _ = collapsed
    (checkpoint,) = run.glob("checkpoint-*")
    status, words = said(capsys, run)
    assert status == 3 and words.startswith("collapsed at step")
    assert "the features shrank" in words and "To change: --regularizer_weight 0.001 (is 0)" in words
    assert Image.open(checkpoint / "doctor.png").size[0] > 1000
    picture = tmp_path / "curves.png"
    status, text = said(capsys, checkpoint, "--json", "--output", picture)
    verdict = json.loads(text)
    assert status == 3 and verdict["state"] == "collapsed" and verdict["levels"][0]["turned"] < verdict["step"]
    assert verdict["picture"] == str(picture) and picture.is_file()


def test_the_verdict_is_in_results_and_card(healthy, capsys):
    results = json.loads((healthy / "results.json").read_text())
    assert results["diagnosis"]["state"] == "too short to tell"
    assert "By its log (`cjepa doctor`) the run is too short to tell" in (healthy / "README.md").read_text()
    status, words = said(capsys, healthy.parent)
    assert status == 0 and words.startswith("too short to tell at step 3")


def test_an_alarm_is_said_once_and_the_run_goes_on(tmp_path, capsys):
    training = {"max_steps": 75, "per_device_train_batch_size": 16, "logging_steps": 3, "learning_rate": 3e-3,
                "start_learning_rate": 3e-3, "ema_momentum": 0.0, "final_ema_momentum": 0.0}  # fmt: skip
    trainer = build_trainer(str(tmp_path), training, {"regularizer_weight": 0.0})
    trainer.train()
    assert trainer.state.global_step == 75 and any(entry.get("collapsed") for entry in trainer.state.log_history)
    assert capsys.readouterr().out.count("ALARM: collapsed at step") == 1
    assert not list(tmp_path.glob("checkpoint-*"))


def test_weights_without_a_log(healthy, tmp_path, capsys):
    encoder = CJepaModel.from_pretrained(healthy)
    shutil.copytree(healthy, tmp_path / "published", ignore=shutil.ignore_patterns("results.json", "doctor.png"))
    encoder.save_pretrained(tmp_path / "published")
    arguments = ["--num_eval_images", "64", "--num_train_images", "1"]
    status, words = said(capsys, tmp_path / "published", *arguments)
    # three steps from its start it is like a random one, up to chance
    assert "(random encoder: " in words and words.startswith(("healthy", "dimensional collapse"))
    with torch.no_grad():
        # all images alike: what tells them apart is far smaller than what they share
        encoder.layernorm.weight.mul_(1e-3)
        encoder.layernorm.bias.fill_(1.0)
    encoder.save_pretrained(tmp_path / "published")
    status, words = said(capsys, tmp_path / "published", *arguments)
    assert status == 3 and words.startswith("collapsed") and (tmp_path / "published/doctor.png").is_file()
    assert encoder(images()).pooler_output.std(dim=0).mean() < 1e-3


def test_a_log_without_features_is_that_of_weights(healthy, tmp_path, capsys):
    """Such as of fine-tuning; the images are those of its run."""
    folder = shutil.copytree(healthy, tmp_path / "classifier")
    results = json.loads((folder / "results.json").read_text())
    results["history"] = [{"step": 1, "loss": 2.0}, {"step": 1, "eval_accuracy": 0.5}]
    (folder / "results.json").write_text(json.dumps(results))
    picture = tmp_path / "verdict.txt"
    assert main(["doctor", str(folder), "--num_eval_images", "64", "--output", str(picture)]) in (0, 3)
    printed = capsys.readouterr()
    assert "(random encoder: " in printed.out and f"no log of features in {folder}" in printed.err
    assert f"Curves in {picture}" in printed.out and Image.open(picture).format == "PNG"


def test_a_broken_recipe_beside_a_checkpoint_is_one_sentence(collapsed, tmp_path, capsys):
    run = shutil.copytree(collapsed[0], tmp_path / "run")
    for text in ("hidden_size: [", ""):
        (run / "recipe.yaml").write_text(text)
        assert main(["doctor", str(run)]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "recipe.yaml, settings of a run, cannot be read" in error and "mend or remove it" in error


def test_a_broken_checkpoint_is_passed_over(collapsed, tmp_path, capsys):
    run = shutil.copytree(collapsed[0], tmp_path / "run")
    (checkpoint,) = run.glob("checkpoint-*")
    broken = shutil.copytree(checkpoint, run / "checkpoint-100")
    state = broken / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-20])
    (run / "checkpoint-5-old").mkdir()
    assert main(["doctor", str(run)]) == 3
    printed = capsys.readouterr()
    assert printed.out.startswith("collapsed at step")
    assert f"{broken} is passed over: trainer_state.json has" in printed.err
    shutil.rmtree(checkpoint)
    assert main(["doctor", str(run)]) == 2
    assert "neither a model nor a whole checkpoint" in capsys.readouterr().err


def test_mistakes_are_told(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "neither a model nor a whole checkpoint" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path / "nowhere")]) == 2


def test_a_picture_needs_a_folder(healthy, tmp_path, capsys):
    assert main(["doctor", str(healthy), "--output", str(tmp_path / "no/doctor.png")]) == 2
    assert "--output" in capsys.readouterr().err


def test_a_file_is_refused(healthy, capsys):
    assert main(["doctor", str(healthy / "config.json")]) == 2
    assert "config.json is a file; give the folder" in capsys.readouterr().err
