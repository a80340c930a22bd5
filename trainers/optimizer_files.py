"""Weights and the optimizer's state in a checkpoint: whole tensors by parameter name, however they are sharded.

Every process takes part in gathering; any number of processes can load what any other has saved. What is no tensor
(step counters, the groups' options) is JSON, which keeps Python's numbers exactly.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from trainers.errors import InputError

TENSORS = "optimizer.safetensors"
VALUES = "optimizer.json"
# how a step is computed on this machine, and what a run may set otherwise than the one it goes on from; what else a
# group holds may be state of its optimizer
_OF_THE_RUN = {"foreach", "fused", "capturable", "betas", "eps", "momentum"}


def host_tensor(tensor: torch.Tensor, kept: bool, copied: bool) -> torch.Tensor | None:
    """
    A tensor, whole and in host memory; all processes call it for one that is sharded.

    Args:
        tensor (`torch.Tensor`): It may be a `DTensor`.
        kept (`bool`): Whether this process wants it.
        copied (`bool`): Whether it must be a copy, as it will be written while training goes on.

    Returns:
        `torch.Tensor`, or None where it is not kept.
    """
    tensor = tensor.detach()
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.to("cpu", copy=copied) if kept else None


def like(whole: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device, in the memory layout and in the shards of another of its shape."""
    if isinstance(own, DTensor):
        # every process has read the whole, so that nothing is sent
        return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
    return torch.empty_like(own, dtype=whole.dtype).copy_(whole)


def host_state(module: nn.Module, kept: bool, copied: bool) -> dict[str, torch.Tensor]:
    """A module's state dictionary, each tensor as by [`host_tensor`]; empty where it is not kept."""
    tensors = ((name, host_tensor(tensor, kept, copied)) for name, tensor in module.state_dict().items())
    return {name: tensor for name, tensor in tensors if tensor is not None}


def optimizer_state(
    model: nn.Module, optimizer: Optimizer, kept: bool, copied: bool
) -> tuple[dict[str, torch.Tensor], str]:
    """
    The state of an optimizer by the names of its parameters.

    Args:
        model (`nn.Module`): Whose parameters they are.
        optimizer (`torch.optim.Optimizer`): Any whose state is of tensors and numbers.
        kept, copied (`bool`): As in [`host_tensor`].

    Returns:
        The tensors by `PARAMETER/KEY`, and as JSON the other values and the groups' options.

    Raises:
        InputError: The state holds something else.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors, values, groups = {}, {}, []
    for group in optimizer.param_groups:
        groups.append(group | {"params": [names[parameter] for parameter in group["params"]]})
        for parameter in group["params"]:
            for place, value in _leaves(names[parameter], optimizer.state.get(parameter, {})):
                if isinstance(value, torch.Tensor):
                    tensors[place] = host_tensor(value, kept, copied)
                else:
                    values[place] = value
    try:
        text = json.dumps({"groups": groups, "values": values}) + "\n"
    except TypeError as error:
        raise InputError(
            f"The state of {type(getattr(optimizer, 'optimizer', optimizer)).__name__} cannot be saved ({error}); "
            "choose another --optim, or --save_only_model."
        ) from error
    return {place: tensor for place, tensor in tensors.items() if tensor is not None}, text


def _leaves(place: str, value) -> Iterator[tuple[str, object]]:
    """What is in nested dictionaries, each with its place, `PARAMETER/KEY/KEY`."""
    if not isinstance(value, dict):
        yield place, value
        return
    for key, inside in value.items():
        yield from _leaves(f"{place}/{key}", inside)


def save_optimizer(folder: Path, tensors: dict[str, torch.Tensor], text: str):
    """Writes what [`optimizer_state`] gave."""
    contiguous = {place: tensor.contiguous() for place, tensor in tensors.items()}
    save_file(contiguous, folder / TENSORS, metadata={"format": "pt"})
    (folder / VALUES).write_text(text, encoding="utf-8")


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer):
    """
    Loads the state of an optimizer of the same parameters, in as many groups.

    Args:
        folder (`Path`): The checkpoint.
        model (`nn.Module`): Whose parameters they are.
        optimizer (`torch.optim.Optimizer`): Of the class that was saved.

    Raises:
        InputError: The checkpoint holds no such state, or that of other groups of parameters.
    """
    if not (folder / TENSORS).exists():
        raise InputError(f"{folder} holds weights only, no {TENSORS}; go on from another checkpoint.")
    saved = json.loads((folder / VALUES).read_text(encoding="utf-8"))
    options = {frozenset(group["params"]): group for group in saved["groups"]}
    parameters = dict(model.named_parameters())
    numbers, groups = {}, []
    names = {parameter: name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        members = [names[parameter] for parameter in group["params"]]
        if frozenset(members) not in options:
            raise InputError(f"{folder} holds the optimizer's state of other groups of parameters than this run's.")
        groups.append(_merged(group, options[frozenset(members)], len(numbers)))
        numbers |= {name: len(numbers) + number for number, name in enumerate(members)}
    state = {}
    for place, value in (load_file(folder / TENSORS) | saved["values"]).items():
        name, *keys, last = place.split("/")
        own = parameters[name]
        if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape == own.shape:
            value = like(value, own)
        inside = state.setdefault(numbers[name], {})
        for key in keys:
            inside = inside.setdefault(key, {})
        inside[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _merged(group: dict, saved: dict, first: int) -> dict:
    """A group's options as they were saved, those of this run as they are, and its parameters' numbers."""
    merged = {"params": list(range(first, first + len(group["params"])))}
    for key, own in group.items():
        if key == "params":
            continue
        value = own if key in _OF_THE_RUN or key not in saved else saved[key]
        merged[key] = tuple(value) if isinstance(own, tuple) else value
    return merged


def load_weights(folder: Path, model: nn.Module):
    """
    Loads the weights of a checkpoint, all of them and no others.

    Args:
        folder (`Path`): The checkpoint.
        model (`nn.Module`): It may be sharded.

    Raises:
        InputError: Weights are missing, or not known to the model.
    """
    own, saved = model.state_dict(), {}
    for file in sorted(folder.glob("model*.safetensors")):
        saved |= load_file(file)
    missing, unexpected = sorted(own.keys() - saved.keys()), sorted(saved.keys() - own.keys())
    if missing or unexpected:
        raise InputError(
            f"Checkpoint {folder} does not fit the model: missing {missing[:3] or 'nothing'}, not known "
            f"{unexpected[:3] or 'nothing'}; resume with the recipe it was trained with."
        )
    model.load_state_dict(
        {name: like(whole, own[name]) if isinstance(own[name], DTensor) else whole for name, whole in saved.items()}
    )
