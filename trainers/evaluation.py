"""How good a frozen encoder is: kNN and a linear probe on its embeddings, beside a random encoder and raw pixels.

Shapes: B images, n images in all, D width of an embedding.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_cjepa import CJepaConfig, CJepaForPreTraining, CJepaModel
from modeling_cjepa.configuration_cjepa import pair
from trainers.datasets import ImageDataset, ImageSource, sample_seed, seeded
from trainers.diagnostics import feature_std, rankme
from trainers.errors import InputError
from trainers.loading import load_image_statistics, load_model
from trainers.probes import accuracy_interval, knn_predict, linear_predict
from trainers.sources import choose_images, with_common_classes
from trainers.transforms import eval_transform, normalize

_MAX_RAW_PIXELS = 32


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
    disable_tqdm: bool | None = field(default=None, metadata={"help": "show no progress bars"})

    def __post_init__(self):
        for name, least in (("num_neighbors", 1), ("eval_batch_size", 1), ("num_random_encoders", 0),
                            ("num_probe_images", 2), ("seed", 0), ("dataloader_num_workers", 0)):  # fmt: skip
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name}={value} is too small; set it to {least} or more.")
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature} divides similarities; set it above 0, such as 0.07.")


def extract_embeddings(
    encoder: nn.Module,
    dataset: torch.utils.data.Dataset,
    mean,
    std,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = True,
    num_workers: int = 0,
    description: str = "embedding images",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    The embeddings of all images, in their order; in bfloat16 arithmetic on a GPU.

    Args:
        encoder (`nn.Module`): Gives a `pooler_output` (B, D), such as [`CJepaModel`].
        dataset (`Dataset`): Gives `pixel_values` (C, H, W) uint8 and, if there are any, `labels`.
        mean, std (`list[float]`): Of the channels, for pixels in [0, 1].
        batch_size (`int`): Images at once.
        device (`torch.device`, *optional*): Where to; the encoder is moved there. Where it is when not given.
        progress (`bool`): Whether to show a bar.
        num_workers (`int`): Processes that load images.
        description (`str`): What the bar says.

    Returns:
        The embeddings, float32 (n, D), and the labels, int64 (n,) or None; both on the CPU.
    """
    device = _device_of(encoder) if device is None else torch.device(device)
    on_gpu = device.type == "cuda"
    # a generator of its own: the loader draws a seed for its workers, and shall not draw it from the caller's
    generator = torch.Generator()
    loader = DataLoader(dataset, batch_size, num_workers=num_workers, pin_memory=on_gpu, generator=generator)
    was_training = encoder.training
    encoder.to(device).eval()
    embeddings, labels = [], []
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            for batch in tqdm(loader, desc=description, unit="batch", disable=not progress):
                pixel_values = normalize(batch["pixel_values"].to(device, non_blocking=True), mean, std)
                embeddings.append(encoder(pixel_values).pooler_output.float().cpu())
                labels.append(batch.get("labels"))
    finally:
        encoder.train(was_training)
    return torch.cat(embeddings), None if labels[0] is None else torch.cat(labels)


def _device_of(encoder: nn.Module) -> torch.device:
    return next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))


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
    """
    kNN, linear probe and diagnostics of one frozen encoder.

    Args:
        encoder (`nn.Module`), mean, std, device: As in [`extract_embeddings`].
        train, test ([`ImageDataset`]): Labelled images; the classes of `test` are among those of `train`.
        arguments ([`EvaluationArguments`]): How.
        label (`str`): What the row is called.

    Returns:
        `dict`: `encoder` (the label); `knn` and `linear`, percent correct; `knn_interval`, `linear_interval`, 95 %;
        `linear_C`, `linear_converged`; `rankme` and `feature_std` of the test embeddings; `dim`, their width.

    Raises:
        InputError: The embeddings are not finite.
    """
    device = _device_of(encoder) if device is None else torch.device(device)
    progress = not arguments.disable_tqdm
    settings = {
        "batch_size": arguments.eval_batch_size,
        "num_workers": arguments.dataloader_num_workers,
        "device": device,
        "progress": progress,
    }
    train_x, train_y, test_x, test_y = (
        tensor.to(device if device.type == "cuda" else "cpu")
        for dataset, images in ((train, "train"), (test, "test"))
        for tensor in extract_embeddings(
            encoder, dataset, mean, std, description=f"{label}: {images} images", **settings
        )
    )
    if not (train_x.isfinite().all() and test_x.isfinite().all()):
        raise InputError(f"The embeddings of the {label} are not finite; its training diverged, take an earlier one.")
    num_classes = int(train_y.max()) + 1
    knn = knn_predict(train_x, train_y, test_x, num_classes, arguments.num_neighbors, arguments.temperature)
    probe = linear_predict(train_x, train_y, test_x, arguments.seed, progress)
    row = {"encoder": label}
    for name, predictions in (("knn", knn), ("linear", probe.predictions)):
        num_correct = int((predictions == test_y).sum())
        row[name] = 100 * num_correct / len(test_y)
        row[f"{name}_interval"] = list(accuracy_interval(num_correct, len(test_y)))
    return row | {
        "linear_C": probe.C,
        "linear_converged": probe.converged,
        "rankme": rankme(test_x),
        "feature_std": feature_std(test_x),
        "dim": test_x.shape[1],
    }


class RawPixels(nn.Module):
    """An "encoder" whose embedding is the image itself, area-reduced to 32 pixels a side if it is larger."""

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """Images (B, C, H, W) as embeddings (B, C * H * W)."""
        size = [min(side, _MAX_RAW_PIXELS) for side in pixel_values.shape[-2:]]
        return BaseModelOutputWithPooling(pooler_output=F.interpolate(pixel_values, size, mode="area").flatten(1))


def evaluate_baselines(
    config: CJepaConfig,
    train: ImageDataset,
    test: ImageDataset,
    mean,
    std,
    arguments: EvaluationArguments,
    device: torch.device | str | None = None,
) -> list[dict]:
    """
    The rows an encoder has to beat: randomly initialised ones of its size, and raw pixels in [0, 1].

    Args:
        config ([`CJepaConfig`]): The encoder's.
        train, test, mean, std, arguments, device: As in [`evaluate_encoder`].

    Returns:
        `list[dict]`: A row for each of `num_random_encoders`, then one for the pixels.
    """
    rows = []
    for index in range(arguments.num_random_encoders):
        with seeded(sample_seed(arguments.seed, index)):
            encoder = CJepaModel(config)
        label = "random encoder" if arguments.num_random_encoders == 1 else f"random encoder {index + 1}"
        rows.append(evaluate_encoder(encoder, train, test, mean, std, arguments, label, device))
    sizes = pair(config.image_size)
    reduced = "x".join(str(min(side, _MAX_RAW_PIXELS)) for side in sizes)
    label = "raw pixels" if max(sizes) <= _MAX_RAW_PIXELS else f"raw pixels, reduced to {reduced}"
    return [*rows, evaluate_encoder(RawPixels(), train, test, [0.0] * 3, [1.0] * 3, arguments, label, device)]


def evaluate_model(
    model: "str | Path | CJepaForPreTraining | CJepaModel",
    train_source: ImageSource,
    test_source: ImageSource,
    arguments: EvaluationArguments | None = None,
    image_mean=IMAGENET_DEFAULT_MEAN,
    image_std=IMAGENET_DEFAULT_STD,
) -> dict:
    """
    Evaluates a model beside a random encoder and raw pixels, on images of its own size.

    Args:
        model (`str`, `Path` or a model): A folder, the id of a model on the Hub, or a model, used where it is.
        train_source, test_source ([`ImageSource`]): Labelled images.
        arguments ([`EvaluationArguments`], *optional*): How; the defaults when not given.
        image_mean, image_std (`list[float]`): Of the channels, where the folder has no image processor to say.

    Returns:
        `dict`: `rows` of [`evaluate_encoder`] (the target encoder, the context encoder if asked for, the
        baselines), the data sets' names and sizes, `chance` (percent: always saying the most frequent test class),
        and the settings.

    Raises:
        InputError: There is no whole C-JEPA model, images have no labels, or a test class is not in the train images.
    """
    arguments = arguments or EvaluationArguments()
    train_source, test_source = with_common_classes(
        choose_images(train_source, arguments.num_probe_images), test_source
    )
    if isinstance(model, str | Path):
        image_mean, image_std = load_image_statistics(model) or (image_mean, image_std)
        model = load_model(model).to("cuda" if torch.cuda.is_available() else "cpu")
    pretraining = isinstance(model, CJepaForPreTraining)
    encoders = {"target encoder" if pretraining else "encoder": model.base_model}
    if pretraining and arguments.context_encoder:
        encoders["context encoder"] = model.context_encoder
    transform = eval_transform(pair(model.config.image_size))
    images = ImageDataset(train_source, transform), ImageDataset(test_source, transform)
    settings = (*images, image_mean, image_std, arguments)
    rows = [evaluate_encoder(encoder, *settings, label) for label, encoder in encoders.items()]
    rows += evaluate_baselines(model.config, *settings, device=model.device)
    return {
        "train_dataset": train_source.name,
        "test_dataset": test_source.name,
        "num_train_images": len(train_source),
        "num_test_images": len(test_source),
        "num_classes": len(train_source.label_names),
        "chance": 100 * float(np.bincount(test_source.labels).max()) / len(test_source),
        "num_neighbors": min(arguments.num_neighbors, len(train_source)),
        "temperature": arguments.temperature,
        "seed": arguments.seed,
        "image_size": list(pair(model.config.image_size)),
        "image_mean": list(image_mean),
        "image_std": list(image_std),
        "rows": rows,
    }
