"""How well frozen patch features carry masks through videos: a model beside a random encoder, raw pixels, no motion.

Shapes: C videos, K objects of a video.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from trainers.baselines import random_encoders
from trainers.clips import objects_of
from trainers.dense_evaluation import patch_size_of
from trainers.errors import InputError
from trainers.loading import load_with_statistics
from trainers.mask_scores import contour_accuracy, region_similarity
from trainers.mask_sources import IGNORED, MaskSource
from trainers.pooling import pooled_encoder
from trainers.probes import times_drawn
from trainers.propagation import PropagationArguments, Propagator
from trainers.reports import markdown_table, with_interval
from trainers.segmentation import PixelPatches

SCORES = ("j", "f", "j_and_f")


@dataclass
class Unmoved:
    """What every motion has to be followed better than: the first mask, in all frames."""

    label: str = "the first mask, unmoved"

    def masks(self, clip: MaskSource, arguments: PropagationArguments, frame_size: int) -> Iterator[np.ndarray]:
        """As [`Propagator.masks`]."""
        first = clip.mask(0)
        return (np.where(first == IGNORED, 0, first).astype(np.uint8) for _ in range(1, len(clip)))


def evaluate_propagation(
    model,
    clips: list[MaskSource],
    arguments: PropagationArguments | None = None,
    image_mean=IMAGENET_DEFAULT_MEAN,
    image_std=IMAGENET_DEFAULT_STD,
    level: int | None = None,
    frame_size: int | None = None,
    on_masks: Callable[[str, MaskSource, list[np.ndarray]], None] | None = None,
) -> dict:
    """
    DAVIS' J and F of masks that are carried on by a model, a random encoder of its kind and size, and raw pixels.

    Args:
        model (`str`, `Path` or a model): A folder, the id of a model on the Hub, or a model, used where it is.
        clips (`list` of [`~mask_sources.MaskSource`]): The videos with their masks.
        arguments ([`PropagationArguments`], *optional*): How; the defaults when not given.
        image_mean, image_std (`list[float]`): Of the channels, where the folder has no image processor to say.
        level (`int`, *optional*): Of a stack; that of its configuration when not given.
        frame_size (`int`, *optional*): Pixels of a frame's shorter side; the encoder's own size when not given.
        on_masks (`Callable`, *optional*): Is given a row's label, a video, and its masks from the second frame on.

    Returns:
        `dict`: `rows`, a `dict` each of `encoder`, its label, `j`, `f` and `j_and_f` in percent, the mean over all
        objects of all videos, and their `j_interval`, ..., 95 % by bootstrap over the videos; and the settings.

    Raises:
        InputError: There is no whole model, no such level, its features lie on no grid or are not finite, or a mask
            does not fit.
    """
    arguments = arguments or PropagationArguments()
    model, *statistics = load_with_statistics(model, image_mean, image_std)
    encoder, size = model.base_model, pair(model.config.image_size)
    frame_size = frame_size or min(size)
    rows = []
    for propagator in _propagators(model, encoder, size, statistics, arguments, level):
        scores = []
        for clip in tqdm(clips, desc=propagator.label, unit="video", disable=arguments.disable_tqdm):
            masks = list(propagator.masks(clip, arguments, frame_size))
            scores.append(score_clip(clip, masks))
            if on_masks is not None:
                on_masks(propagator.label, clip, masks)
        rows.append({"encoder": propagator.label, **summarize_clips(scores, arguments.seed)})
    return {
        "num_clips": len(clips),
        "num_objects": sum(len(objects_of(clip)) for clip in clips),
        "num_frames": sum(len(clip) for clip in clips),
        "frame_size": frame_size,
        "num_context_frames": arguments.num_context_frames,
        "neighbourhood": arguments.neighbourhood,
        "top_k": arguments.top_k,
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "rows": rows,
    }


def _propagators(model, encoder, size, statistics, arguments: PropagationArguments, level: int | None) -> Iterator:
    """The model's encoder and what it is compared with, each made when it is asked for."""
    label = "target encoder" if isinstance(model, CJepaForPreTraining) else "encoder"
    random = random_encoders(encoder, arguments.num_random_encoders, arguments.seed)
    patch_size = patch_size_of(pooled_encoder(encoder, "patches", level), size)
    for name, each in ((label, encoder), *random):
        maps = pooled_encoder(each.to(encoder.device), "patches", level).eval()
        yield Propagator(name, maps, patch_size, *statistics)
    yield Propagator("raw pixels", PixelPatches(patch_size).to(encoder.device), patch_size, *statistics)
    yield Unmoved()


def score_clip(clip: MaskSource, masks: list[np.ndarray]) -> np.ndarray:
    """
    J and F of each object of a video, means over its frames but the first, which is given, and the last, as in DAVIS.

    Args:
        clip ([`~mask_sources.MaskSource`]): The video with its true masks; pixels of 255 do not count.
        masks (`list` of `np.ndarray` of shape `(H, W)`): Of the frames from the second on.

    Returns:
        `np.ndarray` of shape `(K, 2)`: J and F, 0 to 1.

    Raises:
        InputError: A true mask has not its frame's size.
    """
    objects, scores = objects_of(clip), []
    for index, found in enumerate(masks[:-1], start=1):
        true = clip.mask(index)
        if true.shape != found.shape:
            raise InputError(
                f"Frame {index} of {clip.images.name} has {found.shape[0]}x{found.shape[1]} pixels, and its mask "
                f"{true.shape[0]}x{true.shape[1]}; mend one."
            )
        counted = true != IGNORED
        pairs = [(true == number, (found == number) & counted) for number in objects]
        scores.append([(region_similarity(*each), contour_accuracy(*each)) for each in pairs])
    return np.mean(scores, axis=0)


def summarize_clips(scores: list[np.ndarray], seed: int) -> dict:
    """
    Means over all objects.

    Args:
        scores (`list` of `np.ndarray` of shape `(K, 2)`): J and F of each video's objects.
        seed (`int`): Of the bootstrap.

    Returns:
        `dict`: `j`, `f` and `j_and_f` in percent, and their `j_interval`, ..., 95 % by bootstrap over the videos.
    """
    totals = np.array([[len(each), *each.sum(axis=0)] for each in scores])
    row = {}
    for drawn, suffix in ((np.ones((1, len(scores))), ""), (times_drawn(len(scores), seed), "_interval")):
        numbers, *sums = (drawn @ totals).T
        j, f = (100 * each / numbers for each in sums)
        for name, values in zip(SCORES, (j, f, (j + f) / 2), strict=True):
            row[name + suffix] = np.quantile(values, (0.025, 0.975)).tolist() if suffix else float(values[0])
    return row


def format_propagation(results: dict, dataset: str | Path) -> str:
    """The results as text that is valid Markdown, too: a line with sizes and settings, then the table."""
    cells = [["encoder", "J&F % (95 % interval)", "J % (95 % interval)", "F % (95 % interval)"]]
    for row in results["rows"]:
        cells.append([row["encoder"]] + [
            with_interval(row, name) for name in ("j_and_f", "j", "f")
        ])  # fmt: skip
    settings = (
        f"{results['num_clips']:,} videos of {dataset}, {results['num_objects']:,} objects, {results['num_frames']:,} "
        f"frames, shorter side {results['frame_size']} pixels; labels of the {results['top_k']} patches most like one "
        f"in the first frame and the {results['num_context_frames']} before, at most {results['neighbourhood']} "
        f"patches away, T {results['temperature']}; intervals by bootstrap over the videos; seed {results['seed']}."
    )
    return "\n".join([settings, "", *markdown_table(cells)])
