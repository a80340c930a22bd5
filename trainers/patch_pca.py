"""Patch tokens as colours: their first three principal components as red, green and blue (as in DINOv2's figures,
arXiv 2304.07193), of all images together, so that a colour means the same in each.

Shapes: h and w rows and columns of a map of features, D its width, n tokens of all images.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from trainers.decoding import read_image
from trainers.drawn_encoders import DrawnEncoder, load_encoders
from trainers.embedding import check_finite
from trainers.errors import InputError
from trainers.panels import Panel, view_of, write_picture
from trainers.pooling import pooled_encoder

ENDS = (1, 99)
"""The percentiles of a component that become 0 and 255: a few tokens far out shall not darken all others."""


def visualize_pca(
    model: str | Path,
    images: Sequence[str | Path],
    output_dir: str | Path,
    beside: Mapping[str, str | Path] | None = None,
    level: int | None = None,
) -> dict:
    """
    Draws the principal components of several encoders' patch tokens and writes `pca.png` and `pca.json`.

    Args:
        model (`str` or `Path`): A folder, or the id of a model on the Hub.
        images (`list` of `str` or `Path`): Files; the components are those of all of them.
        output_dir (`str` or `Path`): The folder to write to.
        beside (`dict`, *optional*): Other models by name, whose published encoders are the first columns.
        level (`int`, *optional*): Of a stack; that of its configuration when not given.

    Returns:
        `dict`: What `pca.json` holds: for each encoder its grid, and the shares of the variance that the three
        components explain.

    Raises:
        InputError: An image or a model cannot be read, or features lie on no grid or are too few.
    """
    pictures = [read_image(file) for file in images]
    encoders = load_encoders(model, beside, level)
    rows = [[Panel(view_of(picture, encoders[0].image_size))] for picture in pictures]
    rows[0][0].title = "image"
    entries = []
    for encoder in encoders:
        maps = feature_maps(encoder, pictures)
        colors, shares = principal_colors(maps, encoder.title)
        for row, color in zip(rows, colors, strict=True):
            enlarged = PILImage.fromarray(color).resize(encoder.image_size[::-1], PILImage.Resampling.NEAREST)
            row.append(Panel(np.asarray(enlarged)))
        rows[0][-1].title = encoder.title
        entries.append({"encoder": encoder.title, "level": encoder.level, "grid": list(maps[0].shape[:2]),
                        "width": maps[0].shape[2], "explained_variance": shares})  # fmt: skip
    results = {
        "model": str(model),
        "beside": {name: str(other) for name, other in (beside or {}).items()},
        "images": [str(file) for file in images],
        "percentiles": list(ENDS),
        "encoders": entries,
    }
    write_picture(Path(output_dir), "pca", rows, results)
    return results


def feature_maps(encoder: DrawnEncoder, pictures: list[PILImage.Image]) -> list[np.ndarray]:
    """The features (h, w, D) float32 of each image before pooling."""
    module = pooled_encoder(encoder.encoder, "patches", encoder.level)
    maps = []
    for picture in pictures:
        features = encoder.run(module, view_of(picture, encoder.image_size)).pooler_output
        check_finite(features, encoder.title)
        maps.append(features[0].float().cpu().numpy())
    return maps


def principal_colors(maps: list[np.ndarray], title: str = "encoder") -> tuple[list[np.ndarray], list[float]]:
    """
    The first three principal components of all tokens together as red, green and blue.

    Args:
        maps (`list` of `np.ndarray` of shape `(h, w, D)`): The features of each image.
        title (`str`): What an error calls the encoder.

    Returns:
        Pictures (h, w, 3) uint8, each component from its 1st to its 99th percentile over all tokens, and the shares of
        the variance that the components explain, 0 if there is none. A component's sign is such that its largest
        loading is positive.

    Raises:
        InputError: There are fewer than three tokens or features.
    """
    tokens = np.concatenate([each.reshape(-1, each.shape[-1]) for each in maps]).astype(np.float64)
    if min(tokens.shape) < 3:
        raise InputError(f"The {title} gives {tokens.shape[0]} tokens of {tokens.shape[1]} features for these images, "
                         "too few for three components; give more images or another level.")  # fmt: skip
    if not np.ptp(tokens, axis=0).any():
        # of a collapsed encoder, which shall be seen as such
        return [np.full((*each.shape[:2], 3), 127, np.uint8) for each in maps], [0.0] * 3
    pca = PCA(3, svd_solver="full")
    # one thread, as in projections: the order in which several add up is chance
    with threadpool_limits(1):
        components = pca.fit_transform(tokens)
    largest = np.abs(pca.components_).argmax(axis=1)
    components *= np.sign(pca.components_[np.arange(3), largest])
    low, high = np.percentile(components, ENDS, axis=0)
    colors = ((components - low) / np.maximum(high - low, np.finfo(np.float32).tiny)).clip(0, 1)
    parts = np.split(np.round(255 * colors).astype(np.uint8), np.cumsum([each[..., 0].size for each in maps])[:-1])
    pictures = [part.reshape(*each.shape[:2], 3) for part, each in zip(parts, maps, strict=True)]
    return pictures, pca.explained_variance_ratio_.tolist()
