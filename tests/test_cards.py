"""Model cards: what is known is told once, what is not known is not there."""

import copy

import pytest
from hub_server import running_hub
from huggingface_hub import ModelCardData, constants
from tiny import sjea_level, tiny_model, tiny_sjea

from trainers.cards import card_text, limits
from trainers.data_facts import data_facts
from trainers.model_facts import model_facts
from trainers.public_facts import public_facts
from trainers.recipe_files import recipe_text
from trainers.reports import energy_facts
from trainers.sources import DataArguments

KNOWN = {
    "recipe": "mine",
    "seed": 3,
    "command": "cjepa pretrain mine",
    "settings": {"hidden_size": 32},
    "data": {"dataset": "uoft-cs/cifar10", "is_on_hub": True, "num_train_images": 5000, "num_unreadable": 2},
    "training": {
        "steps": 70, "skipped_steps": 0, "batch_size": 16, "images_seen": 1120, "seconds": 7300.0, "processes": 2,
        "precision": "bf16", "images_per_second": 12.5, "energy_kwh": 0.125, "schedule": {"weight decay": "0.1"},
        "rankme": [[2.0, 9.0]], "feature_std": [[0.5, 0.25]],
    },
    "diagnosis": {"state": "collapsed", "levels": [{"level": 0, "sentences": ["rank 1"]}]},
    "machine": {"processor": "abacus"},
    "software": {"torch": "9.9"},
}  # fmt: skip


@pytest.fixture(scope="module")
def facts():
    return {"model": model_facts(tiny_model())} | KNOWN


def row(encoder, knn, linear):
    around = {"knn_interval": [knn - 1, knn + 1], "linear_interval": [linear - 1, linear + 1]}
    return {
        "encoder": encoder,
        "knn": knn,
        "linear": linear,
        **around,
        "linear_converged": True,
        "rankme": 5,
        "dim": 8,
    }


def evaluation(*rows):
    return {
        "rows": list(rows), "num_neighbors": 20, "temperature": 0.07, "seed": 0, "num_classes": 2, "chance": 50.0,
        "image_size": [32, 32], "num_train_images": 8, "num_test_images": 9, "train_dataset": "a (train)",
        "test_dataset": "a (test)",
    }  # fmt: skip


def test_a_table_holds_whatever_an_encoder_is_called(facts):
    card = card_text("cjepa", facts | {"evaluation": evaluation(row("target | mine", 50.0, 60.0))}, "me/mine")
    assert "| target \\| mine |" in card


def test_every_fact_is_told(facts):
    card = card_text("cjepa", facts, "me/mine", ["curves.png"])
    for words in (
        "`uoft-cs/cifar10`, 5,000 images", "70 steps of 16 images (1,120 images seen) in 2.0 hours at 12.5 images/s",
        "2 processes, bf16, seed 3", "weight decay 0.1", "2.0 at the first log, 9.0 at the last", "0.25 at the last",
        "is collapsed: rank 1", "abacus; 0.125 kWh by CodeCarbon's estimate", "torch 9.9",
        "2 images could not be read", "cjepa pretrain mine", "hidden_size: 32", "![curves of the run](curves.png)",
        "By its log the run is collapsed.",
        "regularizer `context`", "datasets:\n- uoft-cs/cifar10\n",
    ):  # fmt: skip
        assert words in card, words
    assert "license" not in card and "masks.png" not in card and "model-index" not in card


LEAVES = [(key, None) for key in KNOWN] + [
    ("training", name) for name in ("images_per_second", "energy_kwh", "schedule", "rankme", "feature_std")
]


@pytest.mark.parametrize(("section", "name"), LEAVES)
def test_an_unknown_fact_is_absent(facts, section, name):
    fewer = copy.deepcopy(facts)
    del (fewer if name is None else fewer[section])[section if name is None else name]
    card = card_text("cjepa", fewer, "me/mine")
    told = card.split("## Settings")[0].replace("```", "")
    assert not any(word in told for word in ("None", "Undefined", "unknown", "TODO", "{{", "()", "``"))


def test_a_card_of_weights_alone_is_whole():
    for kind, model in (("cjepa", tiny_model()), ("sjea", tiny_sjea(sjea_level()))):
        card = card_text(kind, {"model": model_facts(model)}, "me/mine")
        assert "## Use it" in card and "It was not evaluated." in card and "## Training" not in card
        assert "How it was trained is not recorded." in card and "pre-trained without labels" not in card


def test_views_are_told_with_the_colours_that_were_set(facts):
    told = facts | {"model": model_facts(tiny_model(num_views=2, regularizer="views"))}
    line = "| views | 2 crops of an image, each with masks of its own"
    assert f"{line} |" in card_text("cjepa", told, "me/mine")
    told["settings"] = {"color_jitter_probability": 0.8, "grayscale_probability": 0.2}
    assert f"{line}; colours jittered in 0.8 of them, 0.2 of them in gray |" in card_text("cjepa", told, "me/mine")


def test_figures_are_metadata_that_the_hub_s_classes_read_back(facts):
    found = evaluation(row("target encoder", 60, 70), row("random encoder", 50, 71), row("raw pixels", 20, 20))
    card = card_text("cjepa", facts | {"evaluation": found, "license": "mit"}, "me/mine")
    import yaml

    data = ModelCardData(**yaml.safe_load(card.split("---\n")[1]), ignore_metadata_errors=False)
    assert data.license == "mit" and data.model_name == "mine"
    assert [result.metric_value for result in data.eval_results] == [60, 70]
    assert {result.dataset_split for result in data.eval_results} == {"test"}
    assert "| target encoder |" in card


def test_limits_tell_what_the_default_features_are_no_better_than(facts):
    found = evaluation(row("target encoder", 60, 70), row("random encoder", 50, 71), row("raw pixels", 20, 20))
    told = limits(facts | {"evaluation": found})
    assert "By a linear probe it is not clearly better than a random encoder (70.0 and 71.0 %)." in told
    assert sum("not clearly better" in limit for limit in told) == 1
    stack = evaluation(
        *(row(f"encoder, level {k}", 40 + k, 40 + k) for k in (0, 1)), row("encoder, all levels", 90, 90),
        row("random encoder, level 0", 80, 80), row("random encoder, level 1", 10, 10), row("raw pixels", 5, 5),
    )  # fmt: skip
    two = {"model": model_facts(tiny_sjea()), "evaluation": stack}
    assert not any("not clearly better" in limit for limit in limits(two))
    two["model"]["level"] = 0
    assert sum("random encoder, level 0 (40.0 and 80.0 %)" in limit for limit in limits(two)) == 2


def test_places_of_this_machine_and_secrets_are_not_told(tmp_path):
    (tmp_path / "photos").mkdir()
    facts = {
        "command": f"cjepa pretrain x --output_dir runs/x --dataset={tmp_path}/photos --hub_token hf_a "
        f"--start_from {tmp_path}/mine/final "
        f"--hub_token=hf_b --beside v={tmp_path}/v/final --levels '[{{\"backbone\": \"{tmp_path}/resnet 1\"}}, 3]'",
        "settings": {"dataset": f"{tmp_path}/photos", "output_dir": "runs/x", "start_from": "me/model", "seed": 1,
                     "hub_token": "hf_c", "levels": [{"backbone": f"{tmp_path}/resnet"}]},
        "start": "me/model",
        "evaluation": {"test_dataset": f"{tmp_path}/photos (held out)", "rows": [{"encoder": "a/b"}]},
        "diagnosis": {"sentences": [f"see {tmp_path}/mine/log.txt, file:///home/x/y.txt or C:\\Users\\me; 3 images/s",
                                    "https://arxiv.org/abs/2301.08243 and a/b"]},
        "history": [{"step": 1}],
    }  # fmt: skip
    found = public_facts(facts)
    told = str(found)
    assert str(tmp_path) not in told and "/home" not in told and "Users" not in told and "hf_" not in told
    levels = '\'[{"backbone": "resnet 1"}, 3]\''
    assert found["command"] == f"cjepa pretrain x --dataset=photos --start_from mine --beside v=v --levels {levels}"
    assert found["settings"] == {
        "dataset": "photos", "start_from": "me/model", "seed": 1, "levels": [{"backbone": "resnet"}]
    }  # fmt: skip
    assert found["evaluation"] == {"test_dataset": "photos (held out)", "rows": [{"encoder": "a/b"}]}
    assert found["diagnosis"]["sentences"] == [
        "see log.txt, y.txt or me; 3 images/s", "https://arxiv.org/abs/2301.08243 and a/b"
    ]  # fmt: skip
    assert found["history"] == facts["history"]


def test_what_was_a_place_where_the_run_was_made_is_none_elsewhere():
    facts = {
        "command": "cjepa pretrain x --dataset clients/acme --start_from runs/secret",
        "settings": {"dataset": "clients/acme", "start_from": "runs/secret"},
        "data": {"dataset": "clients/acme", "is_on_hub": False},
        "start": "secret",
        "evaluation": {"test_dataset": "clients/acme (held out)"},
    }
    found = public_facts(facts)
    assert "clients" not in str(found) and "runs/" not in str(found)
    facts["data"]["is_on_hub"] = True
    assert public_facts(facts)["settings"]["dataset"] == "clients/acme"


@pytest.mark.parametrize(
    ("place", "told"),
    [("cifar10/data", "cifar10"), ("runs/x/final", "x"), ("/home/me/data", "data"), ("../data", "data"),
     ("~/train", "train"), ("data", "data"), ("my/photos", "photos")],
)  # fmt: skip
def test_a_folder_is_called_by_what_it_tells_but_never_by_whose_it_is(place, told):
    facts = {"command": f"cjepa pretrain x --dataset {place}", "data": {"dataset": place}}
    assert public_facts(facts) == {"command": f"cjepa pretrain x --dataset {told}", "data": {"dataset": told}}


def test_the_licence_of_a_data_set_is_that_of_its_card(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as hub:
        hub.datasets = {"uoft-cs/cifar10": {"license": ["mit", "cc0-1.0"]}, "someone/none": {}}
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        on_hub = {"dataset": "uoft-cs/cifar10", "is_on_hub": True}
        assert data_facts(DataArguments(dataset="uoft-cs/cifar10")) == on_hub | {"license": "mit, cc0-1.0"}
        given = DataArguments(dataset="uoft-cs/cifar10", dataset_license="own")
        assert data_facts(given) == on_hub | {"license": "own"}
        for dataset in ("someone/none", "someone/missing"):
            assert data_facts(DataArguments(dataset=dataset)) == {"dataset": dataset, "is_on_hub": True}
        asked = len(hub.requests)
        assert data_facts(DataArguments(dataset="scenes")) == {"dataset": "scenes", "is_on_hub": False}
        assert not data_facts(DataArguments(dataset=str(tmp_path)))["is_on_hub"]
        assert len(hub.requests) == asked


def test_energy_is_the_sum_of_a_run_s_calls(tmp_path):
    assert energy_facts(tmp_path) == {}
    (tmp_path / "emissions.csv").write_text("timestamp,energy_consumed,other\na,0.5,x\nb,0.25,y\n")
    assert energy_facts(tmp_path) == {"energy_kwh": 0.75}
    with open(tmp_path / "emissions.csv", "a") as file:
        file.write("c,?,x\nd")  # a row that is not written to its end
    assert energy_facts(tmp_path) == {"energy_kwh": 0.75}


def test_settings_of_plain_values_have_a_line_each():
    assert recipe_text({"seed": 1, "learning_rate": 1e-5}) == "seed: 1\nlearning_rate: 1.0e-05\n"
    assert recipe_text({"seed": 1, "crop_scale": [0.3, 1.0]}) == "seed: 1\ncrop_scale: [0.3, 1.0]\n"
