"""Images with masks from everywhere, and what is refused."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from trainers.datasets import ImageSource
from trainers.errors import InputError
from trainers.mask_sources import MaskArguments, MaskDataset, MaskSource, load_mask_sources
from trainers.scenes import KIND_NAMES, render_scenes

MASK = np.array([[0, 1, 2], [255, 2, 150]], dtype=np.uint8)


def photograph(number=0, size=(3, 2)):
    return Image.new("RGB", size, (number, 100, 200))


@pytest.fixture
def ade(tmp_path):
    """A download of ADE20K with three images to train on and one to test on."""
    for split, number in (("training", 3), ("validation", 1)):
        for name in ("images", "annotations"):
            (tmp_path / name / split / "sky").mkdir(parents=True)
        for index in range(number):
            photograph(index).save(tmp_path / "images" / split / "sky" / f"{index}.png")
            Image.fromarray(MASK).save(tmp_path / "annotations" / split / "sky" / f"{index}.png")
    names = "".join(f"{number}\t0.1\t1\t1\tthing {number}, stuff\n" for number in range(1, 151))
    (tmp_path / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + names)
    return tmp_path


def test_scenes_have_the_kinds_of_their_objects():
    arguments = MaskArguments(num_train_images=12, num_eval_images=5)
    train, test, names = load_mask_sources(arguments, 16, progress=False)
    assert names == ["background", *KIND_NAMES] and (len(train), len(test)) == (12, 5)
    scenes = render_scenes(12, 0, 16)
    for index in range(12):
        seen = np.unique(train.mask(index)[scenes["mask"][index] > 0])
        assert (
            seen.tolist() == [scenes["kind"][index] + 1] and (train.mask(index)[scenes["mask"][index] == 0] == 0).all()
        )
        assert np.array_equal(np.asarray(train.images.image(index)), scenes["image"][index])


def test_ade_has_no_class_of_zeros(ade):
    train, test, names = load_mask_sources(MaskArguments(dataset=str(ade)))
    assert len(train) == 3 and len(test) == 1 and len(names) == 150
    assert names[0] == "thing 1" and names[-1] == "thing 150"
    assert train.mask(1).tolist() == [[255, 0, 1], [255, 1, 149]]
    assert np.asarray(train.images.image(2))[0, 0, 0] == 2
    as_they_are, _, _ = load_mask_sources(MaskArguments(dataset=str(ade), reduce_labels=False, num_train_images=1))
    assert len(as_they_are) == 1 and np.array_equal(as_they_are.mask(0), MASK)


def test_a_folder_of_ones_own(ade):
    (ade / "objectInfo150.txt").unlink()
    for split in ("training", "validation"):
        for name in ("images", "annotations"):
            (ade / name / split).rename(ade / name / {"training": "train", "validation": "val"}[split])
    image = Image.fromarray(MASK)
    image.putpalette([1, 2, 3] * 256)  # a palette changes no class
    image.save(ade / "annotations" / "train" / "sky" / "0.png")
    train, _, names = load_mask_sources(MaskArguments(dataset=str(ade)), progress=False)
    assert np.array_equal(train.mask(0), MASK) and names == [str(number) for number in range(151)]


def test_a_table_with_a_column_of_masks(tmp_path):
    rows = {"label": [Image.fromarray(MASK + index) for index in range(20)],
            "picture": [photograph(index) for index in range(20)]}  # fmt: skip
    features = datasets.Features({"picture": datasets.Image(), "label": datasets.Image()})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "train.parquet")
    arguments = MaskArguments(dataset=str(tmp_path), mask_column="label", image_column="picture")
    train, test, names = load_mask_sources(arguments, progress=False)
    assert (len(train), len(test)) == (18, 2)
    assert names[-1] == str(
        max(train.mask(index).max(where=train.mask(index) < 255, initial=0) for index in range(18))
    )
    for source in (train, test):
        for index in range(len(source)):
            number = np.asarray(source.images.image(index))[0, 0, 0]
            assert np.array_equal(source.mask(index), MASK + number)
    with pytest.raises(InputError, match="has no folder `annotations`.*--mask_column"):
        load_mask_sources(MaskArguments(dataset=str(tmp_path)))


def test_images_and_masks_are_resized_alike():
    image = np.zeros((8, 6, 3), np.uint8)
    image[:4], mask = 200, np.repeat([[1], [2]], 4, axis=0).repeat(6, axis=1).astype(np.uint8)
    item = MaskDataset(MaskSource(ImageSource(image[None]), mask[None]), (4, 4), 3)[0]
    assert item["pixel_values"].shape == (3, 4, 4) and item["masks"].dtype == torch.uint8
    assert item["masks"].tolist() == [[1] * 4, [1] * 4, [2] * 4, [2] * 4]
    assert item["pixel_values"][:, 0].min() > 150 and item["pixel_values"][:, 3].max() < 50


def test_wrong_masks_are_refused(ade):
    train, _, _ = load_mask_sources(MaskArguments(dataset=str(ade)))
    with pytest.raises(InputError, match="image number 0 of .* has class 149, and there are 100, from 0"):
        MaskDataset(train, (4, 4), 100)[0]
    masks = ade / "annotations" / "training" / "sky"
    photograph(size=(5, 5)).convert("L").save(masks / "0.png")
    with pytest.raises(InputError, match="Image number 0 .* has 2x3 pixels, and its mask 5x5"):
        MaskDataset(train, (4, 4), 150)[0]
    photograph().save(masks / "0.png")
    with pytest.raises(InputError, match="Mask number 0 .* has mode RGB; give masks of one channel"):
        train.mask(0)
    (masks / "0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="Image .*0.png of the masks of .* cannot be read .not an image."):
        train.mask(0)
    (masks / "0.png").unlink()
    with pytest.raises(InputError, match="1 images have no mask, such as .*0.png"):
        load_mask_sources(MaskArguments(dataset=str(ade)))
    Image.fromarray(MASK).save(masks / "0.png")
    (ade / "images" / "validation").rename(ade / "images" / "other")
    with pytest.raises(InputError, match="has no folder validation or val or test"):
        load_mask_sources(MaskArguments(dataset=str(ade)))
