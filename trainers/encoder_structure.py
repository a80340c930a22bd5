"""How far apart the levels of a model keep classes: whether a level means more than the one below it."""

import numpy as np
import torch
from transformers import PreTrainedModel

from trainers.datasets import ImageDataset, ImageSource
from trainers.embedding import device_of, extract_embeddings
from trainers.evaluation import EvaluationArguments
from trainers.pooling import EveryLevel, side_by_side
from trainers.structure import NUM_K_MEANS, arrangement, coarse_labels, count_classes, unit_vectors


def structure_of_levels(
    model: PreTrainedModel, source: ImageSource, dataset: ImageDataset, mean, std, arguments: EvaluationArguments
) -> list[dict]:
    """
    Silhouette and NMI of the classes at each level of a model.

    Args:
        model (`PreTrainedModel`): Gives embeddings of a level, such as [`CJepaModel`].
        source ([`ImageSource`]): Labelled images.
        dataset ([`ImageDataset`]): The same as the model sees them.
        mean, std (`list[float]`): Of the channels, for pixels in [0, 1].
        arguments ([`EvaluationArguments`]): Batch size, workers, precision, progress; the seed is that of k-means.

    Returns:
        `list[dict]`: In the order of the levels, and of a stack last of all of them side by side: `silhouette`, from
        -1 to 1, and `nmi`, from 0 to 1, as of [`~structure.structure_of`]; of the coarse classes, where these are
        known, `coarse_silhouette` and `coarse_nmi`.

    Raises:
        InputError: The images show one class, or as many as there are images, or embeddings are not finite.
    """
    encoder = EveryLevel(model)
    embeddings, labels = extract_embeddings(
        encoder, dataset, mean, std, description="structure: test images", **arguments.extraction(device_of(model))
    )
    parts = encoder.split(embeddings)
    if len(parts) > 1:
        parts.append(side_by_side(parts))
    labellings = {"": labels}
    if (coarse := coarse_labels(source)) is not None:
        labellings["coarse_"] = torch.from_numpy(coarse[0])
    for before, of_images in labellings.items():
        count_classes(before.strip("_") or "fine", of_images)
    return [_row(unit_vectors(part), labellings, arguments.seed) for part in parts]


def _row(unit_x: np.ndarray, labellings: dict[str, torch.Tensor], seed: int) -> dict:
    row = {}
    for before, labels in labellings.items():
        found = arrangement(unit_x, labels.numpy(), range(seed, seed + NUM_K_MEANS))
        row |= {f"{before}{name}": found[name] for name in ("silhouette", "nmi")}
    return row
