"""Losses of C-JEPA (arXiv 2410.19560) and VICReg (arXiv 2105.04906): pure functions, named and unweighted terms.

Shapes: B images, M target blocks, K patches a block, D width. Batch statistics shall be those of the global batch:
under several processes give what [`gather`] returns. All statistics are float32, also under autocast.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

VARIANCE_EPS = 1e-4


def normalize_targets(tokens: torch.Tensor) -> torch.Tensor:
    """The target encoder's tokens (B, N, D), each normalised over its features without learned parameters."""
    return F.layer_norm(tokens, tokens.shape[-1:])


def prediction_loss(predictions: torch.Tensor, targets: torch.Tensor, kind: str = "smooth_l1") -> torch.Tensor:
    """
    I-JEPA's loss, the mean over images, blocks, patches and features.

    Args:
        predictions (`torch.Tensor` of shape `(B, M, K, D)`): The predictor's output.
        targets (`torch.Tensor` of the same shape): The normalised target tokens.
        kind (`str`): `"smooth_l1"` (the authors' code, beta 1) or `"mse"` (the paper's squared distance).

    Returns:
        A scalar tensor in float32.
    """
    function = {"smooth_l1": F.smooth_l1_loss, "mse": F.mse_loss}[kind]
    return function(predictions.float(), targets.float())


def vicreg_terms(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    VICReg's three unweighted terms in the convention of the authors' code.

    `invariance` is the mean squared distance of a pair, `variance` the mean of both hinge terms, `covariance` the sum
    of both, each with unbiased statistics (n - 1).

    Args:
        a, b (`torch.Tensor` of shape `(B, D)`): Embeddings of two views, row by row of the same image.

    Returns:
        `dict` of the scalars `invariance`, `variance` and `covariance`.

    Raises:
        ValueError: There is one image only, so that its variance is undefined.
    """
    a, b = a.float(), b.float()
    return {
        "invariance": F.mse_loss(a, b),
        "variance": (variance_term(a) + variance_term(b)) / 2,
        "covariance": covariance_term(a) + covariance_term(b),
    }


def block_vicreg_terms(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    The mean of [`vicreg_terms`] over all ordered pairs of M blocks (C-JEPA, Algorithm 1), in closed form.

    With one variance and covariance a block instead of two a pair: variance = mean_i v(z_i), covariance =
    2 mean_i c(z_i), invariance = 2 / (M - 1) * mean_{B,D} sum_i (z_i - mean_i z_i)^2.

    Args:
        blocks (`torch.Tensor` of shape `(B, M, D)`): One embedding a target block; M at least 2.

    Returns:
        `dict` of the scalars `invariance`, `variance` and `covariance`.

    Raises:
        ValueError: There is one block or one image only.
    """
    num_blocks = blocks.shape[1]
    if num_blocks < 2:
        raise ValueError(
            "regularizer='blocks' compares target blocks with each other; set num_target_blocks to 2 or more."
        )
    blocks = blocks.float()
    centred = blocks - blocks.mean(dim=1, keepdim=True)
    return {
        "invariance": 2 / (num_blocks - 1) * centred.square().sum(dim=1).mean(),
        "variance": torch.stack([variance_term(block) for block in blocks.unbind(dim=1)]).mean(),
        "covariance": 2 * torch.stack([covariance_term(block) for block in blocks.unbind(dim=1)]).mean(),
    }


def variance_term(z: torch.Tensor) -> torch.Tensor:
    """Mean over features of max(0, 1 - standard deviation) of embeddings (B, D)."""
    if z.shape[0] < 2:
        raise ValueError("The variance over a batch of 1 image is undefined; use a batch of 2 images or more.")
    return F.relu(1 - torch.sqrt(z.var(dim=0) + VARIANCE_EPS)).mean()


def covariance_term(z: torch.Tensor) -> torch.Tensor:
    """Sum of squared off-diagonal covariances of embeddings (B, D), divided by D."""
    if z.shape[0] < 2:
        raise ValueError("The covariance over a batch of 1 image is undefined; use a batch of 2 images or more.")
    z = z - z.mean(dim=0)
    with torch.autocast(z.device.type, enabled=False):
        covariance = z.T @ z / (z.shape[0] - 1)
    return (covariance.square().sum() - covariance.diagonal().square().sum()) / z.shape[1]


def gather(x: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in rank order, with gradient; `x` itself in one process. Rows must be equally many."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _AllGather.apply(x)


class _AllGather(torch.autograd.Function):
    """All-gather whose backward sums the gradients of all ranks: averaged by DDP, that is the global gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.num_rows = x.shape[0]
        gathered = x.new_empty((dist.get_world_size() * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        start = dist.get_rank() * ctx.num_rows
        return gradient[start : start + ctx.num_rows]


def take(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, D) at positions `ids` (B, ...): (B, ..., D)."""
    index = ids.flatten(1).unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index).view(*ids.shape, tokens.shape[-1])


def level_term(name: str, level: int) -> str:
    """The name of a level's loss term: plain at level 0, `level1_invariance` and so on above it."""
    return name if level == 0 else f"level{level}_{name}"
