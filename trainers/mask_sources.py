"""Images with a class for each pixel: rendered scenes, ADE20K's folders, or a table with a column of masks.

Shapes: H and W rows and columns of an image, S those it is resized to.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from trainers.datasets import ImageSource, StoredImages
from trainers.errors import InputError, first_line
from trainers.readable import readable_positions
from trainers.scenes import KIND_NAMES, render_scenes
from trainers.sources import IMAGE_SUFFIXES, NUM_SCENES, SCENES_SEED, DataArguments, load_sources
from trainers.subsets import choose_images

IGNORED = 255
"""The class of pixels that count for nothing."""
_FOLDERS = {"train": ("training", "train"), "test": ("validation", "val", "test")}


@dataclass
class MaskArguments(DataArguments):
    """Which images, and where their masks are."""

    mask_column: str | None = field(
        default=None, metadata={"help": "column of masks of parquet files or of a data set on the Hub"}
    )
    reduce_labels: bool | None = field(
        default=None,
        metadata={"help": "whether 0 in a mask is no class, as in ADE20K, and 1 the first; when not given: of ADE20K"},
    )


@dataclass
class MaskSource:
    """
    Images with masks, by position, undecoded.

    Args:
        images ([`ImageSource`]): The images.
        masks (`Sequence`): Of each a mask (H, W) uint8 as an array, or as a stored file; 255 counts for nothing.
        reduce_labels (`bool`): Whether 0 in a stored mask is no class, and 1 the first.
        skipped (`list[dict]`): Images and masks left out with their pairs, of [`~readable.readable_positions`].
    """

    images: ImageSource
    masks: Sequence
    reduce_labels: bool = False
    skipped: list[dict] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def mask(self, index: int) -> np.ndarray:
        """The classes (H, W) uint8 of an image's pixels; raises `InputError` naming the file if it has none."""
        if isinstance(self.masks, np.ndarray):
            item = self.masks[index]
        else:
            mode, item = self.mask_images().read(index, lambda image: (image.mode, np.asarray(image)))
            if mode not in ("L", "P", "1"):
                raise InputError(
                    f"Mask number {index} of {self.images.name} has mode {mode}; give masks of one channel of 8 bits, "
                    "whose values are classes."
                )
            item = item.astype(np.uint8)
        # 0 becomes 255, 255 stays
        return np.where(item == IGNORED, IGNORED, item - np.uint8(1)) if self.reduce_labels else item

    def mask_images(self) -> ImageSource:
        """The masks as images."""
        return ImageSource(self.masks, name=f"the masks of {self.images.name}")

    def take(self, indices: np.ndarray) -> "MaskSource":
        """The images at some positions."""
        return dataclasses.replace(self, images=self.images.take(indices), masks=self.masks[indices])

    def readable(self, num_workers: int, progress: bool) -> "MaskSource":
        """The pairs whose image and mask can be read; the arguments are those of [`~readable.readable_positions`]."""
        kept, skipped_images = readable_positions(self.images, num_workers, progress)
        source = self.take(kept)
        kept, skipped_masks = readable_positions(source.mask_images(), num_workers, progress)
        return dataclasses.replace(source.take(kept), skipped=skipped_images + skipped_masks)


class MaskDataset(torch.utils.data.Dataset):
    """
    Whole images and their masks, both resized to a square: `pixel_values` (3, S, S) uint8, `masks` (S, S) uint8.

    Args:
        source ([`MaskSource`]): The images.
        image_size (`(height, width)`): S.
        num_classes (`int`): Classes that masks may have.
    """

    def __init__(self, source: MaskSource, image_size: tuple[int, int], num_classes: int):
        self.source, self.num_classes = source, num_classes
        self.transform: Callable = v2.Compose([
            v2.Resize(image_size, interpolation=InterpolationMode.BICUBIC), v2.PILToTensor()
        ])  # fmt: skip
        self.size = image_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict:
        image, mask = self.source.images.image(index), self.source.mask(index)
        if image.size != mask.shape[::-1]:
            raise InputError(
                f"Image number {index} of {self.source.images.name} has {image.size[1]}x{image.size[0]} pixels, and "
                f"its mask {mask.shape[0]}x{mask.shape[1]}; mend one."
            )
        if (highest := mask[mask != IGNORED].max(initial=0)) >= self.num_classes:
            raise InputError(
                f"The mask of image number {index} of {self.source.images.name} has class {highest}, and there are "
                f"{self.num_classes}, from 0; mend it, or name another --mask_column."
            )
        mask = np.array(PILImage.fromarray(mask).resize(self.size[::-1], PILImage.Resampling.NEAREST))
        return {"pixel_values": self.transform(image), "masks": torch.from_numpy(mask)}


def load_mask_sources(
    arguments: MaskArguments, image_size: int = 32, progress: bool = True, num_workers: int = 0
) -> tuple[MaskSource, MaskSource, list[str]]:
    """
    Loads images with masks to train on and to evaluate on; pairs that cannot be read are left out.

    Args:
        arguments ([`MaskArguments`]): Where they are, and how many.
        image_size (`int`): Pixels of a rendered scene's side.
        progress (`bool`): Whether to show bars.
        num_workers (`int`): Processes that look which can be read; 0: this one.

    Returns:
        The train and the evaluation [`MaskSource`], and the classes' names.

    Raises:
        InputError: There are no such images, no masks of them, or too many that cannot be read.
    """
    if arguments.dataset == "scenes":
        return *(_scenes(arguments, split, image_size, progress) for split in NUM_SCENES), ["background", *KIND_NAMES]
    path = Path(arguments.dataset).expanduser()
    if (path / "annotations").is_dir():
        train, test = (_folder(path, names) for names in _FOLDERS.values())
        is_ade = (path / "objectInfo150.txt").is_file()
        reduce_labels = is_ade if arguments.reduce_labels is None else arguments.reduce_labels
        train = choose_masks(train, arguments.num_train_images)
        test = choose_masks(test, arguments.num_eval_images)
    else:
        train, test = _table(arguments)
        is_ade, reduce_labels = False, bool(arguments.reduce_labels)
    train.reduce_labels = test.reduce_labels = reduce_labels
    train, test = train.readable(num_workers, progress), test.readable(num_workers, progress)
    return train, test, _ade_names(path) if is_ade else _names_found(train, progress)


def choose_masks(source: MaskSource, number: int | None) -> MaskSource:
    """A fixed random choice of so many images, as [`~sources.choose_images`] makes it."""
    positions = ImageSource(np.arange(len(source)))
    return source.take(choose_images(positions, number).images)


def _scenes(arguments: MaskArguments, split: str, image_size: int, progress: bool) -> MaskSource:
    """Rendered scenes; a pixel's class is the kind of the object there, or the background."""
    asked = arguments.num_train_images if split == "train" else arguments.num_eval_images
    scenes = render_scenes(asked or NUM_SCENES[split], SCENES_SEED[split], image_size, progress)
    masks = np.where(scenes["mask"] > 0, scenes["kind"][:, None, None] + 1, 0).astype(np.uint8)
    return MaskSource(ImageSource(scenes["image"], name=f"scenes ({split})"), masks)


def _folder(path: Path, names: tuple[str, ...]) -> MaskSource:
    """A split of a folder with `images/SPLIT` and `annotations/SPLIT`, whose files are called alike."""
    split = next((name for name in names if (path / "images" / name).is_dir()), None)
    if split is None:
        raise InputError(f"{path / 'images'} has no folder {' or '.join(names)}; mend --dataset.")
    files = [file for file in sorted((path / "images" / split).rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise InputError(f"{path / 'images' / split} holds no image; mend --dataset.")
    masks = [
        (path / "annotations" / split / file.relative_to(path / "images" / split)).with_suffix(".png")
        for file in files
    ]
    if missing := [mask for mask in masks if not mask.is_file()]:
        raise InputError(f"{len(missing)} images have no mask, such as {missing[0]}; add them or remove the images.")
    images = ImageSource(StoredImages.of_files(files), name=f"{path} ({split})")
    return MaskSource(images, StoredImages.of_files(masks))


def _table(arguments: MaskArguments) -> tuple[MaskSource, MaskSource]:
    """The splits of parquet files or of a data set on the Hub that has a column of masks beside that of images."""
    if arguments.mask_column is None:
        raise InputError(
            f"{arguments.dataset} has no folder `annotations`; give a folder with `images` and `annotations`, or say "
            "which column of a table holds masks with --mask_column."
        )
    images = load_sources(arguments)
    masks = load_sources(dataclasses.replace(arguments, image_column=arguments.mask_column))
    return tuple(MaskSource(of_split, mask.images) for of_split, mask in zip(images, masks, strict=True))


def _ade_names(path: Path) -> list[str]:
    """The names of ADE20K's 150 classes, the last column of a table with a heading."""
    file = path / "objectInfo150.txt"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()[1:]
        return [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}); download it again.") from error


def _names_found(source: MaskSource, progress: bool) -> list[str]:
    """Numbers from 0 to the highest class of the train masks."""
    highest = 0
    for index in tqdm(range(len(source)), desc="looking for classes", disable=not progress):
        mask = source.mask(index)
        highest = max(highest, int(mask[mask != IGNORED].max(initial=0)))
    return [str(number) for number in range(highest + 1)]
