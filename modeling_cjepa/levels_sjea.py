"""The levels of S-JEA: what a level reads of the one below, and the backbone that reads it.

Shapes: B images, C channels, N tokens, h and w rows and columns of a map, D width of an embedding, E expanded width.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import nn

from .backbones_sjea import build_backbone, build_backbone_config, mistakes_as_value_error
from .configuration_sjea import SJeaLevelConfig
from .heads_cjepa import CJepaExpander


@dataclass
class LevelOutput:
    """
    What a level makes of a batch.

    Args:
        features (`torch.Tensor` of shape `(B, D, h, w)` or `(B, N, D)`): The backbone's map or tokens before pooling.
        embedding (`torch.Tensor` of shape `(B, D)`): Its pooled features, Y in the paper.
        read_size (`(int, int)`): Rows and columns of what the backbone read.
        expanded (`torch.Tensor` of shape `(B, E)`, *optional*): What the expander makes of them, Z, where the level
            above reads it.
    """

    features: torch.Tensor
    embedding: torch.Tensor
    read_size: tuple[int, int]
    expanded: torch.Tensor | None = None


class SJeaLevel(nn.Module):
    """
    One level: it reads the level below in the configured form, or the image, and gives features and an embedding.

    Args:
        config ([`SJeaLevelConfig`]): Its configuration.
        below (`SJeaLevel`, *optional*): The level below; none for the lowest.
        image_shape (`(C, h, w)`): Channels and pixels of the image, which the lowest level reads.
        is_read_expanded (`bool`): Whether the level above reads the expanded embedding.
        attn_implementation (`str`, *optional*): For backbones that have attention.

    Raises:
        ValueError: The backbone gives no pooled features, or cannot read what the level below gives.
    """

    def __init__(
        self,
        config: SJeaLevelConfig,
        below: "SJeaLevel | None",
        image_shape: tuple[int, int, int],
        is_read_expanded: bool = False,
        attn_implementation: str | None = None,
    ):
        super().__init__()
        self.config, self.is_lowest = config, below is None
        self.input_shape = image_shape if below is None else self._shape_below(below)
        self.size_below = None if below is None else below.input_shape[1:]
        fields = {"patch_size": 1, **config.backbone} if config.input == "tokens" else config.backbone
        self.backbone_config = build_backbone_config(fields, self.input_shape)
        self.backbone = build_backbone(self.backbone_config, config.stem, attn_implementation)
        self.features_shape, self.width = self._output_shapes()
        self.expander = CJepaExpander(self.width, config.expander_sizes) if is_read_expanded else None

    def _shape_below(self, below: "SJeaLevel") -> tuple[int, int, int]:
        """Channels, rows and columns of what this level reads of the one below."""
        if self.config.input == "vector":
            width = below.config.expander_sizes[-1] if self.config.reads == "expanded" else below.width
            return (1, *fold_size(width, self.config.fold_height))
        if len(below.features_shape) == 3:
            return below.features_shape
        num_tokens, width = below.features_shape
        return (width, *_token_grid(num_tokens, below))

    def _output_shapes(self) -> tuple[tuple[int, ...], int]:
        """The shape of an image's features and the width of its embedding."""
        with torch.no_grad():
            _, outputs = self._try_out()
        if getattr(outputs, "pooler_output", None) is None or getattr(outputs, "last_hidden_state", None) is None:
            raise ValueError(
                f"backbone {self.backbone_config.model_type!r} gives no pooled features (pooler_output) beside those "
                "before the pooling, which a level needs; choose one that does, such as resnet, vit, dinov2, convnext "
                "or cjepa."
            )
        return tuple(outputs.last_hidden_state.shape[1:]), outputs.pooler_output[0].numel()

    def unused_parameters(self) -> list[nn.Parameter]:
        """The backbone's parameters that have no part in features and embedding, such as a mask token."""
        with torch.enable_grad():
            backbone, outputs = self._try_out()
            total = outputs.pooler_output.sum() + outputs.last_hidden_state.sum()
        names, parameters = zip(*backbone.named_parameters(), strict=True)
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        unused = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
        return [self.backbone.get_parameter(name) for name in unused]

    def _try_out(self):
        """A backbone like this one and its outputs for two images, without memory or arithmetic."""
        channels, height, width = self.input_shape
        what = f"backbone {self.backbone_config.model_type!r} cannot read {channels} channels of {height}x{width}"
        with mistakes_as_value_error(what), torch.device("meta"):
            # a configuration of its own: a model writes its attention implementation into that it is given
            backbone = build_backbone(copy.deepcopy(self.backbone_config), self.config.stem).to("meta").eval()
            return backbone, backbone(torch.empty(2, *self.input_shape))

    def read(self, below: "LevelOutput | torch.Tensor") -> torch.Tensor:
        """What the backbone reads, (B, C, h, w), of the level below, or the image itself."""
        if self.is_lowest:
            return below
        if self.config.input == "vector":
            # the expander gives float32, whatever the precision of the weights
            expands = self.config.reads == "expanded"
            vector = below.expanded.to(below.embedding.dtype) if expands else below.embedding
            return vector.view(-1, *self.input_shape)
        features = below.features
        if features.ndim == 4:
            return features
        channels, rows, columns = self.input_shape
        if below.read_size != self.size_below:
            sizes = " and not ".join("{}x{}".format(*size) for size in (below.read_size, self.size_below))
            raise ValueError(
                f"The level below has read {sizes}, and the grid of its tokens is that of the latter; give images of "
                "the configured image_size."
            )
        # the patch tokens come last; class tokens and registers, if any, before them
        return features[:, -rows * columns :].transpose(1, 2).reshape(-1, channels, rows, columns)

    def forward(self, below: "LevelOutput | torch.Tensor", stop_gradients: bool = False) -> LevelOutput:
        """The output of the level for images (B, C, H, W) or the output of the level below, as of [`SJeaModel`]."""
        inputs = self.read(below)
        if stop_gradients and self.config.stop_gradient:
            inputs = inputs.detach()
        outputs = self.backbone(inputs)
        embedding = outputs.pooler_output.flatten(1)  # a ResNet's is (B, D, 1, 1)
        expanded = None if self.expander is None else self.expander(embedding)
        return LevelOutput(outputs.last_hidden_state, embedding, tuple(inputs.shape[-2:]), expanded)


def as_tokens(features: torch.Tensor) -> torch.Tensor:
    """A level's features before pooling, a map (B, D, h, w) or tokens (B, N, D), as tokens."""
    return features.flatten(2).transpose(1, 2) if features.ndim == 4 else features


def fold_size(width: int, height: int | None = None) -> tuple[int, int]:
    """
    Rows and columns of a vector folded to a map.

    Args:
        width (`int`): Features of the vector.
        height (`int`, *optional*): Rows; those of the squarest map when not given.

    Returns:
        `(int, int)`: Rows, the fewer, and columns.

    Raises:
        ValueError: The vector does not fill such rows, or without `height` makes a map of one row only.
    """
    if height is None:
        height = max(rows for rows in range(1, int(width**0.5) + 1) if width % rows == 0)
        if height == 1:
            raise ValueError(
                f"An embedding of width {width} cannot be folded to a map: the width has no divisor; choose one below "
                "that has, such as 512."
            )
    elif width % height:
        raise ValueError(
            f"An embedding of width {width} cannot be folded to fold_height={height} rows: the width is no multiple "
            "of it; choose a divisor."
        )
    return height, width // height


def _token_grid(num_tokens: int, level: SJeaLevel) -> tuple[int, int]:
    """Rows and columns of a transformer's patch tokens, without its class tokens and registers."""
    config = level.backbone_config
    if _is_row_by_row(config):
        for rows, columns, others in _possible_grids(num_tokens, config, *level.input_shape[1:]):
            if rows > 0 and columns > 0 and num_tokens - rows * columns in others:
                return rows, columns
    raise ValueError(
        f"The {num_tokens} tokens of backbone {config.model_type!r} lie on no grid that is known; let the level above "
        "read input='vector'."
    )


def _is_row_by_row(config) -> bool:
    """Whether a backbone's tokens end with those of the patches, row by row."""
    if getattr(config, "num_detection_tokens", 0):
        return False
    # hiera's lie unit by unit until each stage but the last has pooled them
    return config.model_type != "hiera" or config.num_query_pool >= len(config.depths) - 1


def _possible_grids(num_tokens: int, config, height: int, width: int):
    """Rows, columns, and how many tokens of no patch may come before theirs, the likeliest first."""
    patch = getattr(config, "patch_size", None) or 1
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    registers = getattr(config, "num_register_tokens", 0)
    # a class token, perhaps a second one or registers
    yield height // patch_height, width // patch_width, {0, 1, 2, 1 + registers}
    # patches padded at the edges
    yield math.ceil(height / patch_height), math.ceil(width / patch_width), {0}
    # stages have merged the patches to a grid as wide and high as the input
    for others in (0, 1):
        rows = math.isqrt((num_tokens - others) * height // width)
        if rows * width % height == 0:
            yield rows, rows * width // height, {others}
