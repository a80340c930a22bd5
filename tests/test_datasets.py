"""Images from every kind of source, unreadable ones, and crops that depend on (seed, epoch, index) alone."""

import dataclasses
import io
import struct
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from trainers.datasets import ImageDataset, ImageSource, sample_seed, seeded
from trainers.decoding import UnreadableImage, decode_image, read_image, to_rgb
from trainers.errors import InputError, plain_message
from trainers.evaluation import EvaluationArguments
from trainers.sources import DataArguments, load_sources
from trainers.subject import Subject
from trainers.subsets import hold_out, with_common_classes
from trainers.transforms import eval_transform, image_processor, normalize, train_transform


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def picture(number: int, size=(24, 20)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root, names, number=4):
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            picture(10 * label + index).save(root / name / f"{index}.png")
    return str(root)


def make_parquet(path, number=12, first=0):
    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["a", "b"]), "note": Value("string")})
    rows = [
        {"img": {"bytes": png(picture(first + i)), "path": None}, "label": i % 2, "note": "x"} for i in range(number)
    ]
    Dataset.from_list(rows, features=features).to_parquet(str(path))


def test_folder_with_class_subfolders(tmp_path):
    folder = make_folder(tmp_path / "pets", ["cat", "dog"])
    train, held_out = load_sources(DataArguments(dataset=folder))
    assert (len(train), len(held_out)) == (8 - 1, 1)
    assert train.label_names == ["cat", "dog"]
    seen = {np.asarray(source.image(i)).tobytes() for source in (train, held_out) for i in range(len(source))}
    assert seen == {np.asarray(picture(n)).tobytes() for n in (0, 1, 2, 3, 10, 11, 12, 13)}
    for source in (train, held_out):
        for i in range(len(source)):
            numbers = range(10 * source.labels[i], 10 * source.labels[i] + 4)
            assert any(np.array_equal(source.image(i), picture(n)) for n in numbers)


def test_folder_without_classes_has_no_labels(tmp_path):
    train, held_out = load_sources(DataArguments(dataset=make_folder(tmp_path, ["."], number=10)))
    assert train.labels is None and held_out.labels is None
    dataset = ImageDataset(train, eval_transform((16, 16)))
    assert set(dataset[0]) == {"pixel_values"}


def test_folder_with_splits(tmp_path):
    make_folder(tmp_path / "train", ["cat", "dog"], number=3)
    make_folder(tmp_path / "test", ["cat", "dog"], number=2)
    train, test = load_sources(DataArguments(dataset=str(tmp_path)))
    assert (len(train), len(test)) == (6, 4)


def test_parquet_folder_splits_by_file_name(tmp_path):
    make_parquet(tmp_path / "train-00000-of-00001.parquet", 12)
    make_parquet(tmp_path / "test-00000-of-00001.parquet", 4, first=50)
    for dataset in (str(tmp_path), str(tmp_path / "*.parquet")):
        train, test = load_sources(DataArguments(dataset=dataset))
        assert (len(train), len(test), train.label_names) == (12, 4, ["a", "b"])
        assert np.array_equal(test.image(1), picture(51)) and test.labels[1] == 1


def test_chosen_images_are_fixed_and_keep_their_labels(tmp_path):
    make_parquet(tmp_path / "train.parquet", 12)
    arguments = DataArguments(dataset=str(tmp_path), num_train_images=5)
    (first, held_out), (again, held_out_again) = load_sources(arguments), load_sources(arguments)
    assert numbers(first) == numbers(again) and numbers(held_out) == numbers(held_out_again)
    assert len(first) == 5 and numbers(first) != [0, 1, 2, 3, 4] and not set(numbers(first)) & set(numbers(held_out))
    assert [number % 2 for number in numbers(first)] == list(first.labels)


def numbers(source):
    """Which pictures a source of a dozen holds."""
    return [
        next(n for n in range(12) if np.array_equal(image, picture(n)))
        for image in map(source.image, range(len(source)))
    ]


def test_a_held_out_tenth_leaves_an_image_of_each_class():
    labels = np.array([0] * 40 + list(range(1, 41)))
    source = ImageSource(np.zeros((80, 4, 4, 3), np.uint8), labels)
    train, held_out = hold_out(source)
    assert set(train.labels) == set(labels) and len(held_out) == 8 and set(held_out.labels) == {0}
    train, held_out = hold_out(source.take(np.arange(40, 80)))
    assert (len(train), len(held_out)) == (36, 4)


def test_a_split_without_published_labels_has_none(tmp_path):
    make_parquet(tmp_path / "train.parquet", 4)
    rows = Dataset.from_parquet(str(tmp_path / "train.parquet"))
    rows.map(lambda row: {"label": -1}).cast(rows.features).to_parquet(str(tmp_path / "test.parquet"))
    train, test = load_sources(DataArguments(dataset=str(tmp_path)))
    assert train.labels is not None and test.labels is None


def test_numbers_that_are_no_classes_are_no_labels(tmp_path):
    images = [{"bytes": png(picture(i)), "path": None} for i in range(4)]
    features = Features({"image": ImageFeature(), "label": Value("float32")})
    rows = Dataset.from_dict({"image": images, "label": [0.25, 1.0, 2.0, 3.5]}, features=features)
    rows.to_parquet(str(tmp_path / "train.parquet"))
    arguments = DataArguments(dataset=str(tmp_path))
    assert all(source.labels is None for source in load_sources(arguments))
    with pytest.raises(InputError, match="Column 'label' of .* holds numbers such as 0.25, not classes; name another"):
        load_sources(dataclasses.replace(arguments, label_column="label"))


def make_labelled_parquet(path, values, dtype):
    images = [{"bytes": png(picture(i)), "path": None} for i in range(len(values))]
    features = Features({"image": ImageFeature(), "label": Value(dtype)})
    Dataset.from_dict({"image": images, "label": values}, features=features).to_parquet(str(path / "train.parquet"))
    return DataArguments(dataset=str(path))


def test_a_column_of_floats_is_named_with_its_type_and_a_value_as_it_is(tmp_path):
    arguments = make_labelled_parquet(tmp_path, [0.0, 1.0] * 5, "float64")
    told = "'label'.*, of type float64, holds numbers such as 0.0, not classes; name another --label_column, or make"
    with pytest.raises(InputError, match=rf"\(train\) has no labels: its column {told}"):
        with_common_classes(*load_sources(arguments))
    with pytest.raises(InputError, match=rf"^Column {told}"):
        load_sources(dataclasses.replace(arguments, label_column="label"))


@pytest.mark.parametrize(
    ("values", "dtype", "number", "row", "value"),
    [
        ([0.0, 1.0, float("nan"), float("nan")], "float32", 2, 2, "nan"),
        ([0.0, None, 1.0, 1.0], "float32", 1, 1, None),
        ([0, 1, 1, None], "int64", 1, 3, None),
        (["a", None, "b", None], "string", 2, 1, None),
    ],
)
def test_a_missing_label_is_told_with_its_row(tmp_path, values, dtype, number, row, value):
    arguments = make_labelled_parquet(tmp_path, values, dtype)
    told = f"has {number} rows without a 'label', such as row {row}, which holds {value}; remove them or name another"
    for each in (arguments, dataclasses.replace(arguments, label_column="label")):
        with pytest.raises(InputError, match=told):
            with_common_classes(*load_sources(each))


@pytest.mark.parametrize("names", [["cat"], ["train/cat"], ["train-2/pets/cat", "test/pets/cat"]])
def test_one_class_folder_is_told(tmp_path, monkeypatch, names):
    folder = make_folder(tmp_path / "pets", names, number=10)
    with pytest.raises(InputError, match=r"\(train\) has one class folder only, 'cat'; give images of two or more"):
        with_common_classes(*load_sources(DataArguments(dataset=folder)))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"^pets \(train\) has one class folder only"):
        with_common_classes(*load_sources(DataArguments(dataset="pets")))


def test_images_in_a_table_lie_in_no_class_folder(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    monkeypatch.chdir(tmp_path / "cat")
    make_parquet(tmp_path / "all.parquet", 10)
    Dataset.from_parquet(str(tmp_path / "all.parquet")).remove_columns("label").to_parquet(tmp_path / "train.parquet")
    (tmp_path / "all.parquet").unlink()
    with pytest.raises(InputError, match=r"\(train\) has no labels; say which"):
        with_common_classes(*load_sources(DataArguments(dataset=str(tmp_path))))


@pytest.mark.parametrize("names", [["."], ["train", "test"], ["a/cat", "cat"]])
def test_a_folder_without_class_folders_has_no_labels(tmp_path, names):
    folder = make_folder(tmp_path / "pets", names, number=10)
    with pytest.raises(InputError, match=r"\(train\) has no labels; say which with --label_column"):
        with_common_classes(*load_sources(DataArguments(dataset=folder)))


def test_images_that_are_held_out_are_called_so(tmp_path):
    folder = make_folder(tmp_path / "pets", ["cat", "dog"])
    assert [source.name for source in load_sources(DataArguments(dataset=folder))] == [
        f"{folder} (train)", f"{folder} (held out)"
    ]  # fmt: skip


def test_a_class_that_a_flag_left_out_is_told_with_the_flag(tmp_path):
    folder = make_folder(tmp_path / "pets", list("abcdefgh"))
    some = load_sources(DataArguments(dataset=folder, num_train_images=2))
    told = r"held out\) has images of . classes that no image of the 2 of .* \(train\) has .*; raise {}, or evaluate"
    with pytest.raises(InputError, match=told.format("--num_train_images 2")):
        with_common_classes(*some)
    train, held_out = load_sources(DataArguments(dataset=folder))
    with pytest.raises(InputError, match=told.format("--num_probe_images 2")):
        Subject.load(None, train, held_out, EvaluationArguments(num_probe_images=2), None, None, None, None)


def test_a_photograph_stands_upright():
    sideways = picture(3, (20, 10))
    buffer = io.BytesIO()
    orientation = Image.Exif()
    orientation[274] = 6  # rotated by a quarter turn
    sideways.save(buffer, "PNG", exif=orientation)
    source = ImageSource([{"bytes": buffer.getvalue(), "path": None}])
    assert np.array_equal(source.image(0), np.rot90(np.asarray(sideways), -1))


def test_where_the_train_split_is_that_to_evaluate_on_a_tenth_is_held_out(tmp_path):
    for split, first in (("train", 0), ("test", 100)):
        make_parquet(tmp_path / f"{split}.parquet", 20, first)
    for arguments in ({"eval_split": "train"}, {"train_split": "test"}):
        train, held_out = load_sources(DataArguments(dataset=str(tmp_path), **arguments))
        first = 100 if "train_split" in arguments else 0
        seen = {np.asarray(source.image(i)).tobytes() for source in (train, held_out) for i in range(len(source))}
        assert (len(train), len(held_out)) == (18, 2) and held_out.name.endswith("(held out)")
        assert seen == {np.asarray(picture(first + i)).tobytes() for i in range(20)}
    assert len(load_sources(DataArguments(dataset=str(tmp_path)))[1]) == 20


def test_scenes_are_labelled_and_test_scenes_are_others():
    train, test = load_sources(DataArguments(num_train_images=30, num_eval_images=30), image_size=16)
    assert len(train) == len(test) == 30 and len(train.label_names) == 12
    assert not (train.images == test.images).all(axis=(1, 2, 3)).any()
    family, _ = load_sources(DataArguments(num_train_images=30, num_eval_images=2, label_column="family"), 16)
    assert len(family.label_names) == 4 and np.array_equal(family.labels, train.labels // 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "{tmp}/empty"}, "holds no image"),
        ({"dataset": "{tmp}/nowhere.parquet"}, "neither a folder of images nor parquet"),
        ({"dataset": "{tmp}/good", "train_split": "training"}, "no split 'training'"),
        ({"dataset": "{tmp}/good", "eval_split": "dev"}, "no split 'dev'"),
        ({"dataset": "{tmp}/good", "image_column": "picture"}, "no column 'picture'"),
        ({"dataset": "{tmp}/good", "image_column": "label"}, "Column 'label' .* holds no images"),
        ({"dataset": "{tmp}/good", "label_column": "kind"}, "no column 'kind'"),
        ({"dataset": "scenes", "label_column": "colour"}, "no labels 'colour'"),
        ({"dataset": "scenes", "eval_split": "train"}, "scenes has images of its own to test on; leave it out"),
    ],
)
def test_wrong_data_is_one_clear_error(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    (tmp_path / "good").mkdir()
    make_parquet(tmp_path / "good" / "train.parquet", 4)
    arguments = {name: value.format(tmp=tmp_path) for name, value in arguments.items()}
    with pytest.raises(InputError, match=message):
        load_sources(DataArguments(**arguments), image_size=16)


def test_unreadable_image_names_its_file_also_from_a_worker(tmp_path):
    folder = make_folder(tmp_path, ["cat"], number=12)
    whole = (tmp_path / "cat" / "3.png").read_bytes()
    (tmp_path / "cat" / "3.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cat" / "4.png").write_bytes(b"")
    sources = load_sources(DataArguments(dataset=folder))
    unreadable = {}
    for source in sources:
        for index in range(len(source)):
            try:
                source.image(index)
            except InputError as error:
                unreadable[index, source.name] = str(error)
                loader = torch.utils.data.DataLoader(
                    ImageDataset(source, eval_transform((16, 16))), sampler=[index], num_workers=1
                )
                with pytest.raises(InputError) as caught:
                    next(iter(loader))
                assert plain_message(caught.value) == str(error)
    assert len(unreadable) == 2
    assert all("cannot be read" in m and ("3.png" in m or "4.png" in m) for m in unreadable.values())


def test_modes_become_rgb():
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(to_rgb(Image.fromarray(gray)), np.repeat(gray[..., None], 3, axis=2))
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    assert np.array_equal(to_rgb(deep), np.repeat(gray[..., None], 3, axis=2))
    for top in (255, 65535, 10**6):
        wide = Image.fromarray(gray.astype(np.int32) * (top // 255))
        assert np.abs(np.asarray(to_rgb(wide))[..., 0].astype(int) - gray).max() <= 1
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    half.putpixel((1, 0), (255, 0, 0, 0))
    assert [to_rgb(half).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]
    for mode in ("P", "LA", "1", "CMYK", "L"):
        assert to_rgb(picture(1).convert("L" if mode == "LA" else "RGB").convert(mode)).mode == "RGB"


def test_crops_depend_on_seed_epoch_and_index_alone():
    source = ImageSource(np.stack([np.asarray(picture(n)) for n in range(6)]))

    def crops(seed, epoch, order=range(6), workers=0):
        dataset = ImageDataset(source, train_transform((16, 16)), seed)
        dataset.set_epoch(epoch)
        loader = torch.utils.data.DataLoader(dataset, sampler=list(order), num_workers=workers)
        return {index: item["pixel_values"] for index, item in zip(order, loader, strict=True)}

    reference = crops(0, 3)
    for same in (crops(0, 3, order=(5, 3, 1, 0, 2, 4)), crops(0, 3, workers=2)):
        assert all(torch.equal(reference[index], same[index]) for index in range(6))
    for other in (crops(1, 3), crops(0, 4)):
        assert not any(torch.equal(reference[index], other[index]) for index in range(6))


def test_an_epoch_reaches_workers_that_live_on():
    source = ImageSource(np.stack([np.asarray(picture(n)) for n in range(4)]))
    dataset = ImageDataset(source, train_transform((16, 16)))
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append(torch.cat([item["pixel_values"] for item in loader]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])


def test_seeds_differ_and_leave_the_generator_alone():
    seeds = {sample_seed(seed, epoch, index) for seed in range(3) for epoch in range(3) for index in range(50)}
    assert len(seeds) == 450
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected) and not torch.equal(inside, expected)


@pytest.mark.parametrize("image_size", [(32, 32), (96, 96), (24, 48)])
def test_saved_processor_gives_the_view_of_evaluation(image_size):
    image, mean, std = picture(3, size=(130, 117)), [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    ours = normalize(eval_transform(image_size)(image)[None], mean, std)
    theirs = image_processor(image_size, mean, std)(image, return_tensors="pt")["pixel_values"]
    assert ours.shape == theirs.shape == (1, 3, *image_size)
    # both resize bicubically, one on 8-bit pixels and one on tensors: a gray level or two apart
    assert (ours - theirs).abs().max() < 0.05


def test_normalize_leaves_floats_alone():
    floats = torch.randn(2, 3, 4, 4)
    assert normalize(floats, [0.5] * 3, [0.5] * 3) is floats
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    expected = torch.tensor([(1 - 0.4) / 0.2, (1 - 0.5) / 0.3, (1 - 0.6) / 0.25]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    torch.testing.assert_close(normalize(white, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]), expected)


def broken_avif() -> bytes:
    """Its boxes are whole, its data is not: Pillow raises RuntimeError."""
    file = io.BytesIO()
    picture(0, (64, 64)).save(file, "AVIF")
    data = bytearray(file.getvalue())
    start = data.index(b"mdat") + 4
    data[start : start + 16] = bytes([255]) * 16
    return bytes(data)


def broken_spider() -> bytes:
    """An image of a stack without the stack: Pillow raises AttributeError."""
    file = io.BytesIO()
    Image.new("F", (8, 8)).save(file, "SPIDER")
    data = bytearray(file.getvalue())
    data[26 * 4 : 27 * 4] = struct.pack("<f", 1)
    return bytes(data)


@pytest.mark.parametrize(
    ("broken", "kind"), [(broken_avif, RuntimeError), (broken_spider, AttributeError)], ids=["avif", "spider"]
)
def test_an_image_is_unreadable_whatever_its_decoder_raises(tmp_path, broken, kind):
    data = broken()
    with pytest.raises(kind):
        Image.open(io.BytesIO(data)).load()
    (tmp_path / "broken").write_bytes(data)
    for item in ({"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "broken")}):
        with pytest.raises(UnreadableImage):
            decode_image(item)
    with pytest.raises(InputError, match="broken cannot be read .*; give a file with an image"):
        read_image(tmp_path / "broken")


def test_a_file_that_is_not_there_or_is_a_folder_is_unreadable(tmp_path):
    (tmp_path / "text").write_text("no folder")
    for path in (tmp_path / "nowhere.png", tmp_path, tmp_path / "text" / "0.png"):
        with pytest.raises(UnreadableImage, match=str(path)) as caught:
            decode_image({"bytes": None, "path": str(path)})
        assert not caught.value.is_missing


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that can be opened and not read")
def test_an_error_of_the_disk_is_no_fault_of_the_image():
    with pytest.raises(OSError, match="Input/output error"):
        decode_image({"bytes": None, "path": "/proc/self/mem"})
    with pytest.raises(InputError, match="mem cannot be read .*Input/output error"):
        read_image("/proc/self/mem")
