"""How far apart the levels of a model keep classes, against the embeddings taken one level at a time."""

import numpy as np
import pytest
import torch
from levels import silhouette_written_out
from tiny import tiny_model

from trainers.datasets import ImageDataset, ImageSource
from trainers.encoder_structure import structure_of_levels
from trainers.errors import InputError
from trainers.evaluation import EvaluationArguments
from trainers.structure import structure_of, unit_vectors
from trainers.transforms import eval_transform, normalize

SIZE, MEAN, STD = 32, [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
ARGUMENTS = EvaluationArguments(eval_batch_size=16, precision="float32", disable_tqdm=True, seed=3)
STACK = {"upper_levels": [{"hidden_size": 16}], "min_context_patches": 8}
NAMES = ["cat", "dog", "ship"]


def images(names=NAMES, number=30):
    pixels = np.random.default_rng(0).integers(0, 256, (number, SIZE, SIZE, 3), dtype=np.uint8)
    return ImageSource(pixels, np.arange(number) % len(names), names)


def found_of(model, source):
    return structure_of_levels(model, source, ImageDataset(source, eval_transform((SIZE, SIZE))), MEAN, STD, ARGUMENTS)


@pytest.mark.parametrize(("changes", "num_rows"), [({}, 1), (STACK, 3)], ids=["one level", "stack"])
def test_each_level_has_its_own(changes, num_rows):
    model, source = tiny_model(**changes).cjepa.eval(), images()
    pixels = torch.from_numpy(np.asarray(source.images)).permute(0, 3, 1, 2)
    with torch.no_grad():
        levels = list(model(normalize(pixels, MEAN, STD), level=-1).level_embeddings)
    if len(levels) > 1:
        unit = [level / level.norm(dim=1, keepdim=True) for level in levels]
        levels.append(torch.cat(unit, dim=1))
    fine = torch.arange(30) % 3
    labels = {"fine": fine, "coarse": (fine == 2).long()}  # cats and dogs are animals
    found = found_of(model, source)
    assert len(found) == len(levels) == num_rows
    for row, level in zip(found, levels, strict=True):
        expected = structure_of(level, labels, level, labels, seeds=(3, 4, 5))
        assert row == pytest.approx({
            "silhouette": expected["fine"]["silhouette"], "nmi": expected["fine"]["nmi"],
            "coarse_silhouette": expected["coarse"]["silhouette"], "coarse_nmi": expected["coarse"]["nmi"],
        }, abs=1e-4)  # fmt: skip
        assert row["silhouette"] == pytest.approx(silhouette_written_out(unit_vectors(level), fine.tolist()), abs=1e-4)
    assert len({row["silhouette"] for row in found}) == num_rows


def test_classes_without_known_groups_have_none():
    (row,) = found_of(tiny_model().cjepa.eval(), images(["one", "two"]))
    assert list(row) == ["silhouette", "nmi"]


def test_a_single_class_is_refused():
    with pytest.raises(InputError, match="show 1 fine classes"):
        found_of(tiny_model().cjepa.eval(), images(["one"]))
