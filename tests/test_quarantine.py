"""Images that cannot be read while training: replaced, listed once, alike for any number of processes and workers."""

import io
import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from test_trainer import WORKER
from tiny import tiny_model
from training_worker import TRAINING, train

from trainers.datasets import ImageDataset, ImageSource, StoredImages, sample_seed
from trainers.decoding import read_image
from trainers.errors import InputError
from trainers.quarantine import Quarantine
from trainers.trainer_cjepa import CJepaTrainer
from trainers.training_args import CJepaTrainingArguments
from trainers.transforms import train_transform

NUM = 24


def picture(number: int) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def bomb() -> bytes:
    """A PNG whose header promises 20,000 x 20,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(100))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """24 files, of which four cannot be read, and three are unusual."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(NUM):
        picture(number).save(folder / f"{number:02d}.jpg", quality=95)
    whole = (folder / "03.jpg").read_bytes()
    (folder / "03.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "04.jpg").write_bytes(b"")
    (folder / "10.jpg").write_text("this is a text")
    (folder / "23.jpg").write_bytes(bomb())
    picture(7).save(folder / "07.jpg", format="PNG")
    picture(8).convert("CMYK").save(folder / "08.jpg")
    Image.fromarray(np.arange(1440, dtype=np.uint16).reshape(40, 36) * 45).save(folder / "09.jpg", format="PNG")
    return folder


BROKEN = {"03.jpg": "truncated", "04.jpg": "not an image", "10.jpg": "not an image", "23.jpg": "decompression bomb"}
# the image that is read in the place of each
INSTEAD = {3: 5, 4: 5, 10: 11, 23: 0}


def trainer_on(source: ImageSource, output: Path, **training) -> CJepaTrainer:
    defaults = TRAINING | {"per_device_train_batch_size": 8, "max_steps": 3}
    args = CJepaTrainingArguments(str(output), **defaults | training)
    dataset = ImageDataset(source, train_transform((32, 32)), seed=5)
    return CJepaTrainer(tiny_model(), args, train_dataset=dataset)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def listed(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_image_is_cropped_in_the_place_of_one_that_is_not(photos, tmp_path, workers):
    files = sorted(photos.glob("*.jpg"))
    trainer = trainer_on(ImageSource(StoredImages.of_files(files)), tmp_path, dataloader_num_workers=workers)
    trainer.train_data = trainer.make_train_data()
    order = trainer.train_data.batches(0, 8, 0, 1)
    for batch, places, _ in zip(trainer.get_train_dataloader(), order, range(3), strict=False):
        for (epoch, index), pixels, sample_id in zip(places, batch["pixel_values"], batch["sample_ids"], strict=True):
            read = INSTEAD.get(index, index)
            assert sample_id == {"index": read, "file": str(files[read])}
            torch.manual_seed(sample_seed(5, epoch, index))
            assert torch.equal(pixels, train_transform((32, 32))(read_image(files[read])))


def test_all_that_cannot_be_read_is_listed_once(photos, tmp_path):
    files = sorted(photos.glob("*.jpg"))
    trainer = trainer_on(ImageSource(StoredImages.of_files(files), name="photos"), tmp_path, max_steps=7)
    trainer.train()
    entries = listed(tmp_path)
    assert entries == trainer.quarantine.entries
    assert sorted((Path(entry["file"]).name, entry["offset"]) for entry in entries) == [
        ("03.jpg", 3), ("04.jpg", 4), ("10.jpg", 10), ("23.jpg", 23)
    ]  # fmt: skip
    for entry in entries:
        assert entry["dataset"] == "photos" and BROKEN[Path(entry["file"]).name] in entry["reason"]


def test_rows_without_an_image_are_listed_by_their_number(tmp_path):
    def stored(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    rows = [stored(picture(number)) for number in range(10)]
    rows[2], rows[6] = None, {"bytes": b"", "path": None}
    column = pa.chunked_array([pa.array(rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))])
    images = StoredImages(column, np.arange(2, 10))
    trainer = trainer_on(ImageSource(images, name="table"), tmp_path)
    trainer.train()
    reasons = {entry["offset"]: (entry["file"], entry["reason"]) for entry in listed(tmp_path)}
    assert reasons == {2: (None, "missing"), 6: (None, "not an image")}
    assert "number 2: missing" in trainer.quarantine.summary()


def test_nothing_readable_at_all_is_said(tmp_path):
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(b"")
    source = ImageSource(StoredImages.of_files(sorted(tmp_path.glob("*.png"))), name="photos")
    with pytest.raises(InputError, match="None of the 8 images of photos can be read"):
        trainer_on(source, tmp_path / "run").train()


class OneProcess:
    is_main_process, num_processes, device = True, 1, torch.device("cpu")


def entry(number: int) -> dict:
    return {"dataset": "a", "file": None, "offset": number, "reason": "why"}


def test_a_share_of_the_images_seen_may_be_unreadable(tmp_path):
    quarantine = Quarantine(tmp_path, OneProcess, 0.01)
    quarantine.begin(None)
    quarantine.add([entry(number) for number in range(10)])
    quarantine.collect(16)  # ten of however few
    quarantine.add([entry(number) for number in range(11)])
    with pytest.raises(
        InputError, match=r"11 images .*number 0: why; number 1: why; number 2: why; \.\.\..* 10 would"
    ):
        quarantine.collect(1099)
    quarantine.begin(None)
    quarantine.add([entry(number) for number in range(11)])
    quarantine.collect(1100)


def test_a_share_of_none_allows_none(tmp_path):
    quarantine = Quarantine(tmp_path, OneProcess, 0)
    quarantine.begin(None)
    quarantine.collect(5000)
    quarantine.add([entry(0)])
    with pytest.raises(
        InputError, match=r"1 image cannot be read \(number 0: why; .* of 5,000 seen, and up to 0 would"
    ):
        quarantine.collect(5000)


def test_the_list_is_in_the_folder_that_a_run_goes_on_in(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    begun = Quarantine(old, OneProcess, 1)
    begun.add([entry(0), entry(1)])
    begun.collect(100)
    moved = Quarantine(new, OneProcess, 1)
    moved.begin(str(old / "checkpoint-3"))
    assert listed(new) == listed(old) == [entry(0), entry(1)]
    # what another run has left there is not this run's
    moved.begin(str(tmp_path / "whole" / "checkpoint-3"))
    assert not (new / "quarantine.jsonl").exists()


def test_the_list_is_read_back_on_resuming_and_begun_anew_else(photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    training = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 20,
                "data": {"dataset": str(tmp_path / "photos")}}  # fmt: skip
    train(str(tmp_path / "run"), training)
    before = listed(tmp_path / "run")
    assert [Path(entry["file"]).name for entry in before] == ["03.jpg", "23.jpg", "10.jpg"]  # 04 is held out
    for name in BROKEN:  # readable from now on
        picture(0).save(tmp_path / "photos" / name)
    train(str(tmp_path / "run"), training | {"max_steps": 4}, resume=True)
    assert listed(tmp_path / "run") == before
    train(str(tmp_path / "run"), training | {"save_strategy": "no"})
    assert not (tmp_path / "run" / "quarantine.jsonl").exists()


def test_two_processes_list_what_both_have_found_and_stop_together(photos, tmp_path):
    training = {"max_steps": 3, "per_device_train_batch_size": 4, "data": {"dataset": str(photos)}}
    many = tmp_path / "many"
    many.mkdir()
    for number in range(48):
        picture(number).save(many / f"{number:02d}.png")
        if number % 2:
            (many / f"{number:02d}.png").write_bytes(b"")
    train(str(tmp_path / "one"), training | {"per_device_train_batch_size": 8})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

    def launch(runs):
        command = [*launcher, str(WORKER), str(tmp_path), json.dumps(runs)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    result = launch({"two": training})
    assert result.returncode == 0, result.stderr[-3000:]

    def files(name):
        return sorted(Path(entry["file"]).name for entry in listed(tmp_path / name))

    assert files("two") == files("one") and len(files("one")) >= 3
    result = launch({"too many": training | {"max_steps": 9, "data": {"dataset": str(many)}}})
    # each process says so itself: none is left waiting and killed
    assert result.returncode != 0 and result.stderr.count("InputError: 1") == 2, result.stderr[-3000:]
