"""The modules of the `evaluate` library, by import and by path, against other libraries' arithmetic."""

import json
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from scipy import linalg
from tiny import seeded, tiny_model
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from trainers.cli import main
from trainers.diagnostics import lidar, rankme
from trainers.finetune_args import FinetuneDataArguments
from trainers.finetune_data import load_labelled_splits
from trainers.publishing import save_model
from trainers.transforms import image_processor

FOLDER = Path(__file__).resolve().parent.parent / "trainers" / "metrics"


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    """Not the user's; once, since what is loaded from it stays imported."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluate.config.HF_MODULES_CACHE", cache / "modules")
        patch.setattr("evaluate.config.HF_METRICS_CACHE", cache / "metrics")
        yield


def both_ways(name, cls):
    """The module by import and by path."""
    from trainers import metrics

    return getattr(metrics, cls)(), evaluate.load(str(FOLDER / name))


def test_lidar_is_the_rank_of_the_generalised_eigenvalue_problem():
    centres = torch.randn(60, 1, 8, generator=seeded(), dtype=torch.float64) * torch.arange(1, 9)
    views = centres + 0.3 * torch.randn(60, 5, 8, generator=seeded(1), dtype=torch.float64)
    x = views.numpy()
    means = x.mean(axis=1)
    within = sum(np.outer(v - m, v - m) for image, m in zip(x, means, strict=True) for v in image) / 300
    between = sum(np.outer(m - means.mean(0), m - means.mean(0)) for m in means) / 60
    eigenvalues = linalg.eigh(between, within + 1e-4 * np.eye(8), eigvals_only=True)
    p = eigenvalues / eigenvalues.sum() + 1e-7
    assert lidar(views) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-6)
    # in another unit, in which delta is another number
    assert lidar(views * 100, delta=1.0) == pytest.approx(lidar(views), rel=1e-6)


def test_lidar_of_collapsed_and_broken_embeddings():
    assert lidar(torch.ones(5, 3, 4)) == pytest.approx(1, abs=1e-4)
    one_axis = torch.randn(50, 1, 1, generator=seeded()) * torch.tensor([1.0, 0, 0, 0])
    assert lidar(one_axis.expand(50, 3, 4)) == pytest.approx(1, abs=1e-4)
    assert math.isnan(lidar(torch.full((3, 2, 4), math.inf)))
    for shape in ((4, 8), (1, 2, 4), (4, 1, 8)):
        with pytest.raises(ValueError, match="give \\(n, q, D\\), of 2 images or more 2 views or more"):
            lidar(torch.ones(shape))


def test_rankme():
    data = torch.randn(40, 6, generator=seeded())
    for module in both_ways("rankme", "RankMe"):
        assert module.compute(data=data.numpy()) == {"rankme": pytest.approx(rankme(data), rel=1e-5)}
        # in parts, too
        for part in data.split(15):
            module.add_batch(data=part.numpy())
        assert module.compute()["rankme"] == pytest.approx(rankme(data), rel=1e-5)


def test_lidar():
    data = torch.randn(30, 4, 6, generator=seeded())
    for module in both_ways("lidar", "LiDAR"):
        assert module.compute(data=data.numpy()) == {"lidar": pytest.approx(lidar(data), rel=1e-5)}
        assert module.compute(data=data.numpy(), delta=10.0)["lidar"] == pytest.approx(lidar(data, 10.0), rel=1e-5)


def test_knn_is_that_of_scikit_learn():
    from sklearn.neighbors import KNeighborsClassifier

    x = torch.randn(90, 5, generator=seeded()) + torch.arange(90).unsqueeze(1) % 3
    y = torch.arange(90) % 3
    given = {"predictions": x[60:].numpy(), "references": y[60:].numpy()}
    bank = {"train_embeddings": x[:60].numpy(), "train_labels": y[:60].numpy()}

    def weights(distances):
        return np.exp((1 - distances) / 0.2)

    theirs = KNeighborsClassifier(7, metric="cosine", weights=weights, algorithm="brute").fit(x[:60], y[:60])
    expected = theirs.score(x[60:], y[60:])
    assert 0.4 < expected < 1
    for module in both_ways("knn", "KNN"):
        assert module.compute(**given, **bank, k=7, temperature=0.2) == {"knn": pytest.approx(expected)}
        with pytest.raises(ValueError, match="60 train_embeddings and 59 train_labels do not go together"):
            module.compute(**given, **(bank | {"train_labels": y[:59].numpy()}))


def test_top_accuracy_is_that_of_scikit_learn():
    from sklearn.metrics import accuracy_score, top_k_accuracy_score

    scores, labels = torch.randn(40, 8, generator=seeded()).numpy(), np.arange(40) % 8
    ranked = np.argsort(-scores, axis=1)
    for module in both_ways("top_accuracy", "TopAccuracy"):
        found = module.compute(predictions=ranked[:, :5], references=labels)
        assert found["accuracy"] == pytest.approx(accuracy_score(labels, ranked[:, 0]))
        assert found["top5_accuracy"] == pytest.approx(top_k_accuracy_score(labels, scores, k=5))
        assert module.compute(predictions=ranked[:, :1], references=labels).keys() == {"accuracy"}


def test_the_stock_trainer_with_top_accuracy_gives_the_numbers_of_finetune(tmp_path):
    """On the images that `cjepa finetune` held out."""
    save_model(tiny_model(initializer_range=0.05), image_processor((32, 32), [0.5] * 3, [0.25] * 3), tmp_path)
    data = FinetuneDataArguments(num_train_images=60, num_eval_images=20, validation_share=0.4)
    flags = [
        "--num_train_images", "60", "--num_eval_images", "20", "--validation_share", "0.4", "--learning_rate", "0.01",
        "--num_train_epochs", "4", "--mixup", "0", "--cutmix", "0", "--use_cpu", "--disable_tqdm", "--precision",
        "float32",
    ]  # fmt: skip
    command = ["finetune", str(tmp_path), "--dataset", "scenes", "--output_dir", str(tmp_path / "run"), *flags]
    assert main(command) == 0
    facts = json.loads((tmp_path / "run/final/results.json").read_text())
    (expected,) = (
        entry
        for entry in facts["history"]
        if "eval_accuracy" in entry and entry["step"] == facts["training"]["best_step"]
    )
    held_out = load_labelled_splits(data, 32, progress=False).validation
    processor = AutoImageProcessor.from_pretrained(tmp_path / "run/final")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run/final")
    items = [
        {"pixel_values": processor(held_out.image(i), return_tensors="pt").pixel_values[0], "labels": int(label)}
        for i, label in enumerate(held_out.labels)
    ]
    for metric in both_ways("top_accuracy", "TopAccuracy"):

        def compute_metrics(predicted, metric=metric):
            ranked = np.argsort(-predicted.predictions, axis=1)[:, :5]
            return metric.compute(predictions=ranked, references=predicted.label_ids)

        args = TrainingArguments(tmp_path / "stock", use_cpu=True, disable_tqdm=True, report_to="none")
        found = Trainer(model, args, eval_dataset=items, compute_metrics=compute_metrics).evaluate()
        for name in ("eval_accuracy", "eval_top5_accuracy"):
            assert found[name] == pytest.approx(expected[name]) and 0 < found[name] < 1
