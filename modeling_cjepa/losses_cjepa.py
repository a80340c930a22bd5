"""Losses of C-JEPA (arXiv 2410.19560) and VICReg (arXiv 2105.04906): pure functions, named and unweighted terms.

Shapes: B images, M target blocks (or views), K patches a block, D width. Batch statistics shall be those of the global
batch: functions named `global_` take the rows of one process and exchange what is needed, the others take what
[`gather`] returns. All statistics are float32, also under autocast.
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


def block_vicreg_terms(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    VICReg's three unweighted terms, the mean over all ordered pairs of M blocks (C-JEPA, Algorithm 1), in closed form.

    Of a pair, as in VICReg's code, `invariance` is the mean squared distance, `variance` the mean of both hinge terms,
    `covariance` the sum of both, with unbiased statistics (n - 1). With one variance and covariance a block instead of
    two a pair: variance = mean_i v(z_i), covariance = 2 mean_i c(z_i), invariance =
    2 / (M - 1) * mean_{B,D} sum_i (z_i - mean_i z_i)^2.

    Args:
        blocks (`torch.Tensor` of shape `(B, M, D)`): One embedding a target block; M at least 2.

    Returns:
        `dict` of the scalars `invariance`, `variance` and `covariance`.

    Raises:
        ValueError: There is one block or one image only.
    """
    covariances = batch_covariances(blocks)
    return {
        "invariance": invariance_term(blocks),
        "variance": variance_term(covariances),
        "covariance": 2 * covariance_term(covariances),
    }


def global_vicreg_terms(blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    """As [`block_vicreg_terms`], of the batch of which every process gives its rows (B, M, D)."""
    covariances = global_covariances(blocks)
    return {
        "invariance": global_mean(invariance_term(blocks)),
        "variance": variance_term(covariances),
        "covariance": 2 * covariance_term(covariances),
    }


def invariance_term(blocks: torch.Tensor) -> torch.Tensor:
    """Mean squared distance of two blocks of an image, over all pairs of blocks (B, M, D)."""
    num_blocks = blocks.shape[1]
    if num_blocks < 2:
        raise ValueError(
            "regularizer='blocks' compares target blocks with each other; set num_target_blocks to 2 or more."
        )
    blocks = blocks.float()
    centred = blocks - blocks.mean(dim=1, keepdim=True)
    return 2 / (num_blocks - 1) * centred.square().sum(dim=1).mean()


def variance_term(covariances: torch.Tensor) -> torch.Tensor:
    """Mean of max(0, 1 - standard deviation) over the features of covariance matrices (M, D, D)."""
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    return F.relu(1 - torch.sqrt(variances + VARIANCE_EPS)).mean()


def covariance_term(covariances: torch.Tensor) -> torch.Tensor:
    """Sum of squared off-diagonal entries of covariance matrices (M, D, D), divided by D; the mean over M."""
    diagonals = covariances.diagonal(dim1=-2, dim2=-1)
    return (covariances.square().sum() - diagonals.square().sum()) / diagonals.numel()


def batch_covariances(z: torch.Tensor) -> torch.Tensor:
    """
    Unbiased covariance matrices over a batch.

    Args:
        z (`torch.Tensor` of shape `(B, M, D)`): M embeddings of each image.

    Returns:
        `torch.Tensor` of shape `(M, D, D)`, in float32.

    Raises:
        ValueError: There is one image only.
    """
    _check_number(z.shape[0])
    z = z.float()
    return _second_moments(z - z.mean(dim=0)) / (z.shape[0] - 1)


def global_covariances(z: torch.Tensor) -> torch.Tensor:
    """As [`batch_covariances`], of the batch of which every process gives its rows, by the fewer bytes sent."""
    if count_processes() == 1:
        return batch_covariances(z)
    if exchange_form(z.shape[0], z.shape[-1], count_processes()) == "gathered":
        return batch_covariances(gather(z))
    _check_number(z.shape[0] * count_processes())
    return _ReducedCovariances.apply(z.float())


def exchange_form(num_rows: int, width: int, num_processes: int) -> str:
    """`"reduced"` where the statistics of embeddings are exchanged, `"gathered"` where the embeddings are."""
    sent = exchange_bytes(num_rows, width, num_processes)
    return min(sent, key=sent.get)


def exchange_bytes(num_rows: int, width: int, num_processes: int) -> dict[str, int]:
    """
    What each process sends, forward and backward, to know the covariance of a batch of embeddings, in either way.

    Collectives are taken to be rings: a process sends what it has once to each other to gather, and twice a share of
    (processes - 1) / processes to sum.

    Args:
        num_rows (`int`): Embeddings of a process.
        width (`int`): Their features D.
        num_processes (`int`): How many give as many embeddings each.

    Returns:
        `dict[str, int]`: Bytes of float32. `"gathered"`: the embeddings, and the sum of their gradients; `"reduced"`:
        the sums of the mean (D) and of the centred second moment (D x D), whose gradient every process knows.
    """
    others = num_processes - 1
    return {
        "gathered": 4 * 3 * others * num_rows * width,
        "reduced": 4 * 2 * others * (width + width * width) // num_processes,
    }


def count_processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def global_mean(term: torch.Tensor) -> torch.Tensor:
    """The mean over processes of a scalar that is itself a mean; its gradient stays, as DDP averages gradients."""
    return term if count_processes() == 1 else _GlobalMean.apply(term)


def _check_number(num_images: int):
    if num_images < 2:
        raise ValueError("Statistics over a batch of 1 image are undefined; use a batch of 2 images or more.")


def _second_moments(centred: torch.Tensor) -> torch.Tensor:
    """The sum over rows of z z^T (M, D, D) of centred embeddings (B, M, D)."""
    with torch.autocast(centred.device.type, enabled=False):
        return torch.einsum("bmi,bmj->mij", centred, centred)


class _ReducedCovariances(torch.autograd.Function):
    """
    Covariances (M, D, D) of the rows of all processes, exchanged as sums: the mean, then the centred second moment.

    Every process knows the gradient of the covariances, G, and so that of its rows, (G + G^T) z / (n - 1), without an
    exchange. DDP divides it by the processes, so it is given times them, as [`gather`]'s is.
    """

    @staticmethod
    def forward(ctx, z):
        ctx.num_processes = count_processes()
        num_images = z.shape[0] * ctx.num_processes
        mean = z.sum(dim=0)
        dist.all_reduce(mean)
        centred = z - mean / num_images
        covariances = _second_moments(centred)
        dist.all_reduce(covariances)
        ctx.save_for_backward(centred)
        ctx.divisor = num_images - 1
        return covariances / ctx.divisor

    @staticmethod
    def backward(ctx, gradient):
        (centred,) = ctx.saved_tensors
        symmetric = (gradient + gradient.transpose(1, 2)) * (ctx.num_processes / ctx.divisor)
        with torch.autocast(centred.device.type, enabled=False):
            return torch.einsum("bmi,mij->bmj", centred, symmetric)


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, term):
        mean = term / count_processes()
        dist.all_reduce(mean)
        return mean

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def append_constant(rows: torch.Tensor, others: list[torch.Tensor]) -> torch.Tensor:
    """
    Rows of a micro-batch followed by those of the step's others, for statistics of all images of the step.

    The others give no gradient here, but in micro-batches of their own. As each has the loss of all images, and their
    mean is taken, the gradient of the rows is given times the number of micro-batches, as [`gather`] does it for
    processes.

    Args:
        rows (`torch.Tensor` of shape `(B, ...)`): Those with a gradient.
        others (`list` of `torch.Tensor` of shape `(B, ...)`): Those of each other micro-batch.
    """
    return _AppendConstant.apply(rows, *others) if others else rows


class _AppendConstant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, *others):
        ctx.num_rows, ctx.num_others = rows.shape[0], len(others)
        return torch.cat([rows, *others])

    @staticmethod
    def backward(ctx, gradient):
        return (1 + ctx.num_others) * gradient[: ctx.num_rows], *[None] * ctx.num_others


def gather(x: torch.Tensor) -> torch.Tensor:
    """Rows of all processes in rank order, with gradient; `x` itself in one process. Rows must be equally many."""
    return x if count_processes() == 1 else _AllGather.apply(x)


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
