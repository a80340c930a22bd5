"""How well masks of objects fit: DAVIS' region similarity J and contour accuracy F (Perazzi et al., CVPR 2016).

Shapes: H and W rows and columns of a frame.
"""

import math

import numpy as np
from scipy import ndimage

# Of the frame's diagonal: how far apart contours may be that count as the same.
_CONTOUR_TOLERANCE = 0.008


def region_similarity(true: np.ndarray, found: np.ndarray) -> float:
    """J, the intersection over union of two masks (H, W) bool; 1 if both are empty."""
    union = np.count_nonzero(true | found)
    return np.count_nonzero(true & found) / union if union else 1.0


def contour_accuracy(true: np.ndarray, found: np.ndarray) -> float:
    """
    F, the harmonic mean of the shares of either contour that lie near the other.

    Args:
        true, found (`np.ndarray` of shape `(H, W)`, bool): The masks. Near is within 0.8 % of the frame's diagonal,
            rounded up to whole pixels.

    Returns:
        `float`: 0 to 1; 1 if neither mask has a contour, 0 if one has none.
    """
    reach = math.ceil(_CONTOUR_TOLERANCE * math.hypot(*true.shape))
    contours = contour(true), contour(found)
    if not any(each.any() for each in contours):
        return 1.0
    if not all(each.any() for each in contours):
        return 0.0
    of_true, of_found = (
        np.count_nonzero(each & (ndimage.distance_transform_edt(~other) <= reach)) / np.count_nonzero(each)
        for each, other in (contours, contours[::-1])
    )
    return 2 * of_true * of_found / (of_true + of_found) if of_true + of_found else 0.0


def contour(mask: np.ndarray) -> np.ndarray:
    """The pixels (H, W) bool of a mask that differ from the one to the right, below, or below and to the right."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    return (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
