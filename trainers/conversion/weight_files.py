"""Files of weights, read as numbers alone: no code of theirs is run, and none is larger than it looks."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import cached_file, has_file

from trainers.errors import InputError, first_line

# dictionaries in one another, and what they hold together
_MOST_NESTED, _MOST_ENTRIES = 10, 1_000_000
_ADVICE = "ask for the weights as safetensors, or save them again by torch.save(model.state_dict(), FILE)"


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
        is_zip = beginning.startswith(b"PK")
        if is_zip:
            _check_archive(path)
        _check_sizes(path, _named_tensors(_load(path, map_location="meta")))
        tensors = _named_tensors(_load(path, map_location="cpu", mmap=is_zip))
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
    for whole in ("model.safetensors", "pytorch_model.bin"):
        if has_file(name, whole):
            files = [whole]
        elif has_file(name, f"{whole}.index.json"):
            files = _files_of_index(name, f"{whole}.index.json")
        else:
            continue
        for file in files:
            if not file.endswith(".safetensors"):  # which has no code, and a header that is checked
                read_weight_file(cached_file(name, file))
        return


def _files_of_index(name: str, index: str) -> list[str]:
    try:
        files = sorted(set(json.loads(Path(cached_file(name, index)).read_text())["weight_map"].values()))
        outside = [file for file in files if Path(file).name != file]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
        if tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(f"{where}: {name} is a {tensor.layout} tensor without plain numbers; save it dense.")
        if tensor.is_complex() or tensor.is_floating_point() and tensor.element_size() == 1:
            raise InputError(f"{where}: {name} is of {tensor.dtype}; save it in float32, float16 or bfloat16.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(
                f"{where}: {name} claims {tensor.numel():,} numbers and stores fewer; the file is not to be trusted."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{where}: {name} holds numbers that are not finite; take weights of before they broke.")


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
        needed = re.search(r"GLOBAL (\S+)", str(error))
        if needed:
            raise InputError(
                f"{path} needs pickled code ({needed[1]}) to be read, which could do anything here; {_ADVICE}."
            ) from error
        raise InputError(f"{path} is no file of weights that torch reads without running code; {_ADVICE}.") from error
    except Exception as error:  # whatever torch's reader comes upon in bytes that are not its own
        if "legacy .tar" in str(error):
            raise InputError(f"{path} is in torch's old tar format, which needs pickled code; {_ADVICE}.") from error
        raise InputError(f"{path} is no torch file, or a damaged one ({first_line(error)}); copy it again.") from error


def _check_archive(path: Path):
    """Refuses archives that torch does not write: what they unpack to must be what they hold."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputError(f"{path} is cut off or damaged ({first_line(error)}); copy it again.") from error
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise InputError(f"{path} is a TorchScript program, which is not run; {_ADVICE}.")
    for member in members:
        name = member.orig_filename.replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
            raise InputError(f"{path} holds a member called {member.orig_filename!r}, outside of it; do not trust it.")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise InputError(f"{path} holds a compressed member ({name}), which torch never writes; {_ADVICE}.")
    total = sum(member.file_size for member in members)
    if total > path.stat().st_size:
        raise InputError(f"{path} unpacks to {total:,} bytes, more than it has; the file is not to be trusted.")
    if not any(member.filename.endswith("data.pkl") for member in members):
        raise InputError(f"{path} is a zip archive, no torch file; give the file of weights itself.")


def _named_tensors(obj, depth: int = 0, seen: list | None = None) -> dict:
    """The tensors that have names, in dictionaries as they were, of which there are few, one in the other."""
    if not isinstance(obj, dict):
        return {}
    seen = [] if seen is None else seen
    seen.append(len(obj))
    if depth > _MOST_NESTED or sum(seen) > _MOST_ENTRIES:
        raise InputError("The file of weights holds dictionaries in each other without end; it is not to be trusted.")
    named = {}
    for name, value in obj.items():
        value = _named_tensors(value, depth + 1, seen) if isinstance(value, dict) else value
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
                f"{path}: {name} claims {tensor.numel():,} numbers, more than the file has; it is not to be trusted."
            )
        total += size
    available = psutil.virtual_memory().available
    if total > available:
        raise InputError(
            f"{path} holds {total / 2**30:.1f} GiB of tensors, {available / 2**30:.1f} GiB of memory are free; use a "
            "machine with more."
        )
