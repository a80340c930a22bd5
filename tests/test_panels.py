"""Panels of a picture, and the patches in them, against slices worked by hand."""

import numpy as np
from PIL import Image

from trainers.panels import HIDDEN, Outline, Panel, PatchGrid, draw_panels

VIEW = np.random.default_rng(0).integers(0, 190, (12, 20, 3), dtype=np.uint8)
# 4 x 4 patches of 3 x 5 pixels
GRID = PatchGrid(4, (3, 5))


def test_other_patches_are_hidden():
    shown = GRID.show(VIEW, np.array([0, 6, 15]))
    expected = np.full_like(VIEW, 200)
    expected[:3, :5], expected[3:6, 10:15], expected[9:, 15:] = VIEW[:3, :5], VIEW[3:6, 10:15], VIEW[9:, 15:]
    assert np.array_equal(shown, expected) and HIDDEN == (200, 200, 200)


def test_blocks_are_outlined():
    block = np.array([5, 6, 7, 9, 10, 11, 13, 14, 15])
    assert GRID.outline(block, "red") == Outline(top=3, left=5, height=9, width=15, color="red")
    assert GRID.outline(np.array([8]), "red") == Outline(6, 0, 3, 5, "red")


def test_surroundings_of_a_patch():
    pixels, around = GRID.surroundings(VIEW, 9, 1)
    assert np.array_equal(pixels, VIEW[3:12, 0:15]) and around == PatchGrid(3, (3, 5))
    pixels, _ = GRID.surroundings(VIEW, 3, 1)
    assert pixels.shape == (9, 15, 3)
    assert np.array_equal(pixels[3:, :10], VIEW[:6, 10:])
    assert (pixels[:3] == 200).all() and (pixels[:, 10:] == 200).all()


def test_rows_may_be_of_different_length(tmp_path):
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    red, green, blue = (
        Panel(np.full((10, 10, 3), color, np.uint8), "$a_{1$ long title of several lines") for color in colors
    )
    green.outlines = [Outline(4, 2, 3, 5, "#000000")]
    draw_panels([[red, green], [blue]], tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    assert pixels.shape[1] == 560
    places = [np.argwhere(np.abs(pixels - color).sum(axis=2) < 10) for color in colors]
    (red_low, red_high), (green_low, green_high), (blue_low, blue_high) = ((p.min(0), p.max(0)) for p in places)
    assert red_high[1] < green_low[1] and red_high[0] < blue_low[0] and np.array_equal(red_low[1:], blue_low[1:])
    assert np.array_equal(green_low[:1], red_low[:1]) and np.array_equal(green_high[:1], red_high[:1])
    # the outline, a tenth of the panel for each pixel, is black and what is in it stays green
    side = green_high - green_low + 1
    black = np.argwhere(pixels.sum(axis=2) < 30)
    black = black[(black >= green_low).all(axis=1) & (black <= green_high).all(axis=1)]
    expected = [green_low + side * (0.4, 0.2), green_low + side * (0.7, 0.7)]
    assert np.abs(np.array([black.min(0), black.max(0)]) - expected).max() <= 4
    middle = np.round(green_low + side * 0.5).astype(int)
    assert pixels[tuple(middle)].tolist() == [0, 250, 0]
