"""The page, the pictures and the numbers of a small stack."""

import dataclasses
import errno
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from levels import (
    COARSE,
    MEAN,
    NAMES,
    NASTY,
    ORDER,
    SIZE,
    STD,
    TEST,
    TRAIN,
    Page,
    colored,
    embeddings_written_out,
    sprite_tiles,
    stack,
)
from matplotlib.figure import Figure
from PIL import Image
from tiny import sjea_level, tiny_model, tiny_sjea

from modeling_cjepa import SJeaConfig, SJeaModel
from trainers.cli import main
from trainers.errors import InputError
from trainers.level_views import format_structure
from trainers.projections import project
from trainers.structure import structure_of
from trainers.subclusters import find_subclusters
from trainers.visualize import visualize_levels


def visualize(folder, models=None, **kwargs):
    settings = {"image_mean": MEAN, "image_std": STD, "coarse": COARSE, "progress": False}
    return visualize_levels(models or {"stack": stack()}, TRAIN, TEST, folder, **settings | kwargs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn") / "new"


@pytest.fixture(scope="module")
def results(folder):
    """Of a stack of two levels beside a single one that is called like a tag; all of 60 images are drawn."""
    return visualize(folder, {"stack": stack(), "a<b>|c": stack(1)})


def test_results_are_the_numbers_of_each_level(results, folder):
    assert json.loads((folder / "levels.json").read_text()) == results
    rows = results["rows"]
    assert [row["encoder"] for row in rows] == ["stack, level 0", "stack, level 1", "a<b>|c"]
    assert [(row["model"], row["level"], row["dim"]) for row in rows] == [
        ("stack", 0, 12), ("stack", 1, 12), ("a<b>|c", 0, 12),
    ]  # fmt: skip
    assert results["num_drawn_images"] == results["num_test_images"] == 60 and results["num_train_images"] == 45
    assert {name: sorted(names) for name, names in results["classes"].items()} == {
        "fine": sorted(NAMES), "coarse": sorted(COARSE),
    }  # fmt: skip
    model = stack()
    train_x, test_x = embeddings_written_out(model, TRAIN), embeddings_written_out(model, TEST)
    labels = [{"fine": torch.from_numpy(source.labels), "coarse": torch.from_numpy(source.labels // 2)} for source in (
        TRAIN, TEST)]  # fmt: skip
    for row, train, test in zip(rows[:2], train_x, test_x, strict=True):
        expected = structure_of(train, labels[0], test, labels[1])
        for name in ("fine", "coarse"):
            for number, value in expected[name].items():
                assert row["structure"][name][number] == pytest.approx(value, abs=1e-4)
    # colours tell the classes apart, even to an untrained encoder
    assert rows[0]["structure"]["fine"]["knn"] > 60


def test_levels_of_masked_prediction_are_drawn_alike(tmp_path):
    upper = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}
    model = tiny_model(image_size=SIZE, patch_size=2, min_context_patches=8, upper_levels=[upper]).eval()
    rows = visualize(tmp_path, {"stack": model})["rows"]
    assert [(row["encoder"], row["dim"]) for row in rows] == [("level 0", 32), ("level 1", 48)]
    train_x, test_x = (embeddings_written_out(model.cjepa, source) for source in (TRAIN, TEST))
    for row, train, test in zip(rows, train_x, test_x, strict=True):
        labels = [{"fine": torch.from_numpy(source.labels)} for source in (TRAIN, TEST)]
        expected = structure_of(train, labels[0], test, labels[1])["fine"]
        assert row["structure"]["fine"]["silhouette"] == pytest.approx(expected["silhouette"], abs=1e-4)
    assert (tmp_path / "levels.html").is_file() and (tmp_path / "levels.png").is_file()


def test_zoom_is_into_the_class_that_differs_most(results):
    zoom = results["zoom"]
    silhouettes = {
        name: np.array([
            find_subclusters(level[TEST.labels[ORDER] == label]).silhouette
            for model in (stack(), stack(1)) for level in embeddings_written_out(model, TEST.take(ORDER))
        ])
        for label, name in enumerate(NAMES)
    }  # fmt: skip
    assert zoom["class_name"] == max(silhouettes, key=lambda name: np.ptp(silhouettes[name]))
    assert "differ most between levels" in zoom["reason"] and zoom["num_images"] == 20
    found = [level["silhouette"] for level in zoom["levels"]]
    assert found == pytest.approx(silhouettes[zoom["class_name"]], abs=1e-3)
    means = np.mean(list(silhouettes.values()), axis=0)
    assert [level["mean_silhouette"] for level in zoom["levels"]] == pytest.approx(means, abs=1e-3)
    assert all(sum(level["sizes"]) == 20 for level in zoom["levels"])


def test_a_table_of_markdown(results):
    text = format_structure(results)
    lines = text.splitlines()
    assert "60 images of images 1 (3 fine, 2 coarse classes)" in lines[0] and "45 of images 0" in lines[0]
    rows = [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in lines[2:]]
    assert {len(row) for row in rows} == {8}
    assert [row[0] for row in rows[2:]] == ["stack, level 0", "stack, level 1", r"a<b>\|c"]
    fine = results["rows"][0]["structure"]["fine"]
    low, high = fine["knn_interval"]
    assert rows[2][2] == f"{fine['silhouette']:.3f}" and rows[2][4] == f"{fine['knn']:.1f} ({low:.1f} to {high:.1f})"


def test_the_page_holds_every_image_and_no_reference(results, folder):
    html = (folder / "levels.html").read_text()
    page = Page(html)
    assert not page.stack and not re.search(r"https?:", html)
    for _, attributes in page.tags:
        assert not {"src", "href", "onclick", "onload", "onerror"} & set(attributes)
    assert all(url.startswith("data:image/jpeg;base64,") for url in re.findall(r'url\("([^"]*)', html))
    data = json.loads(page.text_of("script")[0])
    # three levels, t-SNE and PCA each, and then the class at each
    assert len(data["plots"]) == sum(tag == "canvas" for tag, _ in page.tags) == 9
    assert [len(plot["points"][0]) for plot in data["plots"]] == [60] * 6 + [20] * 3
    for plot in data["plots"]:
        xs, ys = np.array(plot["points"])
        assert (min(xs), min(ys), max(*xs, *ys)) == (0, 0, 1) and len(set(zip(xs, ys, strict=True))) > 10
    # the sprite holds the drawn images in the order of the points, each with its label
    tiles = sprite_tiles(html, 60, columns=8, size=(SIZE, SIZE))
    drawn = [int(np.abs(TEST.images.astype(int) - tile).mean(axis=(1, 2, 3)).argmin()) for tile in tiles]
    assert sorted(drawn) == list(range(60)) and drawn != sorted(drawn)
    fine, coarse = data["labellings"]
    assert [fine["names"][label] for label in fine["labels"]] == [NAMES[TEST.labels[index]] for index in drawn]
    assert [coarse["names"][label] for label in coarse["labels"]] == [
        next(group for group, names in COARSE.items() if NAMES[TEST.labels[index]] in names) for index in drawn
    ]
    # the legends say the same
    assert page.text_of("button") == fine["names"] + coarse["names"]
    dots = [attributes["style"] for _, attributes in page.tags if attributes.get("class") == "dot"]
    assert dots == [f"background: {color}" for color in fine["colors"] + coarse["colors"]]
    sizes = [
        sum(label == i for label in entry["labels"]) for entry in (fine, coarse) for i in range(len(entry["names"]))
    ]
    assert [int(text) for text in page.text_of("span") if text.isdigit()] == sizes
    for plot in data["plots"][6:]:
        members = [drawn[image] for image in plot["images"]]
        assert {NAMES[TEST.labels[index]] for index in members} == {results["zoom"]["class_name"]}
        assert sorted(set(plot["clusters"])) == [0, 1, 2, 3]


def test_points_of_the_page_are_those_of_the_embeddings(results, folder):
    """PCA of the first level, for the images in the order of the sprite."""
    html = (folder / "levels.html").read_text()
    tiles = sprite_tiles(html, 60, columns=8, size=(SIZE, SIZE))
    drawn = [int(np.abs(TEST.images.astype(int) - tile).mean(axis=(1, 2, 3)).argmin()) for tile in tiles]
    points = project(embeddings_written_out(stack(), TEST)[0][drawn], "pca")
    points -= points.min(0)
    points /= points.max()
    xs, ys = np.array(json.loads(Page(html).text_of("script")[0])["plots"][1]["points"])
    np.testing.assert_allclose(xs, points[:, 0], atol=2e-3)
    np.testing.assert_allclose(ys, points[:, 1].max() - points[:, 1], atol=2e-3)  # downwards


def test_names_are_text_and_never_markup(results, folder):
    html = (folder / "levels.html").read_text()
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.tags) == 2 and NASTY not in html
    assert not any(tag == "b" for tag, _ in page.tags)
    assert NASTY in page.text_of("button") and "$x_{1$" in page.text_of("button")
    assert "a<b>|c, t-SNE" in page.text_of("figcaption") and "a<b>|c" in page.text_of("td")
    shown = visualize(folder.parent / "nasty", class_name=NASTY)
    page = Page((folder.parent / "nasty/levels.html").read_text())
    assert f"One class zoomed in: {NASTY}" in page.text_of("h2")
    assert shown["zoom"]["class_name"] == NASTY and shown["zoom"]["reason"] == "This class was asked for."
    assert [row["encoder"] for row in shown["rows"]] == ["level 0", "level 1"]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_script_of_the_page_is_javascript(results, folder, tmp_path):
    _, script = Page((folder / "levels.html").read_text()).text_of("script")
    (tmp_path / "page.js").write_text(script)
    subprocess.run(["node", "--check", tmp_path / "page.js"], check=True)


def test_large_images_are_reduced_and_what_the_model_sees(tmp_path):
    large = dataclasses.replace(colored(12, 2, size=64), name="large")
    models = {"one": stack(1, image_size=64)}
    results = visualize_levels(models, large, large, tmp_path, image_mean=MEAN, image_std=STD, progress=False)
    html = (tmp_path / "levels.html").read_text()
    tiles = sprite_tiles(html, 12, columns=4, size=(48, 48))
    order = np.random.default_rng(0).permutation(12)
    for tile, index in zip(tiles, order, strict=True):
        expected = np.asarray(Image.fromarray(large.images[index]).resize((48, 48), Image.Resampling.LANCZOS))
        assert np.abs(tile - expected).mean() < 10
    # four images a class are too few to zoom in, and nobody knows these classes' coarse ones
    assert results["zoom"] is None and list(results["rows"][0]["structure"]) == ["fine"]
    assert "zoomed in" not in html and 'id="labelling"' not in html
    assert [row["encoder"] for row in results["rows"]] == ["one"]


def test_a_picture_of_an_earlier_call_does_not_stay(tmp_path):
    visualize(tmp_path, {"one": stack(1)}, num_images=60)
    assert (tmp_path / "levels_class.png").exists()
    results = visualize(tmp_path, {"one": stack(1)}, num_images=12)
    assert results["num_drawn_images"] == 12 and results["zoom"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["levels.html", "levels.json", "levels.png"]
    assert len(json.loads(Page((tmp_path / "levels.html").read_text()).text_of("script")[0])["plots"]) == 2


def test_a_full_disk_is_named_and_leaves_no_part_of_a_picture(tmp_path, monkeypatch):
    def fill(self, path, **_):
        path.write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fill)
    with pytest.raises(InputError, match="The disk is full .*make room for"):
        visualize(tmp_path, {"one": stack(1)})
    assert not list(tmp_path.iterdir())


def test_one_level_zooms_into_the_class_with_the_clearest_subclusters(tmp_path):
    zoom = visualize(tmp_path, {"one": stack(1)})["zoom"]
    (level,) = embeddings_written_out(stack(1), TEST.take(ORDER))
    silhouettes = [find_subclusters(level[TEST.labels[ORDER] == label]).silhouette for label in range(3)]
    assert zoom["class_name"] == NAMES[int(np.argmax(silhouettes))]
    assert "farthest apart" in zoom["reason"]


def test_the_same_call_gives_the_same_files(results, folder, tmp_path):
    """But for the seed, which chooses the images that are drawn and their order."""
    again = visualize(tmp_path / "again", {"stack": stack(), "a<b>|c": stack(1)})
    assert again == results
    for name in ("levels.html", "levels.png", "levels_class.png"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    visualize(tmp_path / "other", {"stack": stack(), "a<b>|c": stack(1)}, seed=1)
    assert (tmp_path / "other/levels.html").read_bytes() != (folder / "levels.html").read_bytes()


def test_coarse_classes_may_come_from_a_file(tmp_path):
    (tmp_path / "groups.yaml").write_text(f"wild: [cat]\ntame: [dog, '{NASTY}']\n")
    results = visualize(tmp_path, {"one": stack(1)}, coarse=tmp_path / "groups.yaml")
    assert results["classes"]["coarse"] == ["wild", "tame"]
    assert results["rows"][0]["structure"]["coarse"]["num_classes"] == 2


@pytest.mark.parametrize("changes, message", [
    ({"class_name": "cow"}, "images 1 has no class 'cow'; choose one of cat, dog"),
    ({"class_name": "cat", "num_images": 15}, "Only . of the 15 drawn images are of class 'cat', and 8 are needed"),
    ({"num_images": 3}, "3 images make no picture"),
    ({"num_images": -1}, "0 images make no picture"),
    ({"coarse": {"pet": ["cat"], "wild": ["dog"]}}, "is in none of them"),
])  # fmt: skip
def test_what_cannot_be_drawn_is_refused_before_the_images_are_embedded(changes, message, tmp_path):
    model = stack(1)
    model.register_forward_hook(lambda *_: pytest.fail("embedded"))
    with pytest.raises(InputError, match=message):
        visualize(tmp_path / "new", {"one": model}, **changes)
    assert not (tmp_path / "new").exists()


def test_no_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="no model to look at"):
        visualize_levels({}, TRAIN, TEST, tmp_path)


def test_the_pictures_are_png(results, folder):
    for name in ("levels.png", "levels_class.png"):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(2**24)) > 50


def test_command(tmp_path, capsys):
    run = tmp_path / "run"
    tiny_sjea().eval().save_pretrained(run)
    few = ["--dataset", "scenes", "--num_train_images", "80", "--num_eval_images", "60", "--num_images", "40"]
    assert main(["visualize", "levels", str(run), "--beside", f"again={run}", *few]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name}, level {level} " in printed for name in ("stack", "again") for level in (0, 1))
    assert {path.name for path in (run / "levels").iterdir()} >= {"levels.html", "levels.png", "levels.json"}
    assert main(["visualize", "levels", str(run), *few, "--class_name", "unicorn"]) == 2
    assert "has no class 'unicorn'" in capsys.readouterr().err
    for flags, sentence in (
        (["--seed", "-1"], "seed=-1 is no seed"),
        (["--output", str(run / "config.json")], "config.json is a file; name a folder"),
        (["--beside", f"stack={run}"], "there is a 'stack' already"),
    ):
        assert main(["visualize", "levels", str(run), *few, *flags]) == 2
        assert sentence in capsys.readouterr().err
    assert main(["visualize", "levels", f"{run},", *few]) == 2
    assert "names a run of no name" in capsys.readouterr().err
    assert main(["visualize", "levels", str(tmp_path / "nothing"), *few]) == 2
    assert "neither a folder" in capsys.readouterr().err


def test_numbers_of_several_runs_are_means_over_them(tmp_path, capsys):
    runs = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = SJeaModel(SJeaConfig(levels=[sjea_level(), sjea_level()])).eval()
        model.save_pretrained(tmp_path / f"run{seed}")
        runs.append(str(tmp_path / f"run{seed}"))
    few = ["--dataset", "scenes", "--num_train_images", "80", "--num_eval_images", "60", "--num_images", "40"]

    def rows_of(*models):
        assert main(["visualize", "levels", *models, *few, "--output", str(tmp_path / "levels")]) == 0
        results = json.loads((tmp_path / "levels" / "levels.json").read_text())
        return results["rows"], results["differences"], capsys.readouterr().out

    together, differences, printed = rows_of(",".join(runs), "--beside", f"one={runs[1]}", f"pair={','.join(runs)}")
    apart = [rows_of(run)[0] for run in runs]
    for level in (0, 1):
        for labelling in ("fine", "coarse"):
            values = [rows[level]["structure"][labelling]["knn"] for rows in apart]
            found = together[level]["structure"][labelling]
            assert found["knn"] == pytest.approx(sum(values) / 2) and found["num_runs"] == 2
            assert found["knn_interval"][0] < found["knn"] < found["knn_interval"][1] or values[0] == values[1]
        assert together[2 + level]["structure"] == apart[1][level]["structure"]
        assert together[level]["runs"] == [rows[level]["structure"] for rows in apart]
    assert "Of stack, pair the mean of several runs, intervals over them. The last rows are differences" in printed

    found, of_pair = differences  # of the model with one run there is none
    assert of_pair["model"] == "pair" and of_pair["structure"] == found["structure"]
    assert found["encoder"] == "stack, level 1 less level 0" and "| stack, level 1 less level 0 |" in printed
    for labelling, entry in found["structure"].items():
        first, second = (
            rows[1]["structure"][labelling]["nmi"] - rows[0]["structure"][labelling]["nmi"] for rows in apart
        )
        # of two runs: half their distance, times 12.706 of Student's t with one degree of freedom
        reach = 12.706204736432095 * abs(first - second) / 2
        assert entry["nmi"] == pytest.approx((first + second) / 2)
        assert entry["nmi_interval"] == pytest.approx([entry["nmi"] - reach, entry["nmi"] + reach])
    tiny_sjea(sjea_level()).save_pretrained(tmp_path / "single")
    assert main(["visualize", "levels", f"{runs[0]},{tmp_path / 'single'}", *few]) == 2
    said = capsys.readouterr().err
    assert "The runs of stack are of different models" in said and "number of levels is 2" in said
    other = tmp_path / "other"
    tiny_sjea(sjea_level(), sjea_level(fold_height=2)).save_pretrained(other)
    assert main(["visualize", "levels", str(other), "--beside", f"pair={runs[0]},{other}", *few]) == 2
    assert "levels[1].fold_height is None" in capsys.readouterr().err
    assert main(["visualize", "levels", f"{runs[0]},{runs[0]}", *few]) == 2
    assert f"{runs[0]} is named twice among the runs of stack" in capsys.readouterr().err
