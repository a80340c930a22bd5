"""What the predictor of C-JEPA predicts: the patches of a data set whose target tokens are nearest to a prediction,
and how near the true one is among them.

Shapes: B images, N patches of an image, M target blocks, K patches a block, D width, H and W pixels of an image.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from modeling_cjepa.losses_cjepa import normalize_targets
from trainers.datasets import ImageDataset, ImageSource, sample_seed
from trainers.decoding import read_image
from trainers.embedding import device_of, encode_batches, encoding
from trainers.errors import InputError
from trainers.loading import load_with_statistics
from trainers.mask_figure import Masks, draw_masks, masks_by_level
from trainers.panels import Panel, PatchGrid, view_of, write_picture
from trainers.token_search import Found, search_tokens
from trainers.transforms import eval_transform

_BATCH_SIZE = 64
# patches that are drawn on each side of one
_MARGIN = 1
_COLOR = "#d62728"


class Predictions(nn.Module):
    """
    A C-JEPA model that predicts under given masks.

    Args:
        model ([`CJepaForPreTraining`]): The model.
        masks (`tuple`): Context and target positions on the top level's grid.
    """

    def __init__(self, model: CJepaForPreTraining, masks: Masks):
        super().__init__()
        self.model, self.masks = model, masks
        self.train(model.training)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, C, H, W) as predictions and normalised targets of level 0, each (B, M, K, D) in float32."""
        num_sets = self.model.config.num_mask_sets  # the model reads as many of an image; all are the same here
        masks = (ids.to(pixel_values.device).repeat_interleave(num_sets, dim=0) for ids in self.masks)
        outputs = self.model(pixel_values, *masks, return_loss=False)
        return outputs.predictions[::num_sets].float(), outputs.targets[::num_sets].float()


class TargetTokens(nn.Module):
    """
    The target encoder's tokens of level 0, normalised as the loss compares them.

    Args:
        model ([`CJepaForPreTraining`]): The model.
    """

    def __init__(self, model: CJepaForPreTraining):
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) as tokens (B, N, D) in float32."""
        return normalize_targets(self.model.cjepa.encode(pixel_values, level=0)[0].last_hidden_state).float()


def visualize_predictions(
    model: str | Path | PreTrainedModel,
    images: Sequence[str | Path],
    source: ImageSource,
    output_dir: str | Path,
    num_nearest: int = 6,
    num_tokens: int = 2,
    seed: int = 0,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    progress: bool = True,
) -> dict:
    """
    Predicts masked patches of images, finds the nearest ones of a data set, and writes `predictions.png` and
    `predictions.json`.

    Args:
        model (`str`, `Path` or a model): A C-JEPA model with its predictor: a folder, the id of one on the Hub, or a
            model. Of a stack level 0 is shown.
        images (`list` of `str` or `Path`): Files, which are one batch.
        source ([`ImageSource`]): The data set whose patches are candidates.
        output_dir (`str` or `Path`): The folder to write to.
        num_nearest (`int`): Nearest patches to draw of each predicted one.
        num_tokens (`int`): Predicted patches to draw of each image, a random choice.
        seed (`int`): Of masks and choice, 0 or more.
        image_mean, image_std (`list[float]`): Of the channels, where no image processor says.
        progress (`bool`): Whether to show a bar.

    Returns:
        `dict`: What `predictions.json` holds: the numbers of [`~Found.summary`] over all predicted tokens, and for
        each one that is drawn its similarity to the true token, that one's rank, and the nearest patches.

    Raises:
        InputError: An image cannot be read, the model has no predictor, or more is asked for than there is.
    """
    name = str(model) if isinstance(model, str | Path) else type(model).__name__
    model, *statistics = load_with_statistics(model, image_mean, image_std)
    if not isinstance(model, CJepaForPreTraining):
        raise InputError(f"{name} holds a {type(model).__name__}, which has no predictor of masked patches; give the "
                         "folder of a C-JEPA run, such as runs/mine/final.")  # fmt: skip
    config = model.config
    num_patches = config.grid_size[0] * config.grid_size[1]
    _check_number("k", num_nearest, len(source) * num_patches, "candidates")
    views = [view_of(read_image(file), pair(config.image_size)) for file in images]
    masks = draw_masks(model, len(views), seed)
    context_ids, target_ids = masks_by_level(model, masks)[0]
    target_ids = target_ids.flatten(1)  # (B, M * K)
    _check_number("num_tokens", num_tokens, target_ids.shape[1], "predicted patches of an image")
    found = _search(model, masks, views, target_ids, source, statistics, num_nearest, progress)
    rows, entries = [], []
    for number, token in _choose(target_ids, num_tokens, seed):
        entry = _entry(found, number * target_ids.shape[1] + token, int(target_ids[number, token]))
        entries.append({"image": str(images[number]), **entry})
        rows.append(_panels(views[number], context_ids[number], entry, source, config, found.num_candidates))
    results = {
        "model": name,
        "images": [str(file) for file in images],
        "dataset": source.name,
        "num_dataset_images": len(source),
        "level": 0,
        "seed": seed,
        "similarity": "cosine of the predicted token and the target encoder's tokens, normalised as in the loss",
        **found.summary(),
        "drawn": entries,
    }
    write_picture(Path(output_dir), "predictions", rows, results)
    return results


def format_predictions(results: dict) -> str:
    """The numbers as a sentence."""
    nearer, in_place = (100 * results[name] for name in ("share_nearer", "share_nearer_in_place"))
    return (
        f"Of {results['num_candidates']:,} patches of {results['dataset']} {nearer:.1f} % are nearer to a predicted "
        f"token than the true one, of those at the same place {in_place:.1f} %: means of "
        f"{results['num_predicted_tokens']:,} tokens, chance 50 %."
    )


def _check_number(name: str, asked: int, most: int, what: str):
    if not 1 <= asked <= most:
        raise InputError(f"{name}={asked} of {most:,} {what} cannot be drawn; set it from 1 to {most:,}.")


def _search(model, masks: Masks, views, target_ids, source, statistics, num_nearest: int, progress: bool) -> Found:
    """What is nearest to all predictions of images (H, W, 3), B * M * K of them."""
    device = device_of(model)
    with encoding(Predictions(model, masks), *statistics, device) as encode:
        predicted, true = encode(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2))
    dataset = ImageDataset(source, eval_transform(pair(model.config.image_size)))
    batches = encode_batches(
        TargetTokens(model), dataset, *statistics, _BATCH_SIZE, device, progress, description="searching patches"
    )
    places = target_ids.flatten().to(device)
    candidates = (tokens for tokens, _ in batches)
    return search_tokens(predicted.flatten(0, 2), true.flatten(0, 2), places, candidates, num_nearest)


def _choose(target_ids: torch.Tensor, num_tokens: int, seed: int) -> Iterator[tuple[int, int]]:
    """Which predicted tokens of each image are drawn, a random choice among those (B, M * K) there are."""
    for number, ids in enumerate(target_ids):
        generator = torch.Generator().manual_seed(sample_seed(seed, number))
        for token in torch.randperm(len(ids), generator=generator)[:num_tokens].tolist():
            yield number, token


def _entry(found: Found, query: int, place: int) -> dict:
    """What was found for one predicted token."""
    nearest = zip(found.images[query], found.positions[query], found.similarities[query], strict=True)
    return {
        "position": place,
        "true_similarity": found.true_similarities[query].item(),
        "rank": 1 + found.nearer[query].item(),
        "nearest": [
            {"index": int(index), "position": int(position), "similarity": similarity.item()}
            for index, position, similarity in nearest
        ],
    }


def _panels(view: np.ndarray, context_ids, entry: dict, source: ImageSource, config, num_candidates) -> list[Panel]:
    """What the context encoder sees, then the true patch and the nearest ones with what surrounds them."""
    grid = PatchGrid(config.grid_size[1], pair(config.patch_size))
    asked = grid.outline(np.array([entry["position"]]), _COLOR)
    title = f"true patch: {entry['true_similarity']:.3f}\nrank {entry['rank']:,.0f} of {num_candidates + 1:,}"
    shown = [(view, entry["position"], title)]
    for near in entry["nearest"]:
        image = view_of(source.image(near["index"]), pair(config.image_size))
        shown.append((image, near["position"], f"nearest: {near['similarity']:.3f}"))
    panels = [Panel(grid.show(view, context_ids.numpy()), "context and patch", [asked])]
    for image, position, title in shown:
        pixels, around = grid.surroundings(image, position, _MARGIN)
        middle = np.array([around.columns**2 // 2])
        panels.append(Panel(pixels, title, [around.outline(middle, _COLOR)]))
    return panels
