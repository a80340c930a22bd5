"""Which features of a data set are wanted, and the encoder that gives them."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from trainers.errors import InputError
from trainers.loading import load_with_statistics
from trainers.pooling import level_of, pooled_encoder
from trainers.precision import probes_in_bf16

DTYPES = ("float32", "float16")


@dataclass
class FeatureArguments:
    """Which features are written, and how."""

    split: list[str] | None = field(
        default=None, metadata={"help": "splits to embed; all of the data set if not given"}
    )
    num_images: int | None = field(default=None, metadata={"help": "embed only the first so many of each split"})
    pooling: str = field(
        default="mean",
        metadata={"help": "`mean` (the level's embedding), `last4` (mean tokens of its last four layers), "
                          "`levels` (all levels side by side) or `patches` (the map of features)"},
    )  # fmt: skip
    level: int | None = field(default=None, metadata={"help": "level of a stack, from 0; the model's if not given"})
    context_encoder: bool = field(default=False, metadata={"help": "embed by the context encoder, not the target one"})
    dtype: str = field(default="float32", metadata={"help": "`float32` or `float16`, of the stored embeddings"})
    keep_columns: bool = field(
        default=False, metadata={"help": "keep all columns of the data set, images included, not the labels alone"}
    )
    streaming: bool = field(
        default=False, metadata={"help": "read rows as they come and store none: parquet and tar files, or the Hub"}
    )
    batch_size: int = field(default=256, metadata={"help": "images at once"})
    shard_size: int = field(
        default=10_000, metadata={"help": "images of a file; processes share the work and resume by whole files"}
    )
    max_skipped_share: float = field(
        default=0.01,
        metadata={
            "help": "share of images that may be unreadable (ten may, but none at 0); they are skipped and listed"
        },
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "processes that decode images; 0: the main one"})
    disable_tqdm: bool = field(default=False, metadata={"help": "show no progress bar"})

    def __post_init__(self):
        for name, least in (("num_images", 1), ("batch_size", 1), ("shard_size", 1), ("dataloader_num_workers", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name}={value} is too small; set it to {least} or more.")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype={self.dtype!r} is not known; choose one of {', '.join(DTYPES)}.")
        if not 0 <= self.max_skipped_share <= 1:
            raise InputError(f"max_skipped_share={self.max_skipped_share} is no share; set it from 0 to 1.")


@dataclass
class FeatureEncoder:
    """
    An encoder that is ready to embed, with what makes its numbers.

    Args:
        module (`nn.Module`): Gives `pooler_output`.
        image_size (`(int, int)`): Height and width of its images.
        image_mean, image_std (`list[float]`): Of the channels.
        settings (`dict`): What makes its embeddings the ones they are, for the manifest.
    """

    module: nn.Module
    image_size: tuple[int, int]
    image_mean: list[float]
    image_std: list[float]
    settings: dict


def load_feature_encoder(
    model: str | Path | PreTrainedModel, arguments: FeatureArguments, image_mean, image_std, device: torch.device
) -> FeatureEncoder:
    """
    The encoder and pooling asked for.

    Args:
        model (`str`, `Path` or a model): A folder, the id of a model on the Hub, or a model.
        arguments ([`FeatureArguments`]): Which encoder, pooling and level.
        image_mean, image_std (`list[float]`): Of the channels, where no image processor says.
        device (`torch.device`): Where it will compute, which decides on the arithmetic.

    Returns:
        [`FeatureEncoder`].

    Raises:
        InputError: There is no such model, encoder, pooling or level.
    """
    model, image_mean, image_std = load_with_statistics(model, image_mean, image_std)
    is_cjepa = isinstance(model, CJepaForPreTraining)
    if arguments.context_encoder and not is_cjepa:
        raise InputError(f"context_encoder is set, and a {type(model).__name__} has none; leave it out.")
    encoder = model.context_encoder if arguments.context_encoder else model.base_model
    module = pooled_encoder(encoder, arguments.pooling, arguments.level)
    config = encoder.config
    settings = {
        "model_type": config.model_type,
        "fingerprint": fingerprint(encoder),
        "encoder": ("context encoder" if arguments.context_encoder else "target encoder") if is_cjepa else "encoder",
        "pooling": arguments.pooling,
        "level": None if arguments.pooling == "levels" else level_of(config, arguments.level),
        "precision": "bf16" if probes_in_bf16(device) else "float32",
        "image_size": list(pair(config.image_size)),
        "image_mean": list(image_mean),
        "image_std": list(image_std),
    }
    return FeatureEncoder(module, pair(config.image_size), list(image_mean), list(image_std), settings)


def fingerprint(encoder: nn.Module) -> str:
    """SHA-256 of an encoder's weights and their names, however they are stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
