"""Nearest tokens by exhaustion, a predictor that is exact, and the command."""

import json

import numpy as np
import pytest
import torch
from pictures import MEAN, STD, image_files, read_by, refused
from PIL import Image
from test_datasets import make_folder, own_cache, picture  # noqa: F401
from tiny import tiny_model, tiny_sjea
from torch import nn

from modeling_cjepa.losses_cjepa import take
from trainers.cli import main
from trainers.datasets import ImageSource, sample_seed
from trainers.predictions import format_predictions, visualize_predictions
from trainers.token_search import search_tokens


def cosines(queries, tokens) -> np.ndarray:
    """Of each of (Q, D) with each of (n, D)."""
    queries, tokens = (np.asarray(each, np.float64) for each in (queries, tokens))
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(tokens, axis=1)
    return queries @ tokens.T / lengths


def normalized(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens with mean 0 and variance 1 over their features, as the loss has them."""
    return (tokens - tokens.mean(-1, keepdim=True)) / (tokens.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def source_of(number=7, first=100) -> ImageSource:
    images = np.stack([np.asarray(picture(first + index, (32, 32))) for index in range(number)])
    return ImageSource(images, name="noise")


def test_nearest_tokens_by_exhaustion():
    rng = np.random.default_rng(0)
    predicted, true = (torch.from_numpy(rng.normal(size=(9, 6)) + 0.5).float() for _ in range(2))
    candidates = torch.from_numpy(rng.normal(size=(7, 5, 6)) * rng.uniform(0.1, 9, (7, 5, 1))).float()
    # one true token is a candidate, too, which counts half
    true[4] = candidates[6, 2]
    places = torch.tensor([0, 1, 2, 3, 2, 0, 1, 2, 3])
    found = search_tokens(predicted, true, places, candidates.split([3, 3, 1]), 4)
    expected = cosines(predicted, candidates.flatten(0, 1))
    own = cosines(predicted, true).diagonal()
    order = np.argsort(-expected, axis=1)[:, :4]
    assert (found.images * 5 + found.positions).tolist() == order.tolist()
    np.testing.assert_allclose(found.similarities, np.take_along_axis(expected, order, 1), atol=1e-5)
    np.testing.assert_allclose(found.true_similarities, own, atol=1e-5)
    nearer = (expected > own[:, None] + 1e-6).sum(axis=1)
    in_place = (expected.reshape(9, 7, 5)[np.arange(9), :, places] > own[:, None] + 1e-6).sum(axis=1)
    half = 0.5 * (np.arange(9) == 4)
    # the same token twice may differ in the last bit
    assert np.abs(found.nearer.numpy() - nearer - half).max() <= 0.5
    assert np.abs(found.nearer_in_place.numpy() - in_place - half).max() <= 0.5
    others = np.arange(9) != 4
    assert np.array_equal(found.nearer[others], nearer[others])
    assert np.array_equal(found.nearer_in_place[others], in_place[others]) and in_place.sum() > 9
    summary = found.summary()
    assert summary["num_candidates"] == 35 and summary["num_predicted_tokens"] == 9 and summary["chance_rank"] == 18.5
    assert summary["mean_rank"] == pytest.approx(1 + found.nearer.mean().item())
    assert summary["share_nearer"] == pytest.approx(found.nearer.mean().item() / 35)
    assert summary["share_nearer_in_place"] == pytest.approx(found.nearer_in_place.mean().item() / 7)


def test_a_collapsed_encoder_is_no_better_than_chance():
    same = torch.ones(3, 4, 8)
    summary = search_tokens(torch.ones(2, 8), torch.ones(2, 8), torch.tensor([0, 3]), [same, same], 2).summary()
    assert summary["share_nearer"] == summary["share_nearer_in_place"] == 0.5 and summary["share_first"] == 0


class Exact(nn.Module):
    """A "predictor" that knows the target tokens (B, N, D)."""

    def __init__(self, tokens, config):
        super().__init__()
        self.tokens, self.config = tokens, config

    def forward(self, context, context_ids, target_ids, grid_size):
        # of any length and with an offset of its own: only the direction counts
        return 7 * take(self.tokens, target_ids)


@torch.no_grad()
def test_of_an_exact_predictor_the_true_token_is_first(tmp_path):
    model = tiny_model()
    pixels = torch.cat([read_by(number) for number in range(2)])
    model.predictor = Exact(normalized(model.cjepa(pixels).last_hidden_state), model.config)
    files = image_files(tmp_path)
    results = visualize_predictions(model, files, source_of(), tmp_path, 3, 4, progress=False)
    assert results["mean_rank"] == 1 and results["share_nearer"] == results["share_nearer_in_place"] == 0
    assert results["share_first"] == 1 and results["mean_true_similarity"] == pytest.approx(1, abs=1e-5)
    assert [entry["image"] for entry in results["drawn"]] == [file for file in files for _ in range(4)]
    assert all(entry["rank"] == 1 for entry in results["drawn"])
    # where the data set holds the images themselves, that very patch is the nearest one
    among = source_of(9, first=0)
    results = visualize_predictions(model, files, among, tmp_path, 2, 4, seed=3, progress=False)
    for entry in results["drawn"]:
        near = entry["nearest"][0]
        assert (near["index"], near["position"]) == (files.index(entry["image"]), entry["position"])
        assert near["similarity"] == pytest.approx(1, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"upper_levels": [{"num_hidden_layers": 1}], "min_context_patches": 8}])
def test_predictions_are_compared_as_in_the_loss(tmp_path, changes):
    model, source, files = tiny_model(**changes), source_of(), image_files(tmp_path)
    results = visualize_predictions(model, files, source, tmp_path, 5, 3, seed=2, progress=False)
    model.eval()
    masks = model.sample_masks(2, generator=torch.Generator().manual_seed(sample_seed(2, 0)))
    outputs = model(torch.cat([read_by(number) for number in range(2)]), *masks)
    stored = ((torch.from_numpy(source.images) / 255 - MEAN) / STD).permute(0, 3, 1, 2)
    tokens = normalized(model.cjepa(stored, level=0).last_hidden_state).flatten(0, 1)
    predicted = outputs.predictions.flatten(0, 2)
    similarities = cosines(predicted, tokens)
    own = cosines(predicted, outputs.targets.flatten(0, 2)).diagonal()
    nearer = (similarities > own[:, None]).sum(axis=1)
    assert results["num_predicted_tokens"] == len(own) and results["num_candidates"] == 7 * 64
    assert results["mean_rank"] == pytest.approx(1 + nearer.mean(), rel=1e-3)
    assert results["mean_true_similarity"] == pytest.approx(own.mean(), abs=1e-4)
    for entry in results["drawn"]:
        query = int(np.abs(own - entry["true_similarity"]).argmin())
        assert query // (len(own) // 2) == files.index(entry["image"]) and entry["rank"] == 1 + nearer[query]
        nearest = [near["index"] * 64 + near["position"] for near in entry["nearest"]]
        assert nearest == np.argsort(-similarities[query])[:5].tolist()
        np.testing.assert_allclose([near["similarity"] for near in entry["nearest"]],
                                   np.sort(similarities[query])[::-1][:5], atol=1e-4)  # fmt: skip


def test_views_and_mask_sets_of_pre_training_change_nothing(tmp_path):
    plain, several = tiny_model(), tiny_model(num_views=2, num_mask_sets=3)
    found = [
        visualize_predictions(model, image_files(tmp_path), source_of(), tmp_path, 3, 4, progress=False)
        for model in (plain, several)
    ]
    assert found[0]["mean_rank"] == found[1]["mean_rank"] > 1
    assert [entry["rank"] for entry in found[0]["drawn"]] == [entry["rank"] for entry in found[1]["drawn"]]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(folder / "cjepa")
    tiny_model().cjepa.save_pretrained(folder / "encoder")
    tiny_sjea().save_pretrained(folder / "sjea")
    return folder


def test_command(models, tmp_path, capsys):
    files, photos = image_files(tmp_path), make_folder(tmp_path / "photos", ["cat", "dog"], 20)
    command = ["visualize", "predictions", str(models / "cjepa"), *files, "--k", "4", "--num_tokens", "3"]
    assert main([*command, "--dataset", photos, "--num_images", "3"]) == 0
    folder = models / "cjepa/predictions"
    results = json.loads((folder / "predictions.json").read_text())
    # a tenth of 40 images is held out, and three of these are searched
    assert results["num_dataset_images"] == 3 and results["num_candidates"] == 3 * 64 and len(results["drawn"]) == 6
    said = capsys.readouterr().out.splitlines()
    assert said == [format_predictions(results), f"Written to {folder}: predictions.png, predictions.json."]
    assert f"Of 192 patches of {photos} (held out) {100 * results['share_nearer']:.1f} % are nearer" in said[0]
    with Image.open(folder / "predictions.png") as drawn:
        assert drawn.width == 6 * 280 and drawn.height > 6 * 280


def test_mistakes_are_told(models, tmp_path, capsys):
    (file,) = image_files(tmp_path, 1)
    photos = ["--dataset", make_folder(tmp_path / "photos", ["cat", "dog"])]
    cjepa = models / "cjepa"
    for arguments, words in (
        ([cjepa, "no.png", *photos], "Image no.png cannot be read"),
        ([cjepa, file], "does not tell which images it was made of; name some with --dataset"),
        ([cjepa, file, "--dataset", "no/such/folder"], "no/such/folder is neither a folder of images nor"),
        ([models / "encoder", file, *photos], "holds a CJepaModel, which has no predictor of masked patches"),
        ([models / "sjea", file, *photos], "holds a SJeaForPreTraining, which has no predictor of masked patches"),
        ([cjepa, file, *photos, "--k", 0], "k=0 of 64 candidates cannot be drawn; set it from 1 to 64"),
        ([cjepa, file, *photos, "--num_tokens", 999], "predicted patches of an image cannot be drawn; set it from 1"),
        ([cjepa, file, *photos, "--num_images", 0], "num_images=0 leaves nothing to search"),
        ([cjepa, file, *photos, "--seed", -1], "seed=-1 is no seed"),
    ):
        assert words in refused(capsys, "predictions", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
