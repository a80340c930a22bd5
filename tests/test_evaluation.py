"""Evaluation of frozen encoders, against scikit-learn and formulas written out."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from tiny import seeded, tiny_config, tiny_model
from transformers import ViTConfig

from modeling_cjepa import CJepaModel
from trainers import probes
from trainers.checkpoint_files import write_manifest
from trainers.datasets import ImageDataset, ImageSource
from trainers.diagnostics import feature_std, rankme
from trainers.errors import InputError
from trainers.evaluation import (
    EvaluationArguments,
    RawPixels,
    evaluate_baselines,
    evaluate_encoder,
    evaluate_model,
    extract_embeddings,
)
from trainers.files import write_json, write_text_atomically
from trainers.loading import load_encoder_config
from trainers.probes import accuracy_interval, folds_of, knn_predict, linear_predict
from trainers.reports import format_table
from trainers.scenes import FAMILY_NAMES, render_scenes
from trainers.transforms import eval_transform, image_processor, normalize

SIZE = 24
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
ARGUMENTS = EvaluationArguments(eval_batch_size=16, num_neighbors=5, precision="float32")


def scenes(num_images, seed) -> ImageSource:
    rendered = render_scenes(num_images, seed, SIZE)
    return ImageSource(rendered["image"], rendered["family"], list(FAMILY_NAMES), f"scenes {seed}")


@pytest.fixture(scope="module")
def train():
    return scenes(80, 0)


@pytest.fixture(scope="module")
def test():
    return scenes(40, 1)


@pytest.fixture
def folder(tmp_path):
    """A saved pre-training model whose encoders differ, with the image processor of MEAN and STD."""
    tiny_model(image_size=SIZE).save_pretrained(tmp_path / "model")
    image_processor((SIZE, SIZE), MEAN, STD).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def as_dataset(source) -> ImageDataset:
    return ImageDataset(source, eval_transform((SIZE, SIZE)))


def clusters(num_images, width=12, num_classes=4, seed=0, spread=1.5):
    """Overlapping classes whose features have very different scales and a common offset."""
    centres = torch.randn(num_classes, width, generator=seeded(99))
    generator = seeded(seed)
    y = torch.randint(num_classes, (num_images,), generator=generator)
    x = centres[y] + spread * torch.randn(num_images, width, generator=generator)
    return x * torch.logspace(-2, 2, width) + 3, y


def rankme_written_out(x):
    s = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = s / s.sum() + 1e-7
    return float(np.exp(-np.sum(p * np.log(p))))


@pytest.mark.parametrize("shape", [(200, 16), (16, 200), (9000, 8)])
def test_rankme_is_the_formula(shape):
    x = torch.randn(shape, generator=seeded()) + 2  # an offset: the embeddings are not centred
    x = x * torch.logspace(0, -9, shape[1])
    assert rankme(x) == pytest.approx(rankme_written_out(x), rel=1e-5)
    assert rankme(x.bfloat16()) == pytest.approx(rankme_written_out(x.bfloat16()), rel=1e-5)


def test_rankme_of_known_ranks():
    orthonormal = torch.linalg.qr(torch.randn(50, 12, generator=seeded()))[0]
    assert rankme(orthonormal) == pytest.approx(12, rel=1e-4)
    assert rankme(torch.outer(torch.rand(50), torch.rand(12))) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(50, 12)) == pytest.approx(1, abs=1e-3)
    assert math.isnan(rankme(torch.full((50, 12), torch.nan)))


def test_feature_std_is_the_mean_over_features():
    x = torch.randn(30, 5, generator=seeded()) * torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]) + 7
    assert feature_std(x) == pytest.approx(np.mean([np.std(column, ddof=1) for column in x.numpy().T]), rel=1e-5)


def test_interval_is_wilsons():
    # Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20
    for (correct, total), expected in {
        (81, 263): (25.53, 36.62),
        (15, 148): (6.24, 16.05),
        (0, 20): (0, 16.11),
    }.items():
        assert accuracy_interval(correct, total) == pytest.approx(expected, abs=0.006)
    low, high = accuracy_interval(7, 9)
    for end in (low / 100, high / 100):  # both ends solve (p - share)^2 = z^2 p (1 - p) / n
        assert (end - 7 / 9) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 9, rel=1e-5)
    assert accuracy_interval(5, 5)[1] == 100


@pytest.mark.parametrize("k, temperature", [(20, 0.07), (7, 0.001), (1000, 0.1)])
def test_knn_predicts_as_scikit_learn(k, temperature):
    (train_x, train_y), (test_x, _) = clusters(300), clusters(200, seed=1)
    # relative to the nearest, as exp(1 / 0.001) overflows
    reference = KNeighborsClassifier(
        min(k, 300), metric="cosine", weights=lambda d: np.exp((d.min(axis=1, keepdims=True) - d) / temperature)
    )
    expected = reference.fit(train_x.double(), train_y).predict(test_x.double())
    assert knn_predict(train_x, train_y, test_x, 4, k, temperature).tolist() == expected.tolist()


def test_knn_in_chunks_is_the_same(monkeypatch):
    (train_x, train_y), (test_x, _) = clusters(300), clusters(101, seed=1)
    whole = knn_predict(train_x, train_y, test_x, 4)
    for at_once in (1, 300 * 7):
        monkeypatch.setattr(probes, "_SIMILARITIES_AT_ONCE", at_once)
        assert torch.equal(knn_predict(train_x, train_y, test_x, 4), whole)


@pytest.mark.parametrize("num_images, width, C", [(500, 12, None), (500, 12, 1e-3), (500, 12, 10.0), (60, 90, 0.1)])
def test_linear_probe_is_scikit_learns(num_images, width, C, monkeypatch):
    (train_x, train_y), (test_x, test_y) = clusters(num_images, width), clusters(400, width, seed=1)
    if C is not None:
        monkeypatch.setattr(probes, "C_GRID", (C,))
    probe = linear_predict(train_x, train_y + 3, test_x)  # class indices need not start at 0
    scaler = StandardScaler().fit(train_x.double())
    reference = LogisticRegression(C=probe.C, max_iter=10_000, tol=1e-7)
    expected = reference.fit(scaler.transform(train_x.double()), train_y).predict(scaler.transform(test_x.double()))
    assert C is None or probe.C == C
    assert probe.converged
    assert (probe.predictions.numpy() - 3 == expected).mean() > 0.99
    accuracies = (
        (probe.predictions - 3 == test_y).double().mean(),
        (torch.from_numpy(expected) == test_y).double().mean(),
    )
    assert abs(accuracies[0] - accuracies[1]) <= 0.005
    assert accuracies[0] > 0.5


def test_linear_probe_minimises_the_objective_where_few_directions_dominate():
    """The case scikit-learn's default solver is slow in: all features nearly the same."""
    x, y = clusters(300)
    x = StandardScaler().fit_transform(x + 300 * torch.randn(300, 1, generator=seeded(5)))
    variances, axes = np.linalg.eigh(x.T @ x / len(x))
    weight, bias, converged = probes._fit(torch.from_numpy(x @ axes), y, 4, 1e3, torch.from_numpy(variances))
    reference = LogisticRegression(C=1e3, solver="newton-cholesky", tol=1e-8).fit(x, y)

    def objective(weight, bias):
        logits = torch.from_numpy(x @ weight + bias)
        return torch.nn.functional.cross_entropy(logits, y, reduction="sum").item() * 1e3 + (weight**2).sum() / 2

    assert converged
    best = objective(reference.coef_.T, reference.intercept_)
    assert objective(axes @ weight.numpy(), bias.numpy()) == pytest.approx(best, rel=1e-4)


def test_fits_go_on_where_that_of_the_C_before_ended(monkeypatch):
    steps, minimize = [], probes.minimize

    def counted(*args, **kwargs):
        result = minimize(*args, **kwargs)
        steps.append(result.nit)
        return result

    monkeypatch.setattr(probes, "minimize", counted)
    monkeypatch.setattr(probes, "C_GRID", (1.0, 1.0, 1.0))
    x, y = clusters(2000, 20)
    linear_predict(x, y, x)
    num_folds = len(folds_of(y, 0))
    first, again, last = steps[:num_folds], steps[num_folds:-1], steps[-1]
    assert len(again) == 2 * num_folds and max(again) <= 1 < 5 < min(*first, last)


def test_linear_probe_chooses_C_on_train_embeddings_alone():
    """Many noisy features: a strong penalty is best, whatever the test embeddings are."""
    generator = seeded(3)
    y = torch.randint(2, (200,), generator=generator)
    x = torch.randn(200, 150, generator=generator)
    x[:, 0] += 2 * y
    chosen = {linear_predict(x, y, test_x).C for test_x in (x, -x, x[torch.randperm(200, generator=generator)])}
    assert len(chosen) == 1
    scaled = StandardScaler().fit_transform(x)
    num_correct = {
        C: sum(
            round(LogisticRegression(C=C).fit(scaled[kept], y[kept]).score(scaled[held_out], y[held_out]) * 20)
            for kept, held_out in probes.folds_of(y, seed=0)
        )
        for C in probes.C_GRID
    }
    assert num_correct[chosen.pop()] >= max(num_correct.values()) - 1 > num_correct[1e-4]


def test_linear_probe_of_few_labels_does_not_stop_at_chance():
    """The labels lie in the weakest direction, which only a weak penalty reads; all below it do alike, by chance."""
    generator = seeded(4)
    x = torch.randn(300, 1, generator=generator) + 1e-3 * torch.randn(300, 20, generator=generator)
    y = ((x[:, 0] - x[:, 1]) > 0).long()
    probe = linear_predict(x[:200], y[:200], x[200:])
    assert probe.C >= 10 and (probe.predictions == y[200:]).float().mean() > 0.8


@pytest.mark.parametrize("num_images, num_folds", [(20, 9), (3000, 7), (30_000, 1)])
def test_folds_leave_one_of_each_class(num_images, num_folds):
    targets = torch.tensor([0] * (num_images - 2) + [1, 2])
    folds = probes.folds_of(targets, seed=0)
    assert len(folds) == num_folds
    for kept, held_out in folds:
        assert set(targets[kept].tolist()) == {0, 1, 2}
        assert sorted([*kept.tolist(), *held_out.tolist()]) == list(range(num_images))
    together = torch.cat([held_out for _, held_out in folds])
    assert len(together.unique()) == len(together) <= max(num_images // 10 * num_folds, 17)
    assert folds[0][1].tolist() != probes.folds_of(targets, seed=1)[0][1].tolist()


def test_one_image_of_each_class_is_too_few():
    with pytest.raises(InputError, match="one train image of each class"):
        linear_predict(torch.randn(3, 4), torch.arange(3), torch.randn(2, 4))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_embeddings_are_the_mean_tokens_in_order(train, num_workers):
    encoder = tiny_model(image_size=SIZE, hidden_dropout_prob=0.5).context_encoder.train()
    embeddings, labels = extract_embeddings(
        encoder, as_dataset(train), MEAN, STD, batch_size=32, progress=False, num_workers=num_workers
    )
    assert encoder.training and all(module.training for module in encoder.modules())
    pixels = torch.from_numpy(train.images).permute(0, 3, 1, 2).float() / 255
    pixels = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected = encoder.eval()(pixels).last_hidden_state.mean(dim=1)
    assert embeddings.dtype == torch.float32 and not embeddings.requires_grad
    torch.testing.assert_close(embeddings, expected, atol=1e-5, rtol=1e-5)
    assert labels.dtype == torch.int64 and labels.tolist() == train.labels.tolist()
    unlabelled = as_dataset(dataclasses.replace(train, labels=None))
    assert extract_embeddings(encoder, unlabelled, MEAN, STD, progress=False)[1] is None
    assert not encoder.training


def test_evaluate_model_loads_both_encoders_and_compares(folder, train, test):
    both = dataclasses.replace(ARGUMENTS, context_encoder=True)
    results = evaluate_model(str(folder), train, test, both, [0.5] * 3, [0.5] * 3)
    labels = [row["encoder"] for row in results["rows"]]
    assert labels == ["target encoder", "context encoder", "random encoder", "raw pixels"]
    model = tiny_model(image_size=SIZE)
    for label, encoder in (("target encoder", model.cjepa), ("context encoder", model.context_encoder)):
        expected = evaluate_encoder(encoder, as_dataset(train), as_dataset(test), MEAN, STD, ARGUMENTS, label)
        assert results["rows"][labels.index(label)] == expected | {"num_parameters": encoder.num_parameters()}
    target, context = (row["feature_std"] for row in results["rows"][:2])
    assert abs(target - context) > 1e-4
    assert (results["image_mean"], results["image_std"]) == (pytest.approx(MEAN), pytest.approx(STD))
    assert results["chance"] == 100 * np.bincount(test.labels).max() / 40
    assert {"train_dataset": "scenes 0", "test_dataset": "scenes 1", "num_train_images": 80, "num_test_images": 40,
            "num_classes": 4, "num_neighbors": 5, "seed": 0}.items() <= results.items()  # fmt: skip
    json.dumps(results, allow_nan=False)
    check_row(results["rows"][0], model.cjepa, train, test)


def test_an_encoder_is_evaluated_in_the_precision_asked_for(train, test, monkeypatch):
    encoder, seen = tiny_model(image_size=SIZE).cjepa.eval(), {}
    for precision in ("bf16", "float32"):
        arguments = dataclasses.replace(ARGUMENTS, precision=precision)
        settings = (as_dataset(train), as_dataset(test), MEAN, STD, arguments, "encoder")
        row = evaluate_encoder(encoder, *settings)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            x = torch.stack([item["pixel_values"] for item in as_dataset(test)])
            expected = feature_std(encoder(normalize(x, MEAN, STD)).pooler_output.float())
        seen[precision] = row["feature_std"]
        assert row["feature_std"] == pytest.approx(expected, rel=1e-5)
    assert seen["bf16"] != pytest.approx(seen["float32"], rel=1e-5)
    for is_fast, precision in ((True, "bf16"), (False, "float32")):
        monkeypatch.setattr("trainers.precision.computes_in_bf16", lambda device, is_fast=is_fast: is_fast)
        auto = dataclasses.replace(ARGUMENTS, precision="auto")
        assert evaluate_encoder(encoder, *settings[:4], auto)["feature_std"] == seen[precision]
        assert evaluate_model(encoder, train, test, auto, MEAN, STD)["precision"] == precision
    with pytest.raises(InputError, match="precision='fp8' is not known"):
        EvaluationArguments(precision="fp8")


def check_row(row, encoder, train, test):
    """The row of an encoder, from its embeddings and scikit-learn."""
    train_x, test_x = (extract_embeddings(encoder, as_dataset(s), MEAN, STD, progress=False)[0] for s in (train, test))
    knn = KNeighborsClassifier(5, metric="cosine", weights=lambda d: np.exp((1 - d) / 0.07)).fit(train_x, train.labels)
    assert row["knn"] == pytest.approx(100 * knn.score(test_x, test.labels))
    assert row["knn_interval"] == pytest.approx(accuracy_interval(round(row["knn"] * 0.4), 40))
    assert row["linear_interval"] == pytest.approx(accuracy_interval(round(row["linear"] * 0.4), 40))
    assert row["rankme"] == pytest.approx(rankme_written_out(test_x), rel=1e-4)
    assert row["dim"] == 32 and row["linear_C"] in probes.C_GRID and row["linear_converged"]


def test_an_encoder_alone_and_a_model_in_memory(folder, tmp_path, train, test):
    CJepaModel.from_pretrained(folder).save_pretrained(tmp_path / "encoder")
    results = evaluate_model(tmp_path / "encoder", train, test, ARGUMENTS, MEAN, STD)
    in_memory = evaluate_model(tiny_model(image_size=SIZE), train, test, ARGUMENTS, MEAN, STD)
    first, again = results["rows"][0], in_memory["rows"][0]
    assert [row["encoder"] for row in results["rows"]] == ["encoder", "random encoder", "raw pixels"]
    assert first | {"encoder": "target encoder"} == again
    assert results["image_mean"] == MEAN
    assert results["rows"][1:] == in_memory["rows"][1:]


def test_baselines_are_a_function_of_the_seed(train, test):
    model = CJepaModel(tiny_config(image_size=SIZE))

    def baselines(**changes):
        arguments = dataclasses.replace(ARGUMENTS, **changes)
        return evaluate_baselines(model, as_dataset(train), as_dataset(test), MEAN, STD, arguments)

    torch.manual_seed(1)
    first = baselines(num_random_encoders=2)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert baselines(num_random_encoders=2) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert [row["encoder"] for row in first] == ["random encoder 1", "random encoder 2", "raw pixels"]
    assert first[0]["feature_std"] != first[1]["feature_std"]
    other = baselines(seed=1)
    assert other[0]["feature_std"] != first[0]["feature_std"]
    assert other[1]["knn"] == first[2]["knn"]
    flat = torch.from_numpy(test.images).flatten(1).double() / 255
    assert first[2]["rankme"] == pytest.approx(rankme_written_out(flat), rel=1e-4)
    assert first[2]["dim"] == 3 * SIZE * SIZE


def test_raw_pixels_of_large_images_are_reduced(test):
    pixels = torch.rand(2, 3, 64, 96, generator=seeded())
    reduced = RawPixels()(pixels).pooler_output
    expected = pixels.reshape(2, 3, 32, 2, 32, 3).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(reduced, expected)
    large = ImageDataset(test, eval_transform((40, 40)))
    arguments = dataclasses.replace(ARGUMENTS, num_random_encoders=0)
    (row,) = evaluate_baselines(CJepaModel(tiny_config(image_size=40)), large, large, MEAN, STD, arguments)
    assert row["encoder"] == "raw pixels, reduced to 32x32" and row["dim"] == 3 * 32 * 32


def test_table():
    row = {"encoder": "target encoder", "knn": 43.61, "knn_interval": [41.2, 46.04], "linear": 50.0,
           "linear_interval": [47.5, 52.5], "linear_C": 1.0, "linear_converged": True, "rankme": 13.66,
           "feature_std": 0.5, "dim": 192}  # fmt: skip
    encoder = row | {"num_parameters": 1_234_567}
    results = {"rows": [encoder, row | {"encoder": "raw pixels", "dim": 3072}], "train_dataset": "scenes (train)",
               "test_dataset": "scenes (test)", "num_train_images": 10000, "num_test_images": 2000, "num_classes": 12,
               "chance": 9.15, "num_neighbors": 20, "temperature": 0.07, "seed": 0, "image_size": [32, 32],
               "image_mean": MEAN, "image_std": STD}  # fmt: skip
    assert format_table(results) == (
        "2,000 images of scenes (test), 12 classes (chance 9.2 %), 32x32 pixels; fitted on 10,000 of scenes (train); "
        "kNN k 20, T 0.07; seed 0.\n\n"
        "| encoder        | parameters | kNN % (95 % interval) | linear % (95 % interval) | RankMe       |\n"
        "|----------------|------------|-----------------------|--------------------------|--------------|\n"
        "| target encoder | 1.23 M     | 43.6 (41.2-46.0)      | 50.0 (47.5-52.5)         | 13.7 of 192  |\n"
        "| raw pixels     | -          | 43.6 (41.2-46.0)      | 50.0 (47.5-52.5)         | 13.7 of 3072 |"
    )
    results["rows"][1]["linear_converged"] = False
    assert "50.0 (47.5-52.5) \\*" in format_table(results)
    assert format_table(results).endswith("\\* The linear probe did not converge.")


def test_classes_go_by_name(folder, train, test):
    """A split that numbers its own classes, some of them missing, is evaluated as if it numbered all."""
    chosen = test.labels != 0
    plain = test.take(np.flatnonzero(chosen))
    renumbered = dataclasses.replace(plain, labels=3 - plain.labels, label_names=list(FAMILY_NAMES[:0:-1]))
    arguments = dataclasses.replace(ARGUMENTS, num_random_encoders=0)
    assert evaluate_model(folder, train, renumbered, arguments) == evaluate_model(folder, train, plain, arguments)


def test_wrong_labels_are_refused(folder, train, test):
    nameless = dataclasses.replace(test, labels=None)
    with pytest.raises(InputError, match="scenes 1 has no labels; say which with --label_column"):
        evaluate_model(folder, train, nameless, ARGUMENTS)
    with pytest.raises(InputError, match="80 images and 79 labels"):
        evaluate_model(folder, dataclasses.replace(train, labels=train.labels[1:]), test, ARGUMENTS)
    with pytest.raises(InputError, match="label -1, which is none"):
        evaluate_model(folder, train, dataclasses.replace(test, labels=test.labels - 1), ARGUMENTS)
    few = train.take(np.flatnonzero(train.labels == 1))
    with pytest.raises(InputError, match=r"3 classes that no image of scenes 0 has \(creature, plant, building\)"):
        evaluate_model(folder, few, test, ARGUMENTS)


def test_broken_models_are_refused(folder, tmp_path, train, test):
    weights = load_file(folder / "model.safetensors")
    name = "context_encoder.layers.1.mlp.fc1.weight"
    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(InputError, match=f"lacks 1 weights of a CJepaForPreTraining \\({name}\\)"):
        evaluate_model(folder, train, test, ARGUMENTS)
    save_file(weights | {name: weights[name][:5].clone()}, folder / "model.safetensors")
    with pytest.raises(InputError, match="weights of .* cannot be loaded"):
        evaluate_model(folder, train, test, ARGUMENTS)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="weights of .* cannot be loaded"):
        evaluate_model(folder, train, test, ARGUMENTS)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="weights of .* cannot be loaded"):
        evaluate_model(folder, train, test, ARGUMENTS)


def test_a_checkpoint_whose_weights_are_damaged_is_refused(folder, train, test):
    """A byte that is another one gives weights that can be loaded."""
    write_manifest(folder, 1)
    evaluate_model(folder, train, test, ARGUMENTS)
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match=r"is a broken checkpoint \(model.safetensors is damaged, its checksum"):
        evaluate_model(folder, train, test, ARGUMENTS)


def test_no_model_is_refused(folder, tmp_path):
    for path in (tmp_path, tmp_path / "not" / "there"):
        with pytest.raises(InputError, match="neither a folder with a C-JEPA or S-JEA model"):
            load_encoder_config(path)
    ViTConfig().save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="is a model of type 'vit', not 'cjepa'"):
        load_encoder_config(tmp_path / "vit")
    assert load_encoder_config(folder).image_size == SIZE


def test_broken_image_processor_is_refused(folder, train, test):
    (folder / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="image processor of .* cannot be loaded"):
        evaluate_model(folder, train, test, ARGUMENTS)


def test_diverged_encoder_is_refused(train):
    encoder = CJepaModel(tiny_config(image_size=SIZE))
    encoder.layernorm.weight.data[0] = torch.nan
    with pytest.raises(InputError, match="embeddings of the target encoder are not finite"):
        evaluate_encoder(encoder, as_dataset(train), as_dataset(train), MEAN, STD, ARGUMENTS)


def test_json_has_no_nan(tmp_path):
    obj = {"a": [1.5, math.nan, (math.inf, "x")], "b": {"c": np.float64("nan"), "d": None, "e": True}}
    write_json(tmp_path / "new" / "results.json", obj)
    text = (tmp_path / "new" / "results.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [1.5, None, [None, "x"]], "b": {"c": None, "d": None, "e": True}
    }  # fmt: skip


def test_files_are_whole_or_untouched(tmp_path):
    path = tmp_path / "card.md"
    write_text_atomically(path, "é\n")
    with pytest.raises(OSError):
        write_text_atomically(tmp_path, "where a folder is")
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert path.read_text(encoding="utf-8") == "é\n"
    assert list(tmp_path.iterdir()) == [path]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))
