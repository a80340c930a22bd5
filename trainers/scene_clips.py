"""Clips of rendered scenes: a camera flies over a scene, turns and comes nearer, and every object's mask is known.

The lamp is the camera's: it shines from the same side all the time, so that an object is lit otherwise when it is
elsewhere in the picture. Every frame has grain of its own. Shapes: T frames, H height, W width (both the image size).
"""

import numpy as np

from trainers.errors import InputError
from trainers.scene_objects import rotate
from trainers.scene_surroundings import grid, photograph
from trainers.scenes import draw_scene

MIN_FRAMES = 3
# Of the camera: how much of the scene's side it sees, and how far it turns in a clip, in radians.
_SIDES = (0.45, 0.8)
_TURN = np.pi / 4
# What the camera sees in pixels of the scene's drawing, of which as many make a pixel of the frame.
_SUPERSAMPLING = 2


def render_clip(seed: int, index: int, num_frames: int = 16, image_size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """
    Renders a clip of scene `index` of the series `seed`.

    Args:
        seed (`int`): Which series of scenes, 0 or more.
        index (`int`): Which scene of the series, 0 or more.
        num_frames (`int`): T, 3 or more.
        image_size (`int`): Height and width of the frames in pixels, 16 or more.

    Returns:
        The frames (T, H, W, 3) and their masks (T, H, W), uint8: 0 the background, i object i. In the middle of the
        first and of the last frame there is an object.

    Raises:
        InputError: A number is too small.
    """
    if num_frames < MIN_FRAMES:
        raise InputError(f"num_frames={num_frames} is too few for a clip; set it to {MIN_FRAMES} or more.")
    # a larger drawing, of which the camera sees a part
    pixels = draw_scene(seed, index, image_size).pixels
    path, light, grain = (np.random.default_rng([seed, index, stream]) for stream in range(3))
    spots = _spots_on_objects(pixels[..., 3], path)
    sides, turn = path.uniform(*_SIDES, 2), path.uniform(-_TURN, _TURN)
    light_seed = light.integers(2**32)
    frames, masks = [], []
    for progress in np.linspace(0, 1, num_frames):
        centre = spots[0] + progress * (spots[1] - spots[0])
        side = sides[0] + progress * (sides[1] - sides[0])
        seen = _look(pixels, centre, side, progress * turn, _SUPERSAMPLING * image_size)
        unlit = seen[..., :3].reshape(image_size, _SUPERSAMPLING, image_size, _SUPERSAMPLING, 3).mean(axis=(1, 3))
        frames.append(photograph(unlit, np.random.default_rng(light_seed), grain))
        masks.append(seen[_SUPERSAMPLING // 2 :: _SUPERSAMPLING, _SUPERSAMPLING // 2 :: _SUPERSAMPLING, 3])
    return np.stack(frames), np.stack(masks)


def _spots_on_objects(numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two random places (2, 2), x and y, on objects, in units of the scene's side."""
    rows, columns = np.nonzero(numbers)
    chosen = rng.integers(len(rows), size=2)
    return (np.stack([columns, rows], axis=1)[chosen] + 0.5) / len(numbers)


def _look(pixels: np.ndarray, centre: np.ndarray, side: float, angle: float, size: int) -> np.ndarray:
    """A square (size, size, 4) of a drawing, turned about its centre; beyond its edges it goes on as in a mirror."""
    x, y = (rotate(grid(size) * side, angle) + centre).T
    columns, rows = (np.floor((1 - np.abs(1 - at % 2)) * len(pixels)).astype(int) for at in (x, y))
    last = len(pixels) - 1
    return pixels[np.minimum(rows, last), np.minimum(columns, last)].reshape(size, size, 4)
