"""Embeddings of a whole data set as parquet files, by one process or several, taken up again where they were left."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel

from trainers.decoded import DecodedViews, decoded
from trainers.embedding import encoding
from trainers.errors import InputError, first_line
from trainers.feature_encoder import FeatureArguments, FeatureEncoder, load_feature_encoder
from trainers.files import full_disk_named, write_json, write_text_atomically
from trainers.readable import SKIPPED, allowed_to_skip
from trainers.recipes import first_difference
from trainers.shards import (
    Shard,
    find_shards,
    hash_rows,
    shard_features,
    shard_path,
    shard_rows,
    splits_with_shards,
    write_shard,
)
from trainers.sources import DataArguments
from trainers.tables import ImageTable, RowBatch, load_tables
from trainers.transforms import eval_transform

MANIFEST = "features.json"
# processes wait for each other at the end of a split, and some have a shard more to embed
_LONGEST_WAIT = timedelta(days=7)


def write_features(
    model: str | Path | PreTrainedModel,
    data: DataArguments,
    output_dir: str | Path,
    arguments: FeatureArguments | None = None,
    tables: dict[str, ImageTable] | None = None,
) -> dict:
    """
    Embeds the images of a data set and writes `SPLIT-00000.parquet` and so on, `features.json` and `skipped.jsonl`.

    Several processes share the shards. A second call with the same settings makes what is missing or broken.

    Args:
        model (`str`, `Path` or a model): A folder, the id of a model on the Hub, or a model.
        data ([`DataArguments`]): Which data set and columns.
        output_dir (`str` or `Path`): The folder to write to.
        arguments ([`FeatureArguments`], *optional*): How; the defaults when not given.
        tables (`dict` of [`ImageTable`], *optional*): The splits, if they are loaded already.

    Returns:
        `dict`: What `features.json` holds: `model`, `streaming`, `settings`, and of each finished split the numbers
        of its images, of those skipped and of its shards.

    Raises:
        InputError: The folder holds features of other settings or of images as they no longer are, more images are
            unreadable than may be, the data set has no such split, or embeddings are not finite.
    """
    arguments = arguments or FeatureArguments()
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=_LONGEST_WAIT)
    progress = state.is_main_process and not arguments.disable_tqdm
    encoder = load_feature_encoder(model, arguments, data.image_mean, data.image_std, state.device)
    if tables is None:
        size = max(encoder.image_size)
        tables = load_tables(data, size, arguments.streaming, arguments.num_images, progress)
    for split in arguments.split or []:
        if split not in tables:
            raise InputError(f"{data.dataset} has no split {split!r}, only {', '.join(tables)}; mend --split.")
    tables = {split: tables[split] for split in arguments.split or tables}
    folder = Path(output_dir)
    manifest = {
        "model": model if isinstance(model, str) else str(model) if isinstance(model, Path) else type(model).__name__,
        "streaming": arguments.streaming,
        "settings": encoder.settings | _stored_settings(data, arguments),
        "splits": {},
    }
    before = read_manifest(folder) if (folder / MANIFEST).is_file() else None
    if before:
        _check_settings(folder, before, manifest, tables)
        manifest["splits"] = before["splits"]
    with full_disk_named(folder):
        for split, table in tables.items():
            writer = _SplitWriter(folder, split, table, encoder, arguments, state, progress)
            state.wait_for_everyone()  # all have seen what is there
            if state.is_main_process:
                write_json(folder / MANIFEST, manifest)
                writer.remove_remains()
            state.wait_for_everyone()
            writer.write()
            state.wait_for_everyone()
            manifest["splits"][split] = writer.summary()
        if state.is_main_process:
            write_json(folder / MANIFEST, manifest)
            _list_skipped(folder, arguments.shard_size)
        state.wait_for_everyone()
    return manifest


def read_manifest(folder: str | Path) -> dict:
    """What `features.json` of a folder holds; raises `InputError` if there is none."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        manifest["settings"], manifest["splits"], manifest["model"]  # noqa: B018
        return manifest
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({first_line(error)}); give a folder that `cjepa features` has written."
        ) from error


def _stored_settings(data: DataArguments, arguments: FeatureArguments) -> dict:
    path = Path(data.dataset).expanduser()
    return {
        "dataset": str(path.resolve()) if path.exists() else data.dataset,
        "dataset_config": data.dataset_config,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "num_images": arguments.num_images,
        "keep_columns": arguments.keep_columns,
        "dtype": arguments.dtype,
        "shard_size": arguments.shard_size,
    }


def _check_settings(folder: Path, before: dict, now: dict, tables: dict[str, ImageTable]):
    """Refuses to mix features of two kinds in one folder."""
    for name in {**before["settings"], **now["settings"]}:
        what, *values = first_difference(name, before["settings"].get(name), now["settings"].get(name))
        if values[0] != values[1]:
            raise InputError(
                f"{folder} holds features with {what} {values[0]!r}, and now it is {values[1]!r}; give another "
                "--output, or the settings it was begun with."
            )
    for split, table in tables.items():
        number = before["splits"].get(split, {}).get("num_images", table.num_images)
        if table.num_images is not None and number != table.num_images:
            raise InputError(f"{folder} holds features of {number:,} images of {table.name}, which has "
                             f"{table.num_images:,} now; give another --output.")  # fmt: skip


class _SplitWriter:
    """Makes the shards of one split that are missing; of those, the ones that are this process' share."""

    def __init__(
        self, folder: Path, split: str, table: ImageTable, encoder: FeatureEncoder, arguments, state, progress
    ):
        self.folder, self.split, self.table, self.encoder = folder, split, table, encoder
        self.arguments, self.state, self.progress = arguments, state, progress
        self.found, self.broken = find_shards(folder, split, arguments.shard_size, table.num_images)
        columns = list(table.rows.features) if arguments.keep_columns else [table.label_column]
        self.kept = [column for column in columns if column is not None]

    def remove_remains(self):
        """Removes what a killed run left, and says what is made anew and what is there."""
        for path in self.folder.glob(f".{self.split}-*.parquet.*.tmp"):
            path.unlink()
        for path in self.broken:
            print(f"{path} is broken or does not fit; it is made anew.", flush=True)
            path.unlink()
        if self.found:
            of = f" of {self._num_shards()}" if self.table.num_images is not None else ""
            print(f"{self.split}: {len(self.found)}{of} shards are there already.", flush=True)

    def _num_shards(self) -> int:
        return -(-self.table.num_images // self.arguments.shard_size)

    def write(self):
        """Embeds and writes."""
        encoder, arguments = self.encoder, self.arguments
        self.num_rows = 0
        self.num_seen = sum(shard.stop - shard.start for shard in self.found.values())
        self.skipped = [entry for shard in self.found.values() for entry in shard.skipped]
        transform = eval_transform(encoder.image_size)
        with encoding(encoder.module, encoder.image_mean, encoder.image_std, self.state.device) as encode:
            # known before the first image that can be read
            self.shape = tuple(
                encode(torch.zeros(1, 3, *encoder.image_size, dtype=torch.uint8)).pooler_output.shape[1:]
            )
            features = shard_features(self.table, self.kept, self.shape, arguments.dtype)
            on_gpu = self.state.device.type == "cuda"
            column, workers = self.table.image_column, arguments.dataloader_num_workers
            loaded = decoded(self._wanted(), column, transform, workers, pin_memory=on_gpu)
            with tqdm(total=self._num_wanted(), desc=f"embedding {self.split}", unit="image",
                      disable=not self.progress) as bar:  # fmt: skip
                for number, batches in itertools.groupby(loaded, key=lambda pair: pair[0].shard):
                    digest = hashlib.sha256()
                    parts = (self._part(batch, views, digest, encode, features, bar) for batch, views in batches)
                    shard = write_shard(shard_path(self.folder, self.split, number), parts, features)
                    self.num_seen += shard.stop - shard.start
                    self.skipped += shard.skipped
                    self._check_skipped(self.skipped, self.table.num_images or self.num_seen)

    def _wanted(self) -> Iterator[RowBatch]:
        """The batches of the shards that this process makes; all processes check the rows of those that are there."""
        rank, num_processes = self.state.process_index, self.state.num_processes
        all_batches = self.table.batches(self.arguments.batch_size, self.arguments.shard_size)
        changed = []
        for number, batches in itertools.groupby(all_batches, key=lambda batch: batch.shard):
            digest = hashlib.sha256()
            for batch in batches:
                self.num_rows = batch.start + batch.rows.num_rows
                if number in self.found:
                    self._hash_rows(digest, batch)
                elif number % num_processes == rank and not changed:
                    yield batch
            if number in self.found and digest.hexdigest() != self.found[number].digest:
                changed.append(shard_path(self.folder, self.split, number).name)
        if changed:
            shown = ", ".join(changed[:5]) + (f" and {len(changed) - 5:,} more" if len(changed) > 5 else "")
            raise InputError(f"{self.table.name} has other images now than those that {self.folder} holds features "
                             f"of in {shown}; remove what is to be made anew, or give another --output.")  # fmt: skip

    def _hash_rows(self, digest, batch: RowBatch):
        hash_rows(digest, batch.rows, self.table.image_column, self.table.label_column)

    def _num_wanted(self) -> int | None:
        if self.table.num_images is None:
            return None
        size, total = self.arguments.shard_size, self.table.num_images
        numbers = range(self.state.process_index, self._num_shards(), self.state.num_processes)
        return sum(min(size, total - number * size) for number in numbers if number not in self.found)

    def _part(
        self, batch: RowBatch, views: DecodedViews, digest, encode, features, bar: tqdm
    ) -> tuple[pa.Table, Shard]:
        paths = pc.struct_field(batch.rows[self.table.image_column], "path").to_pylist()
        skipped = [
            {"index": batch.start + position, "path": paths[position], "reason": reason}
            for position, reason in views.unreadable.items()
        ]
        readable = [position for position in range(len(paths)) if position not in views.unreadable]
        if readable:
            embeddings = encode(views.pixel_values).pooler_output.float().cpu().numpy()
        else:
            embeddings = np.zeros((0, *self.shape), np.float32)
        with np.errstate(over="ignore"):
            stored = embeddings.astype(self.arguments.dtype)
        if not np.isfinite(stored).all():
            advice = ("are too large for float16; store --dtype float32" if np.isfinite(embeddings).all() else
                      "are not finite; its training diverged, take an earlier one")  # fmt: skip
            raise InputError(f"Embeddings of the encoder {advice}.")
        rows = batch.rows.take(pa.array(readable, pa.int64()))
        indices = batch.start + np.asarray(readable, dtype=np.int64)
        bar.update(len(paths))
        self._hash_rows(digest, batch)
        table = shard_rows(rows, indices, [paths[position] for position in readable], stored, features)
        return table, Shard(batch.start, batch.start + len(paths), digest.hexdigest(), skipped)

    def _check_skipped(self, skipped: list[dict], num_images: int):
        """Lists the unreadable images and stops when they are more than may be; of a stream, of those seen."""
        share = self.arguments.max_skipped_share
        if len(skipped) <= allowed_to_skip(num_images, share):
            return
        _list_skipped(self.folder, self.arguments.shard_size)
        where = skipped[0]["path"] or f"number {skipped[0]['index']}"
        raise InputError(
            f"{len(skipped):,} of {num_images:,} images of {self.table.name} cannot be read, such as {where} "
            f"({skipped[0]['reason']}), more than --max_skipped_share {share:g} allows; those found so far are listed "
            f"in {self.folder / SKIPPED}: repair them or raise it."
        )

    def summary(self) -> dict:
        """Numbers of a finished split, once all processes are done."""
        found, _ = find_shards(self.folder, self.split, self.arguments.shard_size, self.table.num_images)
        shards = [found[number] for number in sorted(found)]
        if not self.num_rows:
            raise InputError(f"{self.table.name} holds no image; mend --dataset or --split.")
        # a stream can be shorter than it was, or longer for one process than for another
        starts = [shard.start for shard in shards]
        if starts != [0, *(shard.stop for shard in shards[:-1])] or shards[-1].stop != self.num_rows:
            raise InputError(f"{self.table.name} has changed since {self.folder} was begun; remove it and start "
                             "again.")  # fmt: skip
        skipped = [entry for shard in shards for entry in shard.skipped]
        self._check_skipped(skipped, shards[-1].stop)
        if len(skipped) == shards[-1].stop:
            raise InputError(
                f"None of the {len(skipped):,} images of {self.table.name} can be read, the first one because of: "
                f"{skipped[0]['reason']}; mend --dataset, or remove {self.folder} once they are repaired."
            )
        return {"num_images": shards[-1].stop, "num_skipped": len(skipped), "num_shards": len(shards)}


def _list_skipped(folder: Path, shard_size: int):
    """Writes which images were skipped in all shards that are there, in their order."""
    lines = []
    for split in splits_with_shards(folder):
        found, _ = find_shards(folder, split, shard_size, num_images=None)
        for number in sorted(found):
            lines += [json.dumps({"split": split, **entry}) for entry in found[number].skipped]
    write_text_atomically(folder / SKIPPED, "".join(f"{line}\n" for line in lines))
