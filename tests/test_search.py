"""Nearest neighbours against cosines written out, by both libraries, and the page that shows them."""

import base64
import io
import json
import re

import numpy as np
import pytest
from datasets import Dataset
from levels import Page
from PIL import Image
from test_datasets import make_folder, picture
from tiny import tiny_model

from trainers.cli import main
from trainers.errors import InputError
from trainers.feature_cost import benchmark_features, format_feature_cost
from trainers.feature_encoder import FeatureArguments
from trainers.features import read_manifest, write_features
from trainers.files import write_json
from trainers.search import LIBRARIES, find_neighbours, load_features
from trainers.sources import DataArguments

NAMES = ["<cat>", "dog"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("photos"), NAMES)


def features_of(model, photos, output, **changes):
    arguments = FeatureArguments(shard_size=3, disable_tqdm=True, **changes)
    write_features(str(model), DataArguments(dataset=photos), output, arguments)
    return str(output)


def cosines(x, queries):
    return np.array([[np.dot(q, v) / np.sqrt(np.dot(q, q) * np.dot(v, v)) for v in x] for q in queries])


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_neighbours_are_those_of_largest_cosine(library, dtype):
    rng = np.random.default_rng(0)
    # a common offset and lengths that mean nothing: neither distances nor inner products have this order
    x = ((rng.normal(size=(60, 6)) + 1) * rng.uniform(0.1, 10, (60, 1))).astype(dtype)
    queries = rng.normal(size=(5, 6)) + 1
    similarities, positions = find_neighbours(Dataset.from_dict({"embedding": x}), queries, 7, library)
    expected = cosines(x.astype(np.float64), queries)
    assert positions.tolist() == np.argsort(-expected, axis=1)[:, :7].tolist()
    np.testing.assert_allclose(similarities, -np.sort(-expected, axis=1)[:, :7], atol=1e-5)


def test_searches_that_cannot_be_are_refused():
    rows = Dataset.from_dict({"embedding": np.ones((4, 6), np.float32)})
    with pytest.raises(InputError, match="give 1 to 4"):
        find_neighbours(rows, np.ones((1, 6)), 5)
    with pytest.raises(InputError, match="6 wide"):
        find_neighbours(rows, np.ones((1, 5)), 2)
    with pytest.raises(InputError, match="--pooling mean"):
        find_neighbours(Dataset.from_dict({"embedding": np.ones((4, 2, 2, 6))}), np.ones((1, 6)), 2)


def test_features_are_loaded_in_order_and_whole(model, photos, tmp_path):
    folder = features_of(model, photos, tmp_path / "out")
    rows, split = load_features(folder)
    assert split == "train" and rows["index"][:] == list(range(8))
    with pytest.raises(InputError, match="no finished split 'test', only train"):
        load_features(folder, "test")
    (tmp_path / "out/test-00000.parquet").touch()
    with pytest.raises(InputError, match="out is half finished; repeat the `cjepa features` call"):
        load_features(folder, "test")
    (tmp_path / "out/train-00001.parquet").unlink()
    with pytest.raises(InputError, match="lacks shards"):
        load_features(folder)
    manifest = read_manifest(folder)
    for splits in ({}, {"test": {}}):  # nothing is finished, another split is
        write_json(tmp_path / "out/features.json", manifest | {"splits": splits})
        with pytest.raises(InputError, match="out is half finished; repeat the `cjepa features` call"):
            load_features(folder)
    with pytest.raises(InputError, match=r"features\.json cannot be read"):
        load_features(tmp_path)


@pytest.mark.parametrize("keep_columns", [False, True])
def test_the_page_shows_the_nearest_images(model, tmp_path, capsys, keep_columns):
    photos = make_folder(tmp_path / "photos", NAMES)
    # the first image is skipped: row 0 is image 1
    (tmp_path / "photos/<cat>/0.png").write_bytes(b"no image")
    features = features_of(model, photos, tmp_path / "out", keep_columns=keep_columns, max_skipped_share=0.2)
    queries = [f"{photos}/<cat>/2.png", f"{photos}/dog/3.png"]
    command = ["visualize", "neighbours", str(model), *queries, "--features", features, "--k", "3"]
    assert main([*command, "--output", str(tmp_path / "drawn")]) == 0
    assert "nearest is image 2 (1.000, <cat>)" in capsys.readouterr().out
    x = np.array(load_features(features)[0]["embedding"][:])
    x = np.concatenate([np.full_like(x[:1], -1), x])
    expected = cosines(x, x[[2, 7]])
    expected[:, 0] = -1
    order = np.argsort(-expected, axis=1)[:, :3]
    results = json.loads((tmp_path / "drawn/neighbours.json").read_text())
    for query, file, nearest, values in zip(results["queries"], queries, order, expected, strict=True):
        assert query["image"] == file
        assert [near["index"] for near in query["neighbours"]] == nearest.tolist()
        assert [near["label"] for near in query["neighbours"]] == [NAMES[index // 4] for index in nearest]
        similarities = [near["similarity"] for near in query["neighbours"]]
        np.testing.assert_allclose(similarities, values[nearest], atol=1e-5)
    html = (tmp_path / "drawn/neighbours.html").read_text()
    page = Page(html)
    assert not re.search(r'(src|href)="(?!data:)', html) and "script" not in [tag for tag, _ in page.tags]
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))))[::5, ::5] for source in sources
    ]
    numbers = [2, *order[0], 7, *order[1]]
    # a picture of 24 x 20 pixels is shown five times as large
    for image, number in zip(shown, numbers, strict=True):
        assert np.array_equal(image, np.asarray(picture(10 * (number // 4) + number % 4)))
    with Image.open(tmp_path / "drawn/neighbours.png") as drawn:
        assert drawn.size[0] > 4 * 100


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("moved", r"has changed .*: image 0 was .*<cat>/0\.png and is .*<cat>/-\.png; write features anew"),
        ("more", r"\(train\) has 9 images now, and had 8 when"),
    ],
)
def test_pictures_of_other_images_are_refused(model, tmp_path, capsys, change, sentence):
    photos = make_folder(tmp_path / "photos", NAMES)
    features = features_of(model, photos, tmp_path / "out")
    picture(70).save(tmp_path / "photos/<cat>/-.png")
    if change == "moved":
        (tmp_path / "photos/<cat>/1.png").unlink()
    command = ["visualize", "neighbours", str(model), f"{photos}/<cat>/0.png", "--features", features, "--k", "2"]
    assert main([*command, "--output", str(tmp_path / "drawn")]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not (tmp_path / "drawn").exists()


def test_mistakes_are_told(model, photos, tmp_path, capsys):
    features = features_of(model, photos, tmp_path / "out")
    other = tiny_model()
    other.cjepa.layernorm.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    query = f"{photos}/dog/3.png"
    for arguments, sentence in (
        ([str(model), __file__, "--features", features], "cannot be read (not an image)"),
        ([str(model), query, "--features", str(tmp_path)], "features.json cannot be read"),
        ([str(model), query, "--features", features, "--k", "9"], "give 1 to 8"),
        ([str(model), query, "--features", features, "--split", "test"], "no finished split 'test'"),
        ([str(tmp_path / "other"), query, "--features", features], "made by other weights"),
    ):
        assert main(["visualize", "neighbours", *arguments, "--output", str(tmp_path / "drawn")]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "drawn").exists()


def test_benchmark_times_both():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    found = benchmark_features(batch_size=4, num_rounds=2, num_images=6, **small)
    assert found["num_images"] == 6 and found["factor"] > 0
    table = format_feature_cost(found)
    assert "forward passes alone" in table and f"{found['features']['median']:.2f}" in table
    with pytest.raises(InputError, match="--rounds 1"):
        benchmark_features(num_rounds=1)
