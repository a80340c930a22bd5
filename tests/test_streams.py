"""Streams of shards: each image once a pass, the same from any position and for any number of processes."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_pretraining import fails_in_one_sentence, pretrain
from test_trainer import WORKER
from tiny import sjea_level
from training_worker import build_trainer, seen, train

from trainers import streams
from trainers.datasets import sample_seed, seeded
from trainers.errors import InputError
from trainers.lanes import choose_lanes, uneven_lanes
from trainers.objectives import OBJECTIVES
from trainers.stream_sources import PretrainDataArguments, load_stream
from trainers.streams import StreamedImages, StreamedTrainData
from trainers.tables import load_tables
from trainers.tars import check_tars
from trainers.transforms import train_transform

pytestmark = pytest.mark.usefixtures("few_penalties")

EQUAL, UNEQUAL = [6] * 8, [5, 9, 2, 7, 1, 8, 4, 6]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def png(shard: int, row: int) -> bytes:
    """A picture of noise whose first pixel tells its place."""
    pixels = np.random.default_rng((shard, row)).integers(0, 256, (40, 36, 3), dtype=np.uint8)
    pixels[0, 0] = shard * 20, row * 6, 90
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_parquet(folder: Path, lengths: list[int], split: str = "train", broken=()) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for shard, length in enumerate(lengths):
        rows = [{"bytes": b"" if (shard, row) in broken else png(shard, row), "path": None} for row in range(length)]
        table = pa.table({"image": rows, "label": [row % 2 for row in range(length)]})
        pq.write_table(table, folder / f"{split}-{shard:05d}.parquet", row_group_size=4)
    return str(folder)


def write_tars(folder: Path, lengths: list[int]) -> str:
    folder.mkdir(parents=True)
    for shard, length in enumerate(lengths):
        with tarfile.open(folder / f"train-{shard:05d}.tar", "w") as tar:
            for row in range(length):
                for suffix, data in (("png", png(shard, row)), ("cls", str(row % 2).encode())):
                    info = tarfile.TarInfo(f"{row:04d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder)


WRITERS = {"parquet": write_parquet, "tars": write_tars}


def train_data(folder: str, buffer: int = 12, num_ranks: int = 1, shard_rows=None, num_lanes=None, seed=7):
    shards = load_stream(PretrainDataArguments(dataset=folder, streaming=True)).shards
    shards.shard_rows = {}  # as it is where only reading tells
    images = StreamedImages(shards, train_transform((32, 32)), buffer)
    return StreamedTrainData(images, seed, num_ranks, num_lanes, shard_rows)


def places(data, start: int, batch_size: int, num: int, rank: int = 0, num_ranks: int = 1) -> list[tuple]:
    """Position, shard and row of so many batches; that a row is what it says is checked by its colour."""
    found = []
    for batch in islice(data.batches(start, batch_size, rank, num_ranks), num):
        for position, row in batch:
            colour = Image.open(io.BytesIO(row.image["bytes"])).getpixel((0, 0))
            assert colour == (row.shard * 20, row.offset * 6, 90)
            found.append((position, row.shard, row.offset))
    return found


@pytest.mark.parametrize("kind", WRITERS)
def test_each_image_is_read_once_a_pass(tmp_path, kind):
    data = train_data(WRITERS[kind](tmp_path / kind, EQUAL))
    rows = [place[1:] for place in places(data, 0, 12, 12)]
    whole = sorted((shard, row) for shard in range(8) for row in range(6))
    passes = [rows[start : start + 48] for start in (0, 48, 96)]
    assert all(sorted(part) == whole for part in passes)
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("kind", WRITERS)
def test_each_lane_reads_its_images_once_a_pass_of_its_own(tmp_path, kind):
    data = train_data(WRITERS[kind](tmp_path / kind, UNEQUAL), num_lanes=4)
    rows = places(data, 0, 4, 60)
    for lane in range(4):
        mine = [place[1:] for place in rows if place[0] % 4 == lane]
        whole = sorted((shard, row) for shard in (lane, lane + 4) for row in range(UNEQUAL[shard]))
        assert len(mine) == 60
        for start in range(0, 60 - len(whole) + 1, len(whole)):
            assert sorted(mine[start : start + len(whole)]) == whole


@pytest.mark.parametrize("kind", WRITERS)
def test_the_position_alone_tells_what_comes_next(tmp_path, kind):
    folder = WRITERS[kind](tmp_path / kind, UNEQUAL)
    whole = places(train_data(folder, num_lanes=4), 0, 4, 60)
    data = train_data(folder, num_lanes=4)
    places(data, 0, 4, 60)  # which has learned how long the shards are
    for start in (4, 8, 28, 60, 104, 200):
        for shard_rows in (None, {0: 5, 4: 1}, data.shard_rows):
            again = train_data(folder, num_lanes=4, shard_rows=shard_rows)
            assert places(again, start, 4, 10) == whole[start : start + 40]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_processes_share_the_lanes(tmp_path, num_ranks):
    folder = write_parquet(tmp_path / "parquet", UNEQUAL)
    whole = places(train_data(folder, num_lanes=4), 0, 8, 12)
    parts = []
    for rank in range(num_ranks):
        data = train_data(folder, num_ranks=num_ranks, num_lanes=4)
        part = places(data, 0, 8 // num_ranks, 12, rank, num_ranks)
        assert {shard % 4 for _, shard, _ in part} == set(range(rank, 4, num_ranks))
        parts += part
    assert sorted(parts) == whole


def test_no_shard_behind_the_position_is_read_again(tmp_path, monkeypatch):
    folder = write_parquet(tmp_path / "parquet", [6] * 12)
    data = train_data(folder, buffer=8, num_lanes=4)
    ahead = places(data, 0, 8, 16)
    opened = []
    batches = streams.Shards._batches
    monkeypatch.setattr(
        streams.Shards, "_batches", lambda self, shard: (opened.append(shard), batches(self, shard))[1]
    )
    again = train_data(folder, buffer=8, num_lanes=4, shard_rows=data.shard_rows)
    # each lane is in its third shard: row 14 of 18
    assert places(again, 56, 4, 1) == ahead[56:60]
    assert len(opened) == 4 and sorted(shard % 4 for shard in opened) == [0, 1, 2, 3]


def test_rows_are_shuffled_within_windows_of_the_buffer(tmp_path):
    data = train_data(write_parquet(tmp_path / "parquet", [40]), buffer=10)
    offsets = [offset for _, _, offset in places(data, 0, 40, 1)]
    assert offsets != sorted(offsets)
    windows = [offsets[start : start + 10] for start in range(0, 40, 10)]
    assert [sorted(window) for window in windows] == [list(range(start, start + 10)) for start in range(0, 40, 10)]
    # each in an order of its own
    assert len({tuple(offset % 10 for offset in window) for window in windows}) == 4


def test_empty_shards_are_passed_over_and_an_empty_lane_is_said(tmp_path):
    """As the footers of parquet files tell; an empty tar has no columns."""
    folder = write_parquet(tmp_path / "parquet", [3, 0, 4])
    shard_rows = load_stream(PretrainDataArguments(dataset=folder, streaming=True)).shards.shard_rows
    data = train_data(folder, num_lanes=1, shard_rows=shard_rows)
    assert Counter(place[1] for place in places(data, 0, 7, 2)) == {0: 6, 2: 8}
    with pytest.raises(InputError, match="Shards 1 .from 0. hold no image"):
        places(train_data(folder, num_lanes=3, shard_rows=shard_rows), 0, 3, 1)


@pytest.mark.parametrize(
    ("num_shards", "num_ranks", "lanes"),
    [(1024, 1, 16), (1024, 8, 16), (17, 1, 17), (17, 2, 2), (100, 1, 20), (8, 2, 8), (6, 4, 4), (96, 96, 96)],
)
def test_lanes_deal_the_shards_evenly(num_shards, num_ranks, lanes):
    assert choose_lanes(num_shards, num_ranks) == lanes


def test_lanes_of_unequal_length_are_told():
    assert uneven_lanes(16, 8, {}) is None and uneven_lanes(4, 2, {0: 10, 1: 9, 2: 10, 3: 10}) is None
    said = uneven_lanes(9, 4, {})
    assert "9 shards make 4 lanes" in said and "1.5 times as often" in said and "a multiple of 4" in said
    assert "2.0 times" in uneven_lanes(2, 2, {0: 10, 1: 20})


def test_processes_that_cannot_share_are_told_which_can(tmp_path):
    folder = write_parquet(tmp_path / "parquet", EQUAL)
    with pytest.raises(InputError, match="has 8 shards, fewer than the 9 processes"):
        train_data(folder, num_ranks=9)
    with pytest.raises(InputError, match="8 lanes, which 3 processes cannot share evenly; go on with 1, 2, 4, 8 proc"):
        train_data(folder, num_ranks=3, num_lanes=8)


def test_an_unreadable_image_is_replaced_by_the_next_one_whatever_the_batch(tmp_path):
    broken = {(0, 2), (1, 0), (1, 3), (2, 0), (2, 1)}
    shards = [(0, row) for row in range(4)] + [(1, row) for row in range(4)] + [(2, 0), (2, 1)]
    data = train_data(write_parquet(tmp_path / "parquet", [4, 4, 2], broken=broken), buffer=4, num_lanes=1)
    for batch_size, rank, num_ranks in ((10, 0, 1), (1, 0, 1), (4, 1, 2)):
        batches = islice(data.batches(0, batch_size, rank, num_ranks), 2)
        for batch in batches:
            for (position, row), sample in zip(batch, data.decoder.__getitems__(batch), strict=True):
                own = shards.index((row.shard, row.offset))
                place = next(place for place in (shards + shards)[own:] if place not in broken)
                with seeded(sample_seed(7, 2, position)):
                    expected = train_transform((32, 32))(Image.open(io.BytesIO(png(*place))))
                assert torch.equal(sample.item["pixel_values"], expected)
                assert (sample.sample_id["shard"], sample.sample_id["offset"]) == place
                found = [(Path(entry["file"]).name, entry["offset"], entry["reason"]) for entry in sample.unreadable]
                told = (f"train-0000{row.shard}.parquet", row.offset, "not an image")
                assert found == ([told] if (row.shard, row.offset) in broken else [])


def test_a_stream_without_a_readable_image_is_said(tmp_path):
    data = train_data(write_parquet(tmp_path / "parquet", [2, 1], broken={(0, 0), (0, 1), (1, 0)}))
    (batch,) = islice(data.batches(0, 2, 0, 1), 1)
    with pytest.raises(InputError, match=r"None of the images of .*train-0000\d.parquet: not an image"):
        data.decoder.__getitems__(batch)


@pytest.mark.parametrize("damage", ["cut in an image", "cut in a header", "another header"])
@pytest.mark.parametrize("streaming", [True, False])
def test_a_tar_that_ends_too_soon_is_refused(tmp_path, damage, streaming):
    """Its readers end there without a word."""
    folder = write_tars(tmp_path / "tars", [6, 6])
    file = tmp_path / "tars" / "train-00001.tar"
    with tarfile.open(file) as tar:
        member = tar.getmembers()[6]
    data = bytearray(file.read_bytes())
    if damage == "another header":
        data[member.offset + 10 : member.offset + 40] = b"x" * 30
    else:
        del data[(member.offset_data if damage == "cut in an image" else member.offset) + 100 :]
    check_tars([str(file)])
    file.write_bytes(data)
    arguments = PretrainDataArguments(dataset=folder, streaming=streaming)
    with pytest.raises(InputError, match=r"train-00001.tar is no whole tar \(.*\); repair or remove it"):
        load_stream(arguments) if streaming else load_tables(arguments)


def test_a_tar_without_its_last_blocks_is_whole(tmp_path):
    write_tars(tmp_path / "tars", [3])
    file = tmp_path / "tars" / "train-00000.tar"
    with tarfile.open(file) as tar:
        last = tar.getmembers()[-1]
    file.write_bytes(file.read_bytes()[: last.offset_data + 512])
    check_tars([str(file)])


@pytest.mark.parametrize("error", [EOFError("ends"), tarfile.ReadError("ends"), zlib.error("ends"), OSError("ends")])
def test_a_shard_that_cannot_be_read_on_is_said(tmp_path, monkeypatch, error):
    shards = load_stream(
        PretrainDataArguments(dataset=write_parquet(tmp_path / "parquet", [6]), streaming=True)
    ).shards

    def ends(self, batch_size):
        raise error

    monkeypatch.setattr("datasets.IterableDataset.iter", ends)
    with pytest.raises(
        InputError, match=r"train-00000.parquet cannot be read \(ends\); repair it, or check the network"
    ):
        next(shards.read(0, 0, lambda shard, number: None))


def test_two_views_are_made_of_a_stream(tmp_path):
    folder = write_parquet(tmp_path / "parquet", EQUAL)
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "dataloader_num_workers": 2}
    trainer = build_trainer(
        str(tmp_path / "run"), training, {"levels": [sjea_level()]}, {"dataset": folder, "streaming": True}
    )
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["pixel_values"].shape == (8, 2, 3, 32, 32)
    assert not torch.equal(batch["pixel_values"][:, 0], batch["pixel_values"][:, 1])


def launch(num_processes: int, folder: Path, run: dict) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [*launcher, str(WORKER), str(folder), json.dumps({"run": run})]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_and_gone_on_with_by_others_each_image_is_read_once_a_pass(tmp_path):
    """Two processes are killed, four and then one go on, in steps of 16 of 48 images."""
    training = {"save_strategy": "steps", "save_steps": 2, "data": {
        "dataset": write_tars(tmp_path / "tars", EQUAL), "streaming": True, "shuffle_buffer": 16}}  # fmt: skip
    run = tmp_path / "run"

    def read_up_to(step):
        rows = seen(run, step)
        for path in run.glob("seen-*"):
            path.unlink()
        return rows

    process = launch(2, tmp_path, training | {"per_device_train_batch_size": 8, "max_steps": 200})
    while not (run / "checkpoint-4" / "progress.json").exists():
        assert process.poll() is None, process.stderr.read()[-3000:]
        time.sleep(0.05)
    for killed in (*psutil.Process(process.pid).children(recursive=True), process):
        killed.kill()
    process.wait(60)
    checkpoints = {int(path.name.split("-")[1]): path for path in run.glob("checkpoint-*")}
    step = max(step for step, path in checkpoints.items() if (path / "progress.json").exists())
    for number, path in checkpoints.items():
        if number > step:  # half written
            shutil.rmtree(path)
    progress = json.loads((checkpoints[step] / "progress.json").read_text())
    assert progress["shard_rows"] == {str(shard): 6 for shard in range(8)}  # what either process has learned
    rows = read_up_to(step)
    assert 4 <= step < 200 and len(rows) == step * 16
    resumed = {"per_device_train_batch_size": 4, "max_steps": step + 2, "resume": True}
    process = launch(4, tmp_path, training | resumed)
    assert process.wait(300) == 0, process.stderr.read()[-3000:]
    rows += read_up_to(step + 2)
    train(str(run), training | {"per_device_train_batch_size": 16, "max_steps": step + 5}, resume=True)
    rows += read_up_to(step + 5)
    whole = sorted((shard, row) for shard in range(8) for row in range(6))
    num_passes = len(rows) // 48
    assert len(rows) == (step + 5) * 16
    assert all(sorted(rows[number * 48 : number * 48 + 48]) == whole for number in range(num_passes))
    data = train_data(training["data"]["dataset"], buffer=16, seed=42)
    assert rows == [place[1:] for place in places(data, 0, 16, step + 5)]


def test_a_resumed_stream_is_the_one_it_was(tmp_path):
    folder = tmp_path / "parquet"
    training = {"max_steps": 2, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 2,
                "data": {"dataset": write_parquet(folder, EQUAL), "streaming": True}}  # fmt: skip
    train(str(tmp_path / "run"), training)
    progress = json.loads((tmp_path / "run" / "checkpoint-2" / "progress.json").read_text())
    assert progress["num_lanes"] == 8 and progress["shard_rows"] == {str(shard): 6 for shard in range(8)}
    other = training | {"max_steps": 3, "data": training["data"] | {"shuffle_buffer": 9}}
    with pytest.raises(InputError, match="other train images .*shuffled by 4096.*shuffled by 9"):
        train(str(tmp_path / "run"), other, resume=True)
    write_parquet(folder, [6] * 7 + [5])
    with pytest.raises(InputError, match="other train images"):
        train(str(tmp_path / "run"), training | {"max_steps": 3}, resume=True)


def test_a_streamed_run_is_evaluated_on_its_labels(tmp_path, capsys):
    folder = write_parquet(tmp_path / "parquet", EQUAL)
    write_parquet(tmp_path / "parquet", [9, 9], "test")
    flags = ["--dataset", folder, "--streaming", "--num_train_images", "null", "--max_steps", "-1",
             "--num_train_epochs", "1", "--num_probe_images", "40", "--num_eval_images", "16"]  # fmt: skip
    assert pretrain(tmp_path / "run", *flags) == 0
    facts = json.loads((tmp_path / "run" / "final" / "results.json").read_text())
    assert facts["training"]["images_seen"] == 48 and facts["data"]["num_train_images"] == 48
    assert facts["evaluation"]["num_train_images"] == 40 and facts["evaluation"]["num_test_images"] == 16
    assert "not evaluated" not in capsys.readouterr().out


def test_streams_that_cannot_be_evaluated_or_counted_say_so(tmp_path, capsys):
    tars = ["--dataset", write_tars(tmp_path / "tars", EQUAL), "--streaming", "--num_train_images", "null"]
    assert pretrain(tmp_path / "run", *tars, "--max_steps", "4") == 0
    assert "not evaluated: " in (said := capsys.readouterr().out) and "no split to evaluate on" in said
    facts = json.loads((tmp_path / "run" / "final" / "results.json").read_text())
    assert facts["data"]["num_train_images"] is None and facts["training"]["images_seen"] == 64
    status = pretrain(tmp_path / "b", *tars, "--max_steps", "-1", "--num_train_epochs", "2")
    fails_in_one_sentence(capsys, status, "does not tell how many images it has", "--max_steps")
    status = pretrain(tmp_path / "c", *tars, "--save_strategy", "epoch")
    fails_in_one_sentence(capsys, status, "save_strategy=epoch", "choose steps")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_train_images", "8"], ["num_train_images=8", "read whole"]),
        (["--shuffle_buffer", "0"], ["shuffle_buffer=0", "1 or more"]),
        (["--dataset", "scenes"], ["scenes", "--streaming"]),
        (["--dataset", "{folder}"], ["folder of image files", "--streaming"]),
    ],
)
def test_what_cannot_be_streamed_is_one_sentence(tmp_path, capsys, flags, words):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos" / "a.png")
    flags = [flag.format(folder=tmp_path / "photos") for flag in flags]
    status = pretrain(tmp_path / "run", "--num_train_images", "null", "--streaming", *flags)
    fails_in_one_sentence(capsys, status, *words)


def test_both_objectives_can_stream():
    assert all({"streaming", "shuffle_buffer"} <= vars(each.data_class()).keys() for each in OBJECTIVES.values())


def test_a_stream_of_unknown_length_can_be_stopped(tmp_path, capsys):
    tars = ["--dataset", write_tars(tmp_path / "tars", EQUAL), "--streaming", "--num_train_images", "null"]
    status = pretrain(tmp_path / "run", *tars, "--max_steps", "6", "--max_hours", "1e-7")
    assert status == 0 and "stopped by --max_hours 1e-07 at step 1 of 6; saved checkpoint-1" in capsys.readouterr().out


def test_nothing_is_held_out_of_a_stream(tmp_path):
    arguments = PretrainDataArguments(dataset=write_parquet(tmp_path, EQUAL), streaming=True, eval_split="train")
    with pytest.raises(InputError, match="eval_split='train' is the train split, and nothing is held out of a stream"):
        load_stream(arguments)
