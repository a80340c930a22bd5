"""Files of weights that are read, and those that are refused before anything of theirs happens."""

import os
import pickle
import struct
import tarfile
import zipfile
import zlib

import pytest
import torch
from safetensors.torch import save_file

from trainers.conversion.weight_files import read_weight_file
from trainers.errors import InputError

TENSORS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.ones(3)}


class Shell:
    """What unpickles by running a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pth.tar"


def refused(path, message):
    with pytest.raises(InputError, match=message) as caught:
        read_weight_file(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def rewritten(path, **changes):
    """The archive that torch wrote, with members added, or all compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", changes.pop("compression", zipfile.ZIP_STORED)) as archive:
        for name, content in (members | changes).items():
            archive.writestr(name, content)


def test_nested_tensors_are_kept_and_the_rest_is_left_out(path):
    optimizer = {"state": {0: {"exp_avg": torch.full((2,), float("nan"))}}, "param_groups": [{"lr": 0.1}]}
    torch.save({"encoder": TENSORS, "opt": optimizer, "epoch": 3, "scaler": None}, path)
    read = read_weight_file(path)
    assert list(read) == ["encoder"]
    assert all(torch.equal(read["encoder"][name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_and_safetensors_are_read(path, zipped):
    torch.save(torch.nn.Linear(3, 2).state_dict() | TENSORS, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(read_weight_file(path)["weight"], TENSORS["weight"])
    save_file(TENSORS, path)
    assert torch.equal(read_weight_file(path)["weight"], TENSORS["weight"])


def test_a_file_that_needs_code_is_refused_and_its_code_not_run(path, tmp_path):
    trace = tmp_path / "trace"
    for save in (torch.save, lambda obj, file: file.write_bytes(pickle.dumps(obj, protocol=2))):
        save({"weight": Shell(f"touch {trace}")}, path)
        refused(path, r"needs pickled code \(\S*system\)")
    torch.save(torch.nn.Linear(2, 2), path)
    refused(path, r"needs pickled code \(torch.nn.modules.linear.Linear\)")
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_an_old_tar_and_a_script_are_refused(path, tmp_path):
    for name in ("storages", "tensors", "pickle"):
        (tmp_path / name).write_bytes(pickle.dumps(Shell(f"touch {tmp_path / 'trace'}")))
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(tmp_path / name, arcname=name)
    refused(path, "old tar format")
    assert not (tmp_path / "trace").exists()
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    refused(path, "TorchScript program")


@pytest.mark.parametrize("name", ["/etc/passwd", "../../outside", "a/../../outside", "C:/outside", "..\\outside"])
def test_members_outside_of_the_archive_are_refused(path, name):
    torch.save(TENSORS, path)
    rewritten(path, **{name: "x"})
    refused(path, "outside of it")


def test_compressed_members_are_refused(path):
    torch.save({"weight": torch.zeros(10**6)}, path)
    rewritten(path, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    refused(path, "compressed member")


def test_members_that_lie_over_each_other_are_refused(path):
    """A directory that lists the same bytes a thousand times."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"0" * 10000)
        info = archive.infolist()[0]
        archive.filelist += [info] * 999
    refused(path, "unpacks to 10,000,000 bytes, more than it has")


def several(path, members):
    """An archive with two directories: where its end says that one starts, the members are compressed there."""
    content, honest, other = b"", b"", b""
    for name, data in members.items():
        packed = zlib.compress(data, wbits=-15) if len(data) > 100 else data
        method, crc, name = 8 * (len(data) > 100), zlib.crc32(data), name.encode()
        place, sizes = len(content), (len(packed), len(data), len(name))
        content += struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, method, 0, 33, crc, *sizes, 0) + name + packed
        for flag in (True, False):
            stated = (
                (method, 0, 33, crc, len(packed), sizes[flag], len(name))
                if flag
                else (0, 0, 33, crc, len(packed), len(packed), len(name))
            )
            entry = struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, *stated, 0, 0, 0, 0, 0, place) + name
            honest, other = (honest + entry, other) if flag else (honest, other + entry)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, len(members), len(members), len(other), len(content), 0)
    path.write_bytes(content + honest + other + end)


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def test_an_archive_of_two_directories_is_refused(path):
    torch.save(TENSORS | {"zeros": torch.zeros(10**6)}, path)
    several(path, members_of(path))
    assert torch.load(path, weights_only=True)["zeros"].shape == (10**6,) and path.stat().st_size < 10**4
    refused(path, "several archives in one")


@pytest.mark.parametrize("change", ["comment", "before", "twice", "case"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_archives_that_torch_does_not_write_are_refused(path, change):
    torch.save(TENSORS, path)
    if change == "before":
        path.write_bytes(b"PK\3\4" + path.read_bytes())
    else:
        with zipfile.ZipFile(path, "a") as archive:
            name = archive.namelist()[0]
            if change == "comment":
                archive.comment = b"more"
            else:
                archive.writestr(name if change == "twice" else name.upper(), b"x")
    refused(path, "several archives in one")


def test_members_that_are_larger_than_they_are_packed_are_refused(path):
    torch.save(TENSORS, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("file/more", "x")
        archive.infolist()[0].file_size += 1
    refused(path, "compressed member")


def test_a_storage_of_which_a_part_is_missing_is_refused(path):
    torch.save({"weight": torch.ones(2048), "more": torch.ones(4096)}, path)
    members = members_of(path)
    name = next(name for name in members if name.endswith("data/0"))
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content[:4096] if each == name else content)
    refused(path, "has less of storage '0' than the 8,192 bytes")
    torch.save({"weight": torch.ones(2048)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-8000])
    refused(path, "has less of storage")


def text(content):
    return b"X" + struct.pack("<I", len(content)) + content


ENCODED = b"c_codecs\nencode\n" + text(b"ab" * 50) + text(b"hex") + b"\x86R"
AGAIN = b"ccollections\nOrderedDict\nh\x01\x85R"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"(" + ENCODED + b"t", r"needs pickled code \(_codecs.encode\)"),
        (b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R", r"needs pickled code \(builtins.bytearray\)"),
        (b"(]q\x01(" + b"K\x01" * 10**5 + b"e" + AGAIN * 11 + b"t", "without end"),
    ],
    ids=["codecs", "bytearray", "copies"],
)
def test_pickles_that_grow_are_refused(path, zipped, content, message):
    content = b"\x80\x02" + content + b"."
    torch.save(TENSORS, path)
    if zipped:
        name = next(name for name in members_of(path) if name.endswith("data.pkl"))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
    else:
        path.write_bytes(content)
    refused(path, message)


def test_empty_dictionaries_count(path, monkeypatch):
    monkeypatch.setattr("trainers.conversion.weight_files._MOST_ENTRIES", 100)
    empty = {}
    torch.save({str(number): empty for number in range(60)} | TENSORS, path)
    refused(path, "without end")


def test_names_that_would_break_the_sentence_are_written_out(path):
    torch.save({"a\n\x1b[31mALL IS WELL": torch.tensor(float("nan"))}, path)
    refused(path, r"'a\\n\\x1b\[31mALL IS WELL' holds numbers")


def test_a_tensor_larger_than_what_is_stored_is_refused(path):
    torch.save({"weight": torch.zeros(1).expand(10**12)}, path)
    refused(path, "weight claims 1,000,000,000,000 numbers")
    torch.save({"weight": torch.zeros(1).expand(100)}, path)  # less than the file has, more than the tensor
    refused(path, "weight claims 100 numbers and stores fewer")
    torch.save({"weight": torch.zeros(1).expand(10**12)}, path, _use_new_zipfile_serialization=False)
    refused(path, "weight claims 1,000,000,000,000 numbers")


def test_more_than_memory_is_refused(path, monkeypatch):
    torch.save(TENSORS, path)
    memory = type("Memory", (), {"available": 35})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    refused(path, "GiB of memory are free")
    memory.available = 36
    read_weight_file(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(path, value):
    torch.save({"encoder": {"norm": torch.tensor([1.0, value])}}, path)
    refused(path, "encoder.norm holds numbers that are not finite")
    save_file({"norm": torch.tensor([1.0, value])}, path)
    refused(path, "norm holds numbers that are not finite")


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_sparse_tensors_are_refused(path):
    torch.save({"weight": torch.eye(3).to_sparse()}, path)
    refused(path, "no torch file, or a damaged one")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_no_layer_has_are_refused(path, dtype):
    torch.save({"weight": torch.zeros(3).to(dtype)}, path)
    refused(path, f"weight is of {dtype}")


def test_damaged_files_are_refused(path, tmp_path):
    refused(tmp_path / "missing.pth", "is no file")
    torch.save(TENSORS, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(path, "cut off or damaged")
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, "damaged")
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:-10])
    refused(path, "no whole safetensors file")
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(path, "no whole safetensors file")
    for content in (b"", b"no file of weights at all" * 20, b"PK\x03\x04nothing"):
        path.write_bytes(content)
        refused(path, "damaged|without running code")


def test_other_archives_and_files_without_tensors_are_refused(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.txt", "1 2 3")
    refused(path, "no torch file")
    torch.save({"epoch": 3}, path)
    refused(path, "no named tensors")
    torch.save([torch.zeros(2)], path)
    refused(path, "no named tensors")
