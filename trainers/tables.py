"""Data sets as tables of undecoded images beside their other columns, read in order: stored, or streamed.

A table is read in batches of rows that end where its shards end, so that a batch is the same whoever reads it.
"""

import dataclasses
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset
from PIL import Image as PILImage

from trainers.clevr import is_clevr, load_clevr
from trainers.datasets import ImageSource, StoredImages
from trainers.errors import InputError
from trainers.labels import find_label_column
from trainers.sources import NUM_SCENES, DataArguments, choose_image_column, load_splits, scenes_source, undecoded


@dataclass
class RowBatch:
    """
    Consecutive rows.

    Args:
        shard (`int`): Which shard they are in.
        start (`int`): Position of the first one in the table.
        rows (`pa.Table`): The rows.
    """

    shard: int
    start: int
    rows: pa.Table


@dataclass
class ImageTable:
    """
    One split of a data set.

    Args:
        rows (`Dataset` or `IterableDataset`): The rows; images as undecoded structures of `bytes` and `path`.
        image_column (`str`): The column of images.
        label_column (`str`, *optional*): The column of labels.
        name (`str`): What an error calls it.
    """

    rows: Dataset | IterableDataset
    image_column: str
    label_column: str | None
    name: str

    @property
    def num_images(self) -> int | None:
        """How many rows; None if they are streamed, and only reading tells."""
        return len(self.rows) if isinstance(self.rows, Dataset) else None

    def batches(self, batch_size: int, shard_size: int) -> Iterator[RowBatch]:
        """
        All rows in their order, undecoded.

        Args:
            batch_size (`int`): Rows of a batch at most.
            shard_size (`int`): Rows of a shard; a batch that would reach into the next one is cut in two.

        Returns:
            An iterator of [`RowBatch`].
        """
        start = 0
        for rows in self.rows.with_format("arrow").iter(batch_size):
            while rows.num_rows:
                shard, inside = divmod(start, shard_size)
                part = rows.slice(0, shard_size - inside)
                yield RowBatch(shard, start, part)
                start += part.num_rows
                rows = rows.slice(part.num_rows)

    def images_at(self, positions: Iterable[int]) -> dict[int, dict]:
        """The undecoded images, `bytes` or `path`, at some positions; without those behind the last row."""
        if isinstance(self.rows, Dataset):
            return {position: self.rows[position][self.image_column] for position in positions
                    if position < len(self.rows)}  # fmt: skip
        wanted, found = set(positions), {}
        for batch in self.batches(1000, 1000):
            here = [position for position in wanted if position < batch.start + batch.rows.num_rows]
            for position in here:
                found[position] = batch.rows[self.image_column][position - batch.start].as_py()
            wanted -= set(here)
            if not wanted:
                break
        return found


def check_streamable(arguments: DataArguments):
    """Refuses to stream what is no table."""
    if _has_own_sources(arguments):
        raise InputError(f"{arguments.dataset} is no table that can be streamed; leave --streaming out.")


def _has_own_sources(arguments: DataArguments) -> bool:
    return arguments.dataset == "scenes" or is_clevr(Path(arguments.dataset).expanduser())


def load_tables(
    arguments: DataArguments,
    image_size: int = 32,
    streaming: bool = False,
    num_images: int | None = None,
    progress: bool = True,
) -> dict[str, ImageTable]:
    """
    The splits of a data set as it is: nothing is held out or drawn.

    Args:
        arguments ([`DataArguments`]): Which data set and columns.
        image_size (`int`): Pixels of a rendered scene's side; other images keep their own size.
        streaming (`bool`): Whether rows are streamed.
        num_images (`int`, *optional*): Only the first so many rows of each split.
        progress (`bool`): Whether to show a bar while scenes are rendered.

    Returns:
        `dict` of [`ImageTable`] by the name of the split.

    Raises:
        InputError: There is no such data set or column, or it cannot be streamed.
    """
    if streaming:
        check_streamable(arguments)
    if _has_own_sources(arguments):
        sources = _own_sources(arguments, image_size, num_images, progress)
        splits = {split: _rows_of(source) for split, source in sources.items()}
        # which label was asked for has been chosen
        arguments = dataclasses.replace(arguments, label_column=None)
    else:
        splits = load_splits(arguments, streaming)
    tables = {split: _table(rows, arguments, f"{arguments.dataset} ({split})") for split, rows in splits.items()}
    for table in tables.values():
        if num_images is not None:
            table.rows = table.rows.take(min(num_images, table.num_images or num_images))
    return tables


def _own_sources(arguments: DataArguments, image_size: int, num_images: int | None, progress: bool):
    """The sources of data sets that no builder of `datasets` reads."""
    if arguments.dataset != "scenes":
        loaded = load_clevr(Path(arguments.dataset).expanduser(), arguments.label_column)
        return dict(zip(NUM_SCENES, loaded, strict=True))
    # a scene is the same however many there are
    asked = DataArguments(label_column=arguments.label_column, num_train_images=num_images, num_eval_images=num_images)
    return {split: scenes_source(asked, split, image_size, progress) for split in NUM_SCENES}


def _rows_of(source: ImageSource) -> Dataset:
    if isinstance(source.images, StoredImages):
        images = source.images.column
    else:
        images = pa.array([{"bytes": _png(image), "path": None} for image in source.images], Image().pa_type)
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=source.label_names)})
    return Dataset(pa.table({"image": images, "label": pa.array(source.labels)}, schema=features.arrow_schema))


def _png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(image).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _table(rows: Dataset | IterableDataset, arguments: DataArguments, name: str) -> ImageTable:
    if isinstance(rows, IterableDataset) and rows.features is None:
        rows = rows._resolve_features()
    image_column = choose_image_column(rows, arguments.image_column, name)
    label_column = find_label_column(rows, arguments.label_column, name)
    # the columns of webdataset's streams come in another order at the end of each tar
    rows = undecoded(rows, image_column, name).select_columns(list(rows.features))
    return ImageTable(rows, image_column, label_column, name)
