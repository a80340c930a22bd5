"""The parquet shards of a features folder: written whole, in order, and found again.

A shard holds the rows of so many consecutive images of a split. What it covers, which of its images could not be
read, and a hash of the rows it was made of stand in the footer of its file, so that a shard tells by itself whether it
is whole, and whether the data set still has these rows.

Shapes: B images, D width of an embedding, h and w rows and columns of a map.
"""

import glob
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Array3D, Features, Image, List, Value
from datasets.features.features import numpy_to_pyarrow_listarray
from datasets.table import embed_table_storage

from trainers.errors import InputError
from trainers.files import whole_file
from trainers.tables import ImageTable

OWN_COLUMNS = ("index", "path", "embedding")
_FOOTER_KEY = b"cjepa"


@dataclass
class Shard:
    """
    What a shard covers.

    Args:
        start, stop (`int`): Positions in the split, from the first one to that behind the last.
        digest (`str`): SHA-256 of its rows by [`hash_rows`].
        skipped (`list[dict]`): Images that could not be read: `index`, `path` (null if it is no file), `reason`.
    """

    start: int
    stop: int
    digest: str
    skipped: list[dict] = field(default_factory=list)


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where a shard is."""
    return folder / f"{split}-{number:05d}.parquet"


def shard_features(table: ImageTable, kept: list[str], shape: tuple[int, ...], dtype: str) -> Features:
    """
    The columns of a shard.

    Args:
        table ([`ImageTable`]): The images.
        kept (`list[str]`): Columns of it that are kept.
        shape (`(D,)` or `(h, w, D)`): Of one embedding.
        dtype (`str`): `"float16"` or `"float32"`.

    Returns:
        `Features`: `index`, `path`, the columns kept, `embedding`.

    Raises:
        InputError: A column that is kept has the name of one of ours.
    """
    for column in OWN_COLUMNS:
        if column in kept:
            raise InputError(f"{table.name} has a column {column!r} already, and so have features; rename it.")
    columns = {column: table.rows.features[column] for column in kept}
    if table.image_column in columns:
        columns[table.image_column] = Image()
    embedding = Array3D(shape, dtype) if len(shape) == 3 else List(Value(dtype), length=shape[0])
    return Features({"index": Value("int64"), "path": Value("string"), **columns, "embedding": embedding})


def shard_rows(
    rows: pa.Table, indices: np.ndarray, paths: list[str | None], embeddings: np.ndarray, features: Features
) -> pa.Table:
    """
    Rows of a shard.

    Args:
        rows (`pa.Table`): Of the source, those that could be read.
        indices (`np.ndarray` of shape `(B,)`): Their positions in the split.
        paths (`list[str]`): Their files; None where an image is none.
        embeddings (`np.ndarray` of shape `(B, D)` or `(B, h, w, D)`): Theirs, in the type they are stored in.
        features (`Features`): Of [`shard_features`].

    Returns:
        `pa.Table`: With the features' columns; images that are files are read into it.
    """
    schema = features.arrow_schema
    kept = [name for name in features if name not in OWN_COLUMNS]
    if embeddings.ndim == 4:
        stored = numpy_to_pyarrow_listarray(embeddings)
        stored = pa.ExtensionArray.from_storage(schema.field("embedding").type, stored)
    else:
        stored = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
    columns = {"index": pa.array(indices), "path": pa.array(paths, pa.string()), "embedding": stored}
    columns |= {name: rows[name].cast(schema.field(name).type) for name in kept}
    table = pa.table([columns[name] for name in features], schema=schema)
    return embed_table_storage(table) if any(isinstance(features[name], Image) for name in kept) else table


def hash_rows(digest, rows: pa.Table, image_column: str, label_column: str | None):
    """
    Adds to a hash what tells rows apart and is known without reading whole images.

    Args:
        digest (`hashlib._Hash`): Is updated row by row: batches of any size give the same.
        rows (`pa.Table`): Of the source: each image's path, the number of its bytes and the last of them, or else
            size and time of its file.
        image_column (`str`): The column of images.
        label_column (`str`, *optional*): The column of labels, which count, too.
    """
    paths = pc.struct_field(rows[image_column], "path").to_pylist()
    stored = pc.struct_field(rows[image_column], "bytes")
    # checksums and the end of what is compressed are there: images of one size differ in it
    sizes, ends = pc.binary_length(stored).to_pylist(), pc.binary_slice(stored, -64, None).to_pylist()
    labels = rows[label_column].to_pylist() if label_column else [None] * rows.num_rows
    for path, size, end, label in zip(paths, sizes, ends, labels, strict=True):
        state = _file_state(path) if size is None and path else (size, end)
        digest.update(repr((path, state, label)).encode())


def _file_state(path: str) -> tuple[int, int] | None:
    """Size and time of a file; None if there is none, which makes an unreadable image."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns


def write_shard(path: Path, parts: Iterable[tuple[pa.Table, Shard]], features: Features) -> Shard:
    """
    Writes a shard part by part; it is in its place only when it is whole.

    Args:
        path (`Path`): Where to.
        parts: Rows of [`shard_rows`], and what they cover, in order; the digest is that of all rows so far.
        features (`Features`): Of [`shard_features`].

    Returns:
        [`Shard`]: What it covers.
    """
    whole = None
    with whole_file(path) as unfinished:
        with pq.ParquetWriter(unfinished, features.arrow_schema) as writer:
            for rows, part in parts:
                if rows.num_rows:  # `datasets` cannot read a file whose first group of rows is empty
                    writer.write_table(rows)
                skipped = whole.skipped + part.skipped if whole else part.skipped
                whole = Shard(whole.start if whole else part.start, part.stop, part.digest, skipped)
            writer.add_key_value_metadata({_FOOTER_KEY: json.dumps(asdict(whole))})
    return whole


def read_shard(path: Path) -> Shard | None:
    """What a shard covers, read off its footer; None if the file is broken."""
    try:
        metadata = pq.read_metadata(path)
        shard = Shard(**json.loads(metadata.metadata[_FOOTER_KEY]))
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
        return None
    is_whole = metadata.num_rows == shard.stop - shard.start - len(shard.skipped)
    return shard if is_whole else None


def splits_with_shards(folder: Path) -> list[str]:
    """The splits of which a folder holds shards, finished or not, by the names of its files."""
    names = [path.stem.rpartition("-") for path in folder.glob("*-[0-9][0-9][0-9][0-9][0-9]*.parquet")]
    return sorted({split for split, _, digits in names if digits.isdecimal()})


def find_shards(
    folder: Path, split: str, shard_size: int, num_images: int | None
) -> tuple[dict[int, Shard], list[Path]]:
    """
    The shards of a split that are there.

    Args:
        folder (`Path`): Where.
        split (`str`): Which split.
        shard_size (`int`): Images of a shard.
        num_images (`int`, *optional*): Images of the split, if it is known.

    Returns:
        The shards by number, and the files of those that are broken.
    """
    found, broken = {}, []
    for path in sorted(folder.glob(f"{glob.escape(split)}-[0-9][0-9][0-9][0-9][0-9]*.parquet")):
        digits = path.stem.removeprefix(f"{split}-")
        if not digits.isdecimal():
            continue
        number, shard = int(digits), read_shard(path)
        start = number * shard_size
        stop = start + shard_size if num_images is None else min(start + shard_size, num_images)
        # the last shard of a stream is as long as it turns out
        fits = shard and shard.start == start and (shard.stop == stop or (num_images is None and shard.stop < stop))
        if fits:
            found[number] = shard
        else:
            broken.append(path)
    return found, broken
