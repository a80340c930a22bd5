"""Labels of images: the column they are in, and why there are none."""

import os
import re
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Image, Value
from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

from trainers.datasets import StoredImages
from trainers.errors import InputError


def find_label_column(rows, asked: str | None, name: str) -> str | None:
    """The column of labels: that asked for, the first one of classes, or by its name; None without one."""
    if asked is not None and asked not in rows.column_names:
        raise InputError(f"{name} has no column {asked!r}, only {', '.join(rows.column_names)}; mend --label_column.")
    classes = [column for column, feature in rows.features.items() if isinstance(feature, ClassLabel)]
    usual = [
        column for column in ("label", "labels", "fine_label", "cls")
        if column in rows.column_names and not isinstance(rows.features[column], Image)
    ]  # fmt: skip
    return asked or next(iter(classes + usual), None)


def find_labels(rows, asked: str | None, name: str) -> tuple[np.ndarray | None, list[str] | None, str | None]:
    """
    The labels of a table: of the column asked for, or of the first column of classes.

    Args:
        rows (`Dataset`): The table.
        asked (`str`, *optional*): The column asked for.
        name (`str`): What an error calls the table.

    Returns:
        `(labels, label_names, without_labels)`: Class indices (n,) int64 and the classes' names; where there are none,
        None for both, and why in a sentence, where that is known.

    Raises:
        InputError: There is no such column, or it holds no label or none that says a class.
    """
    column = find_label_column(rows, asked, name)
    if column is None:
        return None, None, None
    feature, values = rows.features[column], rows[column][:]
    missing = [row for row, value in enumerate(values) if value is None or value != value]  # NaN is not itself
    if len(missing) == len(values) and asked is None:
        return None, None, None
    is_float = isinstance(feature, Value) and feature.dtype.startswith("float")
    if missing or is_float:
        whose = f"Column {column!r} of {name}" if asked else f"{name} has no labels: its column {column!r}"
        mistake = (
            f"{name} has {len(missing)} rows without a {column!r}, such as row {missing[0]}, which holds "
            f"{values[missing[0]]}; remove them or name another --label_column."
            if missing else
            f"{whose}, of type {feature.dtype}, holds numbers such as {values[0]}, not classes; name another "
            "--label_column, or make whole numbers or words of it."
        )  # fmt: skip
        if is_float and asked is None:
            return None, None, mistake
        raise InputError(mistake)
    values = np.asarray(values)
    if isinstance(feature, ClassLabel) and asked is None and (values == -1).all():
        # how data sets of the Hub say that the labels of a split are not published
        return None, None, None
    if values.ndim != 1:
        raise InputError(f"Column {column!r} of {name} holds lists, not one label each; name another --label_column.")
    if isinstance(feature, ClassLabel):
        return values.astype(np.int64), list(feature.names), None
    names, indices = np.unique(values, return_inverse=True)
    return indices.astype(np.int64), [str(value) for value in names], None


def one_class_folder(images: StoredImages, dataset: str, name: str) -> str | None:
    """
    Why a folder whose images all lie in one folder below it has no labels: `imagefolder` takes that for no class.

    Args:
        images ([`StoredImages`]): Of a split.
        dataset (`str`): The folder.
        name (`str`): What an error calls the split.

    Returns:
        `str`: A sentence, or None of any other data set.
    """
    root, folders = Path(dataset).expanduser().resolve(), {os.path.dirname(path or "") for path in images.paths()}
    folder = folders.pop()
    if folders or not os.path.isabs(folder) or not (folder := Path(folder).resolve()).is_relative_to(root):
        return None
    below = [part for part in folder.relative_to(root).parts if not _is_split(part)]
    if not below:
        return None
    return (
        f"{name} has one class folder only, {below[-1]!r}; give images of two or more classes, each in a folder of "
        "its own."
    )


def _is_split(part: str) -> bool:
    """Whether a folder's name says a split, as `datasets` reads it: `test`, `val_2017`."""
    words = {word for of_split in SPLIT_KEYWORDS.values() for word in of_split}
    return not words.isdisjoint(re.split(f"[{re.escape(NON_WORDS_CHARS)}]", part))
