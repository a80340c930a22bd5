"""Images to pre-train and evaluate on: rendered scenes, a folder, parquet files or a data set of the Hub.

Whatever the source, an [`ImageDataset`] gives `{"pixel_values": (C, H, W) uint8, "labels": int}`; the randomness of
its crops is a function of (seed, epoch, index), so that workers, processes and resumed runs all see the same crops.
"""

import glob
import io
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, DatasetDict, DownloadMode, Image, load_dataset
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from trainers.errors import InputError
from trainers.scenes import FAMILY_NAMES, KIND_NAMES, render_scenes

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
EVAL_SPLITS = ("test", "validation", "val", "valid")
# rendered scenes: as many as these where the recipe does not say; evaluation scenes have a seed of their own
NUM_SCENES = {"train": 10_000, "test": 2_000}
SCENES_SEED = {"train": 0, "test": 1}


@dataclass
class DataArguments:
    """Which images, and how they are cropped."""

    dataset: str = field(
        default="scenes",
        metadata={"help": "`scenes` (rendered), a folder of images, parquet files (a path, a pattern or a folder), "
                          "or the id of a data set on the Hub"},
    )  # fmt: skip
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a data set on the Hub"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "split to evaluate on; when not given `test` or `validation`, or else a tenth of the train "
                          "split is held out"},
    )  # fmt: skip
    image_column: str | None = field(
        default=None, metadata={"help": "column of images; found by its type if not given"}
    )
    label_column: str | None = field(default=None, metadata={"help": "column of labels; scenes: `kind` or `family`"})
    num_train_images: int | None = field(
        default=None, metadata={"help": "use only so many train images, a fixed choice"}
    )
    num_eval_images: int | None = field(default=None, metadata={"help": "use only so many evaluation images"})
    crop_scale: list[float] = field(
        default_factory=lambda: [0.3, 1.0], metadata={"help": "share of the image a random crop covers, low and high"}
    )
    horizontal_flip: bool = field(default=False, metadata={"help": "mirror half of the crops (I-JEPA does not)"})
    image_mean: list[float] = field(
        default_factory=lambda: [0.485, 0.456, 0.406], metadata={"help": "mean of the channels, for pixels in [0, 1]"}
    )
    image_std: list[float] = field(
        default_factory=lambda: [0.229, 0.224, 0.225], metadata={"help": "standard deviation of the channels"}
    )


@dataclass
class ImageSource:
    """
    Images by position, undecoded, with their labels if there are any.

    Args:
        images (`np.ndarray` (n, H, W, 3) uint8, or [`StoredImages`]): The images.
        labels (`np.ndarray` of shape `(n,)`, *optional*): Class indices.
        label_names (`list[str]`, *optional*): Their names.
        name (`str`): What an error calls the data set.
    """

    images: "np.ndarray | StoredImages"
    labels: np.ndarray | None = None
    label_names: list[str] | None = None
    name: str = "data set"

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> PILImage.Image:
        """The image at a position as RGB; raises `InputError` naming the file if it cannot be read."""
        item = self.images[index]
        if isinstance(item, np.ndarray):
            return PILImage.fromarray(item)
        try:
            data = io.BytesIO(item["bytes"]) if item.get("bytes") is not None else item["path"]
            with PILImage.open(data) as image:
                return to_rgb(image)
        except (OSError, SyntaxError, ValueError, zlib.error, PILImage.DecompressionBombError) as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else error
            where = item.get("path") or f"number {index}"
            raise InputError(
                f"Image {where} of {self.name} cannot be read ({reason}); repair or remove it."
            ) from error

    def take(self, indices: np.ndarray) -> "ImageSource":
        """The images at some positions."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageSource(self.images[indices], labels, self.label_names, self.name)


class StoredImages(Sequence):
    """Undecoded images of an arrow column, or some of them: dictionaries with `bytes` or `path`."""

    def __init__(self, column, indices: np.ndarray | None = None):
        # the arrow column itself: indexing a `datasets` column costs more than decoding a small image
        self.column = column
        self.indices = np.arange(len(column)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, np.ndarray):
            return StoredImages(self.column, self.indices[index])
        return self.column[int(self.indices[index])].as_py()


class ImageDataset(torch.utils.data.Dataset):
    """
    Transformed images, with randomness from (seed, epoch, index) alone.

    Args:
        source ([`ImageSource`]): The images.
        transform (`Callable`): PIL image to uint8 tensor (C, H, W); may use torch's default generator.
        seed (`int`): First part of each image's seed.
    """

    def __init__(self, source: ImageSource, transform: Callable, seed: int = 0):
        self.source, self.transform, self.seed = source, transform, seed
        # shared with the workers, which may outlive an epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int):
        """Chooses the crops of an epoch; the data loader calls it."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        image = self.source.image(index)
        with seeded(sample_seed(self.seed, int(self.epoch), index)):
            item = {"pixel_values": self.transform(image)}
        if self.source.labels is not None:
            item["labels"] = int(self.source.labels[index])
        return item


@contextmanager
def seeded(seed: int):
    """Torch's default CPU generator with a seed of its own for a while; as it was afterwards."""
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


def sample_seed(*numbers: int) -> int:
    """One 64-bit seed from several whole numbers, such as (seed, epoch, index) or (seed, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def to_rgb(image: PILImage.Image) -> PILImage.Image:
    """Any image as RGB: gray, palette and 16-bit converted, transparency laid on white."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        pixels = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode.startswith("I") else max(pixels.max(), 1.0)
        image = PILImage.fromarray((pixels / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = PILImage.new("RGBA", image.size, "white")
        image = PILImage.alpha_composite(white, image)
    return image.convert("RGB")


def load_sources(arguments: DataArguments, image_size: int = 32, seed: int = 0) -> tuple[ImageSource, ImageSource]:
    """
    Loads the images to train on and those to evaluate on.

    Args:
        arguments ([`DataArguments`]): Which data set, splits and columns, and how many images.
        image_size (`int`): Pixels of a rendered scene's side; other images keep their own size.
        seed (`int`): Chooses the images where only some are used or held out.

    Returns:
        The train and the evaluation [`ImageSource`].

    Raises:
        InputError: There is no such data set, split or column, or no image in it.
    """
    if arguments.dataset == "scenes":
        return _scenes(arguments, "train", image_size), _scenes(arguments, "test", image_size)
    splits = _load_splits(arguments)
    if arguments.train_split not in splits:
        raise InputError(f"{arguments.dataset} has no split {arguments.train_split!r}, only {', '.join(splits)}; say "
                         "which with --train_split.")  # fmt: skip
    train = _source(splits[arguments.train_split], arguments, arguments.train_split)
    name = arguments.eval_split or next((name for name in EVAL_SPLITS if name in splits), None)
    if name is None:
        order = np.random.default_rng(seed).permutation(len(train))
        num_held_out = max(len(train) // 10, 1)
        if len(train) < 2:
            raise InputError(
                f"{train.name} has {len(train)} image; give at least 2, one to train on, one to evaluate."
            )
        train, evaluation = train.take(np.sort(order[num_held_out:])), train.take(np.sort(order[:num_held_out]))
    elif name not in splits:
        raise InputError(f"{arguments.dataset} has no split {name!r}, only {', '.join(splits)}; mend --eval_split.")
    else:
        evaluation = _source(splits[name], arguments, name)
    return _choose(train, arguments.num_train_images, seed), _choose(evaluation, arguments.num_eval_images, seed)


def _scenes(arguments: DataArguments, split: str, image_size: int) -> ImageSource:
    asked = arguments.num_train_images if split == "train" else arguments.num_eval_images
    label = arguments.label_column or "kind"
    if label not in ("kind", "family"):
        raise InputError(f"Scenes have no labels {label!r}; give --label_column kind or family.")
    scenes = render_scenes(asked or NUM_SCENES[split], SCENES_SEED[split], image_size, progress=True)
    names = {"kind": KIND_NAMES, "family": FAMILY_NAMES}[label]
    return ImageSource(scenes["image"], scenes[label], list(names), f"scenes ({split})")


def _choose(source: ImageSource, number: int | None, seed: int) -> ImageSource:
    """A fixed random choice of so many images, in their own order; all of them if there are not more."""
    if number is None or number >= len(source):
        return source
    order = np.random.default_rng(seed).permutation(len(source))
    return source.take(np.sort(order[:number]))


def _load_splits(arguments: DataArguments) -> DatasetDict:
    """The splits of a folder, of parquet files, or of a data set on the Hub, images undecoded."""
    name, path = arguments.dataset, Path(arguments.dataset).expanduser()
    parquet = sorted(glob.glob(str(path / "**/*.parquet" if path.is_dir() else path), recursive=True))
    if parquet and all(file.endswith(".parquet") for file in parquet):
        return load_dataset("parquet", data_files=_parquet_splits(parquet, arguments))
    if path.is_dir():
        return _load_folder(path)
    if path.exists() or name.endswith(".parquet") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"{name} is neither a folder of images nor parquet files; mend --dataset.")
    try:
        loaded = load_dataset(name, arguments.dataset_config, download_mode=DownloadMode.REUSE_DATASET_IF_EXISTS)
    except (DatasetNotFoundError, ConnectionError, FileNotFoundError, ValueError, OSError) as error:
        raise InputError(
            f"Data set {name!r} is no folder here and cannot be loaded from the Hub ({_first_line(error)}); check the "
            "name, the network, and whether you are logged in."
        ) from error
    return loaded


def _load_folder(path: Path) -> DatasetDict:
    if not any(file.suffix.lower() in IMAGE_SUFFIXES for file in path.rglob("*")):
        raise InputError(f"Folder {path} holds no image ({', '.join(IMAGE_SUFFIXES)}); mend --dataset.")
    return load_dataset("imagefolder", data_dir=str(path))


def _parquet_splits(files: list[str], arguments: DataArguments) -> dict[str, list[str]]:
    """Parquet files by split, read off names such as `test-00000-of-00001.parquet`; all others are `train`."""
    known = {"train", *EVAL_SPLITS, arguments.train_split, arguments.eval_split}
    splits: dict[str, list[str]] = {}
    for file in files:
        name = Path(file).stem.split("-")[0]
        splits.setdefault(name if name in known else "train", []).append(file)
    return splits


def _source(rows, arguments: DataArguments, split: str) -> ImageSource:
    name = f"{arguments.dataset} ({split})"
    image_column = arguments.image_column or _find_image_column(rows, name)
    if image_column not in rows.column_names:
        raise InputError(f"{name} has no column {image_column!r}, only {', '.join(rows.column_names)}; mend "
                         "--image_column.")  # fmt: skip
    if len(rows) == 0:
        raise InputError(f"{name} holds no image; mend --dataset or the split.")
    labels, label_names = _labels(rows, arguments.label_column, name)
    images = StoredImages(rows.cast_column(image_column, Image(decode=False)).data.column(image_column))
    return ImageSource(images, labels, label_names, name)


def _find_image_column(rows, name: str) -> str:
    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            return column
    for column in ("image", "img", "jpg", "png"):
        if column in rows.column_names:
            return column
    raise InputError(f"{name} has no column of images among {', '.join(rows.column_names)}; say which with "
                     "--image_column.")  # fmt: skip


def _labels(rows, asked: str | None, name: str) -> tuple[np.ndarray | None, list[str] | None]:
    """Class indices and names: of the column asked for, or of the first column of classes; None without one."""
    if asked is not None and asked not in rows.column_names:
        raise InputError(f"{name} has no column {asked!r}, only {', '.join(rows.column_names)}; mend --label_column.")
    classes = [column for column, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    usual = [column for column in ("label", "labels", "fine_label") if column in rows.column_names]
    column = asked or next(iter(classes + usual), None)
    if column is None:
        return None, None
    feature = rows.features[column]
    values = np.asarray(rows[column])
    if isinstance(feature, ClassLabel):
        return values.astype(np.int64), list(feature.names)
    names, indices = np.unique(values, return_inverse=True)
    return indices.astype(np.int64), [str(value) for value in names]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
