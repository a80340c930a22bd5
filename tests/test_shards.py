"""Features of a data set that changes: what is there stays only while its rows do."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from test_datasets import make_folder, picture, png
from test_features import contents, load, write
from tiny import tiny_model

from trainers.errors import InputError
from trainers.features import read_manifest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def pets(tmp_path):
    """Eight images: a shard of five, and one of three."""
    return Path(make_folder(tmp_path / "pets", ["cat", "dog"]))


def interrupt(folder, *missing):
    """Makes of a finished folder what an interrupted call leaves."""
    for number in missing:
        (folder / f"train-{number:05d}.parquet").unlink()
    manifest = read_manifest(folder)
    (folder / "features.json").write_text(json.dumps(manifest | {"splits": {}}))


def add_in_front(pets):
    picture(70).save(pets / "cat/-.png")
    (pets / "dog/3.png").unlink()


def replace(pets):
    picture(70).save(pets / "cat/1.png")


def touch(pets):
    status = (pets / "cat/1.png").stat()
    os.utime(pets / "cat/1.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1000))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("change", [add_in_front, replace, touch])
def test_shards_of_other_images_are_refused(model, pets, tmp_path, change, streaming):
    output = tmp_path / "out"
    write(model, str(pets), output, streaming=streaming, shard_size=2)
    interrupt(output, 1, 2, 3)
    before = contents(output)
    change(pets)
    with pytest.raises(InputError, match=r"out holds features of in train-00000\.parquet; remove") as error:
        write(model, str(pets), output, streaming=streaming, shard_size=2)
    assert "\n" not in str(error.value)
    assert {**contents(output), "features.json": b""} == {**before, "features.json": b""}
    (output / "train-00000.parquet").unlink()
    write(model, str(pets), output, streaming=streaming, shard_size=2)
    write(model, str(pets), tmp_path / "fresh", streaming=streaming, shard_size=2)
    assert contents(output) == contents(tmp_path / "fresh")


def test_all_shards_of_other_images_are_named(model, pets, tmp_path):
    write(model, str(pets), tmp_path / "out", shard_size=1)
    for file in pets.glob("*/*.png"):
        picture(70).save(file)
    with pytest.raises(InputError, match=r"00000\.parquet, .*00004\.parquet and 3 more; remove"):
        write(model, str(pets), tmp_path / "out", shard_size=1)


def test_every_process_refuses_shards_of_other_images(model, pets, tmp_path, monkeypatch):
    output = tmp_path / "out"
    write(model, str(pets), output, shard_size=2)
    interrupt(output, 2, 3)
    replace(pets)  # of a shard that the other process made
    second = SimpleNamespace(
        process_index=1, num_processes=2, is_main_process=False, device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr("trainers.features.PartialState", lambda **_: second)
    with pytest.raises(InputError, match=r"in train-00000\.parquet;"):
        write(model, str(pets), output, shard_size=2)
    assert not (output / "train-00003.parquet").exists()


def test_images_behind_those_embedded_may_come(model, pets, tmp_path):
    write(model, str(pets), tmp_path / "out")
    interrupt(tmp_path / "out", 1)
    shard = (tmp_path / "out/train-00000.parquet").stat().st_mtime_ns
    picture(70).save(pets / "dog/9.png")
    # rows are told apart alike whatever the batches
    write(model, str(pets), tmp_path / "out", batch_size=2)
    assert (tmp_path / "out/train-00000.parquet").stat().st_mtime_ns == shard
    assert [Path(path).name for path in load(tmp_path / "out")["train"]["path"][-2:]] == ["3.png", "9.png"]


def test_a_finished_split_of_another_number_of_images_is_refused(model, pets, tmp_path):
    write(model, str(pets), tmp_path / "out")
    before = contents(tmp_path / "out")
    picture(70).save(pets / "dog/9.png")
    with pytest.raises(InputError, match=r"features of 8 images of .*pets \(train\), which has 9 now"):
        write(model, str(pets), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_a_stream_of_another_length_is_refused(model, pets, tmp_path):
    output = tmp_path / "out"
    write(model, str(pets), output, streaming=True)
    picture(70).save(pets / "dog/9.png")
    with pytest.raises(InputError, match=r"in train-00001\.parquet; remove"):
        write(model, str(pets), output, streaming=True)
    (output / "train-00001.parquet").unlink()
    assert write(model, str(pets), output, streaming=True)["splits"]["train"]["num_images"] == 9
    for number in (1, 2, 3, 9):  # the second shard's
        (pets / f"dog/{number}.png").unlink()
    with pytest.raises(InputError, match=r"has changed since .*out was begun"):
        write(model, str(pets), output, streaming=True)


@pytest.mark.parametrize("change", ["label", "image"])
def test_rows_of_tables_are_told_apart(model, tmp_path, change):
    def write_table(changed):
        rows = [{"image": {"bytes": png(picture(number)), "path": None}, "label": number % 2} for number in range(4)]
        if changed == "label":
            rows[1]["label"] = 0
        if changed == "image":
            rows[1]["image"]["bytes"] = png(picture(70))
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
        Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))

    write_table(None)
    write(model, str(tmp_path / "train.parquet"), tmp_path / "out", shard_size=3)
    write_table(change)
    with pytest.raises(InputError, match=r"in train-00000\.parquet;"):
        write(model, str(tmp_path / "train.parquet"), tmp_path / "out", shard_size=3)
