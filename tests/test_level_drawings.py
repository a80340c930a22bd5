"""The page and the pictures of levels, piece by piece."""

import re

import numpy as np
import pytest
import torch
from levels import NASTY, Page, colored_pixels, sprite_tiles, view_of
from matplotlib.colors import to_rgb
from PIL import Image

from trainers.level_figure import draw_class, draw_levels, subcluster_strips
from trainers.level_page import render_page, thumbnail_sprite
from trainers.level_views import ClassPlot, ClassView, class_colors, structure_table
from trainers.projections import project
from trainers.subclusters import Subclusters, find_subclusters


def test_the_zoomed_class_shows_the_images_nearest_to_its_centres():
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    subclusters = find_subclusters(x)
    members = np.arange(12) * 2
    plot = ClassPlot("level 0", project(x), subclusters, 0.25)
    view = view_of(project(torch.randn(24, 4)), np.arange(24) % 3, class_view=ClassView("cat", members, "why", [plot]))
    page = Page(render_page(view))
    shown = [int(attributes["data-image"]) for _, attributes in page.tags if "data-image" in attributes]
    assert shown == members[np.concatenate(subclusters.nearest)].tolist()
    for _, attributes in page.tags:
        if "data-image" in attributes:  # 24 thumbnails lie in rows of 5
            row, column = divmod(int(attributes["data-image"]), 5)
            assert attributes["style"] == f"--x: {column}; --y: {row}"
    sizes = np.bincount(subclusters.clusters)
    assert page.text_of("small") == [f"{size} images" for size in sizes]
    assert any(f"{subclusters.silhouette:.2f} (mean over all classes 0.25)" in text for text in page.text_of("h3"))
    assert "why" in " ".join(page.text_of("p"))


@pytest.mark.parametrize("size", [(12, 12), (32, 32), (36, 48)])
def test_thumbnails_keep_to_their_cells(size):
    """Neighbours of the strongest contrast leave no trace in a thumbnail."""
    height, width = size
    thumbnails = np.zeros((7, height, width, 3), np.uint8)
    thumbnails[::2] = (255, 0, 0)
    sprite, columns, cell = thumbnail_sprite(thumbnails)
    assert columns == 3 and cell == (-(-width // 8) * 8, -(-height // 8) * 8)
    for thumbnail, tile in zip(thumbnails, sprite_tiles(f'url("{sprite}")', 7, columns, cell), strict=True):
        assert np.abs(tile[:height, :width] - thumbnail).max() < 8


def test_the_sprite_of_the_worst_images_fits_into_ten_megabytes():
    noise = np.random.default_rng(0).integers(0, 256, (2000, 48, 48, 3), np.uint8)
    assert len(thumbnail_sprite(noise)[0]) < 10_000_000


def test_pictures_show_every_class_where_it_is(tmp_path):
    labels = np.arange(60) % 2
    points = np.random.default_rng(0).normal(size=(60, 2)) + 20 * labels[:, None] * [1, 0]
    draw_levels(view_of(points, labels, ["_left", "$x_{1$"]), tmp_path / "levels.png")
    picture = np.asarray(Image.open(tmp_path / "levels.png").convert("RGB"), np.float64)
    height, width, _ = picture.shape
    (left, right) = (colored_pixels(picture, color) for color in class_colors(2))
    # two rows and two columns of plots; the second column is the first turned around
    for top in (0, height // 2):
        first, second = (
            [
                columns[(rows >= top) & (rows < top + height // 2) & (columns // (0.43 * width) == half)]
                for rows, columns in (left, right)
            ]
            for half in (0, 1)
        )
        assert min(map(len, first + second)) > 100
        assert first[0].max() < first[1].min() and second[1].max() < second[0].min()
    # the legend has its colours in full
    assert all(len(colored_pixels(picture, color, alpha=1)[0]) > 30 for color in class_colors(2))


def test_pictures_of_other_points_are_other_pictures(tmp_path):
    points = np.random.default_rng(0).normal(size=(9, 2))
    for name, moved in (("a", points), ("b", points), ("c", points[::-1])):
        draw_levels(view_of(moved, np.arange(9) % 3), tmp_path / f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_a_legend_is_whole_and_many_classes_have_none(tmp_path):
    """It would be larger than the plots; the colours stay."""
    points = np.random.default_rng(0).normal(size=(41, 2))
    ends, widths = [], []
    for number in (40, 41):
        view = view_of(points[:number], np.arange(number), [f"class {i}" for i in range(number)])
        view.plots = view.plots[:1]
        draw_levels(view, tmp_path / "a.png")
        picture = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
        frames = np.flatnonzero((picture < 100).mean(axis=0) > 0.8)
        ends.append(frames.max() / picture.shape[1])
        widths.append(frames.max())
        # beside the plots nothing touches an edge, where it would be cut
        margin = picture[:, frames.max() + 1 :]
        assert all((edge == 255).all() for edge in (margin[:3], margin[-3:], margin[:, -3:]))
    assert ends[0] < 0.8 < 0.95 < ends[1] and widths[0] > 0.9 * widths[1]


def test_strips_are_the_nearest_images_behind_a_bar(tmp_path):
    rng = np.random.default_rng(0)
    thumbnails = rng.integers(0, 256, (10, 6, 5, 3), np.uint8)
    members = np.array([9, 7, 5, 3, 1])
    subclusters = Subclusters(np.array([0, 0, 1, 0, 1]), [np.array([3, 0, 1]), np.array([4, 2])], 0.5)
    plot = ClassPlot("level 0", rng.normal(size=(5, 2)), subclusters, 0.4)
    strips = subcluster_strips(plot, members, thumbnails, ["#ff0000", "#0000ff"])
    assert strips.shape == (2 * 6 + 2, 4 + 8 * 7, 3)
    for row, (color, images) in enumerate([((255, 0, 0), [3, 9, 7]), ((0, 0, 255), [1, 5])]):
        strip = strips[8 * row : 8 * row + 6]
        assert (strip[:, :4] == color).all()
        for column, image in enumerate(images):
            assert np.array_equal(strip[:, 6 + 7 * column : 11 + 7 * column], thumbnails[image])
        assert (strip[:, 4 + 7 * len(images) :] == 255).all()

    draw_class(ClassView(NASTY, members, "why", [plot]), thumbnails, tmp_path / "class.png")
    picture = np.asarray(Image.open(tmp_path / "class.png").convert("RGB"), np.float64)
    assert all(len(colored_pixels(picture, color)[0]) > 30 for color in class_colors(2))
    # the first image of the first strip, pixel by pixel large
    assert all(len(colored_pixels(picture, pixel / 255, alpha=1)[0]) > 30 for pixel in thumbnails[3].reshape(-1, 3))


@pytest.mark.parametrize("number", [1, 12, 20, 21, 60])
def test_classes_have_colors_of_their_own(number):
    colors = class_colors(number)
    assert len(set(colors)) == number and all(re.fullmatch("#[0-9a-f]{6}", color) for color in colors)
    rgb = np.array([to_rgb(color) for color in colors])
    if number <= 20:
        gaps = np.linalg.norm(rgb[:, None] - rgb, axis=2) + np.eye(number) * 9
        assert gaps.min() > 0.15


def test_a_summary_is_a_row_of_the_table_too():
    entry = {"silhouette": -0.05, "silhouette_interval": [-0.08, -0.02], "nmi": 0.5, "nmi_interval": None}
    entry |= {"knn": 70.04, "knn_interval": [69.0, 71.08]}
    table = structure_table([{"encoder": "three runs", "dim": 64, "structure": {"fine": entry}}])
    assert table == [
        ["encoder", "width", "fine: silhouette", "fine: NMI", "fine: kNN %"],
        ["three runs", "64", "-0.050 (-0.080 to -0.020)", "0.500", "70.0 (69.0 to 71.1)"],
    ]
