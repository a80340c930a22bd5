"""Multi-block masks of I-JEPA (arXiv 2301.08243, section 3), drawn for a whole batch at once.

Shapes: B images, N patches of a grid, M target blocks, K patches a block, Nc patches of a context.
"""

import logging
import math

import torch

logger = logging.getLogger(__name__)

# Layouts drawn for each one used: the quarter with the smallest contexts is thrown away, so that the common context
# length does not sink to the minimum of the batch (and with the batch size), as it does in the authors' sampler.
_OVERSAMPLING = 4 / 3
_warned_geometries: set[tuple] = set()


def sample_block_masks(
    batch_size: int,
    grid_size: int | tuple[int, int],
    *,
    num_target_blocks: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    min_context_patches: int = 10,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    Draws target blocks and context patches for a batch of images.

    What is drawn: once per batch, the size of the target blocks (scale and aspect ratio, both uniform and
    independent) and of the context block (scale uniform, aspect ratio that of the grid). Per image, independently:
    the place of each of the M target blocks and of the context block, uniform over all places inside the grid, its
    last row and column included. Target blocks may overlap each other. The context is the context block less all
    target patches. A third more layouts are drawn than images, and those with the fewest context patches dropped. All
    contexts are then cut to one length, the shortest of the batch rounded down to a multiple of about N / 16 (a power
    of two, so that few lengths occur), by a uniformly random choice of patches: no row or column is favoured.

    Blocks too large to leave `min_context_patches` are shrunk, which is logged once.

    Args:
        batch_size (`int`): Number of images B.
        grid_size (`int` or `(rows, columns)`): Patches of an image.
        num_target_blocks (`int`): Target blocks M of an image.
        target_scale (`(float, float)`): Range of the share of the grid a target block covers, in (0, 1].
        target_aspect_ratio (`(float, float)`): Range of a target block's height over width, each as a share of the
            grid's own height and width.
        context_scale (`(float, float)`): Range of the share of the grid the context block covers, in (0, 1].
        min_context_patches (`int`): Fewest patches left as context.
        generator (`torch.Generator`, *optional*): The only source of randomness; the draw runs on its device.
        device (`torch.device`, *optional*): Where the result goes; the generator's device when not given.

    Returns:
        `context_ids` (B, Nc) and `target_ids` (B, M, K), both `int64` positions in raster order, rising along the
        last dimension.

    Raises:
        ValueError: The grid or the smallest context block cannot hold `min_context_patches` and the targets, or a
            range is not one.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be 1 or more.")
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    _check_geometry(rows, columns, num_target_blocks, target_scale, target_aspect_ratio, context_scale,
                    min_context_patches)  # fmt: skip
    draw_device = generator.device if generator is not None else torch.device(device or "cpu")
    device = draw_device if device is None else device

    uniform = torch.rand(3, generator=generator, device=draw_device).tolist()
    target_size = _block_size(uniform[0], uniform[1], target_scale, target_aspect_ratio, rows, columns)
    context_size = _block_size(uniform[2], 0.0, context_scale, (1.0, 1.0), rows, columns)

    num_layouts = math.ceil(batch_size * _OVERSAMPLING)
    while True:
        targets, contexts = (_every_block(size, rows, columns, draw_device) for size in (target_size, context_size))
        target_places = torch.randint(
            len(targets), (num_layouts, num_target_blocks), generator=generator, device=draw_device
        )
        context_places = torch.randint(len(contexts), (num_layouts,), generator=generator, device=draw_device)
        # rows are taken by index_select, which is several times as fast as brackets
        is_context = _marked(contexts, rows * columns).index_select(0, context_places)
        outside = ~_marked(targets, rows * columns)
        for places in target_places.unbind(dim=1):
            is_context &= outside.index_select(0, places)
        counts, kept = is_context.sum(dim=1, dtype=torch.int32).topk(batch_size, sorted=False)
        num_context = int(counts.min())
        if num_context >= min_context_patches:
            break
        target_size, context_size = _smaller(target_size, context_size, rows, columns, min_context_patches)

    kept = kept.sort().values
    num_context = max(_round_down(num_context, rows * columns), min_context_patches)
    context_ids = _random_subset(is_context.index_select(0, kept), num_context, generator)
    target_ids = targets.index_select(0, target_places[kept].flatten()).view(batch_size, num_target_blocks, -1)
    return context_ids.to(device), target_ids.to(device)


def _block_size(u_scale, u_aspect, scale, aspect_ratio, rows, columns) -> tuple[int, int]:
    """Height and width in patches of a block of the drawn share and shape, at least 1 and at most the grid."""
    share = scale[0] + u_scale * (scale[1] - scale[0])
    aspect = aspect_ratio[0] + u_aspect * (aspect_ratio[1] - aspect_ratio[0])
    height, width = round(rows * math.sqrt(share * aspect)), round(columns * math.sqrt(share / aspect))
    return min(max(height, 1), rows), min(max(width, 1), columns)


def _every_block(block_size, rows, columns, device) -> torch.Tensor:
    """Positions (P, K), in raster order, of a block at each of its P places inside the grid."""
    numbers = torch.arange(max(rows, columns), device=device)
    height, width = (numbers[:size] for size in block_size)
    top, left = (numbers[: g - b + 1] for g, b in zip((rows, columns), block_size, strict=True))
    corners = (top.unsqueeze(1) * columns + left).flatten()
    return corners.unsqueeze(1) + (height.unsqueeze(1) * columns + width).flatten()


def _marked(ids, num_patches) -> torch.Tensor:
    """A mask (P, N) that is true at the positions of each row (P, K)."""
    return torch.zeros(len(ids), num_patches, dtype=torch.bool, device=ids.device).scatter_(1, ids, True)


def _random_subset(mask, size, generator) -> torch.Tensor:
    """
    `size` random positions of each row's true entries, rising: (B, size) from (B, N).

    One random order of the positions serves the batch, and each row reads it from a random start on: as uniform as an
    order a row, without the sorting of one.
    """
    num_rows, num_patches = mask.shape
    order = torch.randperm(num_patches, generator=generator, device=mask.device)
    start = torch.randint(num_patches, (num_rows,), generator=generator, device=mask.device)
    orders = torch.cat([order, order]).unfold(0, num_patches, 1).index_select(0, start)  # (B, N)
    candidates = mask.gather(1, orders)
    chosen = candidates & (candidates.cumsum(dim=1, dtype=torch.int32) <= size)
    return _true_positions(torch.empty_like(mask).scatter_(1, orders, chosen), size)


def _true_positions(mask, size) -> torch.Tensor:
    """Where rows (B, N) with `size` true entries each are true, rising: (B, size)."""
    # on a CPU numpy finds them in an eighth of torch's time
    flat = mask.flatten()
    found = torch.from_numpy(flat.numpy().nonzero()[0]) if mask.device.type == "cpu" else flat.nonzero()
    starts = torch.arange(0, mask.numel(), mask.shape[1], device=mask.device)
    return found.view(-1, size) - starts.unsqueeze(1)


def _round_down(length: int, num_patches: int) -> int:
    bucket = 2 ** max(int(math.log2(num_patches / 16)), 0) if num_patches >= 16 else 1
    return length // bucket * bucket


def _smaller(target_size, context_size, rows, columns, min_context_patches):
    """The next smaller target block (or, where it is one patch, the whole grid as context), said once."""
    geometry = (rows, columns, min_context_patches)
    if geometry not in _warned_geometries:
        _warned_geometries.add(geometry)
        logger.warning(
            "Target blocks of %dx%d patches leave fewer than min_context_patches=%d of a %dx%d grid: smaller ones are "
            "drawn. Lower target_scale, num_target_blocks or min_context_patches, or use a smaller patch_size.",
            *target_size, min_context_patches, rows, columns,
        )  # fmt: skip
    height, width = target_size
    if height * width == 1:
        return target_size, (rows, columns)
    return (height - 1, width) if height >= width else (height, width - 1), context_size


def _check_geometry(rows, columns, num_target_blocks, target_scale, target_aspect_ratio, context_scale, min_context):
    for name, scale, limit in (
        ("target_scale", target_scale, 1.0),
        ("target_aspect_ratio", target_aspect_ratio, math.inf),
        ("context_scale", context_scale, 1.0),
    ):
        if not isinstance(scale, list | tuple) or len(scale) != 2 or not 0 < scale[0] <= scale[1] <= limit:
            raise ValueError(f"{name}={scale} is not a range within (0, {limit}]; give (low, high).")
    if min(rows, columns) < 1:
        raise ValueError(f"A {rows}x{columns} grid has no patches; give a grid_size of 1 or more.")
    if num_target_blocks < 1 or min_context < 1:
        raise ValueError(f"num_target_blocks={num_target_blocks} and min_context_patches={min_context} must be >= 1.")
    if rows * columns < min_context + num_target_blocks:
        raise ValueError(
            f"A {rows}x{columns} grid has {rows * columns} patches, too few for min_context_patches={min_context} and "
            f"num_target_blocks={num_target_blocks}; use a smaller patch_size, larger images or lower these numbers."
        )
    height, width = _block_size(0.0, 0.0, context_scale, (1.0, 1.0), rows, columns)
    if height * width < min_context:
        raise ValueError(
            f"context_scale={context_scale} allows a context block of {height}x{width} patches of a {rows}x{columns} "
            f"grid, too few for min_context_patches={min_context}; raise context_scale or lower min_context_patches."
        )


def check_ids(name: str, ids: torch.Tensor | None, batch_size: int, grid_size: tuple[int, int]):
    """Refuses, by a `ValueError`, positions (B, ...) of another number of masks or beside the grid; None passes."""
    if ids is None:
        return
    if ids.shape[0] != batch_size:
        raise ValueError(f"{name} has {ids.shape[0]} masks; give {batch_size}, num_mask_sets of each image.")
    # to look at positions on a GPU is to wait for it, and in a graph to break it
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel() > 0:
        low, high, (rows, columns) = ids.min().item(), ids.max().item(), grid_size
        if low < 0 or high >= rows * columns:
            raise ValueError(
                f"{name} has positions from {low} to {high}, and the grid of the top level has {rows}x{columns}: give "
                f"0 to {rows * columns - 1}."
            )


def grids_by_level(grid_size: tuple[int, int], merges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The grid (rows, columns) of each level from the lowest up; raises `ValueError` if one cannot be merged."""
    grids = [grid_size]
    for rows, columns in merges:
        if grids[-1][0] % rows or grids[-1][1] % columns:
            raise ValueError(
                f"A {grids[-1][0]}x{grids[-1][1]} grid of tokens cannot be merged by {rows}x{columns}; give images "
                "whose grid they divide."
            )
        grids.append((grids[-1][0] // rows, grids[-1][1] // columns))
    return grids


def ids_by_level(
    ids: torch.Tensor | None, grid_size: tuple[int, int], merges: list[tuple[int, int]]
) -> list[torch.Tensor | None]:
    """
    Positions on the top grid of a stack as positions on the grid of each level: those of the patches below them.

    Args:
        ids (`torch.Tensor` of shape `(..., n)`, *optional*): Positions on the top grid; all of them when not given.
        grid_size (`(rows, columns)`): The lowest grid.
        merges (`list` of `(int, int)`): Rows and columns of tokens that each level above the lowest merges.

    Returns:
        `list`: From the lowest level up, positions (..., n * merged tokens), those below one position side by side;
        None where `ids` is.

    Raises:
        ValueError: A grid cannot be merged.
    """
    grids = grids_by_level(grid_size, merges)
    found = [ids]
    for (rows, columns), (_, num_columns) in zip(reversed(merges), reversed(grids[1:]), strict=True):
        if ids is not None:
            down, right = (torch.arange(size, device=ids.device) for size in (rows, columns))
            below = (down.unsqueeze(1) * num_columns * columns + right).flatten()
            corner = ids // num_columns * rows * num_columns * columns + ids % num_columns * columns
            ids = (corner.unsqueeze(-1) + below).flatten(-2)
        found.append(ids)
    return found[::-1]


def tokens_on_grid(tokens: torch.Tensor, ids: torch.Tensor | None, grid_size: tuple[int, int]) -> torch.Tensor:
    """Tokens (B, n, D) at positions `ids` (B, n), or all in order, as a map (B, D, rows, columns); zero elsewhere."""
    if ids is not None:
        index = ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        tokens = tokens.new_zeros(len(tokens), grid_size[0] * grid_size[1], tokens.shape[-1]).scatter(1, index, tokens)
    return tokens.transpose(1, 2).unflatten(2, grid_size)
