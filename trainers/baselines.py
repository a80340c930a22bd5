"""What a trained encoder has to beat: randomly initialised ones of its kind and size, and raw pixels."""

from collections.abc import Iterator

from transformers import PreTrainedModel

from trainers.datasets import sample_seed, seeded
from trainers.embedding import MAX_RAW_PIXELS


def random_encoders(model: PreTrainedModel, number: int, seed: int) -> Iterator[tuple[str, PreTrainedModel]]:
    """
    Randomly initialised encoders, each made when it is asked for.

    Args:
        model (`PreTrainedModel`): The encoder whose class and configuration they have.
        number (`int`): How many.
        seed (`int`): Of their weights, each of which is a function of it and of the encoder's number.

    Yields:
        `(label, encoder)`: What its row is called, and the encoder, on the CPU.
    """
    for index in range(number):
        with seeded(sample_seed(seed, index)):
            encoder = type(model)(model.config)
        yield "random encoder" if number == 1 else f"random encoder {index + 1}", encoder


def raw_pixels_label(image_size: tuple[int, int]) -> str:
    """What the row of [`~embedding.RawPixels`] is called, for images of so many rows and columns."""
    reduced = "x".join(str(min(side, MAX_RAW_PIXELS)) for side in image_size)
    return "raw pixels" if max(image_size) <= MAX_RAW_PIXELS else f"raw pixels, reduced to {reduced}"
