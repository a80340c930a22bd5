"""What `cjepa` says when a command ends before its time."""

import pytest

from trainers.cli import main

START_AGAIN = "repeat the call to start again"
FROM_CHECKPOINT = "a run that has saved a checkpoint goes on with --resume_from_checkpoint last"


@pytest.mark.parametrize(
    ("run", "command", "advice"),
    [
        ("cli.run_pretrain", ["pretrain", "cjepa_scenes"], FROM_CHECKPOINT),
        ("cli_finetune.run_finetune", ["finetune", "model"], FROM_CHECKPOINT),
        ("cli_features.run_features", ["features", "model", "--output", "out"], "repeat the call to go on after"),
        ("cli_models.run_evaluate", ["evaluate", "model"], START_AGAIN),
        ("cli_probe.run_segmentation", ["probe", "segmentation", "model"], START_AGAIN),
        ("cli_visualize.run_levels", ["visualize", "levels", "model"], START_AGAIN),
    ],
)
def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, run, command, advice):
    def interrupted(namespace):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"trainers.{run}", interrupted)
    assert main(command) == 130
    assert capsys.readouterr().err.startswith(f"\ncjepa: interrupted; {advice}")


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_help_says_how_to_go_on_from_the_newest_checkpoint(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    _, _, text = capsys.readouterr().out.partition("--resume_from_checkpoint [X ...]")
    assert "`last`" in text.partition("\n  --")[0]


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_help_names_the_flags_of_pushes(capsys, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in ("push_to_hub", "hub_model_id", "hub_private_repo", "hub_update"))
