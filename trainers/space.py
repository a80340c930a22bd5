"""What a Space shows of a published model: maps of attention, principal components and nearest images, of any level.

Nothing here knows of a page; `space_page.py` lays it out. Shapes: H and W rows and columns of pixels of a picture that
is shown, 640 or more on the shorter side; h and w rows and columns of a level's grid.
"""

import dataclasses
import importlib.util
import socket
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from datasets import Dataset
from huggingface_hub import constants
from PIL import Image as PILImage
from PIL import ImageDraw

from trainers.attention_maps import QUERY_COLOR, attention_map, attention_of, overlay
from trainers.datasets import ImageSource
from trainers.decoding import UnreadableImage, decode_image
from trainers.drawn_encoders import load_encoders
from trainers.embedding import check_finite
from trainers.errors import InputError, first_line, plain_message
from trainers.level_embeddings import embed_levels
from trainers.neighbours import thumbnail
from trainers.panels import view_of
from trainers.patch_pca import feature_maps, principal_colors
from trainers.pooling import EveryLevel
from trainers.readable import readable_positions
from trainers.search import find_neighbours
from trainers.sources import DataArguments, load_splits, scenes_source, source_of
from trainers.subsets import choose_images

NUM_EXAMPLES, NUM_NEAREST = 8, 8
"""Images that can be clicked on, and nearest ones that are shown, where there are so many."""
MAX_PICTURES = 16
"""Images whose principal components are drawn together."""
_NUM_SCENES, _MAX_GALLERY = 256, 2_000
# a browser that enlarged a picture would misread the places of clicks on it
_SHOWN_SIDE, _GAP = 640, 16


class Explorer:
    """
    A model with images to look for, all of them embedded once.

    Args:
        model (`str` or `Path`): A folder, or the id of a model on the Hub; of a C-JEPA model the target encoder is
            shown.
        gallery (`str` or `Path`, *optional*): A folder of images, or what else `--dataset` names; 256 rendered scenes
            when not given. Of more than 2,000 images a fixed choice is taken.

    Raises:
        InputError: There is no such model or folder, or it holds less than two images.
    """

    def __init__(self, model: str | Path, gallery: str | Path | None = None):
        self.name = str(model)
        chosen = load_encoders(model)[0]
        self.chosen_level, self.num_levels = chosen.level, chosen.encoder.config.num_levels
        self.levels = [
            dataclasses.replace(
                chosen, level=level, title=f"encoder's level {level}" if self.num_levels > 1 else "encoder"
            )
            for level in range(self.num_levels)
        ]
        source = _gallery_of(gallery, max(chosen.image_size))
        number = min(NUM_EXAMPLES, len(source) // 2)
        is_example = np.isin(np.arange(len(source)), np.linspace(0, len(source) - 1, number).astype(int))
        examples = source.take(np.flatnonzero(is_example))
        self.examples = [examples.image(index) for index in range(len(examples))]
        self.gallery = source.take(np.flatnonzero(~is_example))
        embeddings = embed_levels(chosen, self.gallery, "embedding the gallery", batch_size=16)
        self._rows = [Dataset.from_dict({"embedding": each.numpy()}) for each in embeddings]

    @property
    def summary(self) -> str:
        """Kind, parameters and image size of the model, in Markdown, with a link to its repository on the Hub."""
        encoder, (height, width) = self.levels[0].encoder, self.levels[0].image_size
        kind = {"cjepa": "C-JEPA", "sjea": "S-JEA"}[encoder.config.model_type]
        what = f"{kind} stack of {self.num_levels} levels" if self.num_levels > 1 else f"{kind} encoder"
        is_here = Path(self.name).exists()
        shown = f"`{self.name}`" if is_here else f"[{self.name}]({constants.ENDPOINT}/{self.name})"
        return (
            f"{shown}: {what}, {encoder.num_parameters() / 1e6:.2f} M parameters, images of {width}x{height} pixels."
        )

    def seen(self, picture: PILImage.Image) -> np.ndarray:
        """An RGB image as the model sees it, (H, W, 3) uint8."""
        return enlarged(view_of(picture, self.levels[0].image_size))

    def num_layers(self, level: int) -> int:
        """Layers of a level that has attention."""
        return self.levels[level].encoder.config.level_config(level).num_hidden_layers

    def patch_at(self, level: int, x: int, y: int) -> tuple[int, int]:
        """Row and column of the patch at a pixel of what [`~Explorer.attention`] draws."""
        encoder = self.levels[level]
        height, width = _shown_size(encoder.image_size)
        rows, columns = encoder.encoder.config.level_config(level).grid_size
        return min(y * rows // height, rows - 1), min(x * columns // width, columns - 1)

    def attention(
        self, picture: PILImage.Image, level: int, layer: int = -1, query: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """
        Where a layer looks.

        Args:
            picture (`PIL.Image.Image`): An RGB image.
            level, layer (`int`): Which, from 0.
            query (`(int, int)`, *optional*): Row and column of the patch that asks; the mean over all when not given.

        Returns:
            The image as the model sees it, and its map laid over it, both (H, W, 3) uint8, with the patch outlined.

        Raises:
            InputError: The level has no attention, or there is no such layer or patch.
        """
        encoder = self.levels[level]
        view = view_of(picture, encoder.image_size)
        received = attention_map(encoder, attention_of(encoder, layer, query), view)
        view = enlarged(view)
        return tuple(_outlined(pixels, received.shape, query) for pixels in (view, overlay(view, received)))

    def components(self, pictures: Sequence[PILImage.Image], level: int) -> tuple[list[np.ndarray], list[float]]:
        """
        Patch tokens as colours, which mean the same in all images.

        Args:
            pictures (`list` of `PIL.Image.Image`): RGB images.
            level (`int`): Which, from 0.

        Returns:
            Pictures (H, 2 * W + 16, 3) uint8, each an image beside its colours; and the shares of the variance that
            the three components explain.

        Raises:
            InputError: There are too many images, or the level's features lie on no grid or are too few.
        """
        if len(pictures) > MAX_PICTURES:
            raise InputError(f"{len(pictures)} images are too many to compare; give up to {MAX_PICTURES}.")
        encoder = self.levels[level]
        colors, shares = principal_colors(feature_maps(encoder, pictures), encoder.title)
        views = [enlarged(view_of(picture, encoder.image_size)) for picture in pictures]
        return [_beside(view, color) for view, color in zip(views, colors, strict=True)], shares

    def nearest(self, picture: PILImage.Image) -> list[list[tuple[PILImage.Image, str]]]:
        """
        The images of the gallery that are nearest to one by the embeddings of each level.

        Args:
            picture (`PIL.Image.Image`): An RGB image.

        Returns:
            For each level its nearest images, the nearest first: a thumbnail, and cosine and label as text.

        Raises:
            InputError: The embedding is not finite.
        """
        encoder = self.levels[0]
        module = EveryLevel(encoder.encoder)
        joined = encoder.run(module, view_of(picture, encoder.image_size)).pooler_output.float().cpu()
        check_finite(joined, encoder.title)
        found, number = [], min(NUM_NEAREST, len(self.gallery))
        for rows, embedding in zip(self._rows, module.split(joined), strict=True):
            similarities, positions = find_neighbours(rows, embedding.numpy(), number, "sklearn")
            both = zip(similarities[0].tolist(), positions[0].tolist(), strict=True)
            found.append([(thumbnail(self.gallery.image(place)), self._caption(place, near)) for near, place in both])
        return found

    def _caption(self, position: int, similarity: float) -> str:
        source = self.gallery
        if source.labels is None or source.labels[position] < 0:
            return f"{similarity:.3f}"
        label = int(source.labels[position])
        return f"{similarity:.3f} {source.label_names[label] if source.label_names else label}"


def page_module() -> ModuleType:
    """`trainers.space_page`; raises `InputError` where gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError('The page needs gradio, which is not installed; pip install "cjepa[space]".')
    return importlib.import_module("trainers.space_page")


def check_port(port: int | None):
    """Raises `InputError` if a port is taken, or is none; before anything takes long."""
    if port is None:
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except (OSError, OverflowError) as error:
        raise InputError(f"--port {port} cannot be used ({first_line(error)}); give another one, or none.") from error


def read_upload(file: str | Path) -> PILImage.Image:
    """A file that somebody gave as an RGB image; raises `InputError` with the file's name if it cannot be read."""
    try:
        return decode_image({"bytes": Path(file).read_bytes()})
    except UnreadableImage as error:
        raise InputError(f"{Path(file).name} cannot be read ({error}); give an image, such as JPEG or PNG.") from error


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """A picture (h, w, 3) uint8 by whole pixels to 640 or more on the shorter side."""
    zoom = _zoom(pixels.shape[:2])
    return pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _zoom(size: tuple[int, int]) -> int:
    return -(-_SHOWN_SIDE // min(size))


def _shown_size(image_size: tuple[int, int]) -> tuple[int, int]:
    return tuple(side * _zoom(image_size) for side in image_size)


def _outlined(pixels: np.ndarray, grid: tuple[int, int], query: tuple[int, int] | None) -> np.ndarray:
    """A picture on which the patch that asks, if it is one, is outlined."""
    if query is None:
        return pixels
    (top, left), (bottom, right) = (
        [(place + end) * side // number for place, side, number in zip(query, pixels.shape, grid, strict=False)]
        for end in (0, 1)
    )
    image = PILImage.fromarray(pixels)
    ImageDraw.Draw(image).rectangle((left, top, right - 1, bottom - 1), outline=QUERY_COLOR, width=4)
    return np.asarray(image)


def _beside(view: np.ndarray, color: np.ndarray) -> np.ndarray:
    """A view (H, W, 3) beside its colours (h, w, 3)."""
    size = view.shape[1], view.shape[0]
    colors = np.asarray(PILImage.fromarray(color).resize(size, PILImage.Resampling.NEAREST))
    return np.concatenate([view, np.full((size[1], _GAP, 3), 255, np.uint8), colors], axis=1)


def _gallery_of(gallery: str | Path | None, image_size: int) -> ImageSource:
    """The images to look for and the examples: those of a data set, or scenes that no model was trained on."""
    if gallery is None:
        number = _NUM_SCENES + NUM_EXAMPLES
        return scenes_source(DataArguments(num_eval_images=number), "test", image_size, progress=True)
    arguments = DataArguments(dataset=str(gallery))
    try:
        split, rows = next(iter(load_splits(arguments).items()))
    except InputError as error:
        raise InputError(plain_message(error).replace("--dataset", "--gallery")) from error
    source = choose_images(source_of(rows, arguments, split), _MAX_GALLERY)
    source = source.take(readable_positions(source)[0])
    if len(source) < 2:
        raise InputError(f"{source.name} has {len(source)} image; give at least 2, one to look for, one to find.")
    return source
