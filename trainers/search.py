"""Nearest neighbours in a features folder, by FAISS through `datasets` where it is installed, else by scikit-learn.

Shapes: n embeddings of the folder, m queries, D width, K neighbours.
"""

import importlib.util
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from sklearn.neighbors import NearestNeighbors

from trainers.errors import InputError
from trainers.features import read_manifest
from trainers.shards import find_shards, shard_path, splits_with_shards

LIBRARIES = ("faiss", "sklearn")


def load_features(folder: str | Path, split: str | None = None) -> tuple[Dataset, str]:
    """
    The features of one split.

    Args:
        folder (`str` or `Path`): What `cjepa features` has written.
        split (`str`, *optional*): Which; `train` if there is one, else the first, when not given.

    Returns:
        `(Dataset, str)`: The rows, and the split's name.

    Raises:
        InputError: There is no such folder or split, or it is half finished.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    splits = manifest["splits"]
    begun = [*splits, *splits_with_shards(folder)]
    split = split or ("train" if "train" in begun else next(iter(begun), None))
    if split not in splits and (split in begun or not splits):
        raise InputError(f"{folder} is half finished; repeat the `cjepa features` call that began it.")
    if split not in splits:
        raise InputError(f"{folder} has no finished split {split!r}, only {', '.join(splits)}; call `cjepa features` "
                         "again or name another --split.")  # fmt: skip
    found, _ = find_shards(folder, split, manifest["settings"]["shard_size"], splits[split]["num_images"])
    if len(found) != splits[split]["num_shards"]:
        raise InputError(f"{folder} lacks shards of {split!r}; call `cjepa features` again to make them anew.")
    files = [str(shard_path(folder, split, number)) for number in sorted(found)]
    return concatenate_datasets([Dataset.from_parquet(file) for file in files]), split


def find_neighbours(
    rows: Dataset, queries: np.ndarray, num_neighbours: int, library: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """
    The nearest embeddings by cosine similarity.

    Args:
        rows (`Dataset`): With a column `embedding` of vectors.
        queries (`np.ndarray` of shape `(m, D)`): Embeddings to look for.
        num_neighbours (`int`): K, at most n.
        library (`str`, *optional*): One of `LIBRARIES`; FAISS where it is installed, when not given.

    Returns:
        Similarities (m, K), falling, and positions (m, K) of the rows.

    Raises:
        InputError: There are not as many rows, or the embeddings are no vectors or of another width.
    """
    if not 1 <= num_neighbours <= len(rows):
        raise InputError(f"{num_neighbours} neighbours of {len(rows):,} embeddings cannot be found; give 1 to "
                         f"{len(rows):,}.")  # fmt: skip
    embeddings = rows.with_format("numpy")["embedding"][:].astype(np.float32)
    if embeddings.ndim != 2:
        raise InputError("The features are maps of patches, not one vector an image; write some by --pooling mean.")
    if embeddings.shape[1] != queries.shape[1]:
        raise InputError(f"The features are {embeddings.shape[1]} wide, the query is {queries.shape[1]}; embed both "
                         "by the same model.")  # fmt: skip
    embeddings, queries = unit_length(embeddings), unit_length(queries.astype(np.float32))
    library = library or ("faiss" if importlib.util.find_spec("faiss") else "sklearn")
    if library == "sklearn":
        neighbours = NearestNeighbors(n_neighbors=num_neighbours, metric="cosine", algorithm="brute").fit(embeddings)
        distances, positions = neighbours.kneighbors(queries)
        return 1 - distances, positions
    indexed = rows.select_columns([])
    # 0 is FAISS' inner product, which of vectors of unit length is the cosine
    indexed.add_faiss_index_from_external_arrays(embeddings, index_name="embedding", metric_type=0)
    similarities, positions = indexed.search_batch("embedding", queries, k=num_neighbours)
    return np.asarray(similarities), np.asarray(positions)


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Vectors (n, D) of length 1; those of length 0 stay."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
