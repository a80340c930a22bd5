"""The two views: seeded, different, and of one distribution whether workers or the device change the colours."""

import numpy as np
import pytest
import torch
from PIL import Image

from trainers.datasets import ImageDataset, ImageSource, seeded
from trainers.errors import InputError
from trainers.scenes import render_scenes
from trainers.views import DeviceColors, TwoViewDataArguments, ViewDataArguments, blur_kernel, view_transform

SIZE = (32, 32)
# whole images, so that what is left to change are the colours
WHOLE = {"crop_scale": [1.0, 1.0], "horizontal_flip": False}
OFF = {"color_jitter_probability": 0.0, "grayscale_probability": 0.0}


@pytest.fixture(scope="module")
def pictures():
    return render_scenes(300, seed=3, image_size=32, progress=False)["image"]


def by_workers(pictures, **changes):
    transform = view_transform(SIZE, TwoViewDataArguments(**WHOLE, **changes), 2)
    with seeded(0):
        return torch.cat([transform(Image.fromarray(picture)) for picture in pictures])


def on_device(pictures, **changes):
    colors = DeviceColors(SIZE, TwoViewDataArguments(**WHOLE, **changes))
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).repeat_interleave(2, dim=0)
    with seeded(0):
        return torch.cat([colors(batch) for batch in images.split(10)])  # an order of the changes a batch


def statistics(views, pictures):
    """What tells one augmentation from another, an image at a time: (mean over images, standard error)."""
    x = views.float() / 255
    before = torch.from_numpy(pictures).permute(0, 3, 1, 2).repeat_interleave(2, dim=0).float() / 255
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    gray, gray_before = (x * luma).sum(1), (before * luma).sum(1)
    per_image = {
        "brightness": gray.mean((1, 2)) - gray_before.mean((1, 2)),
        "spread of brightness": (gray.mean((1, 2)) / gray_before.mean((1, 2)).clamp_min(0.02)).log().abs(),
        "contrast": gray.std((1, 2)) - gray_before.std((1, 2)),
        "saturation": x.std(1).mean((1, 2)) - before.std(1).mean((1, 2)),
        "is gray": (x.std(1).amax((1, 2)) < 0.01).float(),
        "is unchanged": ((x - before).abs().amax((1, 2, 3)) < 0.01).float(),
        "red": x[:, 0].mean((1, 2)) - before[:, 0].mean((1, 2)),
        "roughness": (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
        - (before[..., 1:] - before[..., :-1]).abs().mean((1, 2, 3)),
    }
    return {name: (v.mean().item(), v.std().item() / len(v) ** 0.5) for name, v in per_image.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blur_probability": 0.5, **OFF},
        {"solarize_probability": 0.3, **OFF},
        {"grayscale_probability": 0.5, "color_jitter_probability": 0.0},
        {"color_jitter": [0.8, 0.0, 0.0, 0.0], "color_jitter_probability": 1.0, "grayscale_probability": 0.0},
        {"color_jitter": [0.0, 0.8, 0.0, 0.0], "color_jitter_probability": 1.0, "grayscale_probability": 0.0},
        {"color_jitter": [0.0, 0.0, 0.8, 0.0], "color_jitter_probability": 1.0, "grayscale_probability": 0.0},
        {"color_jitter": [0.0, 0.0, 0.0, 0.3], "color_jitter_probability": 1.0, "grayscale_probability": 0.0},
    ],
    ids=["paper", "blur", "solarize", "gray", "brightness", "contrast", "saturation", "hue"],
)
def test_device_and_workers_draw_from_one_distribution(pictures, changes):
    ours, theirs = (statistics(make(pictures, **changes), pictures) for make in (by_workers, on_device))
    for name, (mean, error) in ours.items():
        other, other_error = theirs[name]
        allowed = 4 * (error**2 + other_error**2) ** 0.5 + 0.004  # the rounding to 8 bits after each step by workers
        assert abs(mean - other) < allowed, f"{name}: {mean:.4f} by workers, {other:.4f} on the device"


@pytest.mark.parametrize("make", [by_workers, on_device])
def test_shares_are_those_of_the_paper(pictures, make):
    views = make(pictures)
    found = statistics(views, pictures)
    are_gray = ((views.float().std(1) < 1).flatten(1).all(1)).float().mean().item()
    was_gray = (torch.from_numpy(pictures).float().std(3) < 1).flatten(1).all(1).float().mean().item()
    assert are_gray == pytest.approx(0.2 + 0.8 * was_gray, abs=0.05)
    assert found["is unchanged"][0] == pytest.approx(0.2 * 0.8, abs=0.05)
    first, second = views[0::2], views[1::2]
    assert (first != second).flatten(1).any(1).float().mean() > 0.9  # each view has parameters of its own


def test_views_are_a_function_of_seed_epoch_and_index(pictures):
    dataset = ImageDataset(ImageSource(pictures), view_transform(SIZE, TwoViewDataArguments(), 2), seed=5)
    first = dataset[7]["pixel_values"]
    assert first.shape == (2, 3, 32, 32) and first.dtype == torch.uint8
    dataset[8], torch.rand(3)
    assert torch.equal(dataset[7]["pixel_values"], first)
    assert not torch.equal(dataset[8]["pixel_values"], first) and not torch.equal(first[0], first[1])
    dataset.set_epoch(1)
    assert not torch.equal(dataset[7]["pixel_values"], first)


def test_crops_and_flips_stay_with_the_workers(pictures):
    data = TwoViewDataArguments()
    plain = view_transform(SIZE, data, 2, with_colors=False)(Image.fromarray(pictures[0]))
    assert plain.shape == (2, 3, 32, 32) and not torch.equal(plain[0], plain[1])
    mirrored = view_transform(SIZE, TwoViewDataArguments(**{**WHOLE, "horizontal_flip": True}), 2, with_colors=False)
    flipped = 0
    for picture in pictures[:100]:
        whole = torch.from_numpy(picture).permute(2, 0, 1)
        for view in mirrored(Image.fromarray(picture)):
            assert torch.equal(view, whole) or torch.equal(view, whole.flip(2))
            flipped += int(torch.equal(view, whole.flip(2)))
    assert flipped == pytest.approx(100, abs=30)


def test_device_colors_are_a_function_of_the_seed(pictures):
    once, again = on_device(pictures[:20]), on_device(pictures[:20])
    assert torch.equal(once, again) and once.dtype == torch.uint8
    # two views of an image are alike only where neither is changed, which 16 in 100 views are not
    assert len(np.unique(once.numpy().reshape(40, -1), axis=0)) > 32


def test_blur_is_a_tenth_of_the_image():
    assert [blur_kernel((size, size)) for size in (32, 96, 224)] == [3, 9, 23]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"color_jitter": [0.4, 0.4]}, "color_jitter=.* must be four numbers"),
        ({"color_jitter": [0.4, 0.4, 0.4, 0.6]}, "the last up to 0.5"),
        ({"grayscale_probability": 1.5}, r"grayscale_probability=1.5 is not in \[0, 1\]"),
        ({"color_augmentation": "gpu"}, "color_augmentation='gpu' is not known; choose one of auto, workers, device"),
    ],
)
def test_unfit_values_are_named(values, message):
    with pytest.raises(InputError, match=message):
        TwoViewDataArguments(**values)


def test_colors_of_small_views_and_on_a_gpu_are_changed_for_a_whole_batch():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    data = TwoViewDataArguments()
    assert data.colors_on(gpu, (224, 224)) and data.colors_on(cpu, SIZE) and not data.colors_on(cpu, (64, 64))
    assert TwoViewDataArguments(color_augmentation="device").colors_on(cpu, (64, 64))
    assert not TwoViewDataArguments(color_augmentation="workers").colors_on(gpu, SIZE)
    assert not ViewDataArguments().colors_on(gpu, SIZE)  # whose colours stay as they are


def test_crops_alone_are_ijepas():
    plain = view_transform(SIZE, ViewDataArguments(**WHOLE | {"horizontal_flip": False}))
    picture = pictures_of_one()
    assert torch.equal(plain(Image.fromarray(picture)), torch.from_numpy(picture).permute(2, 0, 1))
    assert view_transform(SIZE, ViewDataArguments(), 3)(Image.fromarray(picture)).shape == (3, 3, *SIZE)


def pictures_of_one():
    return render_scenes(1, seed=3, image_size=32, progress=False)["image"][0]
