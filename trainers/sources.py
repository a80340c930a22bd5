"""Where images come from: rendered scenes, a folder, parquet files or a data set of the Hub."""

import dataclasses
import glob
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
from datasets import Image, load_dataset
from datasets.exceptions import DatasetsError
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from trainers.clevr import is_clevr, load_clevr
from trainers.datasets import ImageSource, StoredImages
from trainers.errors import InputError, first_line
from trainers.labels import find_labels, one_class_folder
from trainers.scenes import SCENE_LABELS, render_scenes, scene_labels
from trainers.subsets import choose_images, hold_out
from trainers.tars import check_tars

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
EVAL_SPLITS = ("test", "validation", "val", "valid")
# rendered scenes: as many as these where the recipe does not say; evaluation scenes have a seed of their own
NUM_SCENES = {"train": 10_000, "test": 5_000}
SCENES_SEED = {"train": 0, "test": 1}
# files that hold many images each: by their names' ends, what `datasets` and we call them
_TABLES = {".parquet": ("parquet", "parquet files"), ".tar": ("webdataset", "tar files")}
# fields that only training reads
AUGMENTATIONS = ("crop_scale", "horizontal_flip")


@dataclass
class DataArguments:
    """Which images, and how they are cropped."""

    dataset: str = field(
        default="scenes",
        metadata={"help": "`scenes` (rendered), a folder of images, parquet files (a path, a pattern or a folder), "
                          "or the id of a data set on the Hub"},
    )  # fmt: skip
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set on the Hub"})
    dataset_license: str | None = field(
        default=None,
        metadata={"help": "licence of the images, for the model card; of a data set on the Hub what its card says"},
    )
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "split to evaluate on; when not given `test` or `validation`; where there is none, or it is "
                          "the train split, a tenth of that is held out"},
    )  # fmt: skip
    image_column: str | None = field(
        default=None, metadata={"help": "column of images; found by its type if not given"}
    )
    label_column: str | None = field(
        default=None,
        metadata={"help": "column of labels; scenes: `kind`, `family`, `count` or `distance`; CLEVR: the latter two"},
    )
    num_train_images: int | None = field(
        default=None, metadata={"help": "use only so many train images, a fixed choice"}
    )
    num_eval_images: int | None = field(default=None, metadata={"help": "use only so many evaluation images"})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.3, 1.0], metadata={"help": "share of the image a random crop covers, low and high"}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "mirror half of the crops (I-JEPA does not)"})
    image_mean: list[float] = field(
        default_factory=lambda: list(IMAGENET_DEFAULT_MEAN),
        metadata={"help": "mean of the channels, for pixels in [0, 1]"},
    )
    image_std: list[float] = field(
        default_factory=lambda: list(IMAGENET_DEFAULT_STD), metadata={"help": "standard deviation of the channels"}
    )

    def __post_init__(self):
        for name in ("num_train_images", "num_eval_images"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be 1 or more.")
        if len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(f"crop_scale={self.crop_scale} must be two numbers, low and high, above 0 and up to 1.")
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise InputError(
                f"image_mean={self.image_mean} and image_std={self.image_std} must be three numbers each, one a "
                "channel, and the latter above 0."
            )


def load_sources(
    arguments: DataArguments, image_size: int = 32, progress: bool = True
) -> tuple[ImageSource, ImageSource]:
    """
    Loads the images to train on and those to evaluate on.

    Where only some are used or held out, the choice is the same at every call: an evaluation long after the training
    tests on no image that was trained on.

    Args:
        arguments ([`DataArguments`]): Which data set, splits and columns, and how many images.
        image_size (`int`): Pixels of a rendered scene's side; other images keep their own size.
        progress (`bool`): Whether to show a bar while scenes are rendered.

    Returns:
        The train and the evaluation [`ImageSource`].

    Raises:
        InputError: There is no such data set, split or column, or no image in it.
    """
    is_rendered = arguments.dataset == "scenes"
    folder = Path(arguments.dataset).expanduser()
    if arguments.eval_split is not None and (is_rendered or is_clevr(folder)):
        raise InputError(f"eval_split={arguments.eval_split!r}: {arguments.dataset} has images of its own to test on; "
                         "leave it out.")  # fmt: skip
    if is_rendered:
        return tuple(scenes_source(arguments, split, image_size, progress) for split in NUM_SCENES)
    if is_clevr(folder):
        return _as_many_as_asked(*load_clevr(folder, arguments.label_column), arguments)
    splits, name = named_splits(load_splits(arguments), arguments)
    train = source_of(splits[arguments.train_split], arguments, arguments.train_split)
    if name is None:
        train, evaluation = hold_out(train)
        evaluation = dataclasses.replace(evaluation, name=f"{arguments.dataset} (held out)")
    else:
        evaluation = source_of(splits[name], arguments, name)
    return _as_many_as_asked(train, evaluation, arguments)


def known_num_train_images(arguments: DataArguments) -> int | None:
    """Train images, or how many there are at most, where that is known before they are loaded; else None."""
    return arguments.num_train_images or (NUM_SCENES["train"] if arguments.dataset == "scenes" else None)


def named_splits(splits: dict, arguments: DataArguments) -> tuple[dict, str | None]:
    """
    The splits with that to train on, and the name of that to evaluate on, None if there is no other.

    Args:
        splits (`dict`): Of a data set, by name.
        arguments ([`DataArguments`]): Which of them are asked for.

    Raises:
        InputError: There is no such split.
    """
    if len(splits) == 1 and arguments.train_split == "train":
        # whatever the file names made of it, such as a folder of photographs called test_1.png and so on
        splits = {"train": next(iter(splits.values()))}
    if arguments.train_split not in splits:
        raise InputError(f"{arguments.dataset} has no split {arguments.train_split!r}, only {', '.join(splits)}; say "
                         "which with --train_split.")  # fmt: skip
    name = arguments.eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    if name is not None and name not in splits:
        raise InputError(f"{arguments.dataset} has no split {name!r}, only {', '.join(splits)}; mend --eval_split.")
    return splits, None if name == arguments.train_split else name


def scenes_source(arguments: DataArguments, split: str, image_size: int, progress: bool) -> ImageSource:
    """The rendered scenes of `train` or `test`."""
    asked = arguments.num_train_images if split == "train" else arguments.num_eval_images
    label = arguments.label_column or "kind"
    if label not in SCENE_LABELS:
        raise InputError(f"Scenes have no labels {label!r}; give --label_column {', '.join(SCENE_LABELS)}.")
    scenes = render_scenes(asked or NUM_SCENES[split], SCENES_SEED[split], image_size, progress)
    labels, names = scene_labels(scenes, label)
    return ImageSource(scenes["image"], labels, names, f"scenes ({split})")


def _as_many_as_asked(
    train: ImageSource, evaluation: ImageSource, arguments: DataArguments
) -> tuple[ImageSource, ImageSource]:
    return (
        choose_images(train, arguments.num_train_images, "--num_train_images"),
        choose_images(evaluation, arguments.num_eval_images, "--num_eval_images"),
    )


def load_splits(arguments: DataArguments, streaming: bool = False) -> dict:
    """
    The splits of a folder, of parquet files, of webdataset's tars, or of a data set on the Hub.

    Args:
        arguments ([`DataArguments`]): Which data set.
        streaming (`bool`): Whether rows are read one after the other when they are asked for, and never stored.

    Returns:
        `dict` of `datasets.Dataset`, or of `datasets.IterableDataset` if streamed, by the name of the split.

    Raises:
        InputError: There is no such data set.
    """
    name, path = arguments.dataset, Path(arguments.dataset).expanduser()
    suffix, data_files = table_files(arguments)
    if suffix is not None:
        builder, what = _TABLES[suffix]
        if suffix == ".tar":
            check_tars([file for files in data_files.values() for file in files])
        return _load(f"the {what} {name}", builder, data_files=data_files, streaming=streaming)
    if path.is_dir():
        if not any(_is_image(file.relative_to(path)) for file in path.rglob("*")):
            raise InputError(f"Folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)}); mend --dataset.")
        return _load(f"the folder {path}", "imagefolder", data_dir=str(path), streaming=streaming)
    if path.exists() or name.endswith(tuple(_TABLES)) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name} is neither a folder of images nor parquet or tar files; mend --dataset.")
    advice = "it is no folder here; check the name, the network, and whether you are logged in"
    return _load(f"{name} of the Hub", name, arguments.dataset_config, advice=advice, streaming=streaming)


def _load(what: str, *args, advice: str = "repair or remove what is not an image or a table of images", **kwargs):
    """`datasets.load_dataset`, whose many errors become one sentence."""
    try:
        return load_dataset(*args, **kwargs)
    except (DatasetsError, pa.ArrowException, ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"Cannot load {what} ({first_line(error)}); {advice}.") from error


def table_files(arguments: DataArguments) -> tuple[str | None, dict[str, list[str]]]:
    """How the names of a data set's files end, `.parquet` or `.tar`, and the files by split; None for others."""
    path = Path(arguments.dataset).expanduser()
    for suffix in _TABLES:
        pattern = glob.escape(str(path)) + f"/**/*{suffix}" if path.is_dir() else arguments.dataset
        files = sorted(glob.glob(pattern, recursive=True))
        if files and all(file.endswith(suffix) for file in files):
            return suffix, _table_splits(files, arguments)
    return None, {}


def _is_image(path: Path) -> bool:
    """Whether a file below the data folder counts as an image: hidden files and folders do not."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith((".", "__")) for part in path.parts)


def _table_splits(files: list[str], arguments: DataArguments) -> dict[str, list[str]]:
    """Files by split, read off names such as `test-00000-of-00001.parquet`; all others are `train`."""
    known = {"train", *EVAL_SPLITS, arguments.train_split, arguments.eval_split}
    splits: dict[str, list[str]] = {}
    for file in files:
        name = Path(file).stem.split("-")[0]
        splits.setdefault(name if name in known else "train", []).append(file)
    return splits


def source_of(rows, arguments: DataArguments, split: str) -> ImageSource:
    """The images of a stored table of `datasets`, with their labels."""
    name = f"{arguments.dataset} ({split})"
    image_column = choose_image_column(rows, arguments.image_column, name)
    if len(rows) == 0:
        raise InputError(f"{name} holds no image; mend --dataset or the split.")
    labels, label_names, without_labels = find_labels(rows, arguments.label_column, name)
    images = StoredImages(undecoded(rows, image_column, name).data.column(image_column))
    if labels is None:
        without_labels = without_labels or one_class_folder(images, arguments.dataset, name)
    tables = tuple(file["filename"] for file in rows.cache_files)
    return ImageSource(images, labels, label_names, name, without_labels, tables=tables, table_column=image_column)


def choose_image_column(rows, asked: str | None, name: str) -> str:
    """The column of images: that which is asked for, or else found by its type, or by its name."""
    if asked in rows.column_names:
        return asked
    if asked is not None:
        raise InputError(f"{name} has no column {asked!r}, only {', '.join(rows.column_names)}; mend --image_column.")
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            return column
    for column in ("image", "img", "jpg", "png"):
        if column in rows.column_names:
            return column
    raise InputError(f"{name} has no column of images among {', '.join(rows.column_names)}; say which with "
                     "--image_column.")  # fmt: skip


def undecoded(rows, image_column: str, name: str):
    """Rows of which the images are files as they are stored; raises `InputError` if the column holds none."""
    try:
        return rows.cast_column(image_column, Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InputError(f"Column {image_column!r} of {name} holds no images ({first_line(error)}); mend "
                         "--image_column.") from error  # fmt: skip
