"""LiDAR of frozen encoders, of ten crops each of a thousand images, as its paper has it (arXiv 2312.04000)."""

import math

from transformers import PreTrainedModel

from trainers.datasets import ImageDataset, ImageSource
from trainers.diagnostics import lidar
from trainers.embedding import device_of, extract_embeddings
from trainers.evaluation import EvaluationArguments
from trainers.pooling import EveryLevel
from trainers.subsets import choose_images
from trainers.transforms import train_transform

NUM_IMAGES, NUM_CROPS = 1000, 10
_CROP_SCALE = (0.3, 1.0)


class _Crops(ImageDataset):
    """Mirrored and plain random crops of images, `NUM_CROPS` of one after the other; the same at every call."""

    def __len__(self) -> int:
        return len(self.source) * NUM_CROPS

    def __getitem__(self, index: int) -> dict:
        image, crop = divmod(index, NUM_CROPS)
        return {"pixel_values": self.source.view(image, lambda opened: self.view(opened, crop, image))}


def lidar_of_levels(
    model: PreTrainedModel, source: ImageSource, image_size: tuple[int, int], mean, std, arguments: EvaluationArguments
) -> list[float]:
    """
    LiDAR of each level of a model.

    Levels side by side have length 1 each, and so most of their directions less variance within images than the
    10^-4 that LiDAR's paper adds to it: LiDAR would be that of the constant.

    Args:
        model (`PreTrainedModel`): Gives embeddings of a level, such as [`CJepaModel`].
        source ([`ImageSource`]): Of which `NUM_IMAGES` are taken, a fixed choice; labels are not looked at.
        image_size (`(height, width)`): Pixels of a crop.
        mean, std (`list[float]`): Of the channels, for pixels in [0, 1].
        arguments ([`EvaluationArguments`]): Batch size, workers, precision, progress.

    Returns:
        `list[float]`: In the order of the levels; NaN of a single image.
    """
    crops = _Crops(choose_images(source, NUM_IMAGES), train_transform(image_size, _CROP_SCALE, horizontal_flip=True))
    encoder = EveryLevel(model)
    embeddings, _ = extract_embeddings(
        encoder, crops, mean, std, description="LiDAR: crops", **arguments.extraction(device_of(model))
    )
    views = [part.unflatten(0, (-1, NUM_CROPS)) for part in encoder.split(embeddings)]
    return [lidar(each) if len(each) > 1 else math.nan for each in views]
