import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from trainers.errors import InputError
from trainers.scene_coats import draw_coat
from trainers.scene_surroundings import _light
from trainers.scenes import FAMILIES, FAMILY_NAMES, KIND_NAMES, Scene, render_scene, render_scenes

ROOT = Path(__file__).resolve().parents[1]
NUM_SCENES = 2500
NUM_TRAIN = 2000


@pytest.fixture(scope="module")
def scenes() -> dict[str, np.ndarray]:
    return render_scenes(NUM_SCENES, seed=3)


def digest(scene: Scene) -> str:
    labels = (scene.family, scene.kind, scene.count, scene.distance)
    return hashlib.sha256(scene.image.tobytes() + scene.mask.tobytes() + repr(labels).encode()).hexdigest()


def visible_areas(scenes: dict[str, np.ndarray]) -> np.ndarray:
    """The pixels (num_scenes, 4) of objects 1 to 4."""
    return np.stack([(scenes["mask"] == number).sum(axis=(1, 2)) for number in range(1, 5)], axis=1)


def nearest_areas(scenes: dict[str, np.ndarray]) -> np.ndarray:
    return np.take_along_axis(visible_areas(scenes), scenes["count"][:, None] - 1, axis=1)[:, 0]


def knn_accuracy(features: np.ndarray, labels: np.ndarray, neighbours: int) -> float:
    """Cosine nearest neighbours' vote, the first NUM_TRAIN rows voting on the rest."""
    features = features - features[:NUM_TRAIN].mean(axis=0)
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    order = np.argsort(-features[NUM_TRAIN:] @ features[:NUM_TRAIN].T, axis=1)[:, :neighbours]
    votes = [np.bincount(labels[nearest], minlength=len(KIND_NAMES)).argmax() for nearest in order]
    return float(np.mean(votes == labels[NUM_TRAIN:]))


def test_names_are_twelve_kinds_in_four_families():
    assert FAMILY_NAMES == tuple(FAMILIES) == ("creature", "vehicle", "plant", "building")
    assert [len(kinds) for kinds in FAMILIES.values()] == [3] * 4
    assert KIND_NAMES == sum(FAMILIES.values(), ())
    assert len(set(KIND_NAMES)) == 12
    assert {"bird", "fish", "spider"} == set(FAMILIES["creature"])


def test_a_scene_is_the_same_whatever_was_rendered_before(scenes):
    few = render_scenes(7, seed=3)
    for index in (6, 0, 3):
        scene = render_scene(3, index)
        for name in ("image", "mask", "family", "kind", "count"):
            assert np.array_equal(getattr(scene, name), scenes[name][index])
            assert np.array_equal(getattr(scene, name), few[name][index])
        assert np.float32(scene.distance) == scenes["distance"][index]


def test_a_scene_is_the_same_in_another_process_and_beside_other_randomness():
    np.random.seed(0)
    here = [digest(render_scene(11, index, image_size=48)) for index in range(20)]
    code = (
        "from tests.test_scenes import digest, render_scene\n"
        "for index in reversed(range(20)): print(digest(render_scene(11, index, image_size=48)))"
    )
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert there.stdout.split() == here[::-1]


def test_seeds_and_indices_give_different_scenes(scenes):
    assert len({image.tobytes() for image in scenes["image"]}) == NUM_SCENES
    assert len({digest(render_scene(seed, index)) for seed in range(3) for index in range(3)}) == 9


def test_arrays_and_fields_have_the_documented_types(scenes):
    assert {name: (array.shape, array.dtype.name) for name, array in scenes.items()} == {
        "image": ((NUM_SCENES, 32, 32, 3), "uint8"),
        "mask": ((NUM_SCENES, 32, 32), "uint8"),
        "family": ((NUM_SCENES,), "int64"),
        "kind": ((NUM_SCENES,), "int64"),
        "count": ((NUM_SCENES,), "int64"),
        "distance": ((NUM_SCENES,), "float32"),
    }
    scene = render_scene(0, 0, image_size=17)
    assert scene.image.shape == (17, 17, 3)
    assert scene.mask.shape == (17, 17)
    assert [type(value) for value in (scene.family, scene.kind, scene.count, scene.distance)] == [int] * 3 + [float]


def test_labels_are_balanced_independent_and_agree(scenes):
    assert all(
        KIND_NAMES[kind] in FAMILIES[FAMILY_NAMES[family]]
        for kind, family in zip(scenes["kind"], scenes["family"], strict=True)
    )
    table = np.zeros((12, 4))
    np.add.at(table, (scenes["kind"], scenes["count"] - 1), 1)
    # 52 scenes are expected in a cell and 208 of a kind, give or take 7 and 14.
    assert table.min() > 20
    assert table.max() < 90
    assert np.abs(table.sum(axis=1) - NUM_SCENES / 12).max() < 65


def test_mask_shows_the_objects_and_the_nearest_is_in_front(scenes):
    areas = visible_areas(scenes)
    assert all(
        set(np.unique(mask)) <= set(range(count + 1))
        for mask, count in zip(scenes["mask"], scenes["count"], strict=True)
    )
    assert nearest_areas(scenes).min() > 20
    shown = (areas > 0).sum(axis=1)
    assert np.mean(shown == scenes["count"]) > 0.995
    several = scenes["count"] > 1
    assert np.mean(areas[several].argmax(axis=1) == scenes["count"][several] - 1) > 0.9
    # Nothing but clutter hides the nearest object, so that the others' number does not change what is seen of it.
    unit_areas = nearest_areas(scenes) * scenes["distance"] ** 2
    assert unit_areas[scenes["count"] == 4].mean() == pytest.approx(unit_areas[scenes["count"] == 1].mean(), rel=0.05)


def test_mask_lies_on_the_object():
    """An object stands out: the image changes more at the mask's edge than at a moved one's."""
    at_edge, at_moved = [], []
    for index in range(100):
        scene = render_scene(5, index, image_size=64)
        step = np.abs(np.diff(scene.image.astype(int), axis=1)).sum(axis=2)
        for mask, steps in ((scene.mask, at_edge), (np.roll(scene.mask, 5, axis=1), at_moved)):
            steps.append(step[np.diff((mask > 0).astype(int), axis=1) != 0].mean())
    assert np.mean(at_edge) > 1.5 * np.mean(at_moved)


def test_distance_is_what_the_object_is_drawn_at(scenes):
    areas = nearest_areas(scenes)
    for kind in range(12):
        chosen = scenes["kind"] == kind
        correlation = np.corrcoef(np.log(areas[chosen]), np.log(scenes["distance"][chosen]))[0, 1]
        assert correlation < -0.5, KIND_NAMES[kind]
    # The documented unit: at distance d the longer side is 1 / d of the image, give or take the rotation.
    spans = []
    alone = scenes["count"] == 1
    for mask, distance in zip(scenes["mask"][alone], scenes["distance"][alone], strict=True):
        rows, columns = np.nonzero(mask)
        if rows.min() > 0 and rows.max() < 31 and columns.min() > 0 and columns.max() < 31:
            spans.append(max(np.ptp(rows), np.ptp(columns)) / 32 * distance)
    assert len(spans) > 50
    assert 0.9 < np.median(spans) < 1.1
    assert 1 <= scenes["distance"].min() < 1.03
    assert 1.40 < scenes["distance"].max() <= 1 / 0.7


def test_another_image_size_shows_the_same_scene():
    for index in range(20):
        small, large = render_scene(0, index, image_size=32), render_scene(0, index, image_size=96)
        for name in ("family", "kind", "count", "distance"):
            assert getattr(small, name) == getattr(large, name)
        reduced = large.image.reshape(32, 3, 32, 3, 3).mean(axis=(1, 3))
        assert np.abs(reduced - small.image).mean() < 12
        assert np.mean(large.mask[1::3, 1::3] == small.mask) > 0.9


def test_pixels_and_colours_do_not_tell_the_kind(scenes):
    kinds = scenes["kind"]
    pixels = scenes["image"].astype(np.float32)
    assert knn_accuracy(pixels.reshape(NUM_SCENES, -1), kinds, neighbours=20) < 0.25
    objects = (scenes["mask"] > 0)[..., None]
    for region in (objects, ~objects):
        means = (pixels * region).sum(axis=(1, 2)) / region.sum(axis=(1, 2))
        assert knn_accuracy(means, kinds, neighbours=1) < 0.14
        centroids = np.stack([means[:NUM_TRAIN][kinds[:NUM_TRAIN] == kind].mean(axis=0) for kind in range(12)])
        nearest = np.linalg.norm(means[NUM_TRAIN:, None] - centroids, axis=2).argmin(axis=1)
        assert np.mean(nearest == kinds[NUM_TRAIN:]) < 0.14


def test_shapes_do_tell_the_kind(scenes):
    """Where the outlines of each direction lie says more than all the pixels do: the kinds look different."""
    down, right = np.gradient((scenes["mask"] > 0).astype(np.float32), axis=(1, 2))
    direction = (np.mod(np.arctan2(down, right), np.pi) / np.pi * 8).astype(int) % 8
    strength = np.sqrt(np.hypot(down, right))
    edges = np.stack([np.where(direction == bin, strength, 0) for bin in range(8)], axis=-1)
    edges = edges.reshape(NUM_SCENES, 8, 4, 8, 4, 8).sum(axis=(2, 4)).reshape(NUM_SCENES, -1)
    assert knn_accuracy(edges, scenes["kind"], neighbours=20) > 0.3


def test_coats_do_tell_the_kind():
    """How soon and in how many directions it repeats sets a coat apart wherever and however it lies."""
    steps = (np.arange(64) + 0.5) / 64 - 0.5
    points = np.stack(np.meshgrid(steps, steps), axis=-1)
    features, kinds = [], np.arange(NUM_SCENES) % 12
    for index, kind in enumerate(kinds):
        coat = draw_coat(kind, points, np.random.default_rng(index)).astype(float) - 0.5
        spectrum = np.abs(np.fft.fft2(coat)) ** 2
        radius = np.hypot(*np.meshgrid(np.fft.fftfreq(64, 1 / 64), np.fft.fftfreq(64, 1 / 64))).astype(int)
        features.append(np.log(np.bincount(radius.ravel(), spectrum.ravel())[:24] + 1))
    assert knn_accuracy(np.array(features), kinds, neighbours=20) > 0.6


def test_coats_lie_anywhere_and_cover_half():
    """No pixel of a coat says the kind, and neither does its brightness."""
    steps = (np.arange(16) + 0.5) / 16 - 0.5
    points = np.stack(np.meshgrid(steps, steps), axis=-1)
    for kind in range(12):
        covered = np.mean([draw_coat(kind, points, np.random.default_rng(seed)) for seed in range(400)], axis=0)
        assert covered.std() < 0.05 and covered.mean() == pytest.approx(0.5, abs=0.03), kind


def test_objects_lie_in_every_direction(scenes):
    resultants = []
    for kind in range(12):
        turns = []
        for mask in scenes["mask"][(scenes["kind"] == kind) & (scenes["count"] == 1)]:
            covariance = np.cov(np.array(np.nonzero(mask)))
            turns.append(np.exp(1j * np.arctan2(2 * covariance[0, 1], covariance[0, 0] - covariance[1, 1])))
        resultants.append(abs(np.mean(turns)))
    # 1 if all lie alike, about 0.12 for 50 at random
    assert len(turns) > 30 and max(resultants) < 0.4


def test_light_has_a_side_and_a_colour():
    corners, colours = [], []
    for seed in range(200):
        lit = _light(np.full((32, 32, 3), 100.0), np.random.default_rng(seed))
        corners.append(lit[[0, 0, -1, -1], [0, -1, 0, -1], 0].argmax())
        colours.append(lit.mean(axis=(0, 1)) / 85)
    assert set(corners) == {0, 1, 2, 3}
    colours = np.array(colours)
    assert colours.min() == pytest.approx(0.3, abs=0.05) and colours.max() == pytest.approx(1, abs=0.05)
    assert np.abs(np.corrcoef(colours.T) - np.eye(3)).max() < 0.2


def test_grain_is_of_the_scene_not_of_the_pixels():
    """A larger image shows the same grains, larger: what is 3 x 3 pixels at 96 is one at 32."""
    large = render_scene(0, 1, image_size=96).image.astype(int)
    within = np.abs(np.diff(large, axis=1))[:, np.arange(95) % 3 != 2].mean()
    between = np.abs(np.diff(large, axis=1))[:, np.arange(95) % 3 == 2].mean()
    assert between > 3 * within


def test_progress_is_shown_on_request_only(capsys):
    render_scenes(3, progress=False)
    assert capsys.readouterr() == ("", "")
    render_scenes(3, progress=True)
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: render_scene(0, 0, image_size=15), "image_size is 15"),
        (lambda: render_scene(-1, 0), "seed is -1"),
        (lambda: render_scene(0, -2), "index is -2"),
        (lambda: render_scenes(0), "num_scenes is 0"),
        (lambda: render_scenes(2, image_size=0), "image_size is 0"),
    ],
)
def test_a_value_out_of_range_is_named(call, named):
    with pytest.raises(InputError, match=named):
        call()
