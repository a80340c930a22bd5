"""The benchmark of train crops measures the authors' transforms and ours on pictures as heavy as photographs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from trainers import data_cost
from trainers.cli import main
from trainers.data_cost import benchmark_data, format_data_cost
from trainers.datasets import seeded


@pytest.fixture(scope="module")
def pictures():
    return data_cost._pictures(16)


@pytest.fixture
def few(pictures, monkeypatch):
    monkeypatch.setattr(data_cost, "_pictures", lambda number: pictures)


def test_pictures_have_the_size_and_the_bytes_of_photographs(pictures):
    assert {pictures.image(index).size for index in range(16)} == {(500, 375)}
    assert np.mean([len(item["bytes"]) for item in pictures.images]) == pytest.approx(62_000, rel=0.1)


@pytest.mark.parametrize("filter", [v2.InterpolationMode.BILINEAR, v2.InterpolationMode.BICUBIC])
def test_the_authors_crops_are_those_of_their_transforms(pictures, filter):
    """Written out in the later transforms of torchvision."""
    steps = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
    written_out = v2.Compose([v2.RandomResizedCrop(224, (0.3, 1.0), interpolation=filter), *steps])
    with seeded(3):
        found = data_cost._AuthorsCrops(pictures, filter)[5]["pixel_values"]
    with seeded(3):
        expected = written_out(pictures.image(5))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_to_the_device_and_how_fast(few, workers):
    found = benchmark_data(16, 2, workers)
    assert [found[name]["bytes"] for name in data_cost.WHAT] == [602_112, 602_112, 150_528, 150_528]
    assert all(0 < found[name]["low"] <= found[name]["median"] <= found[name]["high"] for name in data_cost.WHAT)
    assert torch.get_num_threads() >= 1 and found["normalize_us"] > 0
    table = format_data_cost(found)
    assert "602.1" in table and ("workers: 1" if workers else "this process, one thread") in table


def test_the_factor_is_the_reference_s_time_over_ours(few, monkeypatch):
    # in turns: the authors', the same with our filter, ours of JPEGs and of decoded images
    seconds = iter([9.0, 9.0, 9.0, 9.0, 3.0, 4.0, 1.0, 0.5, 6.0, 8.0, 2.0, 1.0])
    monkeypatch.setattr(data_cost._Passes, "seconds", lambda passes: next(seconds))
    found = benchmark_data(16, 2)
    assert {name: factor["median"] for name, factor in found["factor"].items()} == {
        "bicubic": 0.75, "stored": 3.0, "cached": 6.0
    }  # fmt: skip
    assert {name: factor["median"] for name, factor in found["factor_bicubic"].items()} == {"stored": 4, "cached": 8}
    assert found["reference"]["median"] == pytest.approx((16 / 3 + 16 / 6) / 2)


@pytest.mark.parametrize(
    "arguments", [["--rounds", "1"], ["--num_images", "15"], ["--workers", "-1"]], ids=lambda arguments: arguments[0]
)
def test_what_cannot_be_measured_is_one_sentence(arguments, capsys):
    assert main(["benchmark", "data", *arguments]) == 2
    assert "--num_images" in (said := capsys.readouterr().err) and "or more" in said


def test_the_command_prints_and_writes(few, tmp_path, capsys):
    output = tmp_path / "data.json"
    assert main(["benchmark", "data", "--num_images", "16", "--rounds", "2", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["num_images"] == 16
    assert "times the authors'" in capsys.readouterr().out
    with Image.open(tmp_path / "data.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10
