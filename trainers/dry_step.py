"""Training steps without memory or arithmetic: their operations on tensors that have a shape and nothing in it."""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

# draws of masks, of which those with the most tokens need the most memory
_NUM_DRAWS = 16
# rows of a draw at most: their number hardly changes what is left of the shortest mask any more
_MOST_ROWS = 4096


class LiveBytes(TorchDispatchMode):
    """
    Counts, while it is entered, the bytes of all tensors that there are; what a kernel uses inside is not seen.

    Args:
        tensors (`Iterable[torch.Tensor]`): Those that are there already.

    Attributes:
        now, peak (`int`): Bytes, now and at most.
    """

    def __init__(self, tensors: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        weakref.finalize(storage, self._remove, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, size: int):
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor):
                self._add(output)
        return outputs


class ReadsZero(TorchDispatchMode):
    """Reads 0, while it is entered, where the value of a tensor is asked for: there is none, and 0 is a position."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return 0 if func is torch.ops.aten._local_scalar_dense.default else func(*args, **(kwargs or {}))


class DryStep:
    """
    Steps of a model of which only shapes are there, as a CPU would take them.

    Args:
        model (`PreTrainedModel`): Built under `torch.device("meta")`; it is changed.
        random_batch (`Callable`): A batch of so many images, as [`~objectives.Objective.random_batch`] makes it.
        bf16 (`bool`): Whether under autocast.
        optimizer (`Callable`): From the trained parameters to what makes the step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        random_batch: Callable[[int], torch.Tensor],
        bf16: bool,
        optimizer: Callable[[list], torch.optim.Optimizer],
    ):
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with self.mode:
            give_shapes(model)
        self.model, self.random_batch = model.train(), random_batch
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer(trained)
        self.live = LiveBytes([*model.parameters(), *model.buffers()])
        self.weights, self.gradients = self.live.now, sum(map(_size, trained))
        self.frozen = sum(_size(parameter) for parameter in model.parameters() if not parameter.requires_grad)
        with self.live:
            self._finish(self._loss(self._batch(2)))
        self.averages = self.live.now - self.weights

    def peak(self, batch_size: int) -> int:
        """Bytes at most of a step of so many images, and the masks, of some draws, with the most tokens."""
        batch = self._batch(batch_size, place=-1)
        self.live.peak = self.live.now
        with self.live:
            self._finish(self._loss(batch))
        return self.live.peak

    def flops(self, batch_size: int = 2) -> int:
        """Operations of products and convolutions an image, forward and backward, with masks of the middle length."""
        batch = self._batch(batch_size, place=_NUM_DRAWS // 2)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self._loss(batch).backward()
        self.optimizer.zero_grad()
        return counter.get_total_flops() // batch_size

    def _batch(self, batch_size: int, place: int = 0) -> tuple[torch.Tensor, ...]:
        with self.mode, self.live:
            images = self.random_batch(batch_size)
        if not hasattr(self.model, "sample_masks"):
            return (images,)
        config, generator = self.model.config, torch.Generator().manual_seed(0)
        num_rows = batch_size * config.num_views * config.num_mask_sets
        drawn = min(num_rows, _MOST_ROWS)
        draws = [self.model.sample_masks(drawn, generator=generator, device="cpu") for _ in range(_NUM_DRAWS)]
        masks = sorted(draws, key=lambda masks: masks[0].shape[1] + masks[1].shape[2])[place]
        with self.mode, self.live:
            return images, *(ids.new_empty(num_rows, *ids.shape[1:]) for ids in masks)

    def _loss(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with self.autocast, ReadsZero():
            return self.model(*batch).loss

    def _finish(self, loss: torch.Tensor):
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def give_shapes(model: nn.Module):
    """Puts a new tensor of the same shape in the place of each of a model's, on the CPU, in its own training mode."""
    for module in model.modules():
        for name, old in list(module.named_parameters(recurse=False)):
            new = torch.empty_like(old, device="cpu")
            module.register_parameter(name, nn.Parameter(new, requires_grad=old.requires_grad))
        for name, old in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, torch.empty_like(old, device="cpu"))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
