"""Where an encoder looks: attention maps in the columns of C-JEPA's figures (arXiv 2410.19560, Fig. 3 to 8).

The encoders have no class token whose attention could be shown, and the paper does not say what it shows instead. We
show of one layer the attention weights softmax(Q K^T / sqrt(d)), averaged over heads, and then over the patches that
ask, which is the share of attention that each patch receives; or, of one patch that asks, what it attends to.

Shapes: B images, N patches, h and w rows and columns of a level's grid, H and W those of an image's pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch

from modeling_cjepa import CJepaModel
from trainers.decoding import read_image
from trainers.drawn_encoders import DrawnEncoder, load_encoders
from trainers.embedding import check_finite
from trainers.errors import InputError
from trainers.panels import Outline, Panel, view_of, write_picture
from trainers.pooling import OneLevel, level_grid

_COLORS, _OPACITY = "inferno", 0.6
QUERY_COLOR = "#2ee6d6"


class AttentionMap(OneLevel):
    """
    An encoder that gives the attention its patches receive in one layer.

    Args:
        model ([`CJepaModel`]): The encoder, with eager attention.
        level (`int`): Of a stack.
        layer (`int`): Of the level, from 0, or from the last as -1, -2.
        query (`(int, int)`, *optional*): Row and column of the patch that asks; the mean over all when not given.
    """

    def __init__(self, model: CJepaModel, level: int, layer: int = -1, query: tuple[int, int] | None = None):
        super().__init__(model, level)
        self.layer, self.query = layer, query

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) as maps (B, h, w) in float32, which sum to 1."""
        rows, columns = level_grid(self.model, self.level, pixel_values)
        attentions = self.model(pixel_values, level=self.level, output_attentions=True).attentions
        weights = attentions[self.layer].float().mean(dim=1)  # (B, N, N), of all heads
        if self.query is None:
            received = weights.mean(dim=1)
        else:
            received = weights[:, self.query[0] * columns + self.query[1]]
        return received.unflatten(1, (rows, columns))


def visualize_attention(
    model: str | Path,
    images: Sequence[str | Path],
    output_dir: str | Path,
    beside: Mapping[str, str | Path] | None = None,
    layer: int = -1,
    query: tuple[int, int] | None = None,
    level: int | None = None,
) -> dict:
    """
    Draws attention maps of several encoders and writes `attention.png` and `attention.json`.

    Args:
        model (`str` or `Path`): A C-JEPA model: a folder, or the id of one on the Hub.
        images (`list` of `str` or `Path`): Files.
        output_dir (`str` or `Path`): The folder to write to.
        beside (`dict`, *optional*): Other models by name, whose published encoders are the first columns.
        layer (`int`): Which layer, from 0, or from the last as -1.
        query (`(int, int)`, *optional*): Row and column of the patch whose attention is drawn, from 0; the mean over
            all patches when not given.
        level (`int`, *optional*): Of a stack; that of its configuration when not given.

    Returns:
        `dict`: What `attention.json` holds: the recipe and, for each encoder, its grid and the map of each image,
        shares of attention that sum to 1, before they are scaled.

    Raises:
        InputError: An image or a model cannot be read, a model has no attention or one that is not finite, or there is
            no such layer or patch.
    """
    pictures = [read_image(file) for file in images]
    encoders = load_encoders(model, beside, level)
    modules = [attention_of(encoder, layer, query) for encoder in encoders]
    rows, found = [], [[] for _ in encoders]
    for picture in pictures:
        rows.append([Panel(view_of(picture, encoders[0].image_size))])
        for encoder, module, maps in zip(encoders, modules, found, strict=True):
            view = view_of(picture, encoder.image_size)
            maps.append(attention_map(encoder, module, view))
            rows[-1].append(Panel(overlay(view, maps[-1]), outlines=_asking(maps[-1], view, query)))
    for panel, title in zip(rows[0], ["image", *(encoder.title for encoder in encoders)], strict=True):
        panel.title = title
    results = {
        "model": str(model),
        "beside": {name: str(other) for name, other in (beside or {}).items()},
        "images": [str(file) for file in images],
        "recipe": recipe(query),
        "layer": layer,
        "query": query,
        "encoders": [
            {"encoder": encoder.title, "level": encoder.level, "grid": list(maps[0].shape),
             "maps": [each.tolist() for each in maps]}
            for encoder, maps in zip(encoders, found, strict=True)
        ],
    }  # fmt: skip
    write_picture(Path(output_dir), "attention", rows, results)
    return results


def attention_of(encoder: DrawnEncoder, layer: int = -1, query: tuple[int, int] | None = None) -> AttentionMap:
    """
    What gives the maps of one layer of an encoder.

    Args:
        encoder ([`DrawnEncoder`]): Whose level is looked at.
        layer, query: As in [`visualize_attention`].

    Returns:
        [`AttentionMap`].

    Raises:
        InputError: The encoder has no attention, or there is no such layer or patch.
    """
    model = encoder.encoder
    if not isinstance(model, CJepaModel):
        raise InputError(
            f"The {encoder.title} is a {type(model).__name__}, which gives no attention maps; give a C-JEPA model, or "
            "draw `cjepa visualize pca`."
        )
    config = model.config.level_config(encoder.level)
    number = config.num_hidden_layers
    if not -number <= layer < number:
        raise InputError(f"layer={layer} is not in the {encoder.title}, which has {number} layers; choose 0 to "
                         f"{number - 1}, or -1 for the last one.")  # fmt: skip
    if query is not None and not all(0 <= place < side for place, side in zip(query, config.grid_size, strict=True)):
        rows, columns = config.grid_size
        raise InputError(f"query={query[0]},{query[1]} is not on the {rows}x{columns} grid of the {encoder.title}; "
                         f"choose 0,0 to {rows - 1},{columns - 1}.")  # fmt: skip
    # only this implementation returns its weights
    model.set_attn_implementation("eager")
    return AttentionMap(model, encoder.level, layer, query)


def attention_map(encoder: DrawnEncoder, module: AttentionMap, view: np.ndarray) -> np.ndarray:
    """The map (h, w) float32 of an image (H, W, 3) as the encoder sees it; raises `InputError` if not finite."""
    received = encoder.run(module, view)[0]
    check_finite(received, encoder.title)
    return received.cpu().numpy()


def recipe(query: tuple[int, int] | None) -> str:
    """How the maps are made, in a sentence."""
    over = "the patches that ask" if query is None else f"taken of the patch in row {query[0]}, column {query[1]}"
    return (
        f"Attention weights softmax(Q K^T / sqrt(d)) of the layer, averaged over heads and {over}; each map scaled "
        "from least to greatest, enlarged bilinearly and laid over the image. There is no class token."
    )


def overlay(view: np.ndarray, received: np.ndarray) -> np.ndarray:
    """
    A map laid over an image.

    Args:
        view (`np.ndarray` of shape `(H, W, 3)`, uint8): The image.
        received (`np.ndarray` of shape `(h, w)`): The map; its least value becomes black, its greatest yellow.

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, uint8.
    """
    scaled = received - received.min()
    # of a map that is the same everywhere all is least
    scaled = torch.from_numpy(scaled / max(scaled.max(), np.finfo(np.float32).tiny))
    enlarged = torch.nn.functional.interpolate(scaled[None, None], view.shape[:2], mode="bilinear")[0, 0].numpy()
    colors = 255 * matplotlib.colormaps[_COLORS](enlarged)[..., :3]
    return np.round((1 - _OPACITY) * view + _OPACITY * colors).astype(np.uint8)


def _asking(received: np.ndarray, view: np.ndarray, query: tuple[int, int] | None) -> list[Outline]:
    """The outline of the patch that asks, if it is one."""
    if query is None:
        return []
    height, width = (side // number for side, number in zip(view.shape, received.shape, strict=False))
    return [Outline(query[0] * height, query[1] * width, height, width, QUERY_COLOR)]
