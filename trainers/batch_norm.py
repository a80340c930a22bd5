"""Batch norm over the images of all processes: torch's own on GPUs, and the same on CPUs, where torch has none."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronize_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """
    Replaces every batch norm by one whose statistics are those of the global batch; names and weights stay.

    Args:
        model (`nn.Module`): What to change.
        device (`torch.device`): Where it will train.

    Returns:
        `nn.Module`: The model.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm):
            setattr(model, name, GlobalBatchNorm.like(child))
        else:
            synchronize_batch_norms(child, device)
    return model


class GlobalBatchNorm(_BatchNorm):
    """
    Batch norm over all processes, by two sums over them: the means, then the variances.

    Every process must have as many images as the others, which Accelerate sees to.
    """

    @classmethod
    def like(cls, norm: _BatchNorm) -> "GlobalBatchNorm":
        """One with the weights and statistics of another batch norm."""
        changed = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        changed.load_state_dict(norm.state_dict())
        changed.to(norm.weight.device if norm.affine else "cpu")
        return changed.train(norm.training)

    def _check_input_dim(self, input):
        if input.ndim < 2:
            raise ValueError(f"A batch norm reads (B, C, ...), not {tuple(input.shape)}.")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises (B, C, ...) over all but C and over all processes."""
        if not self.training or not (dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        x = input.float()
        dims = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        number = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _SumOverProcesses.apply(x.sum(dims)) / number
        centred = x - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / number
        self._update(mean.detach(), variance.detach() * number / (number - 1))
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, variance: torch.Tensor):
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _SumOverProcesses(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x):
        total = x.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient
