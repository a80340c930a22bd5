"""What makes an image's patches tokens, before positions are added: one linear projection, or a few convolutions.

Shapes: B images, C channels, N patches, Nc kept patches, D width.
"""

import torch
from torch import nn
from transformers import initialization as init

from .configuration_cjepa import CJepaConfig, pair
from .losses_cjepa import take


def check_floating_point(pixel_values: torch.Tensor):
    """Refuses, by a `ValueError`, images of whole numbers, which no processor has normalised."""
    if not pixel_values.is_floating_point():
        raise ValueError(f"pixel_values is {pixel_values.dtype}; give normalised images in floating point.")


class CJepaStem(nn.Module):
    """What all stems have: the grid of patches of an image."""

    def __init__(self, config: CJepaConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.patch_size = pair(config.patch_size)

    def grid_size(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of patches of images (B, C, H, W); a rest that fills no patch is left out."""
        _, channels, height, width = pixel_values.shape
        if channels != self.num_channels:
            raise ValueError(f"pixel_values has {channels} channels, the model num_channels={self.num_channels}.")
        rows, columns = height // self.patch_size[0], width // self.patch_size[1]
        if min(rows, columns) < 1:
            raise ValueError(
                f"An image of {height}x{width} pixels is smaller than a patch of "
                f"{self.patch_size[0]}x{self.patch_size[1]}; resize the images or use a smaller patch_size."
            )
        return rows, columns

    def whole_patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) without the rest that fills no patch."""
        check_floating_point(pixel_values)
        rows, columns = self.grid_size(pixel_values)
        return pixel_values[..., : rows * self.patch_size[0], : columns * self.patch_size[1]]


class CJepaPatchEmbeddings(CJepaStem):
    """Linear projection of patches, stored as the convolution it equals."""

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, self.patch_size, self.patch_size)

    def forward(self, pixel_values: torch.Tensor, patch_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Embeds all patches of images (B, C, H, W) to (B, N, D), or only those at `patch_ids` (B, Nc)."""
        pixels = self.whole_patches(pixel_values)
        (height, width), (rows, columns) = self.patch_size, self.grid_size(pixels)
        pixels = pixels.reshape(-1, self.num_channels, rows, height, columns, width)
        patches = pixels.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, N, C * height * width)
        if patch_ids is not None:
            patches = take(patches, patch_ids)
        weight = self.projection.weight
        return nn.functional.linear(patches.to(weight.dtype), weight.flatten(1), self.projection.bias)


class CJepaStemConv(nn.Conv2d):
    """A convolution, drawn by its number of inputs; `gain` is 2^0.5 where an activation halves what is given."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, gain: float = 2**0.5, **kwargs):
        super().__init__(in_channels, out_channels, kernel_size, **kwargs)
        self.gain = gain

    def draw_weights(self):
        """Draws normal weights by the number of inputs of an output; zero biases."""
        init.normal_(self.weight, mean=0.0, std=self.gain * self.weight[0].numel() ** -0.5)
        init.zeros_(self.bias)


class CJepaStemBlock(nn.Module):
    """Two 3x3 convolutions beside a residual connection, pre-norm, of maps (B, width, height, width)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.layernorm = nn.LayerNorm(width, eps=eps)
        self.conv1 = CJepaStemConv(width, width, 3, padding=1)
        self.conv2 = CJepaStemConv(width, width, 3, gain=0.5, padding=1)

    def forward(self, maps: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """Changes maps of which no convolution reads more than what is `seen` (B, 1, height, width), 1 or 0."""
        hidden = self.layernorm(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        hidden = nn.functional.gelu(self.conv1(only(hidden, seen)))
        return maps + self.conv2(only(hidden, seen))


class CJepaConvEmbeddings(CJepaStem):
    """
    Convolutions over the whole image, each stage of which halves it, until a pixel of the map is a patch.

    Of a masked image no convolution reads what is hidden: it is zero, and is made so again before each of them, so
    that a kept patch knows of its kept neighbours alone (as sparse convolutions do, SparK, arXiv 2301.03580).

    Args:
        config ([`CJepaConfig`]): `stem_hidden_sizes` are the widths of the stages.
    """

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        widths = config.stem_hidden_sizes
        # the first one overlaps, as patches of 2x2 pixels would be cut arbitrarily
        first = CJepaStemConv(config.num_channels, widths[0], 4, stride=2, padding=1)
        others = [CJepaStemConv(before, after, 2, stride=2) for before, after in zip(widths, widths[1:], strict=False)]
        self.downsamplings = nn.ModuleList([first, *others])
        self.blocks = nn.ModuleList(CJepaStemBlock(width, config.layer_norm_eps) for width in widths)
        self.projection = nn.Linear(widths[-1], config.hidden_size)

    def forward(self, pixel_values: torch.Tensor, patch_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Embeds all patches of images (B, C, H, W) to (B, N, D), or only those at `patch_ids` (B, Nc)."""
        maps = self.whole_patches(pixel_values).to(self.projection.weight.dtype)
        maps = maps.contiguous(memory_format=torch.channels_last)
        seen = None if patch_ids is None else self._seen(patch_ids, self.grid_size(maps)).to(maps.dtype)
        finer = enlarged(seen, maps)
        for downsampling, block in zip(self.downsamplings, self.blocks, strict=True):
            maps = downsampling(only(maps, finer))
            finer = enlarged(seen, maps)
            maps = block(maps, finer)
        tokens = maps.flatten(2).transpose(1, 2)
        return self.projection(tokens if patch_ids is None else take(tokens, patch_ids))

    def _seen(self, patch_ids: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """A map (B, 1, rows, columns) of the grid that is 1 at the kept patches and else 0."""
        seen = torch.zeros(len(patch_ids), grid_size[0] * grid_size[1], device=patch_ids.device)
        return seen.scatter(1, patch_ids, 1.0).unflatten(1, (1, *grid_size))


def enlarged(seen: torch.Tensor | None, maps: torch.Tensor) -> torch.Tensor | None:
    """A map of the grid (B, 1, rows, columns) as large as maps (B, width, height, width), which are finer."""
    if seen is None:
        return None
    rows, columns = (size // of_grid for size, of_grid in zip(maps.shape[2:], seen.shape[2:], strict=True))
    return seen.repeat_interleave(rows, 2).repeat_interleave(columns, 3).to(maps.dtype)


def only(maps: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Maps (B, width, height, width) that are zero where another one (B, 1, height, width) is."""
    return maps if seen is None else maps * seen.to(maps.dtype)


def build_stem(config: CJepaConfig) -> CJepaStem:
    """The stem that a configuration asks for."""
    return CJepaPatchEmbeddings(config) if config.stem_hidden_sizes is None else CJepaConvEmbeddings(config)
