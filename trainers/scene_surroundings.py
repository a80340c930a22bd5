"""What surrounds the objects of a rendered scene: the ground, the light, and the grain of a picture taken at night.

Shapes: H height, W width (both the image size).
"""

import numpy as np
from PIL import Image

from trainers.scene_objects import rotate

# Grains a side, whatever the image size, and the range of their standard deviation, of 255.
_GRAINS = 32
_GRAIN_STRENGTHS = (20, 45)
# Of the light's share that a colour channel gets.
_LIGHT = (0.3, 1.0)


def photograph(unlit: np.ndarray, light: np.random.Generator, grain: np.random.Generator) -> np.ndarray:
    """An image (H, W, 3) uint8 lit from a random side in a random colour, with grain."""
    return np.clip(_light(unlit, light) + _grain(len(unlit), grain), 0, 255).astype(np.uint8)


def background(ground: np.ndarray, image_size: int, rng: np.random.Generator) -> np.ndarray:
    """A texture (H, W, 3) between the two colours of `ground` (2, 3): stripes, checks, a gradient or noise."""
    texture = rng.choice(["stripes", "checks", "gradient", "noise"])
    x, y = rotate(grid(image_size), rng.uniform(0, 2 * np.pi)).T.reshape(2, image_size, image_size)
    waves = rng.uniform(1.5, 6)
    phase = rng.uniform(0, 1)
    if texture == "stripes":
        blend = 0.5 + 0.5 * np.sin(2 * np.pi * (waves * x + phase))
    elif texture == "checks":
        blend = ((np.floor(waves * x + phase) + np.floor(waves * y)) % 2).astype(float)
    elif texture == "gradient":
        blend = np.clip(0.5 + x, 0, 1)
    else:
        cells = int(rng.choice([3, 6, 12, 24]))
        noise = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        blend = np.asarray(noise.resize((image_size, image_size), Image.Resampling.BILINEAR))
    return (ground[0] + blend[..., None] * (ground[1] - ground[0])).astype(np.uint8)


def _light(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Lights an image (H, W, 3) from a random side in a random colour."""
    direction = rng.uniform(-0.5, 0.5, 2)
    shade = 0.85 + (grid(len(image)) @ direction).reshape(*image.shape[:2], 1)
    return np.clip(image * shade, 0, 255) * rng.uniform(*_LIGHT, 3)


def _grain(image_size: int, rng: np.random.Generator) -> np.ndarray:
    """Noise (H, W, 3) that is independent from grain to grain and colour to colour."""
    grains = rng.normal(0, rng.uniform(*_GRAIN_STRENGTHS), (3, _GRAINS, _GRAINS)).astype(np.float32)
    size = image_size, image_size
    return np.stack([Image.fromarray(colour).resize(size, Image.Resampling.BOX) for colour in grains], axis=-1)


def grid(image_size: int) -> np.ndarray:
    """The middles (H * W, 2) of the pixels, in units of the image's side from the image's middle."""
    steps = (np.arange(image_size) + 0.5) / image_size - 0.5
    return np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
