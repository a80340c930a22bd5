"""Signs of collapse that only the model can tell: detached figures of a batch that wait for no device.

Shapes: B images, M target blocks, K patches a block, D width.
"""

import torch

_TINY = 1e-12


@torch.no_grad()
def block_means(tokens: torch.Tensor) -> torch.Tensor:
    """The mean token of each block, (B, M, K, D) as (B, M, D) in float32."""
    return tokens.detach().float().mean(dim=2)


@torch.no_grad()
def masked_signs(
    context: torch.Tensor, target: torch.Tensor, predictions: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    """
    How far the encoders are apart, and how much of the targets the predictor dares to say.

    Args:
        context, target (`torch.Tensor` of shape `(B, D)`): Mean tokens of both encoders at the same positions, in
            float32.
        predictions, targets (`torch.Tensor` of shape `(B, M, K, D)`): The predictor's output and what it shall be.

    Returns:
        `dict` of scalars in float32, the first two means over images: `context_distance`, the length of context -
        target over that of target (0: the encoders agree); `prediction_norm`, the root mean square of predictions over
        that of targets; and `prediction_std`, the standard deviation of the blocks' means over images and blocks,
        averaged over features, of predictions over that of targets (0: the predictor says the same of all).
    """
    norms, deviations = (
        [size(tokens.detach().float()) for tokens in (predictions, targets)] for size in (_norm, _deviation)
    )
    return {
        "context_distance": _ratio((context - target).norm(dim=1), target.norm(dim=1)).mean(),
        "prediction_norm": _ratio(*norms).mean(),
        "prediction_std": _ratio(*deviations),
    }


def _norm(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.flatten(1).norm(dim=1)


def _deviation(tokens: torch.Tensor) -> torch.Tensor:
    return block_means(tokens).flatten(0, 1).var(dim=0, correction=0).sqrt().mean()


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    return numerator / denominator.clamp_min(_TINY)
