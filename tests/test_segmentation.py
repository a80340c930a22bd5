"""The linear probe of segmentation on planted features and by hand; the command on rendered scenes."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import images, tiny_model, tiny_sjea
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trainers import probes, segmentation
from trainers.cli import main
from trainers.datasets import ImageSource
from trainers.dense_evaluation import evaluate_segmentation
from trainers.errors import InputError
from trainers.mask_sources import MaskDataset, MaskSource
from trainers.segmentation import (
    FrozenMaps,
    PixelPatches,
    SegmentationArguments,
    confusion,
    ious,
    mean_scores,
    score_counts,
    score_segmenter,
    train_segmenter,
)

ARGUMENTS = SegmentationArguments(num_probe_epochs=30, probe_batch_size=8, probe_learning_rate=0.05, disable_tqdm=True)
MEAN, STD = [0.5] * 3, [0.25] * 3


class Pooled(nn.Module):
    """An "encoder" whose features are an image's mean colours in 4x4 patches, in a unit of their own."""

    def __init__(self, scale=1.0, shift=0.0):
        super().__init__()
        self.weight, self.shift = nn.Parameter(torch.tensor(scale)), shift

    def forward(self, pixel_values):
        pooled = nn.functional.avg_pool2d(pixel_values, 4).permute(0, 2, 3, 1)
        return BaseModelOutputWithPooling(pooler_output=pooled * self.weight + self.shift)


def planted(number=24, size=16, seed=0) -> MaskSource:
    """Images of 4x4 squares, each of the colour of its class; a corner does not count, and no pixel has class 3."""
    colors = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
    classes = np.random.default_rng(seed).integers(0, 3, (number, size // 4, size // 4)).astype(np.uint8)
    masks = classes.repeat(4, axis=1).repeat(4, axis=2)
    pictures = colors[masks]
    masks[:, :2, :2] = 255
    return MaskSource(ImageSource(pictures, name="planted"), masks)


def maps_of(source, encoder=None, arguments=ARGUMENTS):
    dataset = MaskDataset(source, (16, 16), 4)
    return FrozenMaps(encoder or Pooled(), dataset, MEAN, STD, arguments, "planted")


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (300.0, -1000.0)])
def test_what_is_linear_in_the_features_is_found(scale, shift):
    head = train_segmenter(maps_of(planted(), Pooled(scale, shift)), ARGUMENTS)
    row = score_segmenter(head, maps_of(planted(seed=1), Pooled(scale, shift)))
    # edges of squares are blurred by the enlargement
    assert row["pixel_accuracy"] > 85 and row["miou"] > 75
    assert row["miou_interval"][0] < row["miou"] < row["miou_interval"][1]
    assert row["iou"][3] is None and min(row["iou"][:3]) > 70


def test_features_that_are_not_kept_give_the_same_probe(monkeypatch):
    kept = maps_of(planted())
    heads = [train_segmenter(kept, ARGUMENTS)]
    assert kept.kept is not None
    monkeypatch.setattr(segmentation, "_MAX_KEPT", 100)
    anew = maps_of(planted())
    heads.append(train_segmenter(anew, ARGUMENTS))
    assert anew.kept is None
    torch.testing.assert_close(heads[0].classifier.weight, heads[1].classifier.weight, rtol=1e-5, atol=1e-6)
    assert score_segmenter(heads[0], kept) == score_segmenter(heads[1], anew)
    other = train_segmenter(maps_of(planted()), dataclasses.replace(ARGUMENTS, seed=1))
    assert not torch.equal(other.classifier.weight, heads[0].classifier.weight)


def test_logits_are_enlarged_linear_functions_of_standardised_features():
    head = train_segmenter(maps_of(planted()), ARGUMENTS)
    features = torch.cat([features for features, _ in maps_of(planted()).batches()])
    rows = features.flatten(0, 2)
    torch.testing.assert_close(head.mean, rows.mean(0))
    torch.testing.assert_close(head.std, rows.std(0, correction=0))
    weight, bias = head.classifier.weight, head.classifier.bias
    logits = (features[:1] - rows.mean(0)) / rows.std(0, correction=0) @ weight.T + bias
    expected = nn.functional.interpolate(logits.permute(0, 3, 1, 2), (16, 16), mode="bilinear")
    torch.testing.assert_close(head(features[:1]), expected)


def test_pixels_are_counted_by_class():
    mask = torch.tensor([[0, 0, 1], [2, 255, 1]])
    prediction = torch.tensor([[0, 1, 1], [0, 3, 1]])
    counts = confusion(mask, prediction, 4)
    assert counts.tolist() == [[1, 2, 0, 0], [2, 2, 1, 0], [2, 3, 0, 0]]
    np.testing.assert_allclose(ious(counts), [1 / 3, 2 / 3, 0, math.nan])
    assert mean_scores(counts) == (pytest.approx(1 / 3), 3 / 5)


def test_intervals_are_quantiles_over_resampled_images(monkeypatch):
    monkeypatch.setattr(probes, "NUM_RESAMPLES", 4000)
    source = planted(40, seed=2)
    head = train_segmenter(maps_of(planted()), dataclasses.replace(ARGUMENTS, num_probe_epochs=1))
    row = score_segmenter(head, maps_of(source))
    pairs = [(mask, head(features).argmax(1)) for features, mask in maps_of(source).batches()]
    masks, predictions = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    rng, accuracies = np.random.default_rng(5), []
    for _ in range(4000):
        drawn = rng.integers(0, 40, 40)
        counted = masks[drawn] != 255
        accuracies.append((masks[drawn] == predictions[drawn])[counted].float().mean().item())
    expected = 100 * np.quantile(accuracies, (0.025, 0.975))
    assert expected[1] - expected[0] > 0.5
    np.testing.assert_allclose(row["pixel_accuracy_interval"], expected, atol=0.15 * (expected[1] - expected[0]))


@pytest.mark.parametrize("found", [0.0, 0.9])
def test_classes_that_resamples_lose_do_not_move_the_interval(found):
    """Six of eight classes are in one of twelve images each, so that a resample has four of them on average."""
    counts = np.zeros((12, 3, 9))
    counts[:, :2, 0] = np.stack([40 + 5 * np.arange(12), np.full(12, 100)], axis=1)
    counts[:, :2, 1] = np.stack([10 + np.arange(12) % 4, np.full(12, 30)], axis=1)
    rare = np.arange(2, 8)
    counts[rare, 1, rare] = 20
    counts[rare, 0, rare] = 20 * found
    counts[:, 2] = counts[:, 0]
    counts[0, 2, 8] = 7  # said, and nowhere true
    row = score_counts(counts)
    of_rare = row["iou"][2:8]
    assert of_rare == pytest.approx([100 * found] * 6) and row["iou"][8] is None
    assert row["miou"] == pytest.approx(np.mean(row["iou"][:8]))
    (low, high), middle = row["miou_interval"], np.mean(row["miou_interval"])
    assert low < row["miou"] < high and abs(middle - row["miou"]) < 0.1 * (high - low)
    # as wide as if there were the two classes alone that each image has
    common = score_counts(counts[..., :2])["miou_interval"]
    assert high - low == pytest.approx((common[1] - common[0]) * 2 / 8)


def test_patches_of_pixels():
    pixels = images(2, 10, 14)
    found = PixelPatches((5, 4))(pixels).pooler_output
    assert found.shape == (2, 2, 3, 3 * 5 * 4)
    assert torch.equal(found[1, 1, 2], pixels[1, :, 5:10, 8:12].flatten())


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="features are not finite"):
        train_segmenter(maps_of(planted(), Pooled(math.nan)), ARGUMENTS)


@pytest.mark.parametrize("model", [tiny_model(image_size=16), tiny_sjea(image_size=16)])
def test_models_are_set_beside_a_random_encoder_and_pixels(model):
    arguments = dataclasses.replace(ARGUMENTS, num_probe_epochs=1, num_random_encoders=2)
    results, segmenters = evaluate_segmentation(
        model, planted(), planted(4, seed=1), list("abcd"), arguments, MEAN, STD
    )
    labels = [row["encoder"] for row in results["rows"]]
    assert labels[1:] == ["random encoder 1", "random encoder 2", "raw pixels"]
    assert len({json.dumps(row["miou"]) for row in results["rows"]}) > 1
    picture = Image.fromarray(planted(1, seed=1).images.images[0])
    alone = segmenters[0].segment(picture)
    dataset = MaskDataset(planted(1, seed=1), (16, 16), 4)
    features, _ = next(FrozenMaps(segmenters[0].encoder, dataset, MEAN, STD, ARGUMENTS, "one image").batches())
    assert np.array_equal(alone, segmenters[0].head(features)[0].argmax(0).numpy())


def test_pixels_are_not_reduced_for_large_images():
    arguments = dataclasses.replace(ARGUMENTS, num_probe_epochs=1, num_random_encoders=0)
    model = tiny_model(image_size=40, patch_size=8)
    results, segmenters = evaluate_segmentation(model, planted(4), planted(2, seed=1), list("abcd"), arguments)
    assert results["rows"][-1]["encoder"] == "raw pixels"
    assert segmenters[-1].head.classifier.in_features == 3 * 8 * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tmp_path_factory.mktemp("run") / "final"
    tiny_model().save_pretrained(model)
    return model


FEW = ["--num_train_images", "16", "--num_eval_images", "10", "--num_probe_epochs", "1", "--disable_tqdm"]


def test_command_writes_figures_picture_and_maps(folder, tmp_path, capsys):
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 50, 3), dtype=np.uint8))
    photograph.save(tmp_path / "mine.png")
    status = main(["probe", "segmentation", str(folder), *FEW, "--segment", str(tmp_path / "mine.png")])
    said = capsys.readouterr().out
    assert status == 0 and "| target encoder | " in said and "1 map of --segment" in said
    results = json.loads((folder / "segmentation" / "segmentation.json").read_text())
    assert [row["encoder"] for row in results["rows"]] == ["target encoder", "random encoder", "raw pixels"]
    assert f"{results['rows'][0]['miou']:.1f} (" in said and results["num_test_images"] == 10
    with Image.open(folder / "segmentation" / "mine_map.png") as drawn:
        assert drawn.mode == "P" and drawn.size == (50, 20) and np.asarray(drawn).max() <= 12
    with Image.open(folder / "segmentation" / "segmentation.png") as drawn:
        assert min(drawn.size) > 500


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--segment", "no.png"], "--segment no.png is no file"),
        (["--level", "2"], "level=2 is not in this model, which has one level, 0; choose one of its own."),
        (["--num_probe_epochs", "0"], "num_probe_epochs=0 is too small"),
        (["--probe_learning_rate", "0"], "probe_learning_rate=0 must be above 0"),
        (["--output", __file__], "is a file; name a folder"),
    ],
)
def test_wrong_flags_are_one_sentence(folder, capsys, flags, words):
    assert main(["probe", "segmentation", str(folder), *FEW, *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said and "say all" not in said


@pytest.fixture
def nothing_fitted(monkeypatch):
    monkeypatch.setattr("trainers.dense_evaluation.train_segmenter", lambda *_: pytest.fail("a probe was fitted"))


def test_images_that_cannot_be_read_are_refused_before_anything_is_fitted(folder, tmp_path, capsys, nothing_fitted):
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 50, 3), dtype=np.uint8))
    photograph.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    files = [str(tmp_path / name) for name in ("whole.png", "cut.png")]
    status = main(["probe", "segmentation", str(folder), *FEW, "--output", str(tmp_path / "o"), "--segment", *files])
    said = capsys.readouterr().err.strip()
    assert status == 2 and f"Image {files[1]} cannot be read" in said and "\n" not in said


def test_two_images_of_the_same_name_are_refused(folder, tmp_path, capsys, nothing_fitted):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "x.png")
    files = [str(tmp_path / name / "x.png") for name in ("a", "b")]
    status = main(["probe", "segmentation", str(folder), *FEW, "--output", str(tmp_path / "o"), "--segment", *files])
    assert status == 2 and "have the same name" in capsys.readouterr().err


def test_seeded_draws_leave_the_callers_generator_alone():
    before = torch.random.get_rng_state()
    train_segmenter(maps_of(planted(8)), dataclasses.replace(ARGUMENTS, num_probe_epochs=1))
    assert torch.equal(before, torch.random.get_rng_state())
