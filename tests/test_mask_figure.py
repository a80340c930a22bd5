"""Masks that are drawn against those that the sampler gives, patch by patch."""

import json

import numpy as np
import pytest
import torch
from pictures import image_files, refused
from PIL import Image
from tiny import tiny_config, tiny_model, tiny_sjea

from modeling_cjepa.masking_cjepa import sample_block_masks
from trainers.cli import main
from trainers.datasets import sample_seed
from trainers.mask_figure import draw_masks, mask_panels, masks_by_level, visualize_masks

UPPER = {"upper_levels": [{"hidden_size": 16, "num_hidden_layers": 1}], "min_context_patches": 8}
GEOMETRY = {"target_scale": (0.1, 0.3), "num_target_blocks": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_model(**GEOMETRY).save_pretrained(folder / "cjepa")
    tiny_model(**UPPER).save_pretrained(folder / "stack")
    tiny_model(image_size=12).save_pretrained(folder / "small")
    tiny_sjea().save_pretrained(folder / "sjea")
    return folder


def test_masks_are_those_of_the_sampler(models, tmp_path):
    results = visualize_masks(models / "cjepa", image_files(tmp_path, 3), tmp_path / "out", seed=5, num_draws=2)
    assert json.loads((tmp_path / "out/masks.json").read_text()) == results
    for number, draw in enumerate(results["draws"]):
        generator = torch.Generator().manual_seed(sample_seed(5, number))
        contexts, targets = sample_block_masks(3, (8, 8), **GEOMETRY, generator=generator)
        (entry,) = draw
        assert entry["context_ids"] == contexts.tolist() and entry["target_ids"] == targets.tolist()
        assert entry["num_context_patches"] == contexts.shape[1] and entry["grid"] == [8, 8]
        assert (entry["num_target_blocks"], entry["num_block_patches"]) == targets.shape[1:]
    assert results["draws"][0] != results["draws"][1]
    other = visualize_masks(models / "cjepa", image_files(tmp_path, 3), tmp_path / "out", seed=6)
    assert other["draws"][0] != results["draws"][0]


@pytest.mark.parametrize("changes", [GEOMETRY, UPPER])
def test_patches_are_drawn_where_they_are(changes):
    model = tiny_model(**changes)
    masks = draw_masks(model, 2, 0)
    levels = masks_by_level(model, masks)
    white = np.full((32, 32, 3), 255, np.uint8)
    for number in range(2):
        image, context, targets = mask_panels(white, number, levels, model.config)
        side = 8 if changes is GEOMETRY else 4
        coarse_context, coarse_targets = (ids[number].tolist() for ids in masks)
        for row in range(8):
            for column in range(8):
                # the masks of a stack are drawn on the grid above, whose patches are 2 x 2 of these
                position = row * side // 8 * side + column * side // 8
                centre = 4 * row + 2, 4 * column + 2
                assert image.pixels[centre].tolist() == [255] * 3
                assert context.pixels[centre].tolist() == [255 if position in coarse_context else 200] * 3
                is_target = any(position in block for block in coarse_targets)
                assert targets.pixels[centre].tolist() == [255 if is_target else 200] * 3
        patch = 32 // side
        for block, outline in zip(coarse_targets, targets.outlines, strict=True):
            rows, columns = np.array(block) // side, np.array(block) % side
            assert (outline.top, outline.left) == (rows.min() * patch, columns.min() * patch)
            assert outline.top + outline.height == (rows.max() + 1) * patch
            assert outline.left + outline.width == (columns.max() + 1) * patch
        assert len({outline.color for outline in targets.outlines}) == len(coarse_targets)


def test_titles_say_how_many(models):
    model = tiny_model(**UPPER)
    masks = draw_masks(model, 1, 0)
    (_, num_context), (_, num_blocks, length) = masks[0].shape, masks[1].shape
    _, context, targets = mask_panels(np.zeros((32, 32, 3), np.uint8), 0, masks_by_level(model, masks), model.config)
    assert context.title == f"context: {4 * num_context} of 64\nlevel 1: {num_context} of 16"
    assert targets.title == f"targets: {num_blocks} blocks of {4 * length}\nlevel 1: {num_blocks} blocks of {length}"
    # of blocks at the same place each is seen
    assert len({outline.line for outline in targets.outlines}) == num_blocks
    of_one = masks_by_level(model, (masks[0], masks[1][:, :1]))
    *_, targets = mask_panels(np.zeros((32, 32, 3), np.uint8), 0, of_one, model.config)
    assert targets.title == f"targets: 1 block of {4 * length}\nlevel 1: 1 block of {length}"


def test_command(models, tmp_path, capsys):
    assert main(["visualize", "masks", str(models / "stack"), *image_files(tmp_path), "--num_draws", "2"]) == 0
    folder = models / "stack/masks"
    assert capsys.readouterr().out == f"Written to {folder}: masks.png, masks.json.\n"
    levels = json.loads((folder / "masks.json").read_text())["draws"][1]
    assert [entry["grid"] for entry in levels] == [[8, 8], [4, 4]]
    assert levels[0]["num_context_patches"] == 4 * levels[1]["num_context_patches"]
    with Image.open(folder / "masks.png") as drawn:
        assert drawn.width == 3 * 280 and drawn.height > 4 * 280


def test_mistakes_are_told(models, tmp_path, capsys):
    (file,) = image_files(tmp_path, 1)
    cjepa = models / "cjepa"
    for arguments, words in (
        ([cjepa, "no.png"], "Image no.png cannot be read"),
        ([models / "sjea", file], "which learns from two views and has no masks; give a C-JEPA model"),
        ([models / "small", file], "masks cannot be drawn: A 3x3 grid has 9 patches"),
        ([cjepa, file, "--num_draws", 0], "num_draws=0 draws nothing; set it to 1 or more"),
        ([cjepa, file, "--seed", -1], "seed=-1 is no seed; set it to 0 or more"),
    ):
        assert words in refused(capsys, "masks", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_not_needed(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert len(visualize_masks(tmp_path, image_files(tmp_path, 1), tmp_path / "out")["draws"]) == 1
