"""Numbers of embeddings: planted groups, noise, and the definitions written out."""

import math

import numpy as np
import pytest
import torch
from levels import balanced, planted, silhouette_written_out
from tiny import seeded

from trainers import structure
from trainers.datasets import ImageSource
from trainers.errors import InputError
from trainers.probes import accuracy_interval
from trainers.scenes import FAMILY_NAMES, KIND_NAMES, render_scenes
from trainers.structure import coarse_labels, read_groups, structure_of, summarize, unit_vectors

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def structure_of_one(train_x, train_y, test_x, test_y, **kwargs):
    return structure_of(train_x, {"fine": train_y}, test_x, {"fine": test_y}, **kwargs)["fine"]


def nmi_written_out(first, second):
    """2 I / (H + H) of the contingency table."""
    table = np.zeros((max(first) + 1, max(second) + 1))
    for pair in zip(first, second, strict=True):
        table[pair] += 1
    joint = table / table.sum()
    rows, columns = joint.sum(1), joint.sum(0)

    def entropy(p):
        return -sum(value * math.log(value) for value in p if value > 0)

    information = sum(
        joint[i, j] * math.log(joint[i, j] / (rows[i] * columns[j])) for i, j in zip(*joint.nonzero(), strict=True)
    )
    return 2 * information / (entropy(rows) + entropy(columns))


def test_planted_classes_are_found():
    y = balanced(5, 20)
    found = structure_of_one(planted(y), y, planted(y, seed=1), y)
    assert found["num_classes"] == 5
    assert found["silhouette"] > 0.7 and found["silhouette_interval"] is None
    assert found["nmi"] == pytest.approx(1) and found["nmi_interval"] == pytest.approx([1, 1])
    assert found["knn"] == 100 and found["knn_interval"] == list(accuracy_interval(100, 100))


def test_noise_has_no_structure():
    y = balanced(4, 100)
    train_x, test_x = (torch.randn(400, 16, generator=seeded(seed)) for seed in (1, 2))
    found = structure_of_one(train_x, y, test_x, y)
    assert abs(found["silhouette"]) < 0.03
    assert 0 <= found["nmi"] < 0.05
    assert found["knn"] == pytest.approx(25, abs=7)
    assert found["knn_interval"] == list(accuracy_interval(round(found["knn"] * 4), 400))


def test_silhouette_is_the_definition():
    x = torch.randn(20, 3, generator=seeded())
    y = torch.arange(20) % 3
    unit = (x / x.norm(dim=1, keepdim=True)).double().numpy()
    found = structure_of_one(x, y, x, y)["silhouette"]
    assert found == pytest.approx(silhouette_written_out(unit, y.tolist()), abs=1e-6)
    # the lengths of the embeddings mean nothing
    assert structure_of_one(x, y, x * torch.rand(20, 1, generator=seeded()), y)["silhouette"] == pytest.approx(
        found, abs=1e-6
    )


def test_nmi_is_the_definition():
    """Three groups that k-means cannot miss, and classes that only partly agree with them."""
    groups = balanced(3, 30)
    classes = torch.where(torch.arange(90) % 4 == 0, (groups + 1) % 3, groups)
    found = structure_of_one(planted(groups), classes, planted(groups), classes)["nmi"]
    assert found == pytest.approx(nmi_written_out(groups.tolist(), classes.tolist()), abs=1e-9)
    assert 0.2 < found < 0.7


def test_each_labelling_has_its_own_numbers():
    fine = balanced(4, 25)
    coarse = fine // 2
    # only the coarse classes can be told apart
    x, other = planted(coarse), planted(coarse, seed=3)
    found = structure_of(x, {"fine": fine, "coarse": coarse}, other, {"fine": fine, "coarse": coarse})
    assert list(found) == ["fine", "coarse"]
    assert (found["fine"]["num_classes"], found["coarse"]["num_classes"]) == (4, 2)
    assert found["coarse"]["knn"] == 100 and found["fine"]["knn"] < 75
    assert found["coarse"]["nmi"] > 0.99 > 0.8 > found["fine"]["nmi"]


def test_structure_is_the_same_at_every_call_and_hangs_on_the_seeds():
    y = balanced(6, 30)
    x = torch.randn(180, 8, generator=seeded())
    first = structure_of_one(x, y, x, y, seeds=(0, 1, 2))
    assert first == structure_of_one(x, y, x, y, seeds=(0, 1, 2))
    one = [structure_of_one(x, y, x, y, seeds=(seed,))["nmi"] for seed in (0, 1, 2)]
    assert len(set(one)) > 1 and first["nmi"] == pytest.approx(np.mean(one))
    assert structure_of_one(x, y, x, y, seeds=(0,))["nmi_interval"] is None
    half = 4.302652729911275 * np.std(one, ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert first["nmi_interval"] == pytest.approx([np.mean(one) - half, np.mean(one) + half])


def test_silhouette_of_many_images_is_that_of_a_fixed_choice(monkeypatch):
    y = balanced(3, 40)
    x = planted(y, spread=0.3)
    whole = structure_of_one(x, y, x, y)["silhouette"]
    monkeypatch.setattr(structure, "MAX_SILHOUETTE_IMAGES", 60)
    part = structure_of_one(x, y, x, y)["silhouette"]
    assert part == structure_of_one(x, y, x, y)["silhouette"] != whole
    assert part == pytest.approx(whole, abs=0.1)


def test_what_has_no_structure_is_refused():
    x, y = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    with pytest.raises(InputError, match="show 1 fine classes"):
        structure_of_one(x, y, x, torch.zeros(6, dtype=torch.int64))
    with pytest.raises(InputError, match="The 6 test images show 6 fine classes"):
        structure_of_one(x, torch.arange(6), x, torch.arange(6))
    with pytest.raises(InputError, match="labelled by fine, .*by kind; give the same"):
        structure_of(x, {"fine": y}, x, {"kind": y})
    broken = x.clone()
    broken[2, 1] = torch.nan
    with pytest.raises(InputError, match="1 of 6 embeddings are not finite"):
        structure_of_one(x, y, broken, y)


def test_collapsed_embeddings_have_no_structure():
    y = balanced(2, 10)
    x = torch.ones(20, 4)
    with pytest.warns(match="distinct clusters"):
        found = structure_of_one(x, y, x, y)
    assert (found["silhouette"], found["nmi"], found["knn"]) == (0, 0, 50)


def test_runs_are_summarized_by_students_t():
    def run(silhouette, nmi, knn):
        numbers = {"silhouette": silhouette, "nmi": nmi, "knn": knn, "nmi_interval": [0, 1], "knn_interval": [0, 1]}
        return {"coarse": {"num_classes": 2, "silhouette_interval": None, **numbers}}

    runs = [run(0.1, 0.5, 70.0), run(0.2, 0.5, 71.0), run(0.4, 0.5, 73.0)]
    summary = summarize(runs)["coarse"]
    assert (summary["num_classes"], summary["num_runs"]) == (2, 3)
    # mean 7/30, standard deviation sqrt(7/300), t of 95 % with two degrees of freedom 4.3027
    reach = 4.302652729911275 * math.sqrt(7 / 300) / math.sqrt(3)
    assert summary["silhouette"] == pytest.approx(7 / 30)
    assert summary["silhouette_interval"] == pytest.approx([7 / 30 - reach, 7 / 30 + reach])
    assert summary["nmi_interval"] == pytest.approx([0.5, 0.5])
    assert summary["knn_interval"] == pytest.approx([214 / 3 - 10 * reach, 214 / 3 + 10 * reach])
    assert summarize(runs[:1])["coarse"]["knn_interval"] is None

    with pytest.raises(InputError, match="no run"):
        summarize([])
    with pytest.raises(InputError, match="other classes"):
        summarize([runs[0], {"coarse": runs[1]["coarse"] | {"num_classes": 3}}])


def test_coarse_classes_of_cifar10():
    source = ImageSource(np.zeros((10, 2, 2, 3), np.uint8), np.arange(10), CIFAR10)
    labels, names = coarse_labels(source)
    vehicles = [name for label, name in zip(labels, CIFAR10, strict=True) if names[label] == "vehicle"]
    assert sorted(names) == ["animal", "vehicle"] and labels.dtype == np.int64
    assert vehicles == ["airplane", "automobile", "ship", "truck"]


def test_coarse_classes_of_scenes_are_the_families():
    scenes = render_scenes(40, image_size=16)
    labels, names = coarse_labels(ImageSource(scenes["image"], scenes["kind"], list(KIND_NAMES)))
    assert names == list(FAMILY_NAMES) and labels.tolist() == scenes["family"].tolist()


@pytest.mark.parametrize("names", [["cat", "sofa"], ["cat", "dog"], None, ["0", "1"]])
def test_other_classes_have_no_coarse_ones(names):
    """Neither where a class is unknown nor where all are in one group."""
    assert coarse_labels(ImageSource(np.zeros((2, 2, 2, 3), np.uint8), np.arange(2), names)) is None


def test_coarse_classes_of_a_file(tmp_path):
    path = tmp_path / "groups.yaml"
    path.write_text("answer: [no, yes]\nnumber: [1, 2]\nunused: [maybe]\n")
    groups = read_groups(path)
    assert groups == {"answer": ["no", "yes"], "number": ["1", "2"], "unused": ["maybe"]}
    source = ImageSource(np.zeros((5, 2, 2, 3), np.uint8), np.array([3, 0, 2, 1, 0]), ["1", "no", "2", "yes"], "mine")
    labels, names = coarse_labels(source, groups)
    assert names == ["answer", "number"] and labels.tolist() == [0, 1, 1, 0, 1]

    for faulty, message in (
        ({"a": ["1", "no"], "b": ["2"]}, "'yes' is in none of them"),
        ({"a": ["1", "no", "2"], "b": ["yes", "2"]}, "'2' is in them 2 times"),
        ({"a": ["1", "no", "2", "2", "yes"]}, "'2' is in them 2 times"),
        ({"a": ["1", "no", "2", "yes"]}, "All classes of mine are in the coarse class 'a'"),
    ):
        with pytest.raises(InputError, match=message):
            coarse_labels(source, faulty)
    with pytest.raises(InputError, match="no names of classes"):
        coarse_labels(ImageSource(source.images, source.labels), groups)


@pytest.mark.parametrize("text", ["- cat\n- dog\n", "animal: cat\n", "animal: [[cat], dog]\n", ""])
def test_a_file_that_is_no_list_of_coarse_classes_is_refused(tmp_path, text):
    (tmp_path / "groups.yaml").write_text(text)
    with pytest.raises(InputError, match="not lists of class names; write lines such as"):
        read_groups(tmp_path / "groups.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "broken.yaml").write_text("animal: [cat\n")
    for name in ("broken.yaml", "missing.yaml"):
        with pytest.raises(InputError, match=f"{name} cannot be read"):
            read_groups(tmp_path / name)


def test_unit_vectors_have_length_one_and_keep_zeros():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]], dtype=torch.bfloat16)
    unit = unit_vectors(x)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0], [-1, 0]], atol=1e-6)
