"""Branches and repositories that `cjepa publish` fills, and answers that are not the Hub's, on loopback."""

import pytest
from command_worker import Commands
from tiny import tiny_config

from modeling_cjepa import CJepaForImageClassification
from trainers.publishing import save_model
from trainers.transforms import image_processor


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, `a` and `b`, whose files differ by their weights alone."""
    folder = tmp_path_factory.mktemp("models")
    for name in "ab":
        (folder / name).mkdir()
        model = CJepaForImageClassification(tiny_config(num_labels=3))
        save_model(model, image_processor((32, 32), [0.5] * 3, [0.5] * 3), folder / name)
    return folder


@pytest.mark.parametrize("size", ["40KB", "5GB"])
def test_a_branch_is_updated_by_what_it_holds_and_not_by_what_main_does(hub, commands, models, size):
    repo = ["--repo", f"someone/branches{size}"]
    assert commands.run("publish", models / "a", *repo)[0] == 0
    assert commands.run("publish", models / "b", *repo, "--revision", "draft", "--shard-size", size)[0] == 0
    status, _, err = commands.run("publish", models / "a", *repo, "--revision", "draft", "--update")
    assert status == 0, err
    repository = hub.repositories[repo[1]]
    assert repository.files("draft") == repository.files("main")


def test_a_branch_that_was_made_and_not_filled_is_filled_by_the_same_call(hub, commands, models):
    assert commands.run("publish", models / "a", "--repo", "someone/killed")[0] == 0
    repository = hub.repositories["someone/killed"]
    repository.branches["draft"] = list(repository.branches["main"])
    call = ["publish", models / "b", "--repo", "someone/killed", "--revision", "draft"]
    status, _, err = commands.run(*call)
    assert status == 0, err
    assert repository.files("draft")["model.safetensors"] == (models / "b" / "model.safetensors").read_bytes()
    for branch in ("draft", "main"):
        status, _, err = commands.run(*call[:-1], branch)
        assert status == 2 and "give --update" in err


def test_metadata_are_refused_before_anything_is_made_or_sent(hub, commands, models):
    hub.faults = [("POST", "validate-yaml", 400, "bad metadata", "")]
    sent = hub.uploads()
    status, _, err = commands.run("publish", models / "a", "--repo", "someone/meta")
    assert status == 2 and "the Hub refuses the metadata of its card (bad metadata)" in err and "--license" in err
    assert "someone/meta" not in hub.repositories and hub.uploads() == sent


def test_a_repository_that_was_made_is_not_said_to_be_as_it_was(hub, commands, models):
    for consequence in ("is new and empty", "is as it was"):
        hub.faults = [("POST", "/commit/", 403, "not now", "")]
        status, _, err = commands.run("publish", models / "a", "--repo", "someone/made")
        assert status == 2 and f"someone/made was not published and {consequence}: the Hub answers 403" in err


@pytest.mark.parametrize("answer", [{}, [], b"<html>Sign in to the wireless network</html>"])
def test_an_answer_that_is_not_the_hub_s_is_one_sentence(hub, commands, models, answer):
    hub.faults = [("GET", "/whoami", 200, answer, "")]
    status, _, err = commands.run("publish", models / "a", "--repo", "someone/portal")
    assert status == 2 and f"{hub.url} does not answer as the Hub does" in err and "Traceback" not in err, err


def test_a_token_that_cannot_be_sent_is_one_sentence(hub, models):
    worker = Commands({"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_é", "HF_HUB_OFFLINE": "0", "PYTHONUTF8": "1"})
    status, _, err = worker.run("publish", models / "a", "--repo", "someone/token")
    worker.close()
    assert status == 2 and "the token holds a character that no token has" in err and "Traceback" not in err, err
