"""Low-level labels: CLEVR's, read from a download's layout, and those of the rendered scenes."""

import json

import numpy as np
import pytest
from PIL import Image

from trainers.errors import InputError
from trainers.scenes import NUM_DISTANCES, render_scenes, scene_labels
from trainers.sources import DataArguments, load_sources

# objects of an image, by their distance to the camera
NEAREST = {"train": [7.9, 8.0, 8.01, 8.6, 9.2, 9.9, 10.5], "val": [12.0, 8.3]}


@pytest.fixture
def clevr(tmp_path):
    """A download with a few images, of 3, 4, 5 ... objects, the last of which is the nearest."""
    for split, distances in NEAREST.items():
        (tmp_path / "images" / split).mkdir(parents=True)
        scenes = []
        for number, nearest in enumerate(distances):
            name = f"CLEVR_{split}_{number:06}.png"
            Image.new("RGBA", (12, 8), (10 * number, 0, 0, 255)).save(tmp_path / "images" / split / name)
            far = [{"pixel_coords": [0, 0, 20.0 + i]} for i in range(number + 2)]
            scenes.append({"image_filename": name, "objects": [*far, {"pixel_coords": [1, 2, nearest]}]})
        (tmp_path / "scenes").mkdir(exist_ok=True)
        (tmp_path / "scenes" / f"CLEVR_{split}_scenes.json").write_text(json.dumps({"scenes": scenes}))
    return tmp_path


def test_objects_are_counted(clevr):
    train, val = load_sources(DataArguments(dataset=str(clevr)))
    assert train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6] and val.labels.tolist() == [0, 1]
    assert train.label_names == [f"{number} objects" for number in range(3, 11)] == val.label_names
    assert train.image(2).mode == "RGB" and train.image(2).size == (12, 8)
    assert np.asarray(train.image(2))[0, 0].tolist() == [20, 0, 0]
    few, _ = load_sources(DataArguments(dataset=str(clevr), label_column="count", num_train_images=3))
    assert len(few) == 3


def test_the_nearest_object_makes_the_class(clevr):
    """VTAB's thresholds, of which 8 itself is below."""
    train, val = load_sources(DataArguments(dataset=str(clevr), label_column="distance"))
    assert train.labels.tolist() == [0, 0, 1, 2, 3, 4, 5] and val.labels.tolist() == [5, 1]
    assert [train.label_names[label] for label in train.labels[[1, 3, 6]]] == ["up to 8", "8.5 to 9", "over 10"]


def test_broken_downloads_are_refused(clevr):
    with pytest.raises(InputError, match="no labels 'color'; give --label_column count or distance"):
        load_sources(DataArguments(dataset=str(clevr), label_column="color"))
    file = clevr / "scenes" / "CLEVR_val_scenes.json"
    for text in ("[]", '{"scenes": [{"image_filename": "a.png", "objects": []}]}', "{"):
        file.write_text(text)
        with pytest.raises(InputError, match="CLEVR_val_scenes.json, annotations of CLEVR, cannot be read"):
            load_sources(DataArguments(dataset=str(clevr)))
    file.write_text('{"scenes": []}')
    with pytest.raises(InputError, match="lists no scene"):
        load_sources(DataArguments(dataset=str(clevr)))


def test_scenes_are_counted_and_measured():
    scenes = render_scenes(300, seed=3, image_size=16)
    labels, names = scene_labels(scenes, "count")
    assert [names[label] for label in labels[:50]] == [f"{count} of a kind" for count in scenes["count"][:50]]
    labels, names = scene_labels(scenes, "distance")
    for label, distance in zip(labels, scenes["distance"], strict=True):
        low, high = map(float, names[label].split(" to "))
        assert low - 0.006 < distance < high + 0.006
    assert names[0].startswith("1.00 to") and names[-1].endswith("to 1.43")
    frequencies = np.bincount(labels, minlength=NUM_DISTANCES) / 300
    assert len(names) == NUM_DISTANCES and abs(frequencies - 1 / NUM_DISTANCES).max() < 0.06


def test_scenes_with_low_level_labels_are_a_source():
    arguments = DataArguments(label_column="count", num_train_images=20, num_eval_images=10)
    train, test = load_sources(arguments, 16, progress=False)
    assert train.labels.tolist() == (render_scenes(20, 0, 16)["count"] - 1).tolist() and len(test.labels) == 10
    with pytest.raises(InputError, match="no labels 'size'; give --label_column kind, family, count, distance"):
        load_sources(DataArguments(label_column="size"), 16, progress=False)
