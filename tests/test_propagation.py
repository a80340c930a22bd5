"""Masks carried through videos: the rule and DAVIS' scores in slow loops, planted motion, folders, the command."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import seeded, tiny_model, tiny_sjea
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trainers.cli import main
from trainers.clips import ClipArguments, load_clips, objects_of
from trainers.datasets import ImageSource
from trainers.errors import InputError
from trainers.mask_scores import contour, contour_accuracy, region_similarity
from trainers.mask_sources import MaskSource
from trainers.propagation import PropagationArguments, Propagator, carry_labels, hard_labels
from trainers.propagation_evaluation import Unmoved, evaluate_propagation, score_clip, summarize_clips
from trainers.scene_clips import _look, render_clip

QUIET = PropagationArguments(disable_tqdm=True)


def unit(*shape, seed=0) -> torch.Tensor:
    return nn.functional.normalize(torch.randn(*shape, generator=seeded(seed)), dim=-1)


@pytest.mark.parametrize(("reach", "top_k"), [(1, 3), (2, 5), (12, 50), (0, 5)])
def test_a_patch_takes_the_labels_of_those_most_like_it_nearby(reach, top_k):
    height, width, num_frames = 4, 5, 3
    features, context = unit(height, width, 6), unit(num_frames, height, width, 6, seed=1)
    labels = torch.rand(num_frames, height, width, 2, generator=seeded(2))
    arguments = PropagationArguments(neighbourhood=reach, top_k=top_k, temperature=0.2)
    found = carry_labels(features, context, labels, arguments)
    for row in range(height):
        for column in range(width):
            near = []
            for frame in range(num_frames):
                for y in range(height):
                    for x in range(width):
                        if abs(y - row) <= reach and abs(x - column) <= reach:
                            likeness = float(features[row, column] @ context[frame, y, x])
                            near.append((likeness, labels[frame, y, x]))
            near = sorted(near, key=lambda pair: -pair[0])[:top_k]
            weights = [math.exp(likeness / 0.2) for likeness, _ in near]
            expected = sum(weight * label for weight, (_, label) in zip(weights, near, strict=True)) / sum(weights)
            torch.testing.assert_close(found[row, column], expected)


def test_the_least_of_a_label_becomes_0_and_the_greatest_1():
    labels = torch.tensor([[[0.9, 0.1], [0.6, 0.4]], [[0.9, 0.1], [0.9, 0.1]]])
    hard = hard_labels(labels, (8, 8), (8, 8))
    # the patch above to the right is the object, though 0.6 is more than 0.4; bilinear, so not half way to the others
    assert hard.shape == (8, 8) and hard[:2, 6:].all() and not hard[4:].any() and not hard[:, :4].any()
    assert hard_labels(labels, (8, 8), (16, 24)).shape == (16, 24)


def masks_of_shapes():
    true, found = np.zeros((2, 40, 50), bool)
    true[5:20, 5:20], true[30:36, 30:45] = True, True
    found[7:20, 4:21] = True
    return true, found


def slow_contour_accuracy(true, found):
    contours = []
    for mask in (true, found):
        places = set()
        for y, x in np.ndindex(mask.shape):
            others = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            within = [(min(row, mask.shape[0] - 1), min(column, mask.shape[1] - 1)) for row, column in others]
            if any(mask[y, x] != mask[other] for other in within):
                places.add((y, x))
        contours.append(places)
    reach = math.ceil(0.008 * math.sqrt(true.shape[0] ** 2 + true.shape[1] ** 2))
    of_true, of_found = (
        sum(any(math.dist(place, other) <= reach for other in others) for place in places) / len(places)
        for places, others in (contours, contours[::-1])
    )
    return 2 * of_true * of_found / (of_true + of_found)


def test_regions_and_contours_are_scored_as_in_slow_loops():
    true, found = masks_of_shapes()
    both, either = (true & found).sum(), true.sum() + found.sum() - (true & found).sum()
    assert region_similarity(true, found) == pytest.approx(both / either)
    accuracy = contour_accuracy(true, found)
    assert accuracy == pytest.approx(slow_contour_accuracy(true, found)) and 0.2 < accuracy < 0.9
    assert accuracy == contour_accuracy(found, true)
    wide = np.zeros((2, 300, 400), bool)
    wide[0, 50:90, 60:200], wide[1, 53:93, 60:200] = True, True  # 3 of 4 pixels that count as near
    assert contour_accuracy(*wide) == 1.0
    wide[1] = np.roll(wide[0], 6, axis=0)
    assert contour_accuracy(*wide) == pytest.approx(slow_contour_accuracy(*wide))


def test_masks_without_objects_have_their_limits():
    true, _ = masks_of_shapes()
    nothing = np.zeros_like(true)
    assert region_similarity(nothing, nothing) == contour_accuracy(nothing, nothing) == 1
    assert region_similarity(true, nothing) == contour_accuracy(true, nothing) == contour_accuracy(nothing, true) == 0
    assert not contour(np.ones((5, 5), bool)).any()
    assert contour_accuracy(true, np.roll(true, 15, axis=1)) < 1


class Colors(nn.Module):
    """An "encoder" whose features are the mean colours of 4x4 patches."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values):
        pooled = nn.functional.avg_pool2d(pixel_values, 4).permute(0, 2, 3, 1)
        return BaseModelOutputWithPooling(pooler_output=pooled * self.weight)


def moving(num_frames=6) -> MaskSource:
    """Two squares of 8 pixels that move by a patch of 4 a frame, one to the right, one down, on gray."""
    frames = np.full((num_frames, 40, 48, 3), 90, np.uint8)
    masks = np.zeros((num_frames, 40, 48), np.uint8)
    for number in range(num_frames):
        for value, color, (row, column) in (
            (1, (250, 0, 0), (4, 4 * number)),
            (5, (0, 0, 250), (12 + 4 * number, 36)),
        ):
            frames[number, row : row + 8, column : column + 8] = color
            masks[number, row : row + 8, column : column + 8] = value
    return MaskSource(ImageSource(frames, name="moving"), masks)


def propagator(encoder=None) -> Propagator:
    return Propagator("colours", encoder or Colors(), (4, 4), [0.35, 0.35, 0.35], [0.25] * 3)


def test_what_moves_and_keeps_its_colour_is_followed():
    clip = moving()
    masks = list(propagator().masks(clip, QUIET, 40))
    assert len(masks) == 5 and masks[0].dtype == np.uint8 and set(np.unique(masks[-1])) == {0, 1, 5}
    scores = score_clip(clip, masks)
    still = score_clip(clip, list(Unmoved().masks(clip, QUIET, 40)))
    assert scores.shape == still.shape == (2, 2)
    assert scores.min() > 0.7 and still[:, 0].max() < 0.4
    # out of reach of the neighbourhood there is nothing to take a label from but the background
    near = PropagationArguments(neighbourhood=0, disable_tqdm=True)
    assert score_clip(clip, list(propagator().masks(clip, near, 40)))[:, 0].max() < 0.5


def test_frames_are_read_in_whole_patches_and_masks_are_of_the_frames_size():
    masks = list(propagator().masks(moving(3), QUIET, 22))
    assert [mask.shape for mask in masks] == [(40, 48)] * 2
    assert propagator()._size((48, 40), 22) == (24, 28) and propagator()._size((40, 48), 3) == (4, 4)


def test_labels_come_from_the_first_frame_and_those_just_before():
    seen = []

    class Counting(Colors):
        def forward(self, pixel_values):
            seen.append(pixel_values)
            return super().forward(pixel_values)

    # an object that changes its colour in one frame is found afterwards by its first, with or without frames before
    clip = moving()
    clip.images.images[1, 4:12, 4:12] = (0, 250, 0)
    alone = PropagationArguments(num_context_frames=0, disable_tqdm=True)
    masks = list(propagator(Counting()).masks(clip, alone, 40))
    assert len(seen) == len(clip)
    with_one_before = PropagationArguments(num_context_frames=1, disable_tqdm=True)
    for found in (masks, list(propagator().masks(clip, with_one_before, 40))):
        assert region_similarity(clip.mask(5) == 1, found[4] == 1) > 0.7
    # one that has changed for good is followed by the frames before alone
    clip = moving()
    for number in range(6):
        share = number / 5
        color = np.array([250 * (1 - share), 250 * share, 0])
        clip.images.images[number, 4:12, 4 * number : 4 * number + 8] = color
    followed = [
        region_similarity(clip.mask(5) == 1, list(propagator().masks(clip, arguments, 40))[4] == 1)
        for arguments in (PropagationArguments(num_context_frames=2), alone)
    ]
    assert followed[0] > 0.7 > 0.3 > followed[1]


def test_scores_leave_out_the_first_the_last_and_what_does_not_count():
    clip = moving(4)
    masks = [clip.mask(1), np.zeros((40, 48), np.uint8), np.full((40, 48), 3, np.uint8)]
    assert score_clip(clip, masks).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    wrong = [clip.mask(1).copy(), clip.mask(2), masks[2]]
    wrong[0][0, 47] = 1
    assert score_clip(clip, wrong)[0, 0] < 1
    clip.masks[1, 0, 47] = 255
    assert score_clip(clip, wrong).tolist() == [[1, 1], [1, 1]]


def test_masks_that_do_not_move_are_the_first_one_without_what_does_not_count():
    clip = moving(3)
    clip.masks[0, 0, 47] = 255
    first = moving(3).mask(0)
    assert [np.array_equal(mask, first) for mask in Unmoved().masks(clip, QUIET, 40)] == [True, True]


def test_means_are_over_objects_and_intervals_over_videos():
    scores = [np.array([[0.2, 0.4]]), np.array([[0.6, 0.8], [1.0, 0.6], [0.8, 1.0]])]
    row = summarize_clips(scores, 0)
    assert row["j"] == pytest.approx(65) and row["f"] == pytest.approx(70) and row["j_and_f"] == pytest.approx(67.5)
    assert row["j_interval"] == pytest.approx([20, 80]) and row["j_and_f_interval"] == pytest.approx([30, 80])
    assert summarize_clips(scores[1:], 0)["f_interval"] == pytest.approx([80, 80])


@pytest.mark.parametrize("model", [tiny_model(image_size=16), tiny_sjea(image_size=16)])
def test_models_are_set_beside_others(model):
    clips = load_clips(ClipArguments(num_clips=3, num_frames=4), 16, progress=False)
    taken = []
    arguments = PropagationArguments(num_random_encoders=2, disable_tqdm=True)
    results = evaluate_propagation(model, clips, arguments, on_masks=lambda *masks: taken.append(masks))
    labels = [row["encoder"] for row in results["rows"]]
    assert labels[1:] == ["random encoder 1", "random encoder 2", "raw pixels", "the first mask, unmoved"]
    assert results["num_frames"] == 12 and results["num_objects"] == sum(len(objects_of(clip)) for clip in clips)
    assert [(label, clip.images.name) for label, clip, _ in taken[:2]] == [(labels[0], f"clip-0{n}") for n in (0, 1)]
    scores = [score_clip(clip, masks) for label, clip, masks in taken if label == labels[0]]
    assert results["rows"][0]["j"] == pytest.approx(100 * np.concatenate(scores)[:, 0].mean())
    assert len({row["j_and_f"] for row in results["rows"]}) > 1


def test_an_encoder_that_diverged_is_refused():
    model = tiny_model(image_size=16)
    model.cjepa.layernorm.bias.data[0] = np.nan
    clips = load_clips(ClipArguments(num_clips=1, num_frames=3), 16, progress=False)
    with pytest.raises(InputError, match="embeddings of the target encoder are not finite"):
        evaluate_propagation(model, clips, PropagationArguments(num_random_encoders=0, disable_tqdm=True))


def test_clips_are_the_same_at_every_call_and_begin_and_end_on_an_object():
    frames, masks = render_clip(3, 7, 5, 32)
    again = render_clip(3, 7, 9, 32)
    assert frames.shape == (5, 32, 32, 3) and masks.shape == (5, 32, 32)
    assert np.array_equal(masks[[0, 2, 4]], again[1][[0, 4, 8]]) and np.array_equal(frames[0], again[0][0])
    seen_in_the_middle = np.array([render_clip(1, index, 3, 32)[1][[0, -1], 15:17, 15:17] for index in range(20)])
    assert seen_in_the_middle.any(axis=(2, 3)).all()
    # and not always on the same: the camera flies
    assert (seen_in_the_middle[:, 0] != seen_in_the_middle[:, 1]).all(axis=(1, 2)).any()
    assert not np.array_equal(masks[0], masks[-1]) and not np.array_equal(masks, render_clip(3, 8, 5, 32)[1])


def test_grain_changes_from_frame_to_frame_and_light_does_not():
    frames = render_clip(0, 4, 400, 32)[0].astype(float)  # so slow that two frames show the same
    assert np.abs(frames[1] - frames[0]).mean() > 5
    means = frames.mean(axis=(1, 2))
    assert np.abs(np.diff(means, axis=0)).max() < 0.1 * means.mean()


def test_the_camera_sees_a_part_of_the_scene():
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 4), dtype=np.uint8)
    part = _look(pixels, np.array([0.5, 0.25]), 0.25, 0, 16)
    assert np.array_equal(part, pixels[8:24, 24:40])
    turned = _look(pixels, np.array([0.5, 0.25]), 0.25, np.pi / 2, 16)
    assert np.array_equal(turned, np.rot90(part)) or np.array_equal(turned, np.rot90(part, -1))
    beyond = _look(pixels, np.array([0.0, 0.5]), 0.25, 0, 16)
    assert np.array_equal(beyond[:, 8:], pixels[24:40, :8]) and np.array_equal(beyond[:, :8], beyond[:, :7:-1])


def davis(folder, num_frames=4):
    """A folder laid out as DAVIS 2017, of the moving squares and of one video that the list leaves out."""
    clip = moving(num_frames)
    for name in ("moving", "other"):
        for kind in ("JPEGImages", "Annotations"):
            (folder / kind / "480p" / name).mkdir(parents=True)
        for number in range(num_frames):
            Image.fromarray(clip.images.images[number]).save(
                folder / "JPEGImages" / "480p" / name / f"{number:05d}.jpg", quality=95
            )
            mask = Image.fromarray(clip.mask(number), "P")
            mask.putpalette([value // 3 for value in range(768)])
            mask.save(folder / "Annotations" / "480p" / name / f"{number:05d}.png")
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("moving\n")
    return folder


def test_davis_folders_are_read(tmp_path):
    (clip,) = load_clips(ClipArguments(dataset=str(davis(tmp_path))))
    assert len(clip) == 4 and clip.images.name == "moving" and objects_of(clip).tolist() == [1, 5]
    assert all(np.array_equal(clip.mask(number), moving(4).mask(number)) for number in range(4))
    assert score_clip(clip, list(propagator().masks(clip, QUIET, 40))).min() > 0.7
    assert len(load_clips(ClipArguments(dataset=str(tmp_path), num_frames=3))[0]) == 3


def test_folders_that_lack_something_are_refused(tmp_path):
    folder = davis(tmp_path)
    masks = folder / "Annotations" / "480p" / "moving"
    arguments = ClipArguments(dataset=str(folder))
    Image.new("L", (4, 4), 1).save(masks / "00001.png")
    clips = load_clips(arguments)
    with pytest.raises(InputError, match="Frame 1 of moving has 40x48 pixels, and its mask 4x4"):
        evaluate_propagation(tiny_model(), clips, QUIET)
    (masks / "00002.png").unlink()
    with pytest.raises(InputError, match="1 frames of moving have no mask, such as .*00002.png"):
        load_clips(arguments)
    with pytest.raises(InputError, match=r"train.txt, the list of videos, cannot be read"):
        load_clips(ClipArguments(dataset=str(folder), split="train"))
    with pytest.raises(InputError, match="holds 0 frames"):
        load_clips(ClipArguments(dataset=str(folder), resolution="Full-Resolution"))
    Image.new("L", (48, 40), 255).save(masks / "00000.png")
    Image.new("L", (48, 40), 0).save(masks / "00002.png")
    with pytest.raises(InputError, match="The first mask of moving shows no object"):
        load_clips(arguments)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("")
    with pytest.raises(InputError, match="names no video"):
        load_clips(arguments)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    model = tmp_path_factory.mktemp("run") / "final"
    tiny_model().save_pretrained(model)
    return model


FEW = ["--num_clips", "2", "--num_frames", "3", "--disable_tqdm"]


def test_command_writes_figures_picture_and_masks(model_folder, tmp_path, capsys):
    assert main(["probe", "propagation", str(model_folder), *FEW]) == 0
    said = capsys.readouterr().out
    results = json.loads((model_folder / "propagation" / "propagation.json").read_text())
    labels = [row["encoder"] for row in results["rows"]]
    assert labels == ["target encoder", "random encoder", "raw pixels", "the first mask, unmoved"]
    assert f"{results['rows'][0]['j_and_f']:.1f} (" in said and "2 videos of scenes" in said
    with Image.open(model_folder / "propagation" / "propagation.png") as drawn:
        assert min(drawn.size) > 500
    clip = load_clips(ClipArguments(num_clips=1, num_frames=3), 32, progress=False)[0]
    files = sorted((model_folder / "propagation" / "masks" / "clip-00").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png", "00002.png"]
    read = [np.asarray(Image.open(file)) for file in files]
    assert Image.open(files[0]).mode == "P" and np.array_equal(read[0], clip.mask(0))
    score = score_clip(clip, read[1:])
    both = [score, score_clip(*_second(model_folder))]
    assert results["rows"][0]["j"] == pytest.approx(100 * np.concatenate(both)[:, 0].mean())


def _second(model_folder):
    clip = load_clips(ClipArguments(num_clips=2, num_frames=3), 32, progress=False)[1]
    files = sorted((model_folder / "propagation" / "masks" / "clip-01").iterdir())
    return clip, [np.asarray(Image.open(file)) for file in files[1:]]


def test_command_reads_davis(model_folder, tmp_path, capsys):
    folder = davis(tmp_path)
    flags = ["--dataset", str(folder), "--frame_size", "24", "--output", str(tmp_path / "out"), "--disable_tqdm"]
    assert main(["probe", "propagation", str(model_folder), *flags]) == 0
    assert "shorter side 24 pixels" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "masks" / "moving" / "00003.png") as mask:
        assert mask.size == (48, 40) and set(np.unique(np.asarray(mask))) <= {0, 1, 5}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--num_frames", "2"], "num_frames=2 is too small; set it to 3 or more"),
        (["--temperature", "0"], "temperature=0 must be above 0"),
        (["--top_k", "0"], "top_k=0 is too small"),
        (["--level", "2"], "level=2 is not in this model"),
        (["--dataset", "nowhere"], "the list of videos, cannot be read"),
        (["--output", __file__], "is a file; name a folder"),
    ],
)
def test_wrong_flags_are_one_sentence(model_folder, capsys, flags, words):
    assert main(["probe", "propagation", str(model_folder), *FEW, *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said and "say all" not in said
