"""Files of weights, read as numbers alone: no code of theirs is run, and none is larger than it looks."""

import json
import pickle
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file, has_file

from trainers.conversion.torch_files import ADVICE, check_torch_file
from trainers.errors import InputError, first_line

# dictionaries in one another, and what they hold together
_MOST_NESTED, _MOST_ENTRIES = 10, 1_000_000


def read_weight_file(path: str | Path) -> dict:
    """
    Reads the tensors of a `.pth`, `.pth.tar`, `.pt`, `.bin` or `.safetensors` file; its content says which it is.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `dict`: Tensors by their names, or dictionaries of them, as the file has them; whatever else it holds (numbers,
        lists, what has no name) is left out. Where the file allows it, tensors are read only when they are used.

    Raises:
        InputError: There is no such file, or it is damaged, needs code to be read, is an archive that unpacks to more
            than it holds or elsewhere, or has tensors that are not finite, or larger than what is stored of them, or
            than memory.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is no file; name one of weights.")
    with path.open("rb") as file:
        beginning = file.read(9)
    if beginning[8:] == b"{":
        tensors = _read_safetensors(path)
    else:
        check_torch_file(path)
        _check_sizes(path, _named_tensors(path, _load(path, map_location="meta")))
        tensors = _named_tensors(path, _load(path, map_location="cpu", mmap=beginning.startswith(b"PK")))
    if not tensors:
        raise InputError(f"{path} holds no named tensors; give a file of weights.")
    check_tensors(tensors, str(path))
    return tensors


def check_folder(name: str):
    """
    Refuses a model's folder whose weights transformers is not to read.

    Args:
        name (`str`): The folder, or an id on the Hub.

    Raises:
        InputError: A file of weights is elsewhere, or one that torch wrote is refused by [`read_weight_file`].
    """
    if has_file(name, "adapter_config.json"):
        raise InputError(f"{name} has adapter_config.json, by which another model would be read; take that file out.")
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if has_file(name, whole):
            files = [whole]
        elif has_file(name, f"{whole}.index.json"):
            files = _files_of_index(name, f"{whole}.index.json")
        else:
            continue
        for file in files:
            path = _shard(name, file)
            if not file.endswith(".safetensors"):  # which has no code, and a header that is checked
                read_weight_file(path)
        return


def _shard(name: str, file: str) -> str:
    try:
        return cached_file(name, file)
    except OSError as error:
        raise InputError(f"{name} has no {file}, which its list of weights names; copy the model again.") from error


def _files_of_index(name: str, index: str) -> list[str]:
    try:
        files = sorted(set(json.loads(Path(cached_file(name, index)).read_text())["weight_map"].values()))
        outside = [file for file in files if Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{index} of {name} cannot be read ({first_line(error)}); copy the model again.") from error
    if outside:
        raise InputError(f"{index} of {name} names a file outside of it ({outside[0]}); do not trust it.")
    return files


def check_tensors(tensors: dict, where: str):
    """
    Refuses tensors that are no weights.

    Args:
        tensors (`dict`): Tensors by name, or dictionaries of them.
        where (`str`): Where they are from, for the sentence.

    Raises:
        InputError: One is of complex numbers or of 8 bits, is larger than what is stored of it, or has numbers that
            are not finite.
    """
    for name, tensor in flat(tensors):
        what = f"{where}: {_shown(name)}"
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise InputError(
                f"{what} is a {type(tensor).__name__}, of 8 bits or otherwise packed; give what it was made from."
            )
        if tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(f"{what} is a {tensor.layout} tensor without plain numbers; save it dense.")
        if tensor.is_complex() or tensor.is_floating_point() and tensor.element_size() == 1:
            raise InputError(f"{what} is of {tensor.dtype}; save it in float32, float16 or bfloat16.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{what} claims {tensor.numel():,} numbers and stores fewer; the file is not to be trusted."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{what} holds numbers that are not finite; take weights of before they broke.")


def _shown(name: str) -> str:
    """A tensor's name, on one line however it is written."""
    return name if name.isprintable() else repr(name)


def flat(tensors: dict, prefix: str = ""):
    """Yields the full name and tensor of each in a dictionary of dictionaries."""
    for name, value in tensors.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _read_safetensors(path: Path) -> dict:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is no whole safetensors file ({first_line(error)}); copy it again.") from error


def _load(path: Path, **options):
    try:
        return torch.load(path, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} is no file of weights that torch reads without running code; {ADVICE}.") from error
    except Exception as error:  # whatever torch's reader comes upon in bytes that are not its own
        raise InputError(f"{path} is no torch file, or a damaged one ({first_line(error)}); copy it again.") from error


def _named_tensors(path: Path, obj, depth: int = 0, seen: list[int] | None = None) -> dict:
    """The tensors that have names, in dictionaries as they were, of which there are few, one in the other."""
    if not isinstance(obj, dict):
        return {}
    seen = [0] if seen is None else seen
    seen[0] += 1 + len(obj)
    if depth > _MOST_NESTED or seen[0] > _MOST_ENTRIES:
        raise InputError(f"{path} holds dictionaries in each other without end; it is not to be trusted.")
    named = {}
    for name, value in obj.items():
        value = _named_tensors(path, value, depth + 1, seen) if isinstance(value, dict) else value
        if isinstance(name, str) and (isinstance(value, torch.Tensor) or isinstance(value, dict) and value):
            named[name] = value.detach() if isinstance(value, torch.Tensor) else value
    return named


def _check_sizes(path: Path, tensors: dict):
    """Refuses tensors that the file has no room for; they have no memory yet."""
    stored, total = path.stat().st_size, 0
    for name, tensor in flat(tensors):
        size = tensor.numel() * tensor.element_size()
        if size > stored:
            raise InputError(
                f"{path}: {_shown(name)} claims {tensor.numel():,} numbers, more than the file has; it is not "
                "to be trusted."
            )
        total += size
    available = psutil.virtual_memory().available
    if total > available:
        raise InputError(
            f"{path} holds {total / 2**30:.1f} GiB of tensors, {available / 2**30:.1f} GiB of memory are free; use a "
            "machine with more."
        )
