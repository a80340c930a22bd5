"""The pictures of benchmarks show every figure, and lie beside it."""

import json
import os

import pytest
from matplotlib.figure import Figure
from PIL import Image

from trainers import cost_panels
from trainers.cost_figure import Bars, Shares, check_output, write_costs
from trainers.errors import InputError
from trainers.loading_cost import WHAT as LOADED
from trainers.memory_cost import WHAT as REMEMBERED
from trainers.step_cost import RACERS

SPREAD = {"low": 1.0, "median": 2.0, "high": 4.0}
FOUND = {
    "step": {
        "size": "cifar", "batch_size": 4, "precision": "bf16", "device": "cpu", "matmul_rate": 1e9,
        "factor": {name: SPREAD for name in RACERS if name != "reference"},
        "seconds": dict.fromkeys(RACERS, SPREAD), "mfu": dict.fromkeys(RACERS, SPREAD),
        "memory": dict.fromkeys(RACERS, 6e6), "parts": {"masks": 0.25, "backward": 0.75},
    },
    "mask": [{"grid": "8x8", "batch_size": 4, "loop": 9.0, "factor": 4.5, **SPREAD}],
    "level": [{"levels": 1, "activations": 3.0, **SPREAD}, {"levels": 2, "activations": 5.0, **SPREAD}],
    "feature": {"num_images": 8, "device": "cpu", "forward": SPREAD, "features": SPREAD},
    "training": {"batch_size": 4, "device": "cpu", "bare": SPREAD, "trainer": SPREAD, "save": 3.0, "stall": 1.0,
                 "write": 2.0, "bytes": 1e6},
    "loading": {name: {"seconds": SPREAD, "megabytes": SPREAD} for name in LOADED},
    "memory": {
        "size": "cifar", "precision": "bf16", "device": "cpu", "batch_sizes": [4],
        **{kind: {"4": {"peak": SPREAD}} for kind in REMEMBERED},
    },
    "scale": {"growths": {"batch x8": {"seconds": SPREAD, "flops": 8.0}}},
}  # fmt: skip


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or savefig(self, *a, **k))
    return figures


def test_bars_are_as_long_as_medians_and_whiskers_reach_the_quartiles(drawn, tmp_path):
    panels = [Bars("a $title$", "ms", {"first": SPREAD, "second": 3.0}), Shares("parts", {"a": 0.25, "b": 0.75})]
    write_costs(str(tmp_path / "cost.json"), [{"figure": 1}], panels)
    bars, shares = drawn[0].axes
    assert [bar.get_width() for bar in bars.patches] == [2.0, 3.0]
    (whisker,) = bars.collections
    assert whisker.get_segments()[0][:, 0].tolist() == [1.0, 4.0]
    assert [text.get_text() for text in bars.get_yticklabels()] == ["first", "second"]
    assert [(bar.get_x(), bar.get_width()) for bar in shares.patches] == [(0.0, 0.25), (0.25, 0.75)]
    assert [text.get_text() for text in shares.get_legend().get_texts()] == ["a 25.0%", "b 75.0%"]
    written = json.loads((tmp_path / "cost.json").read_text())
    assert written["rows"] == [{"figure": 1}] and written["machine"] and written["software"]["torch"]
    with Image.open(tmp_path / "cost.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("part", FOUND)
def test_every_part_has_a_picture(part, drawn, tmp_path):
    panels = getattr(cost_panels, f"{part}_panels")(FOUND[part])
    write_costs(str(tmp_path / f"{part}.json"), FOUND[part], panels)
    assert len(drawn[0].axes) == len(panels) and (tmp_path / f"{part}.png").is_file()
    # nothing that is written lies outside of the picture
    width, height = drawn[0].canvas.get_width_height()
    for axes in drawn[0].axes:
        box = axes.get_tightbbox()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1


def test_seconds_become_milliseconds_and_shares_percent():
    seconds, faster, mfu, memory, parts = cost_panels.step_panels(FOUND["step"])
    assert faster.values == dict.fromkeys(RACERS.values(), SPREAD) | {"the authors', re-stated": 1.0}
    assert seconds.values["ours, with its regulariser"]["median"] == 2000
    assert mfu.values["the authors', re-stated"]["high"] == 400 and parts.shares == FOUND["step"]["parts"]
    assert memory.values["ours, with its regulariser"] == 6e6 / 4 / 2**20
    (memory,) = cost_panels.memory_panels(FOUND["memory"])
    assert memory.values["ours"]["median"] == 2 / 2**20


@pytest.mark.parametrize("output", ["cost.png", "cost.PNG", "."])
def test_a_file_that_is_no_json_is_refused(output):
    with pytest.raises(InputError, match="is no JSON file"):
        check_output(output)


def test_a_place_that_cannot_be_written_to_is_said_before(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        check_output(str(tmp_path / "file" / "cost.json"))
    check_output(str(tmp_path / "new" / "cost.json"))
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize("output", ["/proc/x.json", "/sys/x.json", "n" * 250, "n" * 300])
def test_a_place_that_takes_no_file_is_said_before(output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"--output .* cannot be made \(.*\); name another place"):
        check_output(output)


@pytest.mark.parametrize("name", ["pipe.json", "pipe.png", "folder.png", "loop.json", "link.json"])
def test_what_is_no_file_is_not_replaced(name, tmp_path):
    place = tmp_path / name
    if place.stem == "pipe":
        os.mkfifo(place)
    elif place.stem == "folder":
        place.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        place.symlink_to(name if place.stem == "loop" else "pipe")
    with pytest.raises(InputError, match="is there and is no file; name another"):
        check_output(str(place.with_suffix(".json")))


def test_figures_are_written_to_the_files_of_links_and_into_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "figures.json").write_text("old")
    for name in ("json", "png"):  # there is no picture yet
        (tmp_path / f"step.{name}").symlink_to(f"kept/figures.{name}")
    check_output("~/step.json")
    assert (tmp_path / "kept" / "figures.json").read_text() == "old"
    write_costs("~/step.json", FOUND["step"], cost_panels.step_panels(FOUND["step"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "step.json", "step.png"]
    assert all((tmp_path / f"step.{name}").is_symlink() for name in ("json", "png"))
    assert "machine" in json.loads((tmp_path / "kept" / "figures.json").read_text())
    assert (tmp_path / "kept" / "figures.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="--output ~nouser/x begins with a user"):
        check_output("~nouser/x")
