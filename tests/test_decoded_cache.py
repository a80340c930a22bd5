"""The cache of decoded images: its pixels, what is read of it, when it is made anew, and what is refused."""

import dataclasses
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny import FLAGS

from trainers import decoded_cache
from trainers.cli import main
from trainers.datasets import ImageDataset, ImageSource, StoredImages, sample_seed, seeded
from trainers.decoded_cache import with_cache
from trainers.decoding import Box, DecodedImage
from trainers.errors import InputError
from trainers.sources import DataArguments, load_sources
from trainers.stream_sources import PretrainDataArguments
from trainers.train_data import StoredTrainData
from trainers.transforms import train_transform

pytestmark = pytest.mark.usefixtures("few_penalties")

# widths and heights, the last smaller than what the cache shrinks to
SHAPES = [(90, 60), (60, 75), (40, 41), (200, 100), (20, 30)]
SIZE = 40
BROKEN = 2


def picture(number: int) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(SHAPES[number % len(SHAPES)], Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Ten files, of which one is cut off."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(10):
        picture(number).save(folder / f"{number}.{'png' if number % 2 else 'jpg'}", quality=95)
    data = (folder / f"{BROKEN}.jpg").read_bytes()
    (folder / f"{BROKEN}.jpg").write_bytes(data[: len(data) // 2])
    return folder


@pytest.fixture
def source(photos) -> ImageSource:
    files = sorted(photos.iterdir())
    return ImageSource(StoredImages.of_files(files), np.arange(10) % 3, ["a", "b", "c"], "photos")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_images_are_kept_shrunk_to_their_short_side(source, tmp_path):
    cached = with_cache(source, tmp_path / "cache", SIZE, progress=False)
    for index in set(range(10)) - {BROKEN}:
        image, pixels = source.image(index), cached.images[index]
        share = min(SIZE / min(image.size), 1)
        width, height = round(image.width * share), round(image.height * share)
        assert pixels.shape == (height, width, 3) and (min(width, height) == SIZE or share == 1)
        expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(pixels - expected).mean() < 0.7 and (share < 1 or np.array_equal(pixels, expected))
        assert np.array_equal(np.asarray(cached.image(index)), pixels)


def test_crops_are_drawn_on_what_is_kept(source, tmp_path):
    cached = with_cache(source, tmp_path / "cache", SIZE, progress=False)
    crop = train_transform((24, 24))
    dataset = ImageDataset(cached, crop, seed=7)
    dataset.set_epoch(3)
    for index in (0, 1, 9):
        with seeded(sample_seed(7, 3, index)):
            expected = crop(Image.fromarray(np.array(cached.images[index])))
        assert torch.equal(dataset[index]["pixel_values"], expected) and dataset[index]["labels"] == index % 3


def test_the_same_images_are_known_and_chosen_by_the_same_names(source, tmp_path):
    cached = with_cache(source, tmp_path / "cache", SIZE, progress=False)
    assert cached.fingerprint() == source.fingerprint() and cached.images.paths() == source.images.paths()
    chosen = np.array([8, 1, 4, 0])
    twice = cached.take(chosen).take(np.array([2, 0]))
    assert twice.images.paths() == source.take(np.array([4, 8])).images.paths()
    assert all(np.array_equal(twice.images[at], cached.images[index]) for at, index in enumerate((4, 8)))
    assert twice.images.place(0) == source.images.place(4)


def test_an_image_that_cannot_be_read_is_replaced_and_listed_as_without_a_cache(source, tmp_path):
    cached = with_cache(source, tmp_path / "cache", SIZE, progress=False)
    with_and_without = []
    for each in (cached, source):
        decoder = StoredTrainData(ImageDataset(each, train_transform((24, 24))), 0).decoder
        samples = decoder.__getitems__([(0, index) for index in range(10)])
        with_and_without.append([(sample.sample_id, sample.unreadable) for sample in samples])
    assert with_and_without[0] == with_and_without[1]
    sample_id, [entry] = with_and_without[0][BROKEN]
    assert sample_id["index"] == BROKEN + 1 and "truncated" in entry["reason"] and entry["offset"] == BROKEN


@pytest.mark.parametrize("seconds", [60, 0])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_written_does_not_depend_on_who_decodes_and_how_long(source, tmp_path, monkeypatch, workers, seconds):
    monkeypatch.setattr(decoded_cache, "_SECONDS", seconds)
    monkeypatch.setattr(decoded_cache, "_BATCH_SIZE", 3)
    with_cache(source, tmp_path / "cache", SIZE, workers, progress=False)
    monkeypatch.undo()
    with_cache(source, tmp_path / "other", SIZE, progress=False)
    assert files_of(tmp_path / "cache") == files_of(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "other"]
    assert len({path.stat().st_mode for path in (tmp_path / "cache").iterdir()}) == 1  # whoever reads one reads both


def test_a_cache_is_found_again(source, tmp_path, monkeypatch):
    first = with_cache(source, tmp_path / "cache", SIZE, progress=False)
    for unneeded in ("open_image", "stored_bytes"):
        monkeypatch.setattr(decoded_cache, unneeded, None)
    again = with_cache(source, tmp_path / "cache", SIZE, progress=False)
    assert np.array_equal(first.images[4], again.images[4])


def made_of_another_version(folder: Path):
    index = load_file(folder / "index.safetensors")
    made_of = decoded_cache.DecodedCache(folder).made_of | {"version": 0}
    save_file(index, folder / "index.safetensors", {"made_of": json.dumps(made_of)})


def made_of_a_list(folder: Path):
    save_file(load_file(folder / "index.safetensors"), folder / "index.safetensors", {"made_of": "[1]"})


def without_sizes(folder: Path):
    made_of = json.dumps(decoded_cache.DecodedCache(folder).made_of)
    nothing = dict.fromkeys(("heights", "widths"), np.zeros(0, np.int32))
    save_file(nothing, folder / "index.safetensors", {"made_of": made_of})


def cut_off(folder: Path):
    with (folder / "pixels.bin").open("r+b") as file:
        file.truncate(1000)


def something_else(folder: Path):
    (folder / "index.safetensors").write_text("notes")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (made_of_another_version, "is of another version of cjepa; remove it, or name another folder"),
        (made_of_a_list, "holds no decoded images .*; name a new folder"),
        (without_sizes, "is damaged .*; remove it"),
        (cut_off, "is damaged .pixels.bin has 1,000 bytes.; remove it"),
        (something_else, "holds no decoded images .*; name a new folder"),
    ],
)
def test_a_folder_that_is_no_cache_of_these_images_is_refused_and_left(source, tmp_path, change, words):
    folder = tmp_path / "cache"
    with_cache(source, folder, SIZE, progress=False)
    change(folder)
    before = files_of(folder)
    with pytest.raises(InputError, match=f"--decoded_cache {folder} {words}"):
        with_cache(source, folder, SIZE, progress=False)
    assert files_of(folder) == before


def test_a_cache_of_other_images_or_another_size_is_refused(source, tmp_path):
    folder = tmp_path / "cache"
    with_cache(source, folder, SIZE, progress=False)
    with pytest.raises(InputError, match=f"{folder} is of other images than those of photos"):
        with_cache(source.take(np.arange(9)), folder, SIZE, progress=False)
    with pytest.raises(InputError, match="has images of 40 pixels, not of 41; set --decoded_size"):
        with_cache(source, folder, SIZE + 1, progress=False)


def test_rows_without_names_are_known_by_their_bytes(tmp_path):
    def rows(*numbers, letter=b"x"):
        items = [{"bytes": number * letter, "path": None} for number in numbers]
        return ImageSource(StoredImages(pa.chunked_array([pa.array(items, datasets.Image().pa_type)])), name="rows")

    with_cache(rows(3, 4, 5), tmp_path / "cache", SIZE, progress=False)
    with_cache(rows(3, 4, 5), tmp_path / "cache", SIZE, progress=False)
    for others in (rows(3, 5, 4), rows(3, 4, 5, letter=b"y")):
        with pytest.raises(InputError, match="is of other images than those of rows"):
            with_cache(others, tmp_path / "cache", SIZE, progress=False)


def test_a_table_on_the_disk_is_known_by_its_file_and_the_column_of_the_images(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    items = [{"bytes": (photos / name).read_bytes(), "path": None} for name in ("0.jpg", "4.jpg", "6.jpg")]
    columns = {"image": items, "turned": items[::-1]}
    features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "rows.parquet")

    def open_column(name):
        source, _ = load_sources(DataArguments(dataset=str(tmp_path / "rows.parquet"), image_column=name))
        return with_cache(source, tmp_path / "cache", SIZE, progress=False)

    first = open_column("image")
    with pytest.raises(InputError, match="is of other images than those of .*rows.parquet"):
        open_column("turned")
    monkeypatch.setattr(decoded_cache, "stored_bytes", None)
    assert np.array_equal(open_column("image").images[1], first.images[1])


@pytest.mark.parametrize("is_copy", [False, True])
def test_one_image_of_many_that_was_replaced_is_seen(tmp_path, is_copy):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(600):
        Image.new("RGB", (2, 2), (number % 256, 0, 0)).save(folder / f"{number:03d}.bmp")

    def open_cache():
        source = ImageSource(StoredImages.of_files(sorted(folder.iterdir())), name="pictures")
        return with_cache(source, tmp_path / "cache", SIZE, progress=False)

    open_cache()
    if is_copy:
        folder = Path(shutil.copytree(folder, tmp_path / "copy" / "pictures"))
        assert len(open_cache()) == 600
    replaced = folder / "001.bmp"
    before = replaced.stat()
    Image.new("RGB", (2, 2), (77, 0, 0)).save(replaced)
    os.utime(replaced, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert replaced.stat().st_size == before.st_size
    with pytest.raises(InputError, match="is of other images than those of pictures"):
        open_cache()


def _killed(source, folder):
    steps = decoded_cache._write(folder, source, {"version": 1, "size": SIZE, "images": ""}, 0, False)
    next(steps)
    os._exit(9)


def test_what_a_killed_process_left_is_not_used_and_is_removed(source, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded_cache, "_BATCH_SIZE", 4)
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(source, tmp_path / "cache"))
    process.start()
    process.join()
    assert process.exitcode == 9
    assert [path.name for path in tmp_path.iterdir()] == [f".cache.{socket.gethostname()}.{process.pid}.tmp"]
    cached = with_cache(source, tmp_path / "cache", SIZE, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"] and len(cached) == 10


def test_what_a_killed_process_of_the_same_number_left_is_removed(source, tmp_path):
    left = tmp_path / f".cache.{socket.gethostname()}.{os.getpid()}.tmp"
    left.mkdir()
    (left / "pixels.bin").touch()
    with_cache(source, tmp_path / "cache", SIZE, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_another_machine_writes_is_left_alone(source, tmp_path):
    theirs = tmp_path / f".cache.another-machine.{os.getpid()}.tmp"
    theirs.mkdir()
    with_cache(source, tmp_path / "cache", SIZE, progress=False)
    assert theirs.is_dir() and (tmp_path / "cache").is_dir()


@pytest.mark.parametrize("is_as_long", [False, True])
def test_other_images_of_the_same_names_are_not_these(source, tmp_path, photos, is_as_long):
    with_cache(source, tmp_path / "cache", SIZE, progress=False)
    other = tmp_path / "photos"
    shutil.copytree(photos, other)
    if is_as_long:
        data = bytearray((other / "0.jpg").read_bytes())
        data[len(data) // 2] ^= 1
        (other / "0.jpg").write_bytes(data)
    else:
        picture(77).save(other / "0.jpg", quality=90)
    files = StoredImages.of_files(sorted(other.iterdir()))
    with pytest.raises(InputError, match="is of other images than those of photos"):
        with_cache(dataclasses.replace(source, images=files), tmp_path / "cache", SIZE, progress=False)
    copied = dataclasses.replace(source, images=StoredImages.of_files(sorted(photos.iterdir())))
    assert len(with_cache(copied, tmp_path / "cache", SIZE, progress=False)) == 10


def test_places_where_no_cache_can_be_are_said_in_a_sentence(source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "nothing")
    refused = {
        "cannot be made": (tmp_path / "file" / "cache", "n" * 255, "n" * 300, "a\0b"),
        "no folder that can be made": (".", tmp_path / "link"),
        "a user whose folder is not known": ("~nouser/x",),
    }
    for sentence, places in refused.items():
        for place in places:
            with pytest.raises(InputError, match=sentence):
                with_cache(source, place, SIZE, progress=False)
    whole = with_cache(source, tmp_path / "cache", SIZE, progress=False)
    (tmp_path / "alias").symlink_to(tmp_path / "cache")
    assert len(with_cache(source, tmp_path / "alias", SIZE, progress=False)) == len(whole)


def test_a_disk_without_room_is_said_before_the_work(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    needed = sum(3 * min(SIZE / min(w, h), 1) ** 2 * w * h for w, h in 2 * SHAPES)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free=needed * 0.9))
    with pytest.raises(InputError, match=r"needs about 0.0 GB for 10 images, and 0.0 GB are free; lower"):
        with_cache(source, tmp_path / "folder" / "cache", SIZE, progress=False)
    assert not any(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free=needed * 1.1))
    with_cache(source, tmp_path / "folder" / "cache", SIZE, progress=False)


def test_a_disk_that_fills_up_leaves_nothing(source, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InputError, match="The disk is full .*; make room for --decoded_cache"):
            with_cache(source, tmp_path / "cache", SIZE, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not any(tmp_path.iterdir())


def test_another_run_that_was_faster_is_no_error(source, tmp_path, monkeypatch):
    put_in_place = decoded_cache._put_in_place

    def later(unfinished, folder, *others):
        shutil.copytree(unfinished, folder)
        put_in_place(unfinished, folder, *others)

    monkeypatch.setattr(decoded_cache, "_put_in_place", later)
    assert with_cache(source, tmp_path / "cache", SIZE, progress=False).images[0].shape == (40, 60, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_another_process_is_sent_no_pixels(source, tmp_path):
    cached = with_cache(source, tmp_path / "cache", SIZE, progress=False)
    expected = np.array(cached.images[3])
    sent = pickle.dumps(cached.images)
    assert len(sent) < 5000 < len(files_of(tmp_path / "cache")["pixels.bin"])
    assert np.array_equal(pickle.loads(sent)[3], expected)


def test_pixels_cannot_be_changed(source, tmp_path):
    pixels = with_cache(source, tmp_path / "cache", SIZE, progress=False).images[0]
    with pytest.raises(ValueError, match="read-only"):
        pixels[0, 0, 0] = 1
    assert DecodedImage(pixels).crop(Box(0, 0, 10, 10), (5, 5)).shape == (3, 5, 5)


def test_images_in_memory_need_none(source, tmp_path):
    scenes = dataclasses.replace(source, images=np.zeros((10, 8, 8, 3), np.uint8), name="scenes (train)")
    with pytest.raises(InputError, match="scenes .train. are decoded already; leave --decoded_cache out"):
        with_cache(scenes, tmp_path / "cache", SIZE, progress=False)


def test_streams_and_sizes_below_one_are_refused():
    with pytest.raises(InputError, match="decoded_cache=folder cannot be made of a stream"):
        PretrainDataArguments(dataset="x.tar", streaming=True, decoded_cache="folder")
    with pytest.raises(InputError, match="decoded_size=0 must be 1 or more"):
        PretrainDataArguments(decoded_size=0)


def test_a_run_reads_its_cache(photos, tmp_path, capsys, monkeypatch):
    folder, flags = tmp_path / "cache", [*FLAGS, "--dataset", str(photos), "--max_steps", "1"]
    flags += ["--per_device_train_batch_size", "4", "--decoded_cache", str(folder)]
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    assert main(["pretrain", "cjepa_scenes", *flags, "--output_dir", str(tmp_path / "a"), "--decoded_size", "16"]) == 2
    assert "decoded_size=16 is less than the 32 pixels of a view" in capsys.readouterr().err
    flags += ["--decoded_size", str(SIZE)]
    losses = []
    for run in ("a", "b", "c"):
        assert main(["pretrain", "cjepa_scenes", *flags, "--output_dir", str(tmp_path / run)]) == 0
        facts = json.loads((tmp_path / run / "final" / "results.json").read_text())
        losses.append(facts["history"][0]["loss"])
        if run == "b":
            # what a run reads is in the cache, and nowhere else
            pixels = (folder / "pixels.bin").read_bytes()
            (folder / "pixels.bin").write_bytes(bytes(255 - pixel for pixel in pixels))
    assert losses[0] == losses[1] != losses[2]


def test_two_processes_make_and_read_one_cache(photos, tmp_path):
    root = Path(__file__).resolve().parent.parent
    losses = []
    for processes in (1, 2):
        flags = [*FLAGS, "--dataset", str(photos), "--max_steps", "1", "--decoded_size", str(SIZE)]
        flags += ["--per_device_train_batch_size", str(4 // processes), "--output_dir", str(tmp_path / f"{processes}")]
        flags += ["--decoded_cache", str(tmp_path / f"cache{processes}")]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        result = subprocess.run(
            [*launcher, "scripts/pretrain.py", "cjepa_scenes", *flags], cwd=root, capture_output=True, text=True,
            env=os.environ | {"PYTHONPATH": str(root), "HF_DATASETS_CACHE": str(tmp_path / "datasets")}, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        facts = json.loads((tmp_path / f"{processes}" / "final" / "results.json").read_text())
        assert facts["training"]["processes"] == processes
        losses.append(facts["history"][0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert files_of(tmp_path / "cache1") == files_of(tmp_path / "cache2")
