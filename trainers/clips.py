"""Videos with a mask of the objects for each frame: rendered clips, or DAVIS' folders."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from trainers.datasets import ImageSource, StoredImages
from trainers.errors import InputError, first_line
from trainers.mask_sources import IGNORED, MaskSource
from trainers.scene_clips import render_clip
from trainers.sources import IMAGE_SUFFIXES, SCENES_SEED

NUM_RENDERED_CLIPS = 64


@dataclass
class ClipArguments:
    """Which videos."""

    dataset: str = field(
        default="scenes",
        metadata={"help": "`scenes` (rendered), or a folder laid out as DAVIS: JPEGImages, Annotations and ImageSets"},
    )
    split: str = field(default="val", metadata={"help": "list of videos in ImageSets/YEAR, without .txt"})
    year: str = field(default="2017", metadata={"help": "folder of lists in ImageSets"})
    resolution: str = field(default="480p", metadata={"help": "folder of frames in JPEGImages and Annotations"})
    num_clips: int | None = field(
        default=None,
        metadata={"help": f"videos, the first ones; when not given all, or {NUM_RENDERED_CLIPS} rendered"},
    )
    num_frames: int | None = field(
        default=None, metadata={"help": "frames of each, the first ones; when not given all, or 16 rendered"}
    )

    def __post_init__(self):
        for name, least in (("num_clips", 1), ("num_frames", 3)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name}={value} is too small; set it to {least} or more.")


def load_clips(arguments: ClipArguments, image_size: int = 32, progress: bool = True) -> list[MaskSource]:
    """
    Loads videos.

    Args:
        arguments ([`ClipArguments`]): Which.
        image_size (`int`): Pixels of a rendered frame's side.
        progress (`bool`): Whether to show a bar.

    Returns:
        `list` of [`~mask_sources.MaskSource`]: The frames of each video with their masks, undecoded where they are
        files; `images.name` is its name.

    Raises:
        InputError: A folder, a list or a file is not there, or a video's first mask shows no object.
    """
    if arguments.dataset == "scenes":
        numbers = range(arguments.num_clips or NUM_RENDERED_CLIPS)
        clips = [
            _rendered(number, arguments.num_frames or 16, image_size)
            for number in tqdm(numbers, desc="rendering clips", disable=not progress)
        ]
    else:
        path = Path(arguments.dataset).expanduser()
        clips = [_folder(path, name, arguments) for name in _names(path, arguments)[: arguments.num_clips]]
    for clip in clips:
        if len(objects_of(clip)) == 0:
            raise InputError(
                f"The first mask of {clip.images.name} shows no object; its values must be 0 for the background and "
                "1, 2, ... for objects, as in DAVIS 2017."
            )
    return clips


def objects_of(clip: MaskSource) -> np.ndarray:
    """The numbers of the objects that a clip's first mask shows."""
    numbers = np.unique(clip.mask(0))
    return numbers[(numbers > 0) & (numbers != IGNORED)]


def _rendered(number: int, num_frames: int, image_size: int) -> MaskSource:
    frames, masks = render_clip(SCENES_SEED["test"], number, num_frames, image_size)
    return MaskSource(ImageSource(frames, name=f"clip-{number:02d}"), masks)


def _names(path: Path, arguments: ClipArguments) -> list[str]:
    """The names of the videos of a split."""
    file = path / "ImageSets" / arguments.year / f"{arguments.split}.txt"
    try:
        names = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file}, the list of videos, cannot be read ({first_line(error)}); mend --dataset, --year or --split."
        ) from error
    if not names:
        raise InputError(f"{file} names no video; mend --dataset, --year or --split.")
    return names


def _folder(path: Path, name: str, arguments: ClipArguments) -> MaskSource:
    """A video of DAVIS: a folder of frames and one of masks of the same names."""
    folders = [path / kind / arguments.resolution / name for kind in ("JPEGImages", "Annotations")]
    frames = sorted(file for file in folders[0].glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    frames = frames[: arguments.num_frames]
    if len(frames) < 3:
        raise InputError(f"{folders[0]} holds {len(frames)} frames, and 3 are needed; mend --dataset or --resolution.")
    masks = [folders[1] / f"{frame.stem}.png" for frame in frames]
    if missing := [mask for mask in masks if not mask.is_file()]:
        raise InputError(f"{len(missing)} frames of {name} have no mask, such as {missing[0]}; add them.")
    return MaskSource(ImageSource(StoredImages.of_files(frames), name=name), StoredImages.of_files(masks))
