"""Files that `torch.save` wrote, looked over before torch reads them.

Of an archive, torch and Python must see the same members, which hold what they say. Of a pickle, every global is one
that tensors need: torch's own reader allows some more, by which a small file fills all memory.
"""

import pickle
import re
import struct
import tarfile
import zipfile
from pathlib import Path

from trainers.errors import InputError, first_line

ADVICE = "ask for the weights as safetensors, or save them again by torch.save(model.state_dict(), FILE)"
_NEEDED = re.compile(
    r"collections\.(OrderedDict|Counter)|torch\.\w+|torch\.storage\.\w+|torch\._utils\._rebuild_\w+|"
    r"torch\._tensor\._rebuild_from_type_v2|torch\.nn\.parameter\.Parameter|torch\.serialization\._get_layout"
)
# of a number, by torch's names of storages
_BYTES = {
    "Untyped": 1, "Byte": 1, "Char": 1, "Bool": 1, "Short": 2, "Half": 2, "BFloat16": 2, "Int": 4, "Float": 4,
    "Long": 8, "Double": 8, "ComplexFloat": 8, "ComplexDouble": 16, "QInt8": 1, "QUInt8": 1, "QInt32": 4,
}  # fmt: skip
_COPIES, _MOST_COPIED = ("OrderedDict", "Counter", "Size"), 1_000_000
_END, _LOCATOR, _END_64 = (b"PK\5\6", 22), (b"PK\6\7", 20), (b"PK\6\6", 56)
# before the storages of a file in torch's old format: a number, its version, the machine, the object, storages' names
_OLD_PICKLES = 5


def check_torch_file(path: Path):
    """
    Refuses a file by which more would happen than that its tensors are read.

    Args:
        path (`Path`): A file of torch's, an archive or in the format before it.

    Raises:
        InputError: It is damaged, is another archive to torch than to Python, or one that torch does not write, needs
            code, or has less of a storage than it claims.
    """
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if not is_archive:
        if _is_tar(path):
            raise InputError(f"{path} is in torch's old tar format, which needs pickled code; {ADVICE}.")
        with path.open("rb") as file:
            storages = [each for _ in range(_OLD_PICKLES) for each in _storages(path, file)]
        _check_storages(path, storages, lambda key: path.stat().st_size)
        return
    members = _checked_members(path)
    with zipfile.ZipFile(path) as archive:
        for name in (name for name in members if name.lower().endswith("data.pkl")):
            with archive.open(name) as file:
                storages = _storages(path, file)
            place = name[: -len("data.pkl")]
            _check_storages(path, storages, lambda key, place=place: members.get(f"{place}data/{key}", 0))


def _is_tar(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:"):  # without unpacking, which is_tarfile would try
            return True
    except tarfile.TarError:
        return False


def _checked_members(path: Path) -> dict[str, int]:
    """The sizes of an archive's members by their names."""
    try:
        with zipfile.ZipFile(path) as archive:
            members, start = archive.infolist(), archive.start_dir
            is_plain = not archive.comment and start == _stated_start(archive.fp)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise InputError(f"{path} is cut off or damaged ({first_line(error)}); copy it again.") from error
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise InputError(f"{path} is a TorchScript program, which is not run; {ADVICE}.")
    for member in members:
        name = member.orig_filename.replace("\\", "/")
        if name.startswith("/") or re.match(r"[A-Za-z]:", name) or ".." in name.split("/") or "\0" in name:
            raise InputError(f"{path} holds a member called {member.orig_filename!r}, outside of it; do not trust it.")
        if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
            raise InputError(f"{path} holds a compressed member ({name!r}), which torch never writes; {ADVICE}.")
    total = sum(member.file_size for member in members)
    if total > path.stat().st_size:
        raise InputError(f"{path} unpacks to {total:,} bytes, more than it has; the file is not to be trusted.")
    sizes = {member.filename.lower(): member.file_size for member in members}  # as torch's reader finds them
    if not is_plain or len(sizes) < len(members) or min((each.header_offset for each in members), default=0):
        raise InputError(f"{path} is several archives in one, of which torch would read another; do not trust it.")
    if not any(name.endswith("data.pkl") for name in sizes):
        raise InputError(f"{path} is a zip archive, no torch file; give the file of weights itself.")
    return {member.filename: member.file_size for member in members}


def _stated_start(file) -> int | None:
    """Where the end of an archive says that its directory starts, which torch's reader believes; Python's does not."""

    def ending(kind, end: int) -> bytes | None:
        signature, size = kind
        file.seek(max(0, end - size))
        content = file.read(size)
        return content if content.startswith(signature) and len(content) == size else None

    length = file.seek(0, 2)
    last = ending(_END, length)
    if last is None:
        return None
    before = length - _END[1]
    locator = ending(_LOCATOR, before)
    if locator is None:
        return struct.unpack_from("<I", last, 16)[0]
    before -= _LOCATOR[1]
    long = ending(_END_64, before)
    stated = struct.unpack_from("<Q", locator, 8)[0]
    return struct.unpack_from("<Q", long, 48)[0] if long and stated == before - _END_64[1] else None


class _Stub(dict):
    """What stands for a global, or what it makes: it holds what is put into it, and does nothing."""

    def __init__(self, name: str = "", called=None):
        super().__init__()
        self.name, self.called = name, called

    def __call__(self, *arguments):
        self.called(self.name, arguments)
        return _Stub(self.name)


class _Contents(pickle._Unpickler):  # the one in Python: the one in C makes room for whatever a file says
    """Reads a pickle without any of its globals, and keeps the storages that it names."""

    def __init__(self, path: Path, file):
        super().__init__(file, encoding="latin1")
        self.path, self.storages, self.num_copied = path, [], 0

    def find_class(self, module, name):
        if not _NEEDED.fullmatch(f"{module}.{name}"):
            raise InputError(
                f"{self.path} needs pickled code ({module}.{name}) to be read, which could do anything here; {ADVICE}."
            )
        return _Stub(name, self.count)

    def count(self, name: str, arguments: tuple):
        """Refuses collections made of others over and over."""
        if name in _COPIES:
            self.num_copied += sum(len(each) for each in arguments)
        if self.num_copied > _MOST_COPIED:
            raise InputError(f"{self.path} makes collections of each other without end; it is not to be trusted.")

    def persistent_load(self, pid):
        self.storages.append(pid)
        return _Stub()


def _storages(path: Path, file) -> list:
    contents = _Contents(path, file)
    try:
        contents.load()
    except InputError:
        raise
    except Exception as error:  # whatever comes of bytes that are no pickle
        raise InputError(f"{path} is no torch file, or a damaged one ({first_line(error)}); copy it again.") from error
    return contents.storages


def _check_storages(path: Path, storages: list, size_of):
    """Refuses storages of which less is stored than claimed: the bytes after them would be read as theirs."""
    for storage in storages:
        try:
            _, kind, key, _, count = storage[:5]
            claimed = count * _BYTES[kind.name.removesuffix("Storage")]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} names its storages as torch does not; copy or save it again.") from error
        if not 0 <= claimed <= size_of(key):
            raise InputError(f"{path} has less of storage {key!r} than the {claimed:,} bytes of it; copy it again.")
