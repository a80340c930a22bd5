"""Features of data sets: the encoder's own numbers, whatever interrupts, shares or streams the work."""

import io
import json
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import ExifTags, Image
from test_datasets import make_folder, picture, png
from tiny import sjea_level, tiny_model, tiny_sjea
from transformers import pipeline

from trainers.cli import main
from trainers.decoding import read_image
from trainers.errors import InputError
from trainers.feature_encoder import FeatureArguments
from trainers.features import read_manifest, write_features
from trainers.readable import allowed_to_skip
from trainers.sources import DataArguments, load_sources
from trainers.transforms import eval_transform, image_processor, normalize

WORKER = Path(__file__).parent / "features_worker.py"
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
BROKEN = (3, 17)
# images of 24 x 20 pixels: 22 to train in files of 9 and 13, and 5 to test
NUM_IMAGES = {"train": 22, "test": 5}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    image_processor((32, 32), MEAN, STD).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Parquet files with two unreadable images."""
    folder = tmp_path_factory.mktemp("data")
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["a", "b"]), "note": Value("string")})
    for file, first, number in (("train-00000", 0, 9), ("train-00001", 9, 13), ("test-00000", 50, 5)):
        rows = [
            {
                "img": {"bytes": b"no image" if i in BROKEN else png(picture(i)), "path": f"{i}.png"},
                "label": i % 2,
                "note": str(i),
            }
            for i in range(first, first + number)
        ]
        Dataset.from_list(rows, features=features).to_parquet(str(folder / f"{file}.parquet"))
    return str(folder)


SETTINGS = {"shard_size": 5, "batch_size": 3, "max_skipped_share": 0.2, "disable_tqdm": True}


def write(model, data, output, **changes) -> dict:
    return write_features(model, DataArguments(dataset=data), output, FeatureArguments(**SETTINGS | changes))


def load(folder):
    return load_dataset("parquet", data_dir=str(folder))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def embedded(model, numbers, size=(24, 20), pool=lambda outputs: outputs.pooler_output):
    """What the encoder gives for pictures, one after the other."""
    encoder = tiny_model().cjepa.eval() if model is None else model
    pixels = [eval_transform((32, 32))(picture(number, size)) for number in numbers]
    with torch.no_grad():
        return torch.cat([pool(encoder(normalize(image[None], MEAN, STD))) for image in pixels]).numpy()


def test_features_are_the_encoders_beside_labels_and_positions(model, data, tmp_path):
    manifest = write(model, data, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 20, "test": 5}
    rows = loaded["train"].with_format("numpy")[:]
    readable = [number for number in range(22) if number not in BROKEN]
    assert rows["index"].tolist() == readable and rows["label"].tolist() == [number % 2 for number in readable]
    assert loaded["train"].features["label"].names == ["a", "b"]
    assert loaded["train"].column_names == ["index", "path", "label", "embedding"]
    assert loaded["train"]["path"][:] == [f"{number}.png" for number in readable]
    assert rows["embedding"].dtype == np.float32
    np.testing.assert_allclose(rows["embedding"], embedded(None, readable), atol=1e-6)
    np.testing.assert_allclose(loaded["test"].with_format("numpy")["embedding"][:], embedded(None, range(50, 55)),
                               atol=1e-6)  # fmt: skip
    assert manifest["splits"]["train"] == {"num_images": 22, "num_skipped": 2, "num_shards": 5}
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert skipped == [
        {"split": "train", "index": number, "path": f"{number}.png", "reason": "not an image"} for number in BROKEN
    ]
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_maps_of_patches_and_half_precision(model, data, tmp_path, dtype):
    write(model, data, tmp_path / "out", pooling="patches", dtype=dtype, split=["test"])
    rows = load(tmp_path / "out")["test"]
    assert rows.features["embedding"].shape == (8, 8, 32) and rows.features["embedding"].dtype == dtype
    expected = embedded(None, range(50, 55), pool=lambda outputs: outputs.last_hidden_state.unflatten(1, (8, 8)))
    tolerance = {"float32": 1e-6, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(rows.with_format("numpy")["embedding"][:], expected, atol=tolerance)


def test_context_encoder_levels_and_last_layers(model, data, tmp_path):
    write(model, data, tmp_path / "context", context_encoder=True, split=["test"])
    context = embedded(tiny_model().context_encoder.eval(), range(50, 55))
    assert np.abs(context - embedded(None, range(50, 55))).max() > 1e-2
    found = load(tmp_path / "context")["test"].with_format("numpy")["embedding"][:]
    np.testing.assert_allclose(found, context, atol=1e-6)
    stack = tiny_sjea(sjea_level(), sjea_level()).eval()
    for name, changes in (("levels", {"pooling": "levels"}), ("lowest", {"level": 0})):
        data_arguments = DataArguments(dataset=data, image_mean=MEAN, image_std=STD)
        arguments = FeatureArguments(**SETTINGS, split=["test"], **changes)
        manifest = write_features(stack, data_arguments, tmp_path / name, arguments)
        assert manifest["settings"]["level"] == {"levels": None, "lowest": 0}[name]
        expected = embedded(
            stack.base_model, range(50, 55), pool=lambda outputs: torch.cat(outputs.level_embeddings, 1)
        )
        width = {"levels": 64, "lowest": 32}[name]
        found = load(tmp_path / name)["test"].with_format("numpy")["embedding"][:]
        np.testing.assert_allclose(found, expected[:, :width], atol=1e-5)


def test_kept_columns_make_a_data_set_of_images(model, data, tmp_path):
    write(model, data, tmp_path / "out", keep_columns=True)
    rows = load(tmp_path / "out")["train"]
    assert rows.column_names == ["index", "path", "img", "label", "note", "embedding"]
    assert [rows[i]["note"] for i in (2, 3)] == ["2", "4"]
    assert np.array_equal(np.asarray(rows[3]["img"]), np.asarray(picture(4)))
    train, test = load_sources(DataArguments(dataset=str(tmp_path / "out")))
    assert (len(train), len(test), train.label_names) == (20, 5, ["a", "b"])


def test_files_keep_their_paths_and_are_read_into_kept_columns(model, tmp_path):
    folder = make_folder(tmp_path / "pets", ["cat", "dog"])
    (tmp_path / "pets/cat/1.png").write_bytes(png(picture(1))[:300])
    write(model, folder, tmp_path / "out", keep_columns=True)
    rows = load(tmp_path / "out")["train"]
    assert rows["path"][:3] == [str(tmp_path / f"pets/cat/{number}.png") for number in (0, 2, 3)]
    skipped = json.loads((tmp_path / "out/skipped.jsonl").read_text())
    assert skipped["path"].endswith("cat/1.png") and "truncated" in skipped["reason"]
    (tmp_path / "pets").rename(tmp_path / "gone")
    assert np.array_equal(np.asarray(rows[6]["image"]), np.asarray(picture(13)))


def test_scenes_are_embedded_without_the_run(model, tmp_path, capsys):
    command = ["features", model, "--dataset", "scenes", "--num_images", "6", "--label_column", "family"]
    assert main([*command, "--out", str(tmp_path / "out"), "--disable_tqdm"]) == 0
    rows = load(tmp_path / "out")["test"]
    assert len(rows) == 6 and "plant" in " ".join(rows.features["label"].names)
    assert "test: 6 embeddings in 1 file" in capsys.readouterr().out
    source, _ = load_sources(DataArguments(num_train_images=6, num_eval_images=1))
    with torch.no_grad():
        pixels = normalize(torch.from_numpy(source.images).permute(0, 3, 1, 2), MEAN, STD)
        expected = tiny_model().cjepa.eval()(pixels).pooler_output
    train = load(tmp_path / "out")["train"].with_format("numpy")
    np.testing.assert_allclose(train["embedding"][:], expected, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (75, 60)])
def test_the_pipeline_gives_the_same_numbers(model, tmp_path, size):
    (tmp_path / "images").mkdir()
    files = [str(tmp_path / f"images/{number}.png") for number in range(6)]
    for number, file in enumerate(files):
        picture(number, size).save(file)
    write(model, str(tmp_path / "images"), tmp_path / "out")
    found = load(tmp_path / "out")["train"].with_format("numpy")["embedding"][:]
    extract = pipeline("image-feature-extraction", model=model, pool=True, trust_remote_code=True)
    by_pipeline = np.array([extract(file)[0] for file in files])
    # of images that need not be resized rounding alone differs; two bicubic filters differ by a grey level here and
    # there, which is 1 / 255 / 0.2 = 0.02 after normalisation, and moves embeddings by much less than between images
    tolerance = 1e-5 if size == (32, 32) else 0.01
    np.testing.assert_allclose(found, by_pipeline, atol=tolerance)
    assert np.abs(found - np.roll(found, 1, axis=0)).max(axis=1).min() > 0.1


def test_the_pipeline_gives_the_same_numbers_of_every_kind_of_image(model, tmp_path):
    """The last two once they are RGB as in `features`: the pipeline drops transparency, and clips 16 bits to 8."""
    rgb, ramp, exif = picture(0, (32, 32)), np.arange(1024).reshape(32, 32), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    transparent = rgb.copy()
    transparent.putalpha(Image.fromarray((ramp // 4).astype(np.uint8)))
    kinds = {
        "gray.png": rgb.convert("L"), "palette.png": rgb.convert("P"), "cmyk.jpg": rgb.convert("CMYK"),
        "turned.jpg": rgb, "transparent.png": transparent, "deep.png": Image.fromarray((ramp * 64).astype(np.uint16)),
    }  # fmt: skip
    (tmp_path / "images").mkdir()
    for name, image in kinds.items():
        image.save(tmp_path / "images" / name, **({"exif": exif} if name == "turned.jpg" else {}))
        assert Image.open(tmp_path / "images" / name).mode == image.mode
    write(model, str(tmp_path / "images"), tmp_path / "out")
    rows = load(tmp_path / "out")["train"]
    extract = pipeline("image-feature-extraction", model=model, pool=True, trust_remote_code=True)
    for path, found in zip(rows["path"], rows.with_format("numpy")["embedding"][:], strict=True):
        np.testing.assert_allclose(extract(read_image(path))[0], found, atol=1e-5, err_msg=path)
        differs = np.abs(np.array(extract(path)[0]) - found).max()
        assert differs > 0.01 if path.endswith(("transparent.png", "deep.png")) else differs < 1e-5, (path, differs)
    stored = np.asarray(Image.open(tmp_path / "images/turned.jpg"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "images/turned.jpg")), np.rot90(stored, -1))


def test_a_killed_run_goes_on_where_it_was(model, data, tmp_path, capsys):
    write(model, data, tmp_path / "whole", num_images=20)
    output = tmp_path / "killed"
    settings = json.dumps({"killed": SETTINGS | {"num_images": 20}})
    process = subprocess.Popen([sys.executable, str(WORKER), model, data, str(tmp_path), settings, "1", "0.2"])
    deadline = time.monotonic() + 120
    while len(list(output.glob("*.parquet"))) < 2 or not list(output.glob(".*.tmp")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -9
    assert list(output.glob(".*.tmp")), "killed while a shard was written"
    there = {path: path.stat().st_mtime_ns for path in output.glob("*.parquet")}
    capsys.readouterr()
    write(model, data, output, num_images=20)
    assert "shards are there already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in there} == there
    whole, resumed = contents(tmp_path / "whole"), contents(output)
    assert whole.keys() == resumed.keys()
    assert all(whole[name] == resumed[name] for name in whole)


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "foreign"])
def test_broken_shards_are_made_anew(model, data, tmp_path, capsys, damage):
    write(model, data, tmp_path / "out")
    whole = contents(tmp_path / "out")
    shard = tmp_path / "out/train-00002.parquet"
    if damage == "missing":
        shard.unlink()
    else:
        neighbour = whole["train-00001.parquet"]
        shard.write_bytes({"cut": whole[shard.name][:-40], "empty": b"", "foreign": neighbour}[damage])
    capsys.readouterr()
    write(model, data, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "train: 4 of 5 shards are there already" in printed
    assert ("train-00002.parquet is broken" in printed) == (damage != "missing")
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"pooling": "last4"}, "pooling 'mean'"),
        ({"dtype": "float16"}, "dtype 'float32'"),
        ({"shard_size": 6}, "shard_size 5"),
        ({"keep_columns": True}, "keep_columns False"),
        ({"context_encoder": True}, "fingerprint"),
    ],
)
def test_other_settings_are_refused(data, tmp_path, changes, named):
    encoder = tiny_model(num_hidden_layers=4)
    write(encoder, data, tmp_path / "out", split=["test"])
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match=named):
        write(encoder, data, tmp_path / "out", split=["test"], **changes)
    assert contents(tmp_path / "out") == before


def test_other_weights_and_another_data_set_are_refused(model, data, tmp_path):
    write(tiny_model(), data, tmp_path / "out", split=["test"])
    other = tiny_model()
    other.cjepa.layernorm.bias.data[0] += 1
    with pytest.raises(InputError, match="fingerprint"):
        write(other, data, tmp_path / "out", split=["test"])
    with pytest.raises(InputError, match="dataset"):
        write(tiny_model(), make_folder(tmp_path / "pets", ["cat"]), tmp_path / "out")
    (tmp_path / "out/features.json").write_text("{}")
    with pytest.raises(InputError, match=r"features\.json cannot be read"):
        write(tiny_model(), data, tmp_path / "out")


def test_two_processes_write_what_one_does(model, data, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    runs = {name: SETTINGS | {"streaming": name == "streamed"} for name in ("stored", "streamed")}
    command = [*launcher, str(WORKER), model, data, str(tmp_path / "two"), json.dumps(runs), "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "process 0 of 2" in result.stdout and "process 1 of 2" in result.stdout
    for name, settings in runs.items():
        write(model, data, tmp_path / name, streaming=settings["streaming"])
        assert contents(tmp_path / "two" / name) == contents(tmp_path / name)


def test_a_stream_gives_the_same(model, data, tmp_path):
    write(model, data, tmp_path / "stored")
    write(model, data, tmp_path / "streamed", streaming=True, dataloader_num_workers=2)
    stored, streamed = contents(tmp_path / "stored"), contents(tmp_path / "streamed")
    assert stored.keys() == streamed.keys()
    assert all(stored[name] == streamed[name] for name in stored if name != "features.json")
    # the one goes on with the other's shards
    (tmp_path / "streamed/train-00004.parquet").unlink()
    write(model, data, tmp_path / "streamed")
    assert contents(tmp_path / "streamed") == stored


def test_a_resumed_stream_decodes_nothing_anew(model, data, tmp_path, monkeypatch):
    write(model, data, tmp_path / "out", streaming=True)
    whole = contents(tmp_path / "out")
    (tmp_path / "out/train-00002.parquet").unlink()
    decoded = []
    monkeypatch.setattr("trainers.decoded.decode_image", lambda item: decoded.append(item["path"]) or picture(0))
    write(model, data, tmp_path / "out", streaming=True)
    assert decoded == [f"{number}.png" for number in range(10, 15)]
    assert {name for name, text in contents(tmp_path / "out").items() if text != whole[name]} == {
        "train-00002.parquet"
    }


def test_tars_are_streamed(model, tmp_path):
    for shard, numbers in enumerate((range(4), range(4, 7))):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for number in numbers:
                for suffix, content in (("png", png(picture(number))), ("cls", str(number % 3).encode())):
                    member = tarfile.TarInfo(f"{number:03d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    pattern = str(tmp_path / "train-*.tar")
    for name, streaming in (("streamed", True), ("stored", False)):
        write(model, pattern, tmp_path / name, streaming=streaming, keep_columns=True)
        rows = load(tmp_path / name)["train"].with_format("numpy")
        assert rows["cls"][:].tolist() == [number % 3 for number in range(7)]
        np.testing.assert_allclose(rows["embedding"][:], embedded(None, range(7)), atol=1e-6)


def test_too_many_unreadable_images_stop_it_and_nothing_is_lost(model, tmp_path):
    folder = Path(make_folder(tmp_path / "pets", list("abcdefg")))
    broken = sorted(folder.glob("*/*.png"))[1:12]
    for file in broken:
        file.write_bytes(b"no image")
    output = tmp_path / "out"
    for num_shards in (1, 2):  # what a call before it skipped counts, too
        with pytest.raises(InputError) as error:
            write(model, str(folder), output, max_skipped_share=0.1, shard_size=12, split=["train"])
        assert re.search(rf"11 of 28 images .*, such as {broken[0]} \(not an image\).* in {output}/skipped\.jsonl",
                         str(error.value))  # fmt: skip
        assert len(list(output.glob("*.parquet"))) == num_shards
        skipped = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
        assert [entry["path"] for entry in skipped] == [str(file) for file in broken]
        assert skipped[0] == {"split": "train", "index": 1, "path": str(broken[0]), "reason": "not an image"}
    write(model, str(folder), output, max_skipped_share=1, shard_size=12)
    write(model, str(folder), tmp_path / "whole", max_skipped_share=1, shard_size=12)
    assert contents(output) == contents(tmp_path / "whole")


def test_ten_unreadable_images_may_be_skipped_but_none_at_0(model, tmp_path):
    folder = Path(make_folder(tmp_path / "pets", ["cat", "dog", "owl", "fox"]))
    for file in sorted(folder.glob("*/*.png"))[:10]:
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="max_skipped_share 0 allows"):
        write(model, str(folder), tmp_path / "none", max_skipped_share=0)
    manifest = write(model, str(folder), tmp_path / "out", max_skipped_share=0.01)
    assert manifest["splits"]["train"] == {"num_images": 16, "num_skipped": 10, "num_shards": 4}
    assert [allowed_to_skip(*asked) for asked in ((5, 1), (1000, 0.01), (1100, 0.01), (199, 0.1))] == [10, 10, 11, 19]


def test_images_none_of_which_can_be_read_are_refused(model, tmp_path):
    folder = Path(make_folder(tmp_path / "pets", ["cat"]))
    for file in folder.glob("*/*.png"):
        file.write_bytes(b"no image")
    with pytest.raises(InputError, match="None of the .* images .* can be read, .*: not an image"):
        write(model, str(folder), tmp_path / "out", split=["train"])


def test_a_shard_without_a_readable_image_is_empty(model, tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a"])})
    rows = [{"image": {"bytes": png(picture(i)) if i > 2 else b"", "path": None}, "label": 0} for i in range(5)]
    rows.append({"image": None, "label": None})
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    manifest = write(model, str(tmp_path / "train.parquet"), tmp_path / "out", shard_size=3, max_skipped_share=1)
    assert pq.read_metadata(tmp_path / "out/train-00000.parquet").num_rows == 0
    assert manifest["splits"]["train"] == {"num_images": 6, "num_skipped": 4, "num_shards": 2}
    assert load(tmp_path / "out")["train"]["index"][:] == [3, 4]
    assert "missing" in (tmp_path / "out/skipped.jsonl").read_text()


def test_embeddings_too_large_for_half_precision_are_refused(data, tmp_path):
    encoder = tiny_model()
    encoder.cjepa.layernorm.weight.data *= 1e6
    with pytest.raises(InputError, match="float32"):
        write(encoder, data, tmp_path / "out", dtype="float16")
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--split", "validation"], "no split 'validation', only"),
        (["--dtype", "int8"], "dtype='int8' is not known"),
        (["--shard_size", "0"], "shard_size=0 is too small"),
        (["--pooling", "max"], "pooling='max' is not known"),
        (["--level", "3"], "level"),
        (["--max_skipped_share", "2"], "max_skipped_share=2 is no share"),
        (["--label_column", "kind"], "no column 'kind'"),
        (["--dataset", "scenes", "--streaming"], "leave --streaming out"),
        (["--output", __file__], "is a file"),
    ],
)
def test_mistakes_are_told(model, data, tmp_path, capsys, flags, sentence):
    assert main(["features", model, "--dataset", data, "--output", str(tmp_path / "out"), *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.parquet"))
