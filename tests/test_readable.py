"""Images that cannot be read are left out before the work begins, counted and listed; too many are refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from datasets import Image as ImageFeature
from PIL import Image
from tiny import tiny_model

from trainers.cli import main
from trainers.datasets import ImageSource, StoredImages
from trainers.errors import InputError
from trainers.evaluation import EvaluationArguments, evaluate_model
from trainers.publishing import save_model
from trainers.readable import allowed_to_skip, readable_positions
from trainers.scenes import render_scenes
from trainers.sources import DataArguments, load_sources
from trainers.transforms import image_processor

QUIET = ["--disable_tqdm", "--num_random_encoders", "0"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save_model(tiny_model(initializer_range=0.05), image_processor((32, 32), [0.5] * 3, [0.25] * 3), folder)
    return str(folder)


def draw(path: Path, number: int):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photos(tmp_path):
    """Two classes: 12 images of each to train on, 4 of each to test on."""
    for split, number in (("train", 12), ("test", 4)):
        for label in "ab":
            for index in range(number):
                draw(tmp_path / "photos" / split / label / f"{index:02d}.png", index)
    return tmp_path / "photos"


def break_train_and_test(photos) -> list[Path]:
    """Half a file, an empty one, and one of text; the last is a test image."""
    half, empty, text = (photos / name for name in ("train/a/03.png", "train/b/05.png", "test/b/01.png"))
    half.write_bytes(half.read_bytes()[:600])
    empty.write_bytes(b"")
    text.write_text("no image")
    return [half, empty, text]


def listed(skipped: list[dict]) -> list[tuple]:
    return [(entry["dataset"].rpartition("/")[2], entry["index"], Path(entry["path"])) for entry in skipped]


@pytest.mark.parametrize(("num_images", "number"), [(1, 10), (1099, 10), (1100, 11), (5000, 50)])
def test_ten_may_be_left_out_and_a_share_of_many(num_images, number):
    assert allowed_to_skip(num_images, 0.01) == number
    assert allowed_to_skip(num_images, 0) == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_broken_is_found_by_position_and_told_by_row(photos, capsys, num_workers):
    half, empty, _ = break_train_and_test(photos)
    train, _ = load_sources(DataArguments(dataset=str(photos)))
    some = train.take(np.arange(2, 24))
    kept, skipped = readable_positions(some, num_workers)
    assert kept.tolist() == [position for position in range(22) if position not in (1, 15)]
    assert listed(skipped) == [("photos (train)", 3, half), ("photos (train)", 17, empty)]
    assert "truncated" in skipped[0]["reason"] and skipped[1]["reason"] == "not an image"
    said, bar = capsys.readouterr()
    assert f"2 of 22 images of {photos} (train) cannot be read and are left out: {half}: " in said
    assert "checking images" in bar
    assert readable_positions(some, num_workers, progress=False) and "checking" not in capsys.readouterr().err


def test_processes_share_the_decoding_and_know_what_all_found(photos, monkeypatch, capsys):
    break_train_and_test(photos)
    train, _ = load_sources(DataArguments(dataset=str(photos)))
    states = [SimpleNamespace(process_index=rank, num_processes=2, is_main_process=rank == 0) for rank in (0, 1)]
    shares = []
    monkeypatch.setattr("trainers.readable.gather_object", lambda found: shares.append(found) or [])
    for state in states:
        readable_positions(train.take(np.arange(2, 24)), state=state)
    assert [[position for position, _ in share] for share in shares] == [[], [1, 15]]
    assert capsys.readouterr().err.count("11/11") == 1  # the bar of the first one
    monkeypatch.setattr("trainers.readable.gather_object", lambda found: shares[0] + shares[1])
    for state, times_said in zip(states, (1, 0), strict=True):
        kept, skipped = readable_positions(train.take(np.arange(2, 24)), state=state)
        assert len(kept) == 20 and [entry["index"] for entry in skipped] == [3, 17]
        assert capsys.readouterr().out.count("left out") == times_said


def test_images_without_a_file_are_told_by_their_row():
    rows = [{"bytes": b"x", "path": None}, None, {"bytes": None, "path": None}] * 10
    source = ImageSource(StoredImages(pa.chunked_array([pa.array(rows, ImageFeature().pa_type)])))
    with pytest.raises(InputError, match=r"30 of 30 images of .* \(number 0: not an image; number 1: missing; "):
        readable_positions(source, progress=False)


def test_pixels_are_not_checked(capsys):
    kept, skipped = readable_positions(ImageSource(render_scenes(5, 0, 16)["image"]))
    assert kept.tolist() == [0, 1, 2, 3, 4] and skipped == [] and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("number", "num_broken", "allowed"), [(40, 11, 10), (3, 3, 2)])
def test_too_many_are_refused_with_their_number_and_the_first(tmp_path, number, num_broken, allowed):
    files = [tmp_path / f"{index:02d}.png" for index in range(number)]
    for index, file in enumerate(files):
        draw(file, index)
    for file in files[:num_broken]:
        file.write_text("no image")
    source = ImageSource(StoredImages.of_files(files), name="photos")
    with pytest.raises(InputError) as caught:
        readable_positions(source, progress=False)
    assert f"{num_broken} of {number} images of photos cannot be read ({files[0]}: not an image; " in str(caught.value)
    assert f"up to {allowed} would be left out" in str(caught.value)
    one_less = source.take(np.arange(1, number)) if number > num_broken else None
    assert one_less is None or len(readable_positions(one_less, progress=False)[1]) == allowed


def evaluate(encoder, photos, output, *flags) -> dict:
    assert main(["evaluate", encoder, "--dataset", str(photos), "--output", str(output), *QUIET, *flags]) == 0
    return json.loads(output.read_text())


def test_evaluation_is_that_of_the_readable_images(encoder, photos, tmp_path, capsys):
    broken = break_train_and_test(photos)
    without = evaluate(encoder, photos, tmp_path / "results.json")
    assert listed(without["skipped"]) == [
        ("photos (train)", 3, broken[0]), ("photos (train)", 17, broken[1]), ("photos (test)", 5, broken[2])
    ]  # fmt: skip
    assert "1 of 8 images" in capsys.readouterr().out
    assert (without["num_train_images"], without["num_test_images"]) == (22, 7)
    for path in broken:
        path.unlink()
    assert evaluate(encoder, photos, tmp_path / "results.json") == without | {"skipped": []}


def test_a_suite_is_of_the_readable_images(encoder, photos, tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr("trainers.suite.probe_features", lambda features, *sources, **_: sizes.append([
        *map(len, sources[:2]), *map(len, features.embeddings[next(iter(features.embeddings))])
    ]) or [])  # fmt: skip
    break_train_and_test(photos)
    results = evaluate(encoder, photos, tmp_path / "results.json", "--suite", "small")
    assert len(results["skipped"]) == 3 and (results["num_train_images"], results["num_test_images"]) == (22, 7)
    assert sizes and all(size == [22, 7, 22, 7] for size in sizes)


def test_only_images_that_are_used_are_checked(encoder, photos, capsys):
    train, test = load_sources(DataArguments(dataset=str(photos)))
    for path in (photos / "train").glob("*/*.png"):
        path.write_text("no image")
    for index in (0, 1, 12, 13):
        draw(Path(train.images.place(index)["path"]), index)
    arguments = EvaluationArguments(num_random_encoders=0, disable_tqdm=True)
    results = evaluate_model(encoder, train.take(np.array([0, 1, 12, 13])), test, arguments)
    assert results["skipped"] == [] and results["num_train_images"] == 4


def test_a_class_that_loses_its_images_is_told(encoder, photos):
    for path in sorted((photos / "train" / "b").iterdir())[1:]:
        path.unlink()
    (photos / "train" / "b" / "00.png").write_bytes(b"")
    train, test = load_sources(DataArguments(dataset=str(photos)))
    with pytest.raises(InputError, match=r"no image of .* has \(b\)"):
        evaluate_model(encoder, train, test, EvaluationArguments(disable_tqdm=True))


def test_fine_tuning_lists_what_it_left_out(encoder, photos, tmp_path):
    broken = break_train_and_test(photos)
    flags = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm"]
    command = ["finetune", encoder, "--dataset", str(photos), "--output_dir", str(tmp_path / "run"), *flags]
    assert main(command) == 0
    lines = (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    assert listed(map(json.loads, lines)) == [
        ("photos (train)", 3, broken[0]), ("photos (train)", 17, broken[1]), ("photos (test)", 5, broken[2])
    ]  # fmt: skip
    facts = json.loads((tmp_path / "run" / "final" / "results.json").read_text())
    assert facts["data"]["num_skipped_images"] == 3 and facts["evaluation"]["num_test_images"] == 7
    assert facts["data"]["num_train_images"] + facts["data"]["num_held_out_images"] == 22


def test_segmentation_leaves_out_pairs_whose_image_or_mask_is_broken(encoder, tmp_path, capsys):
    data = tmp_path / "data"
    for split in ("train", "val"):
        for index in range(6):
            draw(data / "images" / split / f"{index}.png", index)
            mask = np.full((32, 32), index % 3, np.uint8)
            (data / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(data / "annotations" / split / f"{index}.png")
    image, mask = data / "images" / "train" / "1.png", data / "annotations" / "val" / "4.png"
    for path in (image, mask):
        path.write_bytes(path.read_bytes()[:50])
    flags = ["--dataset", str(data), "--output", str(tmp_path / "maps"), "--num_probe_epochs", "1", *QUIET]
    assert main(["probe", "segmentation", encoder, *flags]) == 0
    results = json.loads((tmp_path / "maps" / "segmentation.json").read_text())
    assert (results["num_train_images"], results["num_test_images"]) == (5, 5)
    assert [(entry["index"], Path(entry["path"])) for entry in results["skipped"]] == [(1, image), (4, mask)]
    assert results["skipped"][1]["dataset"] == f"the masks of {data} (val)"
    assert "1 of 6 images of the masks of" in capsys.readouterr().out
