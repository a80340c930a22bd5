"""`cjepa publish` and pushed checkpoints, against a server on loopback that speaks the Hub's endpoints."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from command_worker import Commands
from formats import save_native
from hub_runs import LOAD, files_of, snippet_of, without_package
from huggingface_hub import ModelCard
from PIL import Image
from tiny import FLAGS, sjea_level, tiny_config, tiny_model, tiny_sjea
from transformers import AutoImageProcessor, IJepaConfig, IJepaModel

from modeling_cjepa import CJepaForImageClassification
from trainers.cli import main
from trainers.loading import load_model
from trainers.model_facts import model_facts
from trainers.publishing import save_model
from trainers.transforms import image_processor

WITH_PACKAGE = """
import sys
import modeling_cjepa
from transformers import AutoModel, AutoModelForPreTraining

assert type(AutoModel.from_pretrained(sys.argv[1])) is modeling_cjepa.CJepaModel
assert type(AutoModelForPreTraining.from_pretrained(sys.argv[1])) is modeling_cjepa.CJepaForPreTraining
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a short run, whose data lie in a folder that is nobody else's business."""
    folder = tmp_path_factory.mktemp("secret") / "mine"
    photos = tmp_path_factory.mktemp("private") / "photos"
    for number in range(40):
        color = (6 * number, 255 - 6 * number, 80)
        place = photos / ("dark" if number < 20 else "light")
        place.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), 10 + number).convert("RGB").point(lambda v, c=color: min(v + c[0], 255)).save(
            place / f"{number}.png"
        )
    flags = [*FLAGS, "--dataset", str(photos), "--num_train_images", "null", "--num_eval_images", "null"]
    flags += ["--dataset_license", "cc-by-4.0", "--max_steps", "3", "--save_steps", "2", "--disable_tqdm"]
    assert main(["pretrain", "cjepa_scenes", *flags, "--output_dir", str(folder)]) == 0
    return folder


def test_a_dry_run_writes_what_is_published_and_asks_nothing(hub, commands, run, tmp_path):
    asked = len(hub.requests)
    status, out, err = commands.run(
        "publish", run, "--repo", "someone/dry", "--license", "apache-2.0", "--dry-run", tmp_path / "preview"
    )
    assert status == 0, err
    assert len(hub.requests) == asked and "Nothing was uploaded." in out
    preview = files_of(tmp_path / "preview")
    assert all(name in out for name in preview)
    status, out, err = commands.run("publish", run, "--repo", "someone/dry", "--license", "apache-2.0", "--private")
    assert status == 0, err
    assert "signed in as someone" in out and f"Published: {hub.url}/someone/dry" in out
    repository = hub.repositories["someone/dry"]
    published = {name: data for name, data in repository.files().items() if name != ".gitattributes"}
    assert published.keys() == preview.keys()
    changing = {name for name in preview if published[name] != preview[name]}
    assert not changing
    assert repository.private and [message for message, _ in repository.branches["main"]][1:] == [
        "Publish mine by cjepa"
    ]


def test_it_loads_from_folder_and_hub_where_the_package_is_not(hub, commands, run, tmp_path):
    status, _, err = commands.run("publish", run, "--repo", "someone/loads", "--shard-size", "40KB")
    assert status == 0, err
    assert sum(name.endswith(".safetensors") for name in hub.repositories["someone/loads"].files()) > 3
    model = load_model(run / "final").eval()
    for place in ("someone/loads", run / "final", run / "checkpoint-2"):
        found = json.loads(without_package(LOAD, tmp_path, hub, place, "main"))
        assert found["module"].startswith("transformers_modules.")
        if str(place).endswith("checkpoint-2"):
            model = load_model(place).eval()
        weights = {name: tensor.double().sum().item() for name, tensor in model.state_dict().items()}
        assert found["weights"] == weights
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITH_PACKAGE, "someone/loads"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_snippet_of_the_card_runs(hub, commands, run, tmp_path):
    status, _, err = commands.run("publish", run, "--repo", "someone/snippet")
    assert status == 0, err
    snippet = snippet_of(hub.repositories["someone/snippet"].files())
    assert len([line for line in snippet.splitlines() if line]) <= 6
    Image.new("RGB", (50, 40), (10, 200, 90)).save(tmp_path / "photo.jpg")
    shape = without_package(snippet + "\nprint(tuple(embedding.shape))\n", tmp_path, hub)
    assert shape.strip() == "(1, 32)"


def test_a_native_encoder_needs_no_code_of_ours(hub, commands, run, tmp_path):
    status, out, err = commands.run("publish", run, "--repo", "someone/native", "--native", "--shard-size", "40KB")
    assert status == 0, err
    assert "checked against transformers' IJepaModel" in out
    files = hub.repositories["someone/native"].files()
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files
    assert not any(name.endswith(".py") for name in files) and b"auto_map" not in files["config.json"]
    snippet = snippet_of(files)
    assert "trust_remote_code" not in files["README.md"].decode()
    Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "photo.png")
    code = snippet.replace("photo.jpg", "photo.png") + "\nprint(type(encoder).__name__, embedding.tolist())\n"
    name, _, numbers = without_package(code, tmp_path, hub).partition(" ")
    processor = AutoImageProcessor.from_pretrained(run / "final")
    pixel_values = processor(Image.open(tmp_path / "photo.png"), return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = load_model(run / "final").eval().cjepa(pixel_values).pooler_output
    torch.testing.assert_close(torch.tensor(json.loads(numbers)), expected, rtol=1e-5, atol=1e-5)
    assert name == "IJepaModel"


def test_the_card_tells_what_was_recorded_and_nothing_else(hub, commands, run, tmp_path):
    status, _, err = commands.run("publish", run, "--repo", "someone/card", "--license", "mit")
    assert status == 0, err
    files = hub.repositories["someone/card"].files()
    text, results = files["README.md"].decode(), json.loads(files["results.json"])
    assert "{{" not in text and "None" not in text.split("## Settings")[0] and "photos" in text
    (tmp_path / "README.md").write_text(text)
    card = ModelCard.load(tmp_path / "README.md")
    row = results["evaluation"]["rows"][0]
    assert card.data.license == "mit" and card.data.model_name == "card" and card.data.datasets is None
    assert {result.metric_value for result in card.data.eval_results} == {
        round(row["knn"], 2),
        round(row["linear"], 2),
    }
    for fact in ("cc-by-4.0", "36 images", "3 steps of 16 images", "share of the old target encoder kept", "kWh"):
        assert (fact in text) == (fact != "kWh")
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert picture in files
    assert {"masks.png", "attention.png", "tsne.png", "curves.png"} <= files.keys()
    for data in files.values():
        assert str(run.parent).encode() not in data and b"private" not in data


@pytest.mark.parametrize(
    ("fault", "environment", "arguments", "sentence"),
    [
        (None, {"HF_TOKEN": "hf_wrong"}, ["--repo", "someone/new"], "401"),
        (None, {}, ["--repo", "other/new"], "someone may not publish under other"),
        (None, {}, ["--repo", "someone/new--name"], "is no name of a repository"),
        (None, {}, ["--repo", "new"], "names no user"),
        (
            ("POST", "/commit/", 413, "You have exceeded your storage quota", ""),
            {},
            ["--repo", "someone/full"],
            "storage",
        ),
    ],
)
def test_a_refusal_is_one_sentence_and_leaves_nothing_half_published(
    hub, commands, run, fault, environment, arguments, sentence
):
    hub.faults = [fault] * (fault is not None)
    status, _, err = commands.run("publish", run, *arguments, **environment)
    hub.faults = []
    assert status == 2 and sentence in err and "Traceback" not in err, err
    repository = hub.repositories.get(arguments[1])
    assert repository is None or set(repository.files()) == {".gitattributes"}


def test_no_network_is_one_sentence(commands, run):
    status, _, err = commands.run("publish", run, "--repo", "someone/x", "--dry-run", run)
    assert status == 2 and "exists already" in err
    worker = Commands({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_valid", "HF_HUB_OFFLINE": "0"})
    status, _, err = worker.run("publish", run, "--repo", "someone/x")
    worker.close()
    assert status == 2 and "http://127.0.0.1:9 cannot be reached" in err and "Traceback" not in err


def test_a_repository_that_holds_something_is_left_alone_unless_asked(hub, commands, run):
    assert commands.run("publish", run, "--repo", "someone/held", "--shard-size", "40KB")[0] == 0
    before = hub.repositories["someone/held"].files()
    status, _, err = commands.run("publish", run, "--repo", "someone/held")
    assert status == 2 and f"holds {len(before) - 1} files; give --update" in err
    assert hub.repositories["someone/held"].files() == before
    status, _, err = commands.run("publish", run, "--repo", "someone/held", "--private", "--update")
    assert status == 2 and "is public, and --private was given" in err
    status, _, err = commands.run("publish", run, "--repo", "someone/held", "--update", "--encoder-only")
    assert status == 0, err
    names = hub.repositories["someone/held"].files().keys()
    assert {name for name in names if "safetensors" in name} == {"model.safetensors"}
    card = hub.repositories["someone/held"].files()["README.md"].decode()
    assert "holds the target encoder alone" in card and "predictor |" not in card


def test_an_interrupted_upload_goes_on_where_it_was(hub, commands, run):
    flags = ["publish", run, "--repo", "someone/slow", "--shard-size", "40KB", "--revision", "draft"]
    hub.faults = [("PUT", "/large/", 500, "broken", "")] * 1 + [("POST", "/commit/", 403, "not now", "")]
    hub.large.clear()
    status, _, err = commands.run(*flags)
    hub.faults = []
    assert status == 2 and "not now" in err
    arrived = set(hub.large)
    assert arrived and hub.repositories["someone/slow"].branches.keys() == {"main"}
    lost = sorted(arrived)[0]
    del hub.large[lost]
    sent = hub.uploads()
    status, out, err = commands.run(*flags)
    assert status == 0, err
    assert hub.uploads() == sent + 1 and set(hub.large) == arrived
    assert out.strip().endswith(f"{hub.url}/someone/slow/tree/draft")
    assert len(hub.repositories["someone/slow"].branches["main"]) == 1


def test_large_files_that_are_refused_are_a_sentence_and_leave_no_branch(hub, commands, run):
    assert commands.run("publish", run, "--repo", "someone/branches", "--encoder-only")[0] == 0
    flags = ["publish", run, "--repo", "someone/branches", "--revision", "feature/x"]
    hub.large.clear()
    hub.faults = [("PUT", "/large/", 403, "no place for it", "")] * 20
    status, _, err = commands.run(*flags)
    assert status == 2 and "the Hub answers 403" in err and "Traceback" not in err
    hub.faults = [("POST", "/commit/", 403, "not now", "")]
    status, _, err = commands.run(*flags)
    assert status == 2 and "not now" in err
    assert hub.repositories["someone/branches"].branches.keys() == {"main"}
    hub.faults = [("GET", "/tree/", 503, "tired", "")] * 20
    status, _, err = commands.run(*flags)
    assert status == 2 and "was not published and is as it was: the Hub answers 503" in err and "lost" not in err
    assert hub.repositories["someone/branches"].branches.keys() == {"main"}
    hub.faults = [("POST", "/commit/", None, "", "")]
    status, _, err = commands.run(*flags)
    assert (
        status == 2
        and err.count("someone/branches") == 1
        and "answer to the commit was lost" in err
        and "repeat the call with --update" in err
    )
    status, out, err = commands.run(*flags, "--update")
    assert status == 0, err
    assert len(hub.repositories["someone/branches"].branches["feature/x"]) == 3
    hub.longest_file = 1000
    hub.large.clear()
    status, _, err = commands.run("publish", run, "--repo", "someone/quota")
    hub.longest_file = 1 << 30
    assert status == 2 and "(Storage limit reached); look at your quota" in err


def test_folders_and_files_of_others_stay_in_a_repository_that_is_updated(hub, commands, run):
    assert commands.run("publish", run, "--repo", "someone/others", "--shard-size", "40KB")[0] == 0
    repository = hub.repositories["someone/others"]
    others = {
        "eval.py": b"1",
        "onnx/model.json": b"2",
        "last-checkpoint/model.safetensors": b"3",
        "tokenizer.json": b"4",
    }
    stale = {"pytorch_model.bin": b"5", "adapter_config.json": b"6", "adapter_model.safetensors": b"7"}
    message, files = repository.branches["main"][-1]
    repository.branches["main"].append(("others", files | others | stale))
    assert commands.run("publish", run, "--repo", "someone/others", "--update")[0] == 0
    now = repository.files()
    assert others.items() <= now.items() and not stale.keys() & now.keys()
    assert [name for name in now if name.startswith("model-0")] == []


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Models of other kinds, saved as runs save them, without their results."""
    folder = tmp_path_factory.mktemp("others")
    models = {
        "stack": tiny_model(upper_levels=[{"hidden_size": 48, "num_attention_heads": 3}]),
        "vicreg": tiny_sjea(sjea_level()),
        "sjea": tiny_sjea(),
        "classifier": CJepaForImageClassification(tiny_config(num_labels=3)),
    }
    for name, model in models.items():
        (folder / name).mkdir()
        save_model(model, image_processor((32, 32), [0.5] * 3, [0.5] * 3), folder / name)
    return folder


@pytest.mark.parametrize("kind", ["stack", "vicreg", "sjea", "classifier"])
def test_every_kind_of_model_is_published(commands, others, tmp_path, kind):
    status, _, err = commands.run("publish", others / kind, "--repo", f"someone/{kind}", "--dry-run", tmp_path / "out")
    assert status == 0, err
    card = (tmp_path / "out" / "README.md").read_text()
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    # no run is recorded beside them, so neither masks nor views are those of pre-training
    assert pictures == {"classifier": set(), "stack": {"attention.png", "tsne.png"}}.get(kind, {"tsne.png"})
    assert all(f"]({name})" in card for name in pictures) and "{{" not in card and "None" not in card
    assert (
        load_model(tmp_path / "out", with_classifier=True).state_dict().keys()
        == load_model(others / kind, with_classifier=True).state_dict().keys()
    )


def test_a_converted_encoder_is_published_as_what_it_is(commands, tmp_path):
    save_native(IJepaModel, IJepaConfig, tmp_path / "theirs", fixed_positions=True)
    assert commands.run("convert", tmp_path / "theirs", tmp_path / "ours")[0] == 0
    for source, out in ((tmp_path / "ours", tmp_path / "out"), (tmp_path / "out", tmp_path / "again")):
        status, _, err = commands.run("publish", source, "--repo", "someone/x", "--dry-run", out)
        assert status == 0, err
        card, own = (out / "README.md").read_text(), (tmp_path / "ours" / "README.md").read_text()
        for words in ("Converted from transformers' IJepaModel, `theirs`, whose licence holds for these weights",
                      "- checked against transformers' IJepaModel", "- There is no predictor in it"):  # fmt: skip
            assert words in card and words in own, words
        for words in ("pre-trained without labels", "reading of the paper", "C-JEPA", "masks", str(tmp_path)):
            assert words not in card, words


def test_an_encoder_alone_has_an_encoder_s_card_also_when_it_is_published_again(commands, run, tmp_path):
    for source, out, flags in ((run, "one", ["--encoder-only"]), (tmp_path / "one", "two", [])):
        flags = ["--repo", "someone/x", "--dry-run", tmp_path / out, *flags]
        assert commands.run("publish", source, *flags)[0] == 0
        card = (tmp_path / out / "README.md").read_text()
        assert "holds the target encoder alone" in card and "predictor |" not in card
        parameters = json.loads((tmp_path / out / "results.json").read_text())["model"]["parameters"]
        assert parameters.keys() == {"encoder"}


@pytest.mark.parametrize(
    ("changes", "pictures", "told"),
    [
        ({"num_channels": 1}, set(), "No pictures: scenes have 3 channels, and the model reads 1"),
        ({"patch_size": 16, "min_context_patches": 1}, {"attention.png", "tsne.png"}, "masks.png is left out: "),
    ],
)
def test_what_cannot_be_drawn_is_left_out(commands, tmp_path, changes, pictures, told):
    channels = changes.get("num_channels", 3)
    (tmp_path / "model").mkdir()
    model = tiny_model(**changes)
    save_model(model, image_processor((32, 32), [0.5] * channels, [0.5] * channels), tmp_path / "model")
    facts = {"model": model_facts(model), "training": {"steps": 3}}
    (tmp_path / "model" / "results.json").write_text(json.dumps(facts))
    status, out, err = commands.run("publish", tmp_path / "model", "--dry-run", tmp_path / "out")
    assert status == 0 and told in out, err
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == pictures


def test_a_checkpoint_tells_what_its_run_says_so_far(commands, run, tmp_path):
    out = tmp_path / "out"
    assert commands.run("publish", run / "checkpoint-2", "--repo", "someone/x", "--dry-run", out)[0] == 0
    card = (out / "README.md").read_text()
    for words in ("2 steps", "**Unfinished**: the run was to take 3 steps", "Effective rank", "hidden_size: 32",
                  "![curves of the run]", "too short to tell", "dataset: photos"):  # fmt: skip
        assert words in card, words
    assert str(run.parent) not in card and json.loads((out / "results.json").read_text())["training"]["steps"] == 2


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--shard-size", "nonsense"], "--shard-size 'nonsense' is no size"),
        (["--shard-size", "0"], "--shard-size '0' is no size"),
        (["--native", "--of", "sjea"], "An S-JEA model does not fit transformers' IJepaModel"),
        (["--native", "--of", "classifier"], "--native: .*classifier is a classifier, which is published whole"),
        (["--encoder-only", "--of", "classifier"], "--encoder-only: .*classifier is a classifier"),
        (["--dry-run", "/proc/x/y"], "/proc/x/y cannot be made"),
        (["--dry-run", ""], "--repo is missing"),
    ],
)
def test_flags_that_cannot_be_are_refused(commands, run, others, tmp_path, flags, sentence):
    place = run
    if "--of" in flags:
        place, flags = others / flags[-1], flags[:-2]
    flags = ["--dry-run", tmp_path / "out", *flags]
    status, _, err = commands.run("publish", place, *flags)
    assert status == 2 and re.search(sentence, err) and "Traceback" not in err, err
    assert not any(path.name.startswith(("out", ".out")) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("results.json", "{", "results.json of .* cannot be read"),
        ("results.json", "[1]", "holds no mapping"),
        ("results.json", '{"model": {}}', "says nothing of the model"),
        ("results.json", '{"model": {"parameters": {}}, "training": {"steps": "x"}}', "is not as a run writes it"),
        ("results.json", '{"model": {"parameters": {}}, "settings": []}', "is not as a run writes it"),
        ("suites.json", "[1]", "suites.json of .* holds no mapping"),
        ("README.md", "---\na: [\n---\n", "cannot be read"),
        ("README.md", "---\n- a\n---\n", "cannot be read"),
        (
            "preprocessor_config.json",
            '{"auto_map": {"AutoImageProcessor": "evil.P"}}',
            "image processor|code of its own",
        ),
    ],
)
def test_a_broken_file_beside_the_model_is_named(commands, others, tmp_path, name, text, sentence):
    shutil.copytree(others / "vicreg", tmp_path / "model")
    if name == "preprocessor_config.json":
        whole = json.loads((tmp_path / "model" / name).read_text())
        text = json.dumps(whole | json.loads(text))
    (tmp_path / "model" / name).write_text(text)
    status, _, err = commands.run("publish", tmp_path / "model", "--repo", "someone/x", "--dry-run", tmp_path / "out")
    assert status == 2 and re.search(sentence, err) and "Traceback" not in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_broken_recipe_beside_a_checkpoint_is_named(commands, run, tmp_path):
    shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2")
    (tmp_path / "recipe.yaml").write_text("a: [")
    status, _, err = commands.run("publish", tmp_path / "checkpoint-2", "--dry-run", tmp_path / "out")
    assert status == 2 and f"{tmp_path / 'recipe.yaml'}, settings of a run, cannot be read" in err, err


def test_what_cannot_be_published_is_refused(commands, run, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, err = commands.run("publish", tmp_path / "empty", "--repo", "someone/x", "--dry-run", tmp_path / "a")
    assert status == 2 and "holds neither a model nor a whole checkpoint" in err
    broken = load_model(run / "final")
    with torch.no_grad():
        broken.cjepa.layernorm.bias[3] = torch.nan
    broken.save_pretrained(tmp_path / "nan")
    status, _, err = commands.run("publish", tmp_path / "nan", "--repo", "someone/x", "--dry-run", tmp_path / "b")
    assert status == 2 and "has no preprocessor_config.json" in err
    (tmp_path / "nan" / "preprocessor_config.json").write_bytes((run / "final/preprocessor_config.json").read_bytes())
    status, _, err = commands.run("publish", tmp_path / "nan", "--repo", "someone/x", "--dry-run", tmp_path / "b")
    assert status == 2 and "cjepa.layernorm.bias" in err and "not finite" in err
    assert not any(path.name.startswith((".a-", ".b-", "a", "b")) for path in tmp_path.iterdir())
