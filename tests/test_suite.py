"""The protocol suite: its features and rows against the poolings, scikit-learn and the probes; cards; the command."""

import dataclasses
import json
import math
import weakref
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from sklearn.neighbors import KNeighborsClassifier
from test_evaluation import ARGUMENTS, MEAN, SIZE, STD, as_dataset, scenes
from tiny import RESNET, sjea_level, tiny_model, tiny_sjea

from modeling_cjepa import CJepaModel
from trainers import attentive_probe, linear_sweep, probes, suite_features
from trainers.cli import main
from trainers.embedding import extract_embeddings
from trainers.errors import InputError
from trainers.eval_results import eval_results, metric_name, write_eval_results
from trainers.pooling import pooled_encoder
from trainers.probes import bootstrap_interval, linear_predict, share_of_each_class
from trainers.reports import format_suite
from trainers.suite import SUITES, evaluate_suite
from trainers.suite_features import ImageReader

QUIET = dataclasses.replace(ARGUMENTS, disable_tqdm=True, num_random_encoders=0)
UPPER = {"patch_size": 6, "upper_levels": [{"hidden_size": 16, "num_hidden_layers": 1}], "min_context_patches": 4}
TOKENS = ["patches", "patches, last4"]
PROBES = ["kNN, k 20", "kNN, k 120", "linear", "linear, 10 % of labels", "linear, 1 % of labels"]


@pytest.fixture(scope="module")
def train():
    return scenes(120, 0)


@pytest.fixture(scope="module")
def test():
    return scenes(40, 1)


def hasten(patch):
    """Probes of few steps, penalties and folds."""
    patch.setattr(attentive_probe, "_NUM_STEPS", 5)
    patch.setattr(attentive_probe, "_NUM_EPOCHS", 1)
    patch.setattr(linear_sweep, "_NUM_STEPS", 20)
    patch.setattr(probes, "C_GRID", (0.01, 1.0))
    patch.setattr(probes, "_NUM_HELD_OUT", 20)


@pytest.fixture(autouse=True)
def hastened(monkeypatch):
    hasten(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model(image_size=SIZE).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def results(folder, train, test):
    with pytest.MonkeyPatch.context() as patch:
        hasten(patch)
        arguments = dataclasses.replace(QUIET, num_random_encoders=1)
        return evaluate_suite(folder, train, test, "small", arguments, MEAN, STD)


def reader(train, test, **changes) -> ImageReader:
    return ImageReader((train, test), SIZE, MEAN, STD, dataclasses.replace(QUIET, **changes), "cpu")


@pytest.mark.parametrize(
    "model", [tiny_model(image_size=SIZE, num_hidden_layers=6), tiny_model(image_size=SIZE, **UPPER)]
)
def test_features_are_the_poolings_in_one_pass(model, train, test):
    encoder, num_encoded = model.context_encoder.train(), []
    hook = encoder.embeddings.register_forward_hook(lambda module, inputs, output: num_encoded.append(len(output)))
    levels = list(range(model.config.num_levels))
    found = reader(train, test).read(encoder, levels, "context encoder")
    hook.remove()
    # each image once, and one more to measure tokens
    assert sum(num_encoded) == len(train) + len(test) + 1 and encoder.training
    for level, features in enumerate(found[: len(levels)]):
        for name in ("mean", "last4"):
            for source, embeddings in zip((train, test), features.embeddings[name], strict=True):
                pooled = pooled_encoder(encoder, name, level)
                expected, _ = extract_embeddings(pooled, as_dataset(source), MEAN, STD, 16, progress=False)
                torch.testing.assert_close(embeddings, expected)
        pooled = pooled_encoder(encoder, "patches", level)
        expected = extract_embeddings(pooled, as_dataset(test), MEAN, STD, 16, progress=False)[0].flatten(1, 2)
        ids = torch.tensor([7, 3, 30])
        stored, joined = (torch.cat(list(features.tokens[name][1].batches(ids, 2))) for name in TOKENS)
        assert stored.dtype == torch.float32 and torch.equal(stored, expected[ids].bfloat16().float())
        # the last quarter is the last layer; the means of all are the pooling
        assert list(features.tokens) == TOKENS and torch.equal(joined[..., -stored.shape[2] :], stored)
        torch.testing.assert_close(joined.mean(1), features.embeddings["last4"][1][ids], rtol=0.01, atol=0.01)
        for kinds in zip(*features.tokens.values(), strict=True):
            patches, last4 = (kind.tokens.untyped_storage().data_ptr() for kind in kinds)
            assert patches == last4  # kept once
        assert features.num_parameters == encoder.num_parameters_up_to(level)


def test_tokens_beyond_the_budget_are_encoded_again(train, test, monkeypatch):
    encoder = tiny_model(image_size=SIZE).cjepa
    num_bytes = 2 * 36 * (2 * 32) * (len(train) + len(test))  # of both layers
    kept = reader(train, test).read(encoder, [0], "encoder")[0].tokens
    ids = torch.tensor([7, 3, 30])
    for budget, cls in ((num_bytes, "StoredTokens"), (num_bytes - 1, "EncodedTokens")):
        monkeypatch.setattr(suite_features, "token_budget", lambda device, budget=budget: budget)
        tokens = reader(train, test).read(encoder, [0], "encoder")[0].tokens
        assert {type(part).__name__ for both in tokens.values() for part in both} == {cls}
        for part, expected in [pair for name in TOKENS for pair in zip(tokens[name], kept[name], strict=True)]:
            batches = list(part.batches(ids, 2))
            assert [len(batch) for batch in batches] == [2, 1] and not batches[0].requires_grad
            torch.testing.assert_close(
                torch.cat(batches), torch.cat(list(expected.batches(ids, 2))), rtol=0.01, atol=0.01
            )
    found = evaluate_suite(tiny_model(image_size=SIZE), train, test, "small", QUIET, MEAN, STD)["rows"]
    assert [row["num_labels"] for row in found if row["probe"] == "attentive"] == [120] * 4


def test_the_budget_is_half_of_what_is_free(monkeypatch):
    monkeypatch.setattr(suite_features.psutil, "virtual_memory", lambda: SimpleNamespace(total=3000, available=1001))
    assert suite_features.token_budget(torch.device("cpu")) == 500
    free = [100]
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: free.append(700))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[-1], 9000))
    # with what torch holds of tokens that are no more
    assert suite_features.token_budget(torch.device("cuda")) == 350


def test_no_features_are_in_memory_when_the_next_encoder_is_read(train, test, monkeypatch):
    earlier = []

    def watched(self, *args, read):
        assert not [reference for reference in earlier if reference() is not None]
        found = read(self, *args)
        for features in found:
            parts = [part for both in (*features.embeddings.values(), *features.tokens.values()) for part in both]
            tensors = [part.tokens for both in features.tokens.values() for part in both]
            earlier.extend(weakref.ref(part) for part in (features, *parts, *tensors))
        return found

    for name in ("read", "read_pixels"):
        monkeypatch.setattr(ImageReader, name, partialmethod(watched, read=getattr(ImageReader, name)))
    arguments = dataclasses.replace(QUIET, num_random_encoders=1)
    evaluate_suite(tiny_model(image_size=SIZE), train.take(np.arange(40)), test, "small", arguments, MEAN, STD)
    # of each encoder itself, two embeddings and two kinds of tokens, and their tensors; of pixels one embedding
    assert len(earlier) == 3 * (1 + 4 + 4 + 4) + 1 + 2


def test_rows(results, train, test):
    rows = results["rows"]
    vectors = [(features, probe) for features in ("mean", "last4") for probe in PROBES]
    of_encoder = [*vectors, *((name, "attentive") for name in TOKENS)]
    encoders = ("target encoder", "context encoder", "random encoder")
    assert [(row["encoder"], row["features"], row["probe"]) for row in rows] == [
        *((encoder, *kind) for encoder in encoders for kind in of_encoder),
        *(("raw pixels", "pixels", probe) for probe in PROBES),
    ]  # fmt: skip
    assert [row["role"] for row in rows] == ["model"] * 24 + ["baseline"] * 17
    encoder = tiny_model(image_size=SIZE).context_encoder
    for features, offset in (("mean", 12), ("last4", 17)):
        pooled = pooled_encoder(encoder, features)
        (train_x, train_y), (test_x, _) = (
            extract_embeddings(pooled, as_dataset(source), MEAN, STD, 16, progress=False) for source in (train, test)
        )
        for row, k in zip(rows[offset : offset + 2], (20, 120), strict=True):
            reference = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07))
            expected = reference.fit(train_x.double(), train.labels).score(test_x.double(), test.labels)
            assert row["accuracy"] == pytest.approx(100 * expected)
            assert row["interval"] == list(bootstrap_interval(round(0.4 * row["accuracy"]), 40))
        for row, share in zip(rows[offset + 2 : offset + 5], (1, 0.1, 0.01), strict=True):
            ids = torch.from_numpy(share_of_each_class(train.labels, share, 0))
            assert row["num_labels"] == len(ids) and row["dim"] == train_x.shape[1]
            if share == 0.01:
                assert row["accuracy"] is None and row["interval"] is None and "one train image a class" in row["note"]
                continue
            probe = linear_predict(train_x[ids], train_y[ids], test_x)
            right = (probe.predictions.numpy() == test.labels).mean()
            assert row["accuracy"] == pytest.approx(100 * right) and row["settings"]["C"] == probe.C
    json.dumps(results, allow_nan=False)


def test_the_last_rows_of_an_encoder_are_the_attentive_probes(results, folder, train, test):
    features = reader(train, test).read(tiny_model(image_size=SIZE).cjepa, [0], "target encoder")[0]
    train_y = torch.from_numpy(train.labels)
    for row, name, width in zip(results["rows"][10:12], TOKENS, (32, 64), strict=True):
        train_tokens, test_tokens = features.tokens[name]
        # of more layers, too, the pooled embedding is as wide as one layer
        probe = attentive_probe.attentive_predict(train_tokens, train_y, test_tokens, 40, width=32)
        assert row["accuracy"] == pytest.approx(100 * (probe.predictions.numpy() == test.labels).mean())
        assert row["settings"] == {"learning_rate": probe.learning_rate} and row["dim"] == width


def test_an_encoder_alone_has_no_context_encoder(tmp_path, results, folder, train, test):
    CJepaModel.from_pretrained(folder).save_pretrained(tmp_path)
    rows = evaluate_suite(tmp_path, train, test, "small", QUIET, MEAN, STD)["rows"]
    assert [row["encoder"] for row in rows] == ["encoder"] * 12 + ["raw pixels"] * 5
    assert rows[:12] == [row | {"encoder": "encoder"} for row in results["rows"][:12]]


def test_levels_of_a_stack_and_models_beside(folder, train, test):
    narrow = RESNET | {"hidden_sizes": [8, 16], "depths": [1, 1]}
    stack = tiny_sjea(sjea_level(), sjea_level(backbone=narrow), image_size=SIZE)
    rows = evaluate_suite(stack, train, test, "small", QUIET, MEAN, STD, "all", {"plain": folder})["rows"]
    kinds = list(dict.fromkeys((row["role"], row["encoder"], row["features"], row["dim"]) for row in rows))
    assert kinds == [
        ("model", "encoder, level 0", "mean", 32), ("model", "encoder, level 0", "patches", 32),
        ("model", "encoder, level 1", "mean", 16), ("model", "encoder, level 1", "patches", 16),
        ("model", "encoder, all levels", "mean", 48),
        ("beside", "plain", "mean", 32), ("beside", "plain", "last4", 64), ("beside", "plain", "patches", 32),
        ("beside", "plain", "patches, last4", 64),
        ("baseline", "raw pixels", "pixels", 3 * SIZE * SIZE),
    ]  # fmt: skip
    alone = evaluate_suite(stack, train, test, "small", QUIET, MEAN, STD, 0)["rows"]
    assert alone[:6] == rows[:6]
    # a map's places are its tokens
    features = reader(train, test).read(stack.sjea, [0], "encoder")[0]
    pooled = pooled_encoder(stack.sjea, "patches", 0)
    expected = extract_embeddings(pooled, as_dataset(test), MEAN, STD, 16, progress=False)[0].flatten(1, 2)
    found = torch.cat(list(features.tokens["patches"][1].batches(torch.arange(40), 16)))
    assert torch.equal(found, expected.bfloat16().float())


def test_imagenets_linear_probes_are_swept(train, test, monkeypatch):
    seen = []

    def watched(train_x, train_y, test_x, seed, progress):
        seen.append(train_x.shape)
        return torch.zeros(len(test_x), dtype=torch.int64), {"learning_rate": 0.1, "weight_decay": 1e-3}

    assert SUITES["imagenet"].__name__ == "swept_linear"
    found, settings = SUITES["imagenet"](*_separable(), 0, False)
    assert found.tolist() == [0, 1] and set(settings) == {"learning_rate", "weight_decay"}
    monkeypatch.setitem(SUITES, "imagenet", watched)
    model = CJepaModel(tiny_model(image_size=SIZE).config)
    results = evaluate_suite(model, train, test, "imagenet", QUIET, MEAN, STD)
    assert seen[:2] == [(120, 32), (12, 32)] and "learning rate 0.1, weight decay 0.001" in format_suite(results)


def _separable():
    return (
        torch.tensor([[0.0], [0.1], [1.0], [1.1]] * 10),
        torch.tensor([0, 0, 1, 1] * 10),
        torch.tensor([[0.0], [1.0]]),
    )


def test_few_labels_are_of_every_class():
    targets = np.array([0] * 200 + [1] * 30 + [2] * 3)[np.random.default_rng(1).permutation(233)]
    for share, expected in ((0.01, [2, 1, 1]), (0.1, [20, 3, 1]), (1, [200, 30, 3])):
        ids = share_of_each_class(targets, share, seed=3).tolist()
        assert np.bincount(targets[ids]).tolist() == expected
        assert ids == sorted(set(ids)) == share_of_each_class(targets, share, seed=3).tolist()
    chosen = [set(share_of_each_class(targets, share, 3).tolist()) for share in (0.01, 0.1)]
    assert chosen[0] < chosen[1] != set(share_of_each_class(targets, 0.1, 4).tolist())


@pytest.mark.parametrize(("num_correct", "total"), [(270, 900), (3, 40), (1, 7), (6, 7)])
def test_bootstrap_is_that_of_the_images(num_correct, total):
    """Against images drawn with replacement, one by one: percentiles of 20,000 resamples."""
    correct = np.arange(total) < num_correct
    rng = np.random.default_rng(5)
    accuracies = [100 * correct[rng.integers(0, total, total)].mean() for _ in range(20_000)]
    expected = np.percentile(accuracies, [2.5, 97.5])
    step = 100 / total + 100 * math.sqrt(0.25 / total) * 0.1
    assert bootstrap_interval(num_correct, total) == pytest.approx(expected, abs=step)
    assert bootstrap_interval(num_correct, total) == bootstrap_interval(num_correct, total, 0)
    assert len({bootstrap_interval(270, 900, seed) for seed in range(5)}) > 1


@pytest.mark.parametrize("total", [1, 2, 7, 1000])
def test_accuracies_at_the_ends_have_an_interval(total):
    """Wilson's: the shares p from which so extreme an accuracy is less than 1.96 standard deviations of p away."""
    width = 100 * 1.959964**2 / (total + 1.959964**2)
    assert bootstrap_interval(0, total) == pytest.approx((0, width), abs=1e-4)
    assert bootstrap_interval(total, total) == pytest.approx((100 - width, 100), abs=1e-4)


def test_table():
    row = {"encoder": "target encoder", "features": "mean", "dim": 192, "probe": "linear", "accuracy": 43.61,
           "interval": [41.2, 46.04], "num_labels": 10000, "settings": {"C": 1000.0}}  # fmt: skip
    results = {"rows": [row, row | {"accuracy": None, "interval": None, "settings": {}, "note": "not run: too few"}],
               "train_dataset": "scenes (train)", "test_dataset": "scenes (test)", "num_train_images": 10000,
               "num_test_images": 2000, "num_classes": 12, "chance": 9.15, "temperature": 0.07, "seed": 0,
               "image_size": [32, 32], "suite": "small", "num_resamples": 1000}  # fmt: skip
    assert format_suite(results) == (
        "2,000 images of scenes (test), 12 classes (chance 9.2 %), 32x32 pixels; fitted on 10,000 of scenes (train); "
        "suite small; kNN T 0.07; intervals by bootstrap over the test images (1,000 resamples); seed 0.\n\n"
        "| encoder        | features   | probe  | correct % (95 % interval) | labels | chosen on train images |\n"
        "|----------------|------------|--------|---------------------------|--------|------------------------|\n"
        "| target encoder | mean (192) | linear | 43.6 (41.2-46.0)          | 10,000 | C 1000                 |\n"
        "| target encoder | mean (192) | linear | -                         | 10,000 | not run: too few       |"
    )
    results["rows"][0]["settings"] = {"C": 1.0, "converged": False}
    assert "43.6 (41.2-46.0) \\*" in format_suite(results) and "| C 1 " in format_suite(results)
    assert format_suite(results).endswith("\\* The linear probe did not converge.")


def test_figures_go_into_the_card(results, tmp_path):
    found = eval_results(results)
    own = [row for row in results["rows"] if row["role"] == "model" and row["accuracy"] is not None]
    assert [result.metric_value for result in found] == [round(row["accuracy"], 2) for row in own]
    assert [result.metric_name for result in found[:4:3]] == [
        "kNN accuracy (k 20; target encoder, last layer)",
        "Linear probe accuracy (10 % of labels; target encoder, last layer)",
    ]
    assert [metric_name(row) for row in own[-2:]] == [
        "Attentive probe accuracy (context encoder, patches)",
        "Attentive probe accuracy (context encoder, patches, last 4 layers)",
    ]
    assert len({result.metric_name for result in found}) == len(found)
    index = ModelCardData(model_name="x", eval_results=found).to_dict()["model-index"]
    assert sum(len(entry["metrics"]) for entry in index[0]["results"]) == len(found)
    path = tmp_path / "README.md"
    other = EvalResult("image-classification", "other", "other", "accuracy", 12.0, metric_name=found[0].metric_name)
    text = "# A title\n\nwith *text*, and é.\n"
    path.write_text(f"---\nlibrary_name: transformers\ntags:\n- jepa\n---\n\n{text}", encoding="utf-8")
    write_eval_results(results, path, "mine")
    card = ModelCard.load(path)
    assert card.text.strip() == text.strip() and (card.data.model_name, card.data.tags) == ("mine", ["jepa"])
    assert card.data.eval_results == found
    card.data.eval_results = [other, *card.data.eval_results]
    card.data.model_name = "named"
    card.save(path)
    # once more, with other values: they take the place of the old ones
    better = [row | {"accuracy": 99.0} if row["accuracy"] is not None else row for row in results["rows"]]
    write_eval_results(results | {"rows": better}, path, "mine")
    card = ModelCard.load(path)
    assert card.data.model_name == "named" and len(card.data.eval_results) == len(found) + 1
    assert sorted({result.metric_value for result in card.data.eval_results}) == [12.0, 99.0]
    kept = json.loads((tmp_path / "suites.json").read_text())
    assert [row["accuracy"] for row in kept[results["test_dataset"]]["rows"] if row in better]
    write_eval_results(results | {"test_dataset": "others (test)"}, path, "mine")
    assert json.loads((tmp_path / "suites.json").read_text()).keys() == {results["test_dataset"], "others (test)"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("uoft-cs/cifar10 (test)", ("uoft-cs/cifar10", "cifar10", "test")),
        ("{here} (validation)", ("photos", "photos", "validation")),
        ("mine", ("mine", "mine", None)),
    ],
)
def test_data_sets_are_named_as_on_the_hub(results, tmp_path, name, expected):
    (tmp_path / "photos").mkdir()
    first = eval_results(results | {"test_dataset": name.format(here=tmp_path / "photos")})[0]
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == expected


def test_mistakes_are_told_before_images_are_read(folder, tmp_path, capsys):
    command = ["evaluate", str(folder), "--dataset", str(tmp_path / "no images")]
    card = tmp_path / "README.md"
    card.write_text("---\na: [\n---\n")
    for flags, sentence in (
        (["--suite", "imagent"], "'imagent' is not known; did you mean imagenet?"),
        (["--suite", "7"], "choose one of small, imagenet"),
        (["--suite", "small", "--num_neighbors", "5"], "a suite's are 20 and 200; leave it out"),
        (["--suite", "small", "--context_encoder"], "wherever a model has one; leave it out"),
        (["--card", str(card)], "give --suite small, too"),
        (["--suite", "small", "--card", str(tmp_path)], "is no file"),
        (["--suite", "small", "--card", str(card)], "cannot be read"),
    ):
        assert main([*command, *flags]) == 2
        assert sentence in capsys.readouterr().err


def test_wrong_labels_are_refused(folder, train, test):
    with pytest.raises(InputError, match="scenes 1 has no labels; say which with --label_column"):
        evaluate_suite(folder, train, dataclasses.replace(test, labels=None), "small", QUIET)
    few = train.take(np.flatnonzero(train.labels == 1))
    with pytest.raises(InputError, match="3 classes that no image of scenes 0 has"):
        evaluate_suite(folder, few, test, "small", QUIET)


def test_one_image_of_each_class_leaves_the_neighbours(train, test):
    one = train.take(np.unique(train.labels, return_index=True)[1])
    rows = evaluate_suite(tiny_model(image_size=SIZE), one, test, "small", QUIET, MEAN, STD)["rows"]
    assert {row["probe"] for row in rows if row["accuracy"] is not None} == {"kNN, k 4"}
    assert all("leaves none to choose settings on" in row["note"] for row in rows if row["accuracy"] is None)


def test_command(folder, tmp_path, capsys):
    (tmp_path / "README.md").write_text("---\ntags:\n- jepa\n---\n\ntext\n")
    images = ["--dataset", "scenes", "--num_train_images", "60", "--num_eval_images", "30"]
    written = ["--output", str(tmp_path / "results.json"), "--card", str(tmp_path / "README.md")]
    flags = [*images, *written, "--num_random_encoders", "0", "--disable_tqdm"]
    assert main(["evaluate", str(folder), "--suite", "small", *flags]) == 0
    printed, results = capsys.readouterr().out, json.loads((tmp_path / "results.json").read_text())
    assert format_suite(results) in printed and results["suite"] == "small"
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.eval_results == eval_results(results) and data.model_name == folder.name
