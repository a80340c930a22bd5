"""All features of an encoder that the protocol suite probes, in one pass over the images.

Shapes: B images, n images in all, N tokens, D width of a level's features.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import psutil
import torch
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_cjepa import CJepaModel
from modeling_cjepa.configuration_cjepa import pair
from modeling_cjepa.levels_sjea import LevelOutput, as_tokens
from trainers.attentive_probe import EncodedTokens, StoredTokens
from trainers.datasets import ImageDataset, ImageSource
from trainers.embedding import RawPixels, check_finite, encode_batches, extract_embeddings
from trainers.pooling import side_by_side
from trainers.transforms import eval_transform


def token_budget(device: torch.device) -> int:
    """
    Up to so many bytes of an encoder's tokens are kept; beyond, images are encoded anew each time.

    Args:
        device (`torch.device`): Where tokens are kept.

    Returns:
        `int`: Half of the memory that is free there; probes need the rest.
    """
    if device.type != "cuda":
        return psutil.virtual_memory().available // 2
    torch.cuda.empty_cache()  # else what earlier tokens left to torch would count as taken
    return torch.cuda.mem_get_info(device)[0] // 2


@dataclass
class Features:
    """
    What one encoder, or one level of it, makes of the train and the test images.

    Args:
        label (`str`): What rows call the encoder.
        embeddings (`dict`): By the features' names, such as `mean`, those of the train and of the test images: two
            `torch.Tensor` of shapes `(n, D)` and `(m, D)`, float32.
        tokens (`dict`): By name, such as `patches`, [`StoredTokens`] or [`EncodedTokens`] of the train and of the test
            images; empty where there are none.
        num_parameters (`int`, *optional*): Of the encoder up to the level.
    """

    label: str
    embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]]
    tokens: dict[str, tuple] = field(default_factory=dict)
    num_parameters: int | None = None


class LevelBatch(NamedTuple):
    """
    What a level makes of a batch of images.

    Args:
        embeddings (`dict`): By name, `torch.Tensor` of shape `(B, D)`.
        tokens (`torch.Tensor` of shape `(B, N, D)`): Of C-JEPA those of the last four layers side by side.
        token_widths (`dict`): By the name of each kind of tokens, how many of the last features of `tokens` it has.
    """

    embeddings: dict[str, torch.Tensor]
    tokens: torch.Tensor
    token_widths: dict[str, int]


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

    def forward(self, pixel_values: torch.Tensor) -> list[LevelBatch]:
        """What each level makes of images (B, C, H, W)."""
        if isinstance(self.model, CJepaModel):
            outputs = self.model.encode(pixel_values, level=max(self.levels), output_hidden_states=True)
            return [self._of_cjepa(outputs[level], level) for level in self.levels]
        outputs = self.model.encode(pixel_values, level=max(self.levels))
        return [self._of_sjea(outputs[level]) for level in self.levels]

    def _of_cjepa(self, output: BaseModelOutputWithPooling, level: int) -> LevelBatch:
        tokens = torch.cat(self.model.last_layers(output.hidden_states, 4, level), dim=2)
        widths = {"patches": output.last_hidden_state.shape[2], "patches, last4": tokens.shape[2]}
        return LevelBatch({"mean": output.pooler_output, "last4": tokens.mean(dim=1)}, tokens, widths)

    def _of_sjea(self, output: LevelOutput) -> LevelBatch:
        tokens = as_tokens(output.features)
        return LevelBatch({"mean": output.embedding}, tokens, {"patches": tokens.shape[2]})


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
        self.settings = arguments.extraction(self.device)

    def read_pixels(self, label: str) -> list[Features]:
        """As [`ImageReader.read`], the features of images that are nothing but pixels in [0, 1]."""
        embeddings = [
            extract_embeddings(
                RawPixels(), dataset, [0.0] * 3, [1.0] * 3, description=f"{label}: {part} images", **self.settings,
            )[0].to(self.device)
            for dataset, part in zip(self.datasets, ("train", "test"), strict=True)
        ]  # fmt: skip
        return [Features(label, {"pixels": tuple(embeddings)})]

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
        # measured first, which moves the encoder to the device
        is_kept = self._num_token_bytes(encoder) <= token_budget(self.device)
        parts = [self._encode(encoder, dataset, f"{label}: {part} images", is_kept)
                 for dataset, part in zip(self.datasets, ("train", "test"), strict=True)]  # fmt: skip
        found = []
        for number, level in enumerate(levels):
            embeddings = {name: tuple(part[number][0][name] for part in parts) for name in parts[0][number][0]}
            for both in embeddings.values():
                for tensor in both:
                    check_finite(tensor, label)
            name = f"{label}, level {level}" if model.config.num_levels > 1 else label
            tokens = {kind: tuple(part[number][1][kind] for part in parts) for kind in parts[0][number][1]}
            found.append(Features(name, embeddings, tokens, model.num_parameters_up_to(level)))
        if len(levels) > 1:
            together = tuple(side_by_side([each.embeddings["mean"][part] for each in found]) for part in range(2))
            found.append(Features(f"{label}, all levels", {"mean": together}, num_parameters=found[-1].num_parameters))
        return found

    def _num_token_bytes(self, encoder: LevelFeatures) -> int:
        """Those of all images, train and test."""
        settings = self.settings | {"progress": False, "num_workers": 0, "batch_size": 1}
        ((outputs, _),) = encode_batches(encoder, Subset(self.datasets[0], [0]), self.mean, self.std, **settings)
        return 2 * sum(level.tokens.numel() for level in outputs) * sum(map(len, self.datasets))

    def _encode(self, encoder: LevelFeatures, dataset: ImageDataset, description: str, is_kept: bool) -> list:
        """For each level the embeddings and the tokens, both by name."""
        embeddings = [{} for _ in encoder.levels]
        kept: list = [None] * len(encoder.levels)
        widths: list = [None] * len(encoder.levels)
        start = 0
        batches = encode_batches(encoder, dataset, self.mean, self.std, description=description, **self.settings)
        for outputs, _ in batches:
            for number, (vectors, tokens, widths[number]) in enumerate(outputs):
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
                {
                    name: StoredTokens(kept[number][..., -width:])
                    if is_kept
                    else EncodedTokens(partial(self._tokens, level, dataset), width)
                    for name, width in widths[number].items()
                },
            )
            for number, level in enumerate(levels)
        ]

    def _tokens(self, encoder: LevelFeatures, dataset: ImageDataset, ids: torch.Tensor, batch_size: int):
        """Batches of the tokens of the images at some positions, encoded now."""
        images = Subset(dataset, ids.tolist())
        settings = self.settings | {"progress": False, "batch_size": batch_size}
        for (of_level,), _ in encode_batches(encoder, images, self.mean, self.std, **settings):
            yield of_level.tokens
