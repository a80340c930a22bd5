"""How good a frozen encoder is: kNN and a linear probe on its embeddings, beside a random encoder and raw pixels.

Shapes: n images to fit on, m to test on, D width of an embedding.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import choose_level, pair
from trainers.baselines import random_encoders, raw_pixels_label
from trainers.datasets import ImageDataset, ImageSource
from trainers.diagnostics import feature_std, rankme
from trainers.embedding import RawPixels, check_finite, device_of, extract_embeddings
from trainers.errors import InputError
from trainers.pooling import EveryLevel, OneLevel, side_by_side
from trainers.precision import check_precision, is_bf16, precision_name
from trainers.probes import accuracy_interval, knn_predict, linear_predict
from trainers.subject import Subject
from trainers.transforms import eval_transform


@dataclass
class EvaluationArguments:
    """How a frozen encoder is evaluated."""

    num_neighbors: int = field(default=20, metadata={"help": "neighbours that vote in the kNN evaluation"})
    temperature: float = field(default=0.07, metadata={"help": "temperature T of their weights exp(cosine / T)"})
    eval_batch_size: int = field(default=256, metadata={"help": "images of a batch in evaluation"})
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that load images; 0: the main one"})
    seed: int = field(default=0, metadata={"help": "seed of random encoders and of what the linear probe holds out"})
    num_probe_images: int | None = field(
        default=None, metadata={"help": "fit the probes on only so many train images, a fixed choice"}
    )
    num_random_encoders: int = field(
        default=1, metadata={"help": "randomly initialised encoders of the same size to compare with"}
    )
    context_encoder: bool = field(
        default=False, metadata={"help": "also evaluate the context encoder, which is not the one that is published"}
    )
    precision: str = field(
        default="auto", metadata={"help": "`auto` (bf16 where the device computes in it), `bf16` or `float32`"}
    )
    disable_tqdm: bool | None = field(default=None, metadata={"help": "show no progress bars"})

    def __post_init__(self):
        for name, least in (("num_neighbors", 1), ("eval_batch_size", 1), ("num_random_encoders", 0),
                            ("num_probe_images", 2), ("seed", 0), ("dataloader_num_workers", 0)):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name}={value} is too small; set it to {least} or more.")
        check_precision(self.precision)
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature} divides similarities; set it above 0, such as 0.07.")

    def extraction(self, device: torch.device) -> dict:
        """The arguments of [`~embedding.extract_embeddings`] that follow from them, for an encoder on a device."""
        return {
            "batch_size": self.eval_batch_size,
            "num_workers": self.dataloader_num_workers,
            "device": device,
            "progress": not self.disable_tqdm,
            "bf16": is_bf16(self.precision, device),
        }


def embed(encoder: nn.Module, train: ImageDataset, test: ImageDataset, mean, std, arguments, label: str, device=None):
    """
    The embeddings and labels of the images to fit on and of those to test on.

    Args:
        encoder, mean, std, device: As in [`~embedding.extract_embeddings`].
        train, test ([`ImageDataset`]): Labelled images.
        arguments ([`EvaluationArguments`]): Batch size, workers, progress.
        label (`str`): What the bar calls the encoder.

    Returns:
        `(train_x, train_y, test_x, test_y)`: Embeddings (n, D) and labels (n,), on the GPU if the encoder is there.

    Raises:
        InputError: The embeddings are not finite.
    """
    device = device_of(encoder) if device is None else torch.device(device)
    embedded = tuple(
        tensor.to(device if device.type == "cuda" else "cpu")
        for dataset, images in ((train, "train"), (test, "test"))
        for tensor in extract_embeddings(
            encoder, dataset, mean, std, description=f"{label}: {images} images", **arguments.extraction(device)
        )
    )
    for embeddings in (embedded[0], embedded[2]):
        check_finite(embeddings, label)
    return embedded


def probe(train_x, train_y, test_x, test_y, arguments: EvaluationArguments, label: str) -> dict:
    """
    kNN, linear probe and diagnostics of embeddings.

    Args:
        train_x, test_x (`torch.Tensor` of shapes `(n, D)` and `(m, D)`): Embeddings.
        train_y, test_y (`torch.Tensor` of shapes `(n,)` and `(m,)`): Class indices; the classes of `test_y` are among
            those of `train_y`.
        arguments ([`EvaluationArguments`]): How.
        label (`str`): What the row is called.

    Returns:
        `dict`: `encoder` (the label); `knn` and `linear`, percent correct; `knn_interval`, `linear_interval`, 95 %;
        `linear_C`, `linear_converged`; `rankme` and `feature_std` of the test embeddings; `dim`, their width.
    """
    num_classes = int(train_y.max()) + 1
    knn = knn_predict(train_x, train_y, test_x, num_classes, arguments.num_neighbors, arguments.temperature)
    probed = linear_predict(train_x, train_y, test_x, arguments.seed, not arguments.disable_tqdm)
    row = {"encoder": label}
    for name, predictions in (("knn", knn), ("linear", probed.predictions)):
        num_correct = int((predictions == test_y).sum())
        row[name] = 100 * num_correct / len(test_y)
        row[f"{name}_interval"] = list(accuracy_interval(num_correct, len(test_y)))
    return row | {
        "linear_C": probed.C,
        "linear_converged": probed.converged,
        "rankme": rankme(test_x),
        "feature_std": feature_std(test_x),
        "dim": test_x.shape[1],
    }


def evaluate_encoder(
    encoder: nn.Module,
    train: ImageDataset,
    test: ImageDataset,
    mean,
    std,
    arguments: EvaluationArguments,
    label: str = "target encoder",
    device: torch.device | str | None = None,
) -> dict:
    """The row of [`probe`] of an encoder; the arguments are those of [`embed`]."""
    return probe(*embed(encoder, train, test, mean, std, arguments, label, device), arguments, label)


def evaluate_levels(
    model: PreTrainedModel,
    train: ImageDataset,
    test: ImageDataset,
    mean,
    std,
    arguments: EvaluationArguments,
    level: int | str | None = None,
    label: str = "encoder",
    device: torch.device | str | None = None,
) -> list[dict]:
    """
    The rows of [`probe`] of one level of a model, or of each and of all together.

    Args:
        model (`PreTrainedModel`): Gives `level_embeddings`, such as [`SJeaModel`].
        level (`int` or `"all"`, *optional*): Which; that of the model's configuration when not given. `"all"` gives a
            row a level, and one of their embeddings side by side, each normalised.
        train, test, mean, std, arguments, label, device: As in [`embed`].

    Returns:
        `list[dict]`: The rows, with `num_parameters`, those of the encoders up to the level.
    """
    settings = (train, test, mean, std, arguments)
    num_levels = model.config.num_levels
    if level != "all" or num_levels == 1:
        chosen = choose_level(model.config.level if level in (None, "all") else level, num_levels)
        name = f"{label}, level {chosen}" if num_levels > 1 else label
        return [_with_parameters(evaluate_encoder(OneLevel(model, chosen), *settings, name, device), model, chosen)]
    levels = EveryLevel(model)
    train_x, train_y, test_x, test_y = embed(levels, *settings, label, device)
    parts = list(zip(levels.split(train_x), levels.split(test_x), strict=True))
    rows = [
        probe(train_part, train_y, test_part, test_y, arguments, f"{label}, level {number}")
        for number, (train_part, test_part) in enumerate(parts)
    ]
    train_all, test_all = map(side_by_side, zip(*parts, strict=True))
    rows.append(probe(train_all, train_y, test_all, test_y, arguments, f"{label}, all levels"))
    return [_with_parameters(row, model, min(number, num_levels - 1)) for number, row in enumerate(rows)]


def _with_parameters(row: dict, model: PreTrainedModel, level: int) -> dict:
    return row | {"num_parameters": model.num_parameters_up_to(level)}


def evaluate_baselines(
    model: PreTrainedModel,
    train: ImageDataset,
    test: ImageDataset,
    mean,
    std,
    arguments: EvaluationArguments,
    level: int | str | None = None,
) -> list[dict]:
    """
    The rows an encoder has to beat: randomly initialised ones of its kind and size, and raw pixels in [0, 1].

    Args:
        model (`PreTrainedModel`): The encoder, of which the configuration and the place are used.
        train, test, mean, std, arguments, level: As in [`evaluate_levels`].

    Returns:
        `list[dict]`: Rows for each of `num_random_encoders`, then one for the pixels.
    """
    rows = []
    for label, encoder in random_encoders(model, arguments.num_random_encoders, arguments.seed):
        rows += evaluate_levels(encoder, train, test, mean, std, arguments, level, label, model.device)
    label = raw_pixels_label(pair(model.config.image_size))
    pixels = evaluate_encoder(RawPixels(), train, test, [0.0] * 3, [1.0] * 3, arguments, label, model.device)
    return [*rows, pixels]


def evaluate_model(
    model: "str | Path | PreTrainedModel",
    train_source: ImageSource,
    test_source: ImageSource,
    arguments: EvaluationArguments | None = None,
    image_mean=IMAGENET_DEFAULT_MEAN,
    image_std=IMAGENET_DEFAULT_STD,
    level: int | str | None = None,
    beside: "dict[str, str | Path | PreTrainedModel] | None" = None,
) -> dict:
    """
    Evaluates a model beside a random encoder and raw pixels, on images of its own size.

    Args:
        model (`str`, `Path` or a model): A folder, the id of a model on the Hub, or a model, used where it is.
        train_source, test_source ([`ImageSource`]): Labelled images.
        arguments ([`EvaluationArguments`], *optional*): How; the defaults when not given.
        image_mean, image_std (`list[float]`): Of the channels, where the folder has no image processor to say.
        level (`int` or `"all"`, *optional*): Which level of a stack, or all of them; that of its configuration when
            not given.
        beside (`dict`, *optional*): Other models by the names of their rows, such as a single-level one.

    Returns:
        `dict`: `rows` of [`probe`] (the target encoder or the stack, the context encoder if asked for, the models
        beside, the baselines), the data sets' names and sizes, `skipped` (images left out, of
        [`~readable.readable_positions`]), `chance` (percent: always saying the most frequent test class), and the
        settings.

    Raises:
        InputError: There is no whole model, or no such level or context encoder of it, images have no labels, a test
            class is not in the train images, or too many images cannot be read.
    """
    arguments = arguments or EvaluationArguments()
    subject = Subject.load(model, train_source, test_source, arguments, image_mean, image_std, level, beside)
    model, statistics = subject.model, subject.statistics
    is_cjepa = isinstance(model, CJepaForPreTraining)
    if arguments.context_encoder and not is_cjepa:
        raise InputError(f"context_encoder is set, and a {type(model).__name__} has none; leave it out.")
    subject.leave_out_unreadable(arguments.dataloader_num_workers, not arguments.disable_tqdm)
    train_source, test_source = subject.train, subject.test
    transform = eval_transform(pair(model.config.image_size))
    images = ImageDataset(train_source, transform), ImageDataset(test_source, transform)
    label = "target encoder" if is_cjepa else "encoder"
    rows = evaluate_levels(model.base_model, *images, *statistics, arguments, level, label)
    if arguments.context_encoder:
        rows += evaluate_levels(model.context_encoder, *images, *statistics, arguments, level, "context encoder")
    for name, (other, *theirs) in subject.others.items():
        transform = eval_transform(pair(other.config.image_size))
        seen = ImageDataset(train_source, transform), ImageDataset(test_source, transform)
        rows += evaluate_levels(other.base_model, *seen, *theirs, arguments, "all" if level == "all" else None, name)
    rows += evaluate_baselines(model.base_model, *images, *statistics, arguments, level)
    return {
        **subject.facts(),
        "num_neighbors": min(arguments.num_neighbors, len(train_source)),
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "precision": precision_name(arguments.precision, model.device),
        "rows": rows,
    }
