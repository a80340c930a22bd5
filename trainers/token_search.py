"""Patch tokens of a data set that are nearest to some tokens, and how near the true ones are among them.

Shapes: B images of a batch, N patches of an image, D width, Q predicted tokens, k neighbours.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class Found:
    """
    What is nearest to predicted tokens, by cosine similarity.

    Args:
        true_similarities (`torch.Tensor` of shape `(Q,)`): To the true tokens.
        similarities (`torch.Tensor` of shape `(Q, k)`): To the nearest candidates, falling.
        images, positions (`torch.Tensor` of shape `(Q, k)`): Of the candidates: which image, and which patch of it.
        nearer (`torch.Tensor` of shape `(Q,)`): Candidates that are nearer than the true token; as near counts half.
        nearer_in_place (`torch.Tensor` of shape `(Q,)`): The same of those at the true token's position.
        num_images, num_patches (`int`): Of the candidates: images, and patches N of each.
    """

    true_similarities: torch.Tensor
    similarities: torch.Tensor
    images: torch.Tensor
    positions: torch.Tensor
    nearer: torch.Tensor
    nearer_in_place: torch.Tensor
    num_images: int
    num_patches: int

    @property
    def num_candidates(self) -> int:
        """How many tokens were searched."""
        return self.num_images * self.num_patches

    def summary(self) -> dict:
        """The numbers: shares of candidates that are nearer than the true token, 0 the best and 0.5 chance."""
        return {
            "num_predicted_tokens": len(self.nearer),
            "num_candidates": self.num_candidates,
            "mean_rank": 1 + self.nearer.mean().item(),
            "chance_rank": 1 + self.num_candidates / 2,
            "share_nearer": self.nearer.mean().item() / self.num_candidates,
            "share_nearer_in_place": self.nearer_in_place.mean().item() / self.num_images,
            "share_first": (self.nearer < 1).double().mean().item(),
            "mean_true_similarity": self.true_similarities.mean().item(),
        }


def search_tokens(
    predicted: torch.Tensor,
    true: torch.Tensor,
    places: torch.Tensor,
    batches: Iterable[torch.Tensor],
    num_nearest: int,
) -> Found:
    """
    The candidates that are nearest to predicted tokens, in one pass that keeps none of them.

    Args:
        predicted, true (`torch.Tensor` of shape `(Q, D)`): Predicted tokens and those they should be.
        places (`torch.Tensor` of shape `(Q,)`): Their positions.
        batches (iterable of `torch.Tensor` of shape `(B, N, D)`): The candidates.
        num_nearest (`int`): k, at most as many as there are candidates.

    Returns:
        [`Found`].
    """
    predicted = F.normalize(predicted.float(), dim=1)
    own = (predicted * F.normalize(true.float(), dim=1)).sum(dim=1)
    nearer, in_place = torch.zeros(2, len(predicted), dtype=torch.float64, device=predicted.device)
    best = predicted.new_empty(len(predicted), 0)
    indices, num_images, num_patches = best.long(), 0, 0
    for tokens in batches:
        num_patches = tokens.shape[1]
        similarities = predicted @ F.normalize(tokens.float(), dim=2).flatten(0, 1).T  # (Q, B * N)
        ahead = (similarities > own[:, None]).double() + 0.5 * (similarities == own[:, None])
        nearer += ahead.sum(dim=1)
        by_image = ahead.unflatten(1, tokens.shape[:2])
        in_place += by_image[torch.arange(len(places), device=places.device), :, places].sum(dim=1)
        numbers = torch.arange(similarities.shape[1], device=indices.device) + num_images * num_patches
        best = torch.cat([best, similarities], dim=1)
        indices = torch.cat([indices, numbers.expand(len(predicted), -1)], dim=1)
        best, kept = best.topk(min(num_nearest, best.shape[1]), dim=1)
        indices = indices.gather(1, kept)
        num_images += len(tokens)
    tensors = (own, best, indices // num_patches, indices % num_patches, nearer, in_place)
    return Found(*(each.cpu() for each in tensors), num_images, num_patches)
