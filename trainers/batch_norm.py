"""Batch norm over the images of all processes: torch's own on GPUs, and the same on CPUs, where torch has none."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    Batch norm over all processes, by one exchange of statistics forward and one of gradients backward.

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
        weight = torch.ones_like(self.running_mean) if self.weight is None else self.weight
        bias = torch.zeros_like(self.running_mean) if self.bias is None else self.bias
        mean, variance = _global_statistics(input.detach())
        number = input.numel() // input.shape[1] * dist.get_world_size()
        self._update(mean, variance * number / (number - 1))
        return _Normalize.apply(input, weight, bias, mean, variance, self.eps)

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, variance: torch.Tensor):
        if not self.track_running_stats:
            return
        self.num_batches_tracked += 1
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def _global_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance (C,) of x (B, C, ...) over all processes, by one exchange of each process's own."""
    variance, mean = torch.var_mean(x.float(), [dim for dim in range(x.ndim) if dim != 1], correction=0)
    of_all = mean.new_empty(dist.get_world_size(), 2, len(mean))
    dist.all_gather_into_tensor(of_all.view(-1, len(mean)), torch.stack([mean, variance]))
    means, variances = of_all.unbind(dim=1)
    mean = means.mean(dim=0)
    return mean, (variances + (means - mean).square()).mean(dim=0)


class _Normalize(torch.autograd.Function):
    """(x - mean) / std * weight + bias, where mean and variance are those of x over all processes."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, variance, eps):
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(variance + eps))
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, mean, scale = ctx.saved_tensors
        dims, shape = [dim for dim in range(x.ndim) if dim != 1], [1, -1] + [1] * (x.ndim - 2)
        normalised = (x.float() - mean.view(shape)) * scale.view(shape)
        gradient = gradient.float()
        of_bias, of_weight = gradient.sum(dims), (gradient * normalised).sum(dims)
        of_all = torch.stack([of_bias, of_weight])
        dist.all_reduce(of_all)
        sum_bias, sum_weight = of_all / (x.numel() // x.shape[1] * dist.get_world_size())
        of_x = gradient - sum_bias.view(shape) - normalised * sum_weight.view(shape)
        of_x = (of_x * (weight * scale).view(shape)).to(x.dtype)
        return of_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None, None
