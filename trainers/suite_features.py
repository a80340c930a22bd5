"""All features of an encoder that the protocol suite probes, in one pass over the images.

Shapes: B images, n images in all, N tokens, D width of a level's features.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel

from modeling_cjepa import CJepaModel
from modeling_cjepa.configuration_cjepa import pair
from modeling_cjepa.levels_sjea import as_tokens
from trainers.attentive_probe import EncodedTokens, StoredTokens
from trainers.datasets import ImageDataset, ImageSource
from trainers.embedding import RawPixels, check_finite, encode_batches, extract_embeddings
from trainers.transforms import eval_transform

TOKEN_BYTES = 4 * 2**30
"""Up to so many bytes of tokens, in bfloat16, are kept of an encoder; beyond, images are encoded anew each time."""


@dataclass
class Features:
    """
    What one encoder, or one level of it, makes of the train and the test images.

    Args:
        label (`str`): What rows call the encoder.
        embeddings (`dict`): By the features' names, such as `mean`, those of the train and of the test images: two
            `torch.Tensor` of shapes `(n, D)` and `(m, D)`, float32.
        tokens (`tuple`, *optional*): [`StoredTokens`] or [`EncodedTokens`] of the train and of the test images.
        num_parameters (`int`, *optional*): Of the encoder up to the level.
    """

    label: str
    embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]]
    tokens: tuple | None = None
    num_parameters: int | None = None


class LevelFeatures(nn.Module):
    """
    An encoder that gives the embeddings and the tokens of some of its levels.

    Args:
        model (`PreTrainedModel`): [`CJepaModel`] or [`SJeaModel`].
        levels (`list[int]`): Which.
    """

    def __init__(self, model: PreTrainedModel, levels: list[int]):
        super().__init__()
        self.model, self.levels = model, levels
        self.train(model.training)

    def forward(self, pixel_values: torch.Tensor) -> list[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        """Of images (B, C, H, W) for each level the embeddings (B, D) by name, and the tokens (B, N, D)."""
        if isinstance(self.model, CJepaModel):
            outputs = self.model.encode(pixel_values, level=max(self.levels), output_hidden_states=True)
            return [
                (
                    {
                        "mean": outputs[k].pooler_output,
                        "last4": self.model.join_last_layers(outputs[k].hidden_states, 4, k),
                    },
                    outputs[k].last_hidden_state,
                )
                for k in self.levels
            ]
        outputs = self.model.encode(pixel_values, level=max(self.levels))
        return [({"mean": outputs[k].embedding}, as_tokens(outputs[k].features)) for k in self.levels]


class ImageReader:
    """
    The train and the test images as one encoder after the other reads them.

    Args:
        sources (`(ImageSource, ImageSource)`): The train and the test images.
        image_size (`int` or `(int, int)`): Of the model.
        mean, std (`list[float]`): Of the channels.
        arguments ([`~evaluation.EvaluationArguments`]): Batch size, workers, progress.
        device (`torch.device`): Where encoders run and features are.
    """

    def __init__(self, sources: tuple[ImageSource, ImageSource], image_size, mean, std, arguments, device):
        transform = eval_transform(pair(image_size))
        self.datasets = [ImageDataset(source, transform) for source in sources]
        self.mean, self.std, self.device = mean, std, torch.device(device)
        self.settings = {
            "device": self.device,
            "num_workers": arguments.dataloader_num_workers,
            "progress": not arguments.disable_tqdm,
        }
        self.batch_size = arguments.eval_batch_size

    def read_pixels(self, label: str) -> Features:
        """The features of images that are nothing but pixels in [0, 1]."""
        embeddings = [
            extract_embeddings(
                RawPixels(), dataset, [0.0] * 3, [1.0] * 3, self.batch_size, description=f"{label}: {part} images",
                **self.settings,
            )[0].to(self.device)
            for dataset, part in zip(self.datasets, ("train", "test"), strict=True)
        ]  # fmt: skip
        return Features(label, {"pixels": tuple(embeddings)})

    def read(self, model: PreTrainedModel, levels: list[int], label: str) -> list[Features]:
        """
        The features of some levels of a model, each image encoded once.

        Args:
            model (`PreTrainedModel`): [`CJepaModel`] or [`SJeaModel`].
            levels (`list[int]`): Which; of several there are those of all together, too, each normalised.
            label (`str`): What rows call the encoder, and bars.

        Returns:
            `list` of [`Features`].

        Raises:
            InputError: The embeddings are not finite.
        """
        encoder = LevelFeatures(model, levels)
        is_kept = self._num_token_bytes(encoder) <= TOKEN_BYTES
        parts = [self._encode(encoder, dataset, f"{label}: {part} images", is_kept)
                 for dataset, part in zip(self.datasets, ("train", "test"), strict=True)]  # fmt: skip
        found = []
        for number, level in enumerate(levels):
            embeddings = {name: tuple(part[number][0][name] for part in parts) for name in parts[0][number][0]}
            for both in embeddings.values():
                for tensor in both:
                    check_finite(tensor, label)
            name = f"{label}, level {level}" if model.config.num_levels > 1 else label
            tokens = tuple(part[number][1] for part in parts)
            found.append(Features(name, embeddings, tokens, model.num_parameters_up_to(level)))
        if len(levels) > 1:
            together = tuple(
                torch.cat([F.normalize(each.embeddings["mean"][part], dim=1) for each in found], dim=1)
                for part in range(2)
            )
            found.append(Features(f"{label}, all levels", {"mean": together}, None, found[-1].num_parameters))
        return found

    def _num_token_bytes(self, encoder: LevelFeatures) -> int:
        """Those of all images, train and test."""
        settings = self.settings | {"progress": False, "num_workers": 0}
        ((outputs, _),) = encode_batches(encoder, Subset(self.datasets[0], [0]), self.mean, self.std, 1, **settings)
        return 2 * sum(tokens.numel() for _, tokens in outputs) * sum(map(len, self.datasets))

    def _encode(self, encoder: LevelFeatures, dataset: ImageDataset, description: str, is_kept: bool) -> list:
        """For each level the embeddings by name, and the tokens."""
        embeddings = [{} for _ in encoder.levels]
        kept: list = [None] * len(encoder.levels)
        start = 0
        batches = encode_batches(
            encoder, dataset, self.mean, self.std, self.batch_size, description=description, **self.settings
        )
        for outputs, _ in batches:
            for number, (vectors, tokens) in enumerate(outputs):
                for name, vector in vectors.items():
                    embeddings[number].setdefault(name, []).append(vector.float())
                if is_kept and kept[number] is None:
                    kept[number] = tokens.new_empty(len(dataset), *tokens.shape[1:], dtype=torch.bfloat16)
                if is_kept:
                    kept[number][start : start + len(tokens)] = tokens
            start += len(tokens)
        levels = [LevelFeatures(encoder.model, [level]) for level in encoder.levels]
        return [
            (
                {name: torch.cat(vectors) for name, vectors in embeddings[number].items()},
                StoredTokens(kept[number]) if is_kept else EncodedTokens(partial(self._tokens, level, dataset)),
            )
            for number, level in enumerate(levels)
        ]

    def _tokens(self, encoder: LevelFeatures, dataset: ImageDataset, ids: torch.Tensor, batch_size: int):
        """Batches of the tokens of the images at some positions, encoded now."""
        images = Subset(dataset, ids.tolist())
        settings = self.settings | {"progress": False}
        for ((_, tokens),), _ in encode_batches(encoder, images, self.mean, self.std, batch_size, **settings):
            yield tokens
