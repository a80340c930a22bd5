"""Tars that are whole: their readers end without a word where an archive is cut off or damaged."""

import os
import tarfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from trainers.errors import InputError, first_line

# headers are small and far apart: what takes time is waiting for the disk
_FILES_AT_ONCE = 16


def check_tars(files: Iterable[str]):
    """
    Reads the headers of all members of some tars.

    Args:
        files (`Iterable[str]`): The tars, not compressed.

    Raises:
        InputError: One is cut off, or a header is damaged: all members behind it would be left out.
    """
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for file, broken in zip(files, pool.map(_broken_part, files), strict=True):
            if broken:
                raise InputError(f"{file} is no whole tar ({broken}); repair or remove it.")


def _broken_part(file: str) -> str | None:
    """Why a tar is not whole, or None if it is."""
    try:
        with open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as tar:
            for _ in tar:
                pass
            size = os.fstat(raw.fileno()).st_size
            raw.seek(tar.offset)
            # a tar ends in blocks of zeros; some writers leave them out
            if tar.offset < size and raw.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                return f"damaged at byte {tar.offset:,} of {size:,}"
            if tar.offset > size:
                return f"cut off at byte {size:,}"
    except (OSError, tarfile.TarError) as error:
        return first_line(error)
    return None
