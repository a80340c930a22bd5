"""The arithmetic of a training step of C-JEPA by formula, and what a device multiplies in a second.

Counted are matrix products alone, two operations a multiply-add; a backward pass has two products for each of the
forward pass, but for those on the images, which get no gradient.

Shapes: N patches, Nc context patches, M target blocks, K patches a block, D width.
"""

import math
import time

import torch

from modeling_cjepa import CJepaConfig
from modeling_cjepa.configuration_cjepa import pair

# sides of the square products, large enough for a device's full rate
_SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
_NUM_TRIES = 8


def model_flops(config: CJepaConfig, num_context: int, num_blocks: int, block_length: int) -> dict[str, int]:
    """
    Floating-point operations an image of a step the way the authors' code takes it: the work that a step is worth.

    All patches of an image are embedded, those of the context are taken afterwards, and the predictor's last layer
    computes the context's tokens, too. A step that saves some of it makes more of the same device, which its MFU then
    shows. The regulariser, which the authors' code has not, is left out.

    Args:
        config ([`CJepaConfig`]): Of the model; levels above count likewise, but embed what they are given alone.
        num_context (`int`): Context patches Nc, on the top level's grid.
        num_blocks (`int`): Target blocks M.
        block_length (`int`): Their patches K, on the top level's grid.

    Returns:
        `dict[str, int]`: Of `target encoder` (forward), `context encoder` and `predictor` (forward and backward).
    """
    levels = [config.level_config(number) for number in range(config.num_levels)]
    found = dict.fromkeys(("target encoder", "context encoder", "predictor"), 0)
    for number, level in enumerate(levels):
        merged = math.prod(math.prod(pair(above.patch_size)) for above in levels[number + 1 :])
        seen, asked = num_context * merged, block_length * merged
        num_patches = math.prod(level.grid_size)
        embedded = num_patches if number == 0 else seen
        has_gradient = number > 0 and not level.stop_gradient
        first, later = _embedding(level, num_patches)
        found["target encoder"] += first + later + _encoder(level, num_patches)
        first, later = _embedding(level, embedded)
        context = (2 + has_gradient) * first + 3 * (later + _encoder(level, seen))
        found["context encoder"] += config.num_mask_sets * context
        found["predictor"] += config.num_mask_sets * 3 * _predictor(level, seen, num_blocks, asked)
    return {part: config.num_views * number for part, number in found.items()}


def _embedding(level: CJepaConfig, num_patches: int) -> tuple[int, int]:
    """The products of a stem with what it is given, and those with what it has made of it."""
    sizes = level.stem_hidden_sizes
    if sizes is None:
        return 2 * num_patches * level.num_channels * math.prod(pair(level.patch_size)) * level.hidden_size, 0
    pixels = [num_patches * 4 ** (len(sizes) - number) for number in range(1, len(sizes) + 1)]
    first = 2 * pixels[0] * sizes[0] * 16 * level.num_channels  # 4x4 wide, the others 2x2
    later = zip(pixels[1:], sizes, sizes[1:], strict=False)
    halving = sum(2 * number * 4 * before * after for number, before, after in later)
    blocks = sum(2 * 2 * 9 * number * width**2 for number, width in zip(pixels, sizes, strict=True))
    return first, halving + blocks + 2 * num_patches * sizes[-1] * level.hidden_size


def _encoder(level: CJepaConfig, num_tokens: int) -> int:
    return level.num_hidden_layers * _layer(num_tokens, level.hidden_size, level.intermediate_size)


def _predictor(level: CJepaConfig, num_context: int, num_blocks: int, block_length: int) -> int:
    width, num_asked = level.predictor_hidden_size, num_blocks * block_length
    layer = _layer(num_context + block_length, width, level.predictor_intermediate_size)
    projections = 2 * (num_context + num_asked) * level.hidden_size * width  # of the context in, of predictions out
    return level.predictor_num_hidden_layers * num_blocks * layer + projections


def _layer(num_tokens: int, width: int, intermediate_size: int) -> int:
    """Queries, keys, values and their projection, scores and their sums, and the MLP of one sequence."""
    return 2 * num_tokens * width * (4 * width + 2 * num_tokens + 2 * intermediate_size)


def matmul_rate(device: torch.device, precision: str) -> float:
    """
    The operations in a second of large square products, the fastest of several tries of two sizes.

    Args:
        device (`torch.device`): A CPU, with the threads of this process, or a GPU.
        precision (`"float32"` or `"bf16"`): Of the numbers; float32 as torch is set to multiply it.

    Returns:
        `float`: FLOP/s, two a multiply-add.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return max(_product_rate(side, device, dtype) for side in _SIDES[device.type])


def _product_rate(side: int, device: torch.device, dtype: torch.dtype) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(_NUM_TRIES + 1):
        wait_for(device)
        started = time.perf_counter()
        left @ right
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / min(seconds[1:])


def wait_for(device: torch.device):
    """Returns when a device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
