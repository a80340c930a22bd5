"""Whether images are the same as before: by hashes of their encoded bytes, or by files that were not written since."""

import hashlib
import json
import os

import pyarrow as pa
import pyarrow.compute as pc

from trainers.datasets import ImageSource


def bytes_hash(data: bytes | None) -> bytes:
    """A hash (32 bytes) of an image's encoded bytes; zeros if there are none."""
    return bytes(32) if data is None else hashlib.sha256(data).digest()


def file_stamps(source: ImageSource) -> str | None:
    """
    What changes when a file that holds images is written, moved or replaced, without reading any.

    Args:
        source ([`ImageSource`]): Stored images.

    Returns:
        `str`: A hash of all files' sizes, inodes and times of change. None if images are in memory.
    """
    images = source.images
    is_file = pc.is_null(pc.struct_field(images.column, "bytes")).take(pa.array(images.indices)).to_pylist()
    stamps = [_stamp(path) for path, is_named in zip(images.paths(), is_file, strict=True) if is_named]
    if not all(is_file):
        if not source.tables:
            return None
        stamps += [source.table_column, *map(_stamp, source.tables)]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()


def _stamp(path: str | None) -> list[int] | None:
    try:
        stat = os.stat(path or "")
    except (OSError, ValueError):  # which is told of the image when it is read
        return None
    # nobody can set the last, when the inode was changed
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
