"""The default data set: small scenes that are rendered, not downloaded, so that a fresh machine can pre-train on them.

A scene shows one to four objects of one kind, lit, before a darker, textured background. The labels are real (a kind
has its shape, the parts and how they are put together, and its coat, a dark pattern on its surface), and all else is a
nuisance: colours, backgrounds, distance, rotation, mirroring, position, occlusion by other objects and by clutter, the
light's side, strength and colour, and the grain of a picture taken at night. None of the nuisances depends on the
label. A part of a picture tells what the object's other parts look like and nothing about the grain: what predicts the
one and leaves out the other has learned.

Every scene is a function of (seed, index) alone, whatever the number of scenes, their order or the process; another
image size shows the same scene in another resolution. The drawing is Pillow's and NumPy's: another version of theirs
may round a pixel otherwise. Shapes: H height, W width (both the image size).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from trainers.errors import InputError
from trainers.scene_coats import draw_coat
from trainers.scene_objects import FAMILY_DRAWINGS, NUM_PAINTS, Part, ellipse, limb, rotate
from trainers.scene_surroundings import background, grid, photograph

FAMILIES: dict[str, tuple[str, ...]] = {
    family: tuple(drawing.__name__ for drawing in drawings) for family, drawings in FAMILY_DRAWINGS.items()
}
"""The kinds of each family."""
FAMILY_NAMES: tuple[str, ...] = tuple(FAMILIES)
"""The name of each `family` label."""
KIND_NAMES: tuple[str, ...] = tuple(kind for kinds in FAMILIES.values() for kind in kinds)
"""The name of each `kind` label."""
MAX_COUNT = 4
"""The most objects in a scene."""
MIN_IMAGE_SIZE = 16
SCENE_LABELS = ("kind", "family", "count", "distance")
"""What [`scene_labels`] can make classes of."""
NUM_DISTANCES = 6
"""Classes of `distance`, as many scenes in each."""

_DRAWINGS = tuple(drawing for drawings in FAMILY_DRAWINGS.values() for drawing in drawings)
_FAMILY_OF_KIND = tuple(family for family, kinds in enumerate(FAMILIES.values()) for _ in kinds)
_SUPERSAMPLING = 4
# Of what two random colours differ by: a texture of full contrast drowns the objects at 32 pixels.
_TEXTURE_CONTRAST = 0.6
# Of the nearest object, in units of the image's side; the others are this many times as far away.
_NEAREST_SIZES = (0.7, 1.0)
_FARTHER_THAN_NEAREST = (1.25, 2.0)
# Of an object's parts: how far their colours are from the object's own.
_SHADES = 50
# Of the background, and of an object before its parts are shaded: how light a colour channel is, of 255.
_DARK = (0, 128)
_LIT = (140, 256)
# How many times darker than the object its coat is.
_COAT_DARKNESS = 3


@dataclass(frozen=True)
class Scene:
    """One rendered scene and all that is known about it.

    Args:
        image (`np.ndarray` of shape `(H, W, 3)`, uint8):
            The picture, RGB.
        mask (`np.ndarray` of shape `(H, W)`, uint8):
            The object seen at the middle of each pixel: 0 the background or clutter, i object i. Object 1 is the
            farthest, object `count` the nearest. In about one scene of ten thousand an object is hidden altogether.
        family (`int`):
            Index into `FAMILY_NAMES`.
        kind (`int`):
            Index into `KIND_NAMES`.
        count (`int`):
            How many objects there are, 1 to 4, all of the same kind.
        distance (`float`):
            Of the nearest object to the camera, in units of the distance from which an object's longer side (upright)
            fills the image: an object at distance d is drawn 1 / d of the image's side long. From 1 to 1.43.
    """

    image: np.ndarray
    mask: np.ndarray
    family: int
    kind: int
    count: int
    distance: float


def render_scene(seed: int, index: int, image_size: int = 32) -> Scene:
    """Renders scene `index` of the series `seed`.

    Args:
        seed (`int`):
            Which series of scenes, 0 or more. Series of different seeds are independent.
        index (`int`):
            Which scene of the series, 0 or more.
        image_size (`int`, *optional*, defaults to 32):
            Height and width of the image in pixels, 16 or more.

    Returns:
        [`Scene`]: The scene.

    Raises:
        InputError: If the image size is below 16, or the seed or index below 0.
    """
    drawing = draw_scene(seed, index, image_size)
    middle = _SUPERSAMPLING // 2
    mask = drawing.pixels[middle::_SUPERSAMPLING, middle::_SUPERSAMPLING, 3].copy()
    unlit = np.asarray(Image.fromarray(drawing.pixels[..., :3]).reduce(_SUPERSAMPLING))
    image = photograph(unlit, drawing.rng, drawing.rng)
    kind, count = drawing.kind, drawing.count
    return Scene(image, mask, _FAMILY_OF_KIND[kind], kind, count, drawing.distance)


@dataclass(frozen=True)
class Drawing:
    """A scene before it is lit.

    Args:
        pixels (`np.ndarray` of shape `(4 * H, 4 * W, 4)`, uint8):
            Larger than the image, to be reduced: red, green, blue, and the number of the object as in [`Scene`].
        kind, count, distance:
            As in [`Scene`].
        rng (`np.random.Generator`):
            What light and grain are drawn from.
    """

    pixels: np.ndarray
    kind: int
    count: int
    distance: float
    rng: np.random.Generator


def draw_scene(seed: int, index: int, image_size: int = 32) -> Drawing:
    """Draws what [`render_scene`] lights and photographs; the arguments and errors are the same."""
    _check_at_least("image_size", image_size, MIN_IMAGE_SIZE)
    _check_at_least("seed", seed, 0)
    _check_at_least("index", index, 0)
    rng = np.random.default_rng([seed, index])
    kind = int(rng.integers(len(KIND_NAMES)))
    count = int(rng.integers(1, MAX_COUNT + 1))
    distances = _draw_distances(count, rng)
    sizes = 1 / distances
    ground = rng.integers(*_DARK, (2, 3))
    ground[1] = ground[0] + _TEXTURE_CONTRAST * (ground[1] - ground[0])

    ground_image = Image.fromarray(background(ground, image_size, rng)).convert("RGBA")
    ground_image.putalpha(0)
    side = image_size * _SUPERSAMPLING
    # The fourth channel holds the number of the object instead of an opacity: one stroke paints image and mask.
    canvas = ground_image.resize((side, side), Image.Resampling.NEAREST)
    brush = ImageDraw.Draw(canvas)
    colour = rng.integers(*_LIT, 3)
    _draw_clutter(brush, side, int(rng.integers(0, 3)), rng)
    for number, (size, centre) in enumerate(zip(sizes, _place(sizes, rng), strict=True), start=1):
        parts = _pose(_DRAWINGS[kind](rng), size, centre, rng)
        _draw(brush, side, parts, _paints(colour, rng), number)
    _draw_clutter(brush, side, int(rng.integers(0, 2)), rng)

    pixels = np.array(canvas)
    coat = draw_coat(kind, grid(side).reshape(side, side, 2), rng)
    pixels[coat & (pixels[..., 3] > 0), :3] = colour // _COAT_DARKNESS
    return Drawing(pixels, kind, count, float(distances[-1]), rng)


def render_scenes(
    num_scenes: int, seed: int = 0, image_size: int = 32, progress: bool = False
) -> dict[str, np.ndarray]:
    """Renders the scenes 0 to `num_scenes` - 1 of a series.

    Args:
        num_scenes (`int`):
            How many scenes, 1 or more.
        seed (`int`, *optional*, defaults to 0):
            Which series of scenes, 0 or more.
        image_size (`int`, *optional*, defaults to 32):
            Height and width of the images in pixels, 16 or more.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `dict[str, np.ndarray]`: The fields of [`Scene`], stacked: `image` (num_scenes, H, W, 3) uint8, `mask`
        (num_scenes, H, W) uint8, and (num_scenes,) each `family`, `kind`, `count` int64 and `distance` float32.

    Raises:
        InputError: If `num_scenes` is below 1, the image size below 16, or the seed below 0.
    """
    _check_at_least("num_scenes", num_scenes, 1)
    scenes = [
        render_scene(seed, index, image_size)
        for index in tqdm(range(num_scenes), desc="rendering scenes", disable=not progress)
    ]
    dtypes = {
        "image": np.uint8,
        "mask": np.uint8,
        "family": np.int64,
        "kind": np.int64,
        "count": np.int64,
        "distance": np.float32,
    }
    return {name: np.array([getattr(scene, name) for scene in scenes], dtype) for name, dtype in dtypes.items()}


def scene_labels(scenes: dict[str, np.ndarray], label: str) -> tuple[np.ndarray, list[str]]:
    """Classes of rendered scenes.

    Args:
        scenes (`dict[str, np.ndarray]`):
            What [`render_scenes`] returned.
        label (`str`):
            One of `SCENE_LABELS`. The classes of `distance` are ranges of the nearest object's, which are equally
            frequent.

    Returns:
        `(np.ndarray, list[str])`: Class indices (num_scenes,) int64, and the classes' names.
    """
    if label == "count":
        return scenes["count"] - 1, [f"{count} of a kind" for count in range(1, MAX_COUNT + 1)]
    if label == "distance":
        # 1 / distance is uniform, see `_draw_distances`
        ends = 1 / np.linspace(*_NEAREST_SIZES[::-1], NUM_DISTANCES + 1)
        names = [f"{low:.2f} to {high:.2f}" for low, high in zip(ends, ends[1:], strict=False)]
        return np.searchsorted(ends[1:-1], scenes["distance"], side="right"), names
    return scenes[label], list({"kind": KIND_NAMES, "family": FAMILY_NAMES}[label])


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{name} is {value}, but must be at least {least}; give a larger {name}.")


def _draw_distances(count: int, rng: np.random.Generator) -> np.ndarray:
    """The distances (count,) of the objects, farthest first."""
    nearest = 1 / rng.uniform(*_NEAREST_SIZES)
    farther = nearest * rng.uniform(*_FARTHER_THAN_NEAREST, size=count - 1)
    return np.append(np.sort(farther)[::-1], nearest)


def _place(sizes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """The centres (2,) of the objects in units of the image's side, kept apart so that they rarely hide each other."""
    centres: list[np.ndarray] = []
    for size in sizes[::-1]:
        margin = 0.4 * size
        tries = rng.uniform(margin, 1 - margin, (16 if centres else 1, 2))
        if centres:
            gaps = np.linalg.norm(tries[:, None] - np.array(centres), axis=2) / sizes[::-1][: len(centres)]
            tries = tries[gaps.min(axis=1).argmax()][None]
        centres.append(tries[0])
    return centres[::-1]


def _pose(parts: list[Part], size: float, centre: np.ndarray, rng: np.random.Generator) -> list[Part]:
    """Brings a drawing to its place: its longer side becomes `size`, in units of the image's side."""
    points = np.concatenate([corners for _, corners in parts])
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) * (size / (high - low).max())
    if rng.random() < 0.5:
        points[:, 0] *= -1
    points = rotate(points, rng.uniform(-np.pi / 2, np.pi / 2)) + centre
    ends = np.cumsum([len(corners) for _, corners in parts])
    return [(paint, corners) for (paint, _), corners in zip(parts, np.split(points, ends[:-1]), strict=True)]


def _paints(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shades (paints, 3) of an object's colour."""
    return np.clip(colour + rng.integers(-_SHADES, _SHADES + 1, (NUM_PAINTS, 3)), 0, 255)


def _draw(brush: ImageDraw.ImageDraw, side: int, parts: list[Part], paints: np.ndarray, number: int) -> None:
    for paint, corners in parts:
        brush.polygon((corners * side).ravel().tolist(), fill=(*paints[paint].tolist(), number))


def _draw_clutter(brush: ImageDraw.ImageDraw, side: int, count: int, rng: np.random.Generator) -> None:
    """Blobs and bars of random colours, which belong to no object."""
    for _ in range(count):
        x, y, length, width, angle = rng.uniform([0, 0, 0.1, 0.03, 0], [1, 1, 0.25, 0.1, np.pi])
        if rng.random() < 0.5:
            shape = ellipse(x, y, length / 2, width, angle)
        else:
            reach = 2 * length * np.array([np.cos(angle), np.sin(angle)])
            shape = limb(width, (x, y) - reach, (x, y) + reach)
        _draw(brush, side, [(0, shape)], rng.integers(0, 256, (1, 3)), number=0)
