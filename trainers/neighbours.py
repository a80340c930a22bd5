"""Images of a features folder that are nearest to some images, as a page and a picture."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from PIL import Image as PILImage

from modeling_cjepa.configuration_cjepa import pair
from trainers.decoding import UnreadableImage, decode_image, read_image
from trainers.embedding import encoding
from trainers.errors import InputError
from trainers.feature_encoder import FeatureArguments, FeatureEncoder, load_feature_encoder
from trainers.features import read_manifest
from trainers.files import full_disk_named, save_figure, write_json, write_text_atomically
from trainers.labels import find_label_column
from trainers.loading import load_encoder_config
from trainers.resources import render_template
from trainers.search import find_neighbours, load_features
from trainers.sources import DataArguments
from trainers.tables import ImageTable, load_tables
from trainers.transforms import eval_transform

_THUMBNAIL_SIDE = 128


@dataclass
class Neighbour:
    """
    An image of the features folder.

    Args:
        index (`int`): Its position in the split.
        similarity (`float`): Cosine, -1 to 1.
        label (`str`, *optional*): Its class.
        path (`str`, *optional*): Its file.
        image (`PIL.Image.Image`): A thumbnail.
    """

    index: int
    similarity: float
    label: str | None
    path: str | None
    image: PILImage.Image


def visualize_neighbours(
    model: str | Path,
    images: list[str],
    features: str | Path,
    output_dir: str | Path,
    num_neighbours: int = 8,
    split: str | None = None,
) -> dict:
    """
    Finds the nearest images and writes `neighbours.html`, `neighbours.png` and `neighbours.json`.

    Args:
        model (`str` or `Path`): The model that made the features.
        images (`list[str]`): Files to look for.
        features (`str` or `Path`): The folder that `cjepa features` has written.
        output_dir (`str` or `Path`): Where to.
        num_neighbours (`int`): How many.
        split (`str`, *optional*): Which split of the features; `train` if there is one, when not given.

    Returns:
        `dict`: What `neighbours.json` holds: for each query its file and its neighbours.

    Raises:
        InputError: An image cannot be read, the features were made by another model, or their images are gone.
    """
    manifest = read_manifest(features)
    rows, split = load_features(features, split)
    encoder = _encoder_of(model, manifest, features)
    queries = [read_image(file) for file in images]
    embeddings = _embed(encoder, queries)
    similarities, positions = find_neighbours(rows, embeddings, num_neighbours)
    thumbnails = _thumbnails(rows, positions, manifest, split)
    found = [
        [_neighbour(rows, int(position), float(value), thumbnails) for value, position in zip(*both, strict=True)]
        for both in zip(similarities, positions, strict=True)
    ]
    results = {
        "model": str(model),
        "features": str(features),
        "split": split,
        "queries": [
            {
                "image": file,
                "neighbours": [
                    {name: getattr(neighbour, name) for name in ("index", "similarity", "label", "path")}
                    for neighbour in neighbours
                ],
            }
            for file, neighbours in zip(images, found, strict=True)
        ],
    }
    shown = list(zip(images, [thumbnail(query) for query in queries], found, strict=True))
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with full_disk_named(folder):
        write_text_atomically(folder / "neighbours.html", render_neighbours(shown, _note(manifest, rows, split)))
        draw_neighbours(shown, folder / "neighbours.png")
        write_json(folder / "neighbours.json", results)
    return results


def _encoder_of(model: str | Path, manifest: dict, features: str | Path) -> FeatureEncoder:
    """The encoder that made the features, or a refusal."""
    settings = manifest["settings"]
    load_encoder_config(model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = FeatureArguments(
        pooling=settings["pooling"],
        level=settings["level"],
        context_encoder=settings["encoder"] == "context encoder",
    )
    encoder = load_feature_encoder(model, arguments, settings["image_mean"], settings["image_std"], device)
    if encoder.settings["fingerprint"] != settings["fingerprint"]:
        raise InputError(f"The features of {features} were made by other weights ({manifest['model']}) than those of "
                         f"{model}; give that model, or write features of this one.")  # fmt: skip
    return encoder


def _embed(encoder: FeatureEncoder, images: list[PILImage.Image]) -> np.ndarray:
    transform = eval_transform(pair(encoder.image_size))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with encoding(encoder.module, encoder.image_mean, encoder.image_std, device) as encode:
        outputs = encode(torch.stack([transform(image) for image in images]))
    return outputs.pooler_output.float().cpu().numpy()


def _thumbnails(rows: Dataset, positions: np.ndarray, manifest: dict, split: str) -> dict[int, PILImage.Image]:
    """The images of some rows by their position there: of the column that is kept, or of the data set by index."""
    wanted = sorted({int(position) for position in positions.flat})
    column = next((name for name, feature in rows.features.items() if isinstance(feature, Image)), None)
    if column is not None:
        undecoded = rows.cast_column(column, Image(decode=False))
        items = {position: undecoded[position][column] for position in wanted}
    else:
        settings = manifest["settings"]
        data = DataArguments(
            **{name: settings[name] for name in ("dataset", "dataset_config", "image_column", "label_column")}
        )
        size, number = max(settings["image_size"]), settings["num_images"]
        table = load_tables(data, size, manifest["streaming"], number).get(split)
        indices = {position: rows[position]["index"] for position in wanted}
        stored = table.images_at(indices.values()) if table else {}
        items = {position: stored.get(index) for position, index in indices.items()}
        if table:
            _check_unchanged(rows, items, table, manifest["splits"][split]["num_images"])
    try:
        return {position: thumbnail(decode_image(item)) for position, item in items.items()}
    except UnreadableImage as error:
        raise InputError(
            f"An image of the features cannot be read any more ({error}); restore {manifest['settings']['dataset']}, "
            "or write features with --keep_columns."
        ) from error


def _check_unchanged(rows: Dataset, items: dict[int, dict | None], table: ImageTable, num_images: int):
    """Stops when other images are where those were that were embedded; images in tables may have no path."""
    if table.num_images not in (None, num_images):
        raise InputError(f"{table.name} has {table.num_images:,} images now, and had {num_images:,} when its features "
                         "were written; write features anew.")  # fmt: skip
    for position, item in items.items():
        index, path = rows[position]["index"], rows[position]["path"]
        if item and item["path"] != path:
            raise InputError(f"{table.name} has changed since its features were written: image {index} was {path} and "
                             f"is {item['path']}; write features anew.")  # fmt: skip


def thumbnail(image: PILImage.Image) -> PILImage.Image:
    """At most 128 pixels a side; a small image is enlarged by whole pixels."""
    image = image.copy()
    if max(image.size) > _THUMBNAIL_SIDE:
        image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), PILImage.Resampling.LANCZOS)
        return image
    zoom = _THUMBNAIL_SIDE // max(image.size)
    return image.resize((image.width * zoom, image.height * zoom), PILImage.Resampling.NEAREST)


def _neighbour(rows: Dataset, position: int, similarity: float, thumbnails: dict) -> Neighbour:
    label = find_label_column(rows, None, "features")
    row = rows.select_columns(["index", "path", *([label] if label else [])])[position]
    value = row.get(label)
    if value is not None and isinstance(rows.features[label], ClassLabel):
        value = rows.features[label].names[value] if value >= 0 else None
    text = None if value is None else str(value)
    return Neighbour(row["index"], similarity, text, row["path"], thumbnails[position])


def _note(manifest: dict, rows: Dataset, split: str) -> str:
    settings = manifest["settings"]
    return (
        f"The nearest of {len(rows):,} images of {settings['dataset']} ({split}) by cosine similarity of embeddings; "
        f"{settings['encoder']}, pooling {settings['pooling']}."
    )


def render_neighbours(shown: list[tuple], note: str) -> str:
    """
    The page, all text escaped and all images in it.

    Args:
        shown: For each query its file's name, its thumbnail and its list of [`Neighbour`].
        note (`str`): A sentence below the title.

    Returns:
        `str`: HTML.
    """
    queries = [
        {
            "name": Path(file).name,
            "image": data_uri(image),
            "neighbours": [
                {"number": number, "image": data_uri(near.image), "near": near}
                for number, near in enumerate(neighbours, 1)
            ],
        }
        for file, image, neighbours in shown
    ]
    return render_template("neighbours.html.j2", {"queries": queries, "note": note}, autoescape=True)


def data_uri(image: PILImage.Image) -> str:
    """An image as text that a page can hold."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def draw_neighbours(shown: list[tuple], path: Path):
    """
    Draws a row a query: the image, then its neighbours.

    Args:
        shown: As in [`render_neighbours`].
        path (`Path`): The PNG to write.
    """
    columns = 1 + max(len(neighbours) for _, _, neighbours in shown)
    figure = matplotlib.figure.Figure(figsize=(1.5 * columns, 1.9 * len(shown)), layout="constrained")
    for axes_row, (file, image, neighbours) in zip(
        figure.subplots(len(shown), columns, squeeze=False), shown, strict=True
    ):
        cells = [(image, Path(file).name)]
        cells += [(near.image, f"{near.similarity:.3f}\n{near.label or ''}") for near in neighbours]
        for axes, (picture, text) in zip(axes_row, cells, strict=True):
            axes.imshow(picture)
            axes.set_title(_short(text), fontsize=8, parse_math=False)
            axes.set_axis_off()
    save_figure(figure, path)


def _short(text: str, length: int = 22) -> str:
    return "\n".join(line if len(line) <= length else line[: length - 1] + "…" for line in text.splitlines())
