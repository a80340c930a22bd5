"""What is streamed: the shards to train on, and some images of them and of the evaluation split to evaluate with."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetInfo

from trainers.datasets import ImageSource
from trainers.errors import InputError, first_line
from trainers.sources import DataArguments, named_splits, source_of, table_files
from trainers.streams import Shards
from trainers.subsets import with_common_classes
from trainers.tables import ImageTable, check_streamable, load_tables

# images that the probes after a run are fitted and tested on, where the recipe does not say
NUM_PROBE_IMAGES, NUM_EVAL_IMAGES = 10_000, 5_000
_MOST_SHARDS = 64


@dataclass
class PretrainDataArguments(DataArguments):
    """Which images, how they are cropped, and whether they are streamed or kept decoded."""

    streaming: bool = field(
        default=False,
        metadata={"help": "read parquet files, tars or a data set of the Hub shard by shard, and store no copy"},
    )
    shuffle_buffer: int = field(
        default=4096, metadata={"help": "streamed images that are shuffled together, over all processes"}
    )
    decoded_cache: str | None = field(
        default=None,
        metadata={"help": "folder that keeps the train images decoded, so that no crop needs a decoder; it is made "
                          "if it is not there, in one pass over the images, and refused if they are not those it was "
                          "made of; where a file was written since or is a copy, all are read at the start to "
                          "see that"},
    )  # fmt: skip
    decoded_size: int = field(
        default=256, metadata={"help": "pixels of the short side that the cache shrinks larger images to"}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.decoded_size < 1:
            raise InputError(f"decoded_size={self.decoded_size} must be 1 or more.")
        if self.streaming and self.decoded_cache is not None:
            raise InputError(
                f"decoded_cache={self.decoded_cache} cannot be made of a stream, of which no copy is stored; leave "
                "--decoded_cache or --streaming out."
            )
        if self.shuffle_buffer < 1:
            raise InputError(f"shuffle_buffer={self.shuffle_buffer} must be 1 or more.")
        if self.streaming and self.num_train_images is not None:
            raise InputError(
                f"num_train_images={self.num_train_images} cannot be chosen of a stream, which is read whole; leave "
                "it out (--num_train_images null), or leave --streaming out."
            )


@dataclass
class Stream:
    """
    A data set that is streamed.

    Args:
        arguments ([`PretrainDataArguments`]): Which.
        train ([`ImageTable`]): Its rows to train on.
        evaluation ([`ImageTable`], *optional*): Its rows to evaluate on.
        shards ([`Shards`]): The images of the former.
    """

    arguments: PretrainDataArguments
    train: ImageTable
    evaluation: ImageTable | None
    shards: Shards

    def without_evaluation(self) -> str | None:
        """Why what is trained on it cannot be evaluated, in a sentence; None if it can be."""
        if self.evaluation is None:
            return f"{self.arguments.dataset} has no split to evaluate on, and none is held out of a stream."
        unlabelled = next((table for table in (self.train, self.evaluation) if table.label_column is None), None)
        return unlabelled and f"{unlabelled.name} has no labels; say which with --label_column."

    def some_images(self, num_probe_images: int | None) -> tuple[ImageSource, ImageSource]:
        """
        Labelled images of all over the train and of the evaluation split, their classes numbered alike.

        Args:
            num_probe_images (`int`, *optional*): How many of the former.
        """
        numbers = num_probe_images or NUM_PROBE_IMAGES, self.arguments.num_eval_images or NUM_EVAL_IMAGES
        return with_common_classes(
            *(
                dataclasses.replace(source_of(_some_rows(table, number), self.arguments, ""), name=table.name)
                for table, number in zip((self.train, self.evaluation), numbers, strict=True)
            )
        )


def load_stream(arguments: PretrainDataArguments) -> Stream:
    """
    Opens a data set to be streamed; no image is read.

    Args:
        arguments ([`PretrainDataArguments`]): Which.

    Returns:
        [`Stream`].

    Raises:
        InputError: There is no such data set, split or column, or it is not in shards.
    """
    suffix, files = stream_files(arguments)
    if arguments.eval_split == arguments.train_split:
        raise InputError(
            f"eval_split={arguments.eval_split!r} is the train split, and nothing is held out of a stream; name "
            "another, or leave --streaming out."
        )
    tables, evaluation = named_splits(load_tables(arguments, streaming=True), arguments)
    train = tables[arguments.train_split]
    # one split may have been called otherwise by its files' names
    files = files.get(arguments.train_split) or next(iter(files.values()), None)
    shard_rows = _rows_of_parquet(files) if suffix == ".parquet" else {}
    num_images = sum(shard_rows.values()) or _told_by_the_hub(train, arguments)
    shards = Shards(train.rows, train.image_column, train.name, files, num_images, shard_rows)
    return Stream(arguments, train, tables.get(evaluation), shards)


def stream_files(arguments: PretrainDataArguments) -> tuple[str | None, dict[str, list[str]]]:
    """As [`~sources.table_files`]; what cannot be streamed is refused."""
    suffix, files = table_files(arguments)
    if suffix is None and Path(arguments.dataset).expanduser().is_dir():
        raise InputError(f"{arguments.dataset} is a folder of image files, which are read one by one as it is; leave "
                         "--streaming out.")  # fmt: skip
    check_streamable(arguments)
    return suffix, files


def _rows_of_parquet(files: list[str]) -> dict[int, int]:
    """Rows of each file, by its footer."""
    counts = {}
    for number, file in enumerate(files):
        try:
            counts[number] = pq.read_metadata(file).num_rows
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{file} is no whole parquet file ({first_line(error)}); repair or remove it.") from error
    return counts


def _told_by_the_hub(table: ImageTable, arguments: PretrainDataArguments) -> int | None:
    split = (table.rows.info.splits or {}).get(arguments.train_split)
    return split and split.num_examples


def _some_rows(table: ImageTable, number: int) -> Dataset:
    """The first rows of shards from all over a table, since rows beside each other are often alike."""
    rows, num_shards = table.rows.select_columns([table.image_column, table.label_column]), table.rows.num_shards
    chosen = np.unique(np.linspace(0, num_shards - 1, min(num_shards, _MOST_SHARDS)).astype(int))
    of_each = -(-number // len(chosen))
    parts = [
        part
        for shard in chosen
        for part in rows.shard(num_shards, int(shard)).take(of_each).with_format("arrow").iter(of_each)
    ]
    return Dataset(pa.concat_tables(parts), info=DatasetInfo(features=rows.features)).take(number)
