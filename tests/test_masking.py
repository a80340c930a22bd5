"""Block masks: their geometry, their law (against a literal sampler of sets) and what they do at the edges."""

import logging
import random
from collections import Counter

import pytest
import torch
from reference import block_masks
from tiny import seeded

from modeling_cjepa.masking_cjepa import _random_subset, sample_block_masks

GRIDS = [(14, 14), (6, 15), (20, 7)]


def draws(count, batch_size, grid_size, **geometry):
    """Masks of `count` batches from one stream of random numbers."""
    generator = seeded()
    return [sample_block_masks(batch_size, grid_size, generator=generator, **geometry) for _ in range(count)]


def frequencies(masks, grid_size):
    """Contexts, and target blocks, that hold each patch, an image of a batch: two of (batches, rows, columns)."""
    size, tables = grid_size[0] * grid_size[1], ([], [])
    for ids in masks:
        for table, of_images in zip(tables, ids, strict=True):
            table.append(torch.bincount(of_images.flatten(), minlength=size) / len(of_images))
    return [torch.stack(table).unflatten(1, grid_size) for table in tables]


def assert_same_mean(a, b):
    """Means over independent batches agree within five of their standard errors, everywhere."""
    error = torch.sqrt(a.var(dim=0) / len(a) + b.var(dim=0) / len(b))
    torch.testing.assert_close((a.mean(dim=0) - b.mean(dim=0)) / error, torch.zeros_like(error), atol=5, rtol=0)


def assert_zero_mean(differences):
    """Differences over independent batches vanish on average within five standard errors, everywhere."""
    error = (differences.var(dim=0) / len(differences)).sqrt()
    assert (differences.mean(dim=0).abs() <= 5 * error).all()


def height_and_width(block, columns):
    """Of a block's patches, which must be exactly those of a rectangle."""
    rows, cols = block // columns, block % columns
    height, width = int(rows.max() - rows.min()) + 1, int(cols.max() - cols.min()) + 1
    filled = {(int(r), int(c)) for r, c in zip(rows, cols, strict=True)}
    top, left = int(rows.min()), int(cols.min())
    assert filled == {(top + r, left + c) for r in range(height) for c in range(width)}
    assert len(block) == height * width
    return height, width


@pytest.mark.parametrize("grid_size", GRIDS)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_ids_are_integers_of_the_grid_rising(grid_size, batch_size):
    for context_ids, target_ids in draws(20, batch_size, grid_size):
        assert context_ids.shape[0] == target_ids.shape[0] == batch_size
        assert context_ids.ndim == 2 and target_ids.shape[1] == 4 and target_ids.ndim == 3
        for ids in (context_ids, target_ids):
            assert ids.dtype == torch.int64
            assert (ids.diff(dim=-1) > 0).all()
            assert ids.min() >= 0 and ids.max() < grid_size[0] * grid_size[1]


@pytest.mark.parametrize("grid_size", GRIDS)
def test_targets_are_rectangles_of_one_size_a_batch_apart_from_the_context(grid_size):
    sizes = set()
    for context_ids, target_ids in draws(30, 5, grid_size):
        of_batch = {height_and_width(block, grid_size[1]) for block in target_ids.flatten(0, 1)}
        assert len(of_batch) == 1
        sizes |= of_batch
        for context, targets in zip(context_ids, target_ids, strict=True):
            assert not set(context.tolist()) & set(targets.flatten().tolist())
    assert len(sizes) > 3


def test_one_integer_is_a_square_grid():
    for ids, same in zip(sample_block_masks(3, 9, generator=seeded()), draws(1, 3, (9, 9))[0], strict=True):
        assert torch.equal(ids, same)


@pytest.mark.parametrize("grid_size", [(40, 40), (56, 28)])
def test_shares_and_shapes_of_targets_fill_their_ranges(grid_size):
    rows, columns = grid_size
    shares, aspects = [], []
    for _, target_ids in draws(400, 1, grid_size, target_scale=(0.1, 0.3), target_aspect_ratio=(0.5, 2.0)):
        height, width = height_and_width(target_ids[0, 0], columns)
        # the block that was rounded may have been half a patch larger or smaller either way
        assert (height - 0.5) * (width - 0.5) <= 0.3 * rows * columns
        assert (height + 0.5) * (width + 0.5) >= 0.1 * rows * columns
        assert (height - 0.5) / rows <= 2.0 * (width + 0.5) / columns
        assert (height + 0.5) / rows >= 0.5 * (width - 0.5) / columns
        shares.append(height * width / (rows * columns))
        aspects.append((height / rows) / (width / columns))
    # both uniform: the means within five standard errors (400 draws), the ends reached, no dependence
    assert abs(sum(shares) / 400 - 0.2) < 5 * 0.2 / 12**0.5 / 20
    assert abs(sum(aspects) / 400 - 1.25) < 5 * 1.5 / 12**0.5 / 20
    assert min(shares) < 0.12 and max(shares) > 0.28 and min(aspects) < 0.6 and max(aspects) > 1.9
    assert abs(torch.corrcoef(torch.tensor([shares, aspects]))[0, 1]) < 5 / 20


def test_context_stays_in_a_block_of_its_share():
    one_patch = {"num_target_blocks": 1, "target_scale": (0.004, 0.004), "target_aspect_ratio": (1.0, 1.0)}
    for context_ids, _ in draws(30, 6, (16, 32), context_scale=(0.25, 0.25), **one_patch):
        rows, columns = context_ids // 32, context_ids % 32
        assert (rows.amax(dim=1) - rows.amin(dim=1) < 8).all()
        assert (columns.amax(dim=1) - columns.amin(dim=1) < 16).all()
        # all 8 x 16 patches, or those less a target patch or two, rounded down to a multiple of 32
        assert context_ids.shape[1] in (96, 128)


def test_law_is_that_of_the_literal_sampler():
    rows, columns, count, batch_size = 9, 12, 1500, 3
    masks = draws(count, batch_size, (rows, columns))
    rng = random.Random(0)
    literal = [block_masks(rng, batch_size, rows, columns) for _ in range(count)]

    sizes = Counter(height_and_width(target_ids[0, 0], columns) for _, target_ids in masks)
    literal_sizes = Counter(size for size, _, _ in literal)
    for size in sizes | literal_sizes:
        # a size is drawn once a batch: both counts are binomial, with the same chance
        chance = (sizes[size] + literal_sizes[size]) / (2 * count)
        assert abs(sizes[size] - literal_sizes[size]) <= 5 * (2 * count * chance * (1 - chance)) ** 0.5, size

    lengths = torch.tensor([[context.shape[1]] for context, _ in masks]).double()
    literal_lengths = torch.tensor([[len(contexts[0])] for _, _, contexts in literal]).double()
    assert_same_mean(lengths, literal_lengths)

    as_ids = [
        (
            torch.tensor([sorted(context) for context in contexts]),
            torch.tensor([[sorted(block) for block in blocks] for blocks in targets]),
        )
        for _, targets, contexts in literal
    ]
    for ours, theirs in zip(frequencies(masks, (rows, columns)), frequencies(as_ids, (rows, columns)), strict=True):
        assert_same_mean(ours, theirs)


@pytest.mark.parametrize("grid_size", [(14, 14), (6, 11)])
def test_every_patch_occurs_and_no_side_is_favoured(grid_size):
    for table in frequencies(draws(800, 16, grid_size), grid_size):
        assert (table.sum(dim=0) > 0).all()
        assert_zero_mean(table - table.flip(1))
        assert_zero_mean(table - table.flip(2))


def test_chances_do_not_depend_on_the_batch_size():
    small, large = (draws(count, batch_size, (14, 14)) for count, batch_size in ((900, 6), (300, 96)))
    shares = []
    for masks in (small, large):
        context, _ = frequencies(masks, (14, 14))
        shares.append(context / context.sum(dim=(1, 2), keepdim=True))
    assert_same_mean(*shares)
    lengths = [sum(context.shape[1] for context, _ in masks) / len(masks) for masks in (small, large)]
    assert lengths[1] == pytest.approx(lengths[0], rel=0.06)


def test_few_lengths_occur():
    lengths = {context_ids.shape[1] for context_ids, _ in draws(300, 4, (14, 14))}
    assert 3 < len(lengths) <= 12
    assert all(length % 8 == 0 for length in lengths)


def test_generator_is_the_only_source_of_randomness():
    before = torch.get_rng_state()
    first, second, other = (sample_block_masks(8, 14, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][:, :48], other[0][:, :48])


def test_default_randomness_is_that_of_torch():
    with torch.random.fork_rng():
        masks = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            masks.append(sample_block_masks(8, 14))
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    assert not torch.equal(masks[0][0][:, :48], masks[2][0][:, :48])


def test_small_grid_shrinks_its_blocks_and_says_so_once(caplog):
    with caplog.at_level(logging.WARNING):
        masks = draws(40, 3, (5, 5), min_context_patches=13)
    assert len(caplog.records) == 1
    assert "min_context_patches=13 of a 5x5 grid" in caplog.text
    for context_ids, target_ids in masks:
        assert context_ids.shape[1] >= 13
        for context, targets in zip(context_ids, target_ids, strict=True):
            assert not set(context.tolist()) & set(targets.flatten().tolist())


def test_smallest_possible_grid():
    for context_ids, target_ids in draws(20, 2, (2, 3), num_target_blocks=4, min_context_patches=2):
        assert context_ids.shape[1] >= 2
        assert target_ids.shape == (2, 4, 1)


@pytest.mark.parametrize(
    ("grid_size", "geometry", "numbers"),
    [
        ((3, 4), {}, "3x4 grid has 12 patches.*min_context_patches=10.*num_target_blocks=4"),
        (14, {"num_target_blocks": 0}, "num_target_blocks=0"),
        (14, {"min_context_patches": 0}, "min_context_patches=0"),
        (14, {"target_scale": (0.3, 0.2)}, r"target_scale=\(0.3, 0.2\)"),
        (14, {"target_scale": (0.0, 0.2)}, r"target_scale=\(0.0, 0.2\)"),
        (14, {"context_scale": (0.9, 1.1)}, r"context_scale=\(0.9, 1.1\)"),
        (14, {"target_aspect_ratio": (-1.0, 1.5)}, r"target_aspect_ratio=\(-1.0, 1.5\)"),
        (14, {"target_scale": 0.2}, "target_scale=0.2 is not a range"),
        ((-3, -3), {}, "-3x-3 grid has no patches"),
        (8, {"context_scale": (0.05, 0.1)}, r"context_scale=\(0.05, 0.1\) .* 2x2 patches .*min_context_patches=10"),
        (14, {"min_context_patches": 190}, r"context_scale=\(0.85, 1.0\) .* 13x13 patches .*min_context_patches=190"),
    ],
)
def test_impossible_geometry_is_named(grid_size, geometry, numbers):
    with pytest.raises(ValueError, match=numbers):
        sample_block_masks(2, grid_size, **geometry)


def test_a_batch_has_images():
    with pytest.raises(ValueError, match="batch_size=0 must be 1 or more"):
        sample_block_masks(0, 14)


def test_target_and_context_blocks_have_sizes_of_their_own():
    """Heights of a small target and of the context block around it, draw by draw, tell nothing about each other."""
    geometry = {"num_target_blocks": 1, "target_scale": (0.01, 0.1), "context_scale": (0.3, 1.0)}
    pairs = []
    for context_ids, target_ids in draws(400, 32, (20, 20), **geometry):
        rows = context_ids // 20
        pairs.append([target_ids.shape[2], (rows.amax(dim=1) - rows.amin(dim=1)).max()])
    assert abs(torch.corrcoef(torch.tensor(pairs).T.float())[0, 1]) < 0.2


def test_images_of_a_batch_keep_different_patches():
    """Two images keep as many patches in common as two independent choices do: half of a half."""
    mask = torch.ones(256, 64, dtype=torch.bool)
    ids = _random_subset(mask, 32, torch.Generator().manual_seed(0))
    kept = torch.zeros_like(mask).scatter_(1, ids, True).float()
    in_common = (kept @ kept.T)[~torch.eye(256, dtype=torch.bool)]
    assert in_common.mean() == pytest.approx(16, abs=0.5)
