"""What each level of a stack tells apart: a page to explore, pictures for a paper, and the numbers behind them.

Shapes: n train images, m test images, D_k width of level k's embedding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from trainers.datasets import ImageSource
from trainers.errors import InputError
from trainers.files import full_disk_named, write_json, write_text_atomically
from trainers.level_embeddings import LoadedModel, load_runs
from trainers.level_figure import draw_class, draw_levels
from trainers.level_page import render_page
from trainers.level_structure import EmbeddedLevel, embed_models, measure_levels
from trainers.level_views import (
    ClassPlot,
    ClassView,
    Labelling,
    LevelPlot,
    LevelView,
    settings_line,
    structure_table,
)
from trainers.projections import METHODS, MIN_IMAGES, project
from trainers.structure import coarse_labels, read_groups
from trainers.subclusters import MIN_CLASS_IMAGES, find_subclusters, subcluster_silhouettes
from trainers.subsets import choose_images, with_common_classes
from trainers.transforms import eval_transform

MAX_TRAIN_IMAGES = 10_000
MAX_TEST_IMAGES = 10_000
_LONGEST_THUMBNAIL = 48


Run = str | Path | PreTrainedModel


def visualize_levels(
    models: Mapping[str, Run | Sequence[Run]],
    train_source: ImageSource,
    test_source: ImageSource,
    output_dir: str | Path,
    num_images: int = 2000,
    class_name: str | None = None,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    coarse: "str | Path | Mapping[str, Sequence[str]] | None" = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """
    Draws and measures what the levels of one or more encoders tell apart, and writes it to a folder.

    `levels.html` is a page to explore, `levels.png` and `levels_class.png` are pictures, `levels.json` holds what is
    returned; without a class to zoom in there is no `levels_class.png`.

    Args:
        models (`dict` of `str`, `Path` or `PreTrainedModel`): Folders, ids on the Hub or models, by what they shall be
            called. They may have different numbers of levels. Of a list, such as one a training seed, the first is
            drawn, and the numbers are means over all with the intervals of the means.
        train_source ([`ImageSource`]): Labelled images that vote in the kNN; at most 10,000 are used.
        test_source ([`ImageSource`]): Labelled images that are measured, at most 10,000.
        output_dir (`str` or `Path`): The folder, made if there is none; files of an earlier call are replaced.
        num_images (`int`): Test images that are drawn, a random choice.
        class_name (`str`, *optional*): The class to zoom in; when not given, the one whose sub-clusters' silhouette
            differs most between levels, or is highest where there is one level.
        image_mean, image_std (`list[float]`): Of the channels, for models without an image processor.
        coarse (`dict`, `str` or `Path`, *optional*): The fine classes of each coarse one, or a YAML file of them; see
            [`~structure.coarse_labels`] for those that are known.
        seed (`int`): Of the choice of images, of t-SNE and of k-means.
        progress (`bool`): Whether to show bars.

    Returns:
        `dict`: `rows`, for each level `encoder` (its name here), `model`, `level`, `dim` and `structure` of
        [`~structure.structure_of`], or, for several runs, of [`~structure.summarize`], and then `runs`, the structure
        of each; `differences`, such rows of models of several runs for the numbers of a level less those of the one
        below, run by run; `num_runs` by name; `zoom`, the class and the silhouette of its sub-clusters at each level
        beside the mean over all classes, or None; the data sets' names and sizes, the classes of each labelling, the
        seed.

    Raises:
        InputError: There is no model, the output is a file, the seed is negative, a model cannot be loaded, images
            have no labels, the coarse classes do not fit, or too few images are drawn of a class asked for.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"{output_dir} is a file; name a folder to write to.")
    if seed < 0:
        raise InputError(f"seed={seed} is no seed; set it to 0 or more.")
    if not models:
        raise InputError("There is no model to look at; give one or more.")
    sources = choose_images(train_source, MAX_TRAIN_IMAGES), choose_images(test_source, MAX_TEST_IMAGES)
    train, test = with_common_classes(*sources)
    labellings = _labellings(train, test, read_groups(coarse) if isinstance(coarse, str | Path) else coarse)
    drawn = _choose_drawn(test, num_images, class_name, seed)
    runs = {
        name: load_runs(name, model if isinstance(model, list | tuple) else [model], image_mean, image_std)
        for name, model in models.items()
    }
    loaded = {name: of_model[0] for name, of_model in runs.items()}
    levels = embed_models(loaded, train, test, progress)
    results = _settings(train, test, labellings, len(drawn), seed)
    results["num_runs"] = {name: len(of_model) for name, of_model in runs.items()}
    results["rows"], results["differences"] = measure_levels(levels, runs, (train, test), labellings, seed, progress)
    view = LevelView(
        title=f"What each level tells apart: {test.name}",
        notes=_notes(results),
        thumbnails=_thumbnails(test, drawn, next(iter(loaded.values()))),
        labellings=[Labelling(name, labels[drawn], names) for name, (_, labels, names) in labellings.items()],
        plots=_plots(levels, drawn, seed, progress),
        class_view=_zoom(levels, test, drawn, class_name, seed),
        table=structure_table(results["rows"] + results["differences"]),
    )
    results["zoom"] = _zoom_results(view.class_view)
    _write(output_dir, view, results)
    return results


def _labellings(train: ImageSource, test: ImageSource, groups) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """By name: the labels of train (n,) and test (m,) images, and the names of the classes."""
    labellings = {"fine": (train.labels, test.labels, train.label_names)}
    coarse = coarse_labels(train, groups)
    if coarse is not None:
        # both sources have the same numbers for the same classes, so the groups are the same, too
        labellings["coarse"] = (coarse[0], coarse_labels(test, groups)[0], coarse[1])
    return labellings


def _choose_drawn(test: ImageSource, num_images: int, class_name: str | None, seed: int) -> np.ndarray:
    """The positions of the images to draw, in random order: drawn in their own, the last class would cover others."""
    drawn = np.random.default_rng(seed).permutation(len(test))[:num_images] if num_images > 0 else np.array([])
    if len(drawn) < MIN_IMAGES:
        raise InputError(f"{len(drawn)} images make no picture; draw at least {MIN_IMAGES} with num_images and give "
                         "as many test images.")  # fmt: skip
    if class_name is not None:
        if class_name not in test.label_names:
            raise InputError(f"{test.name} has no class {class_name!r}; choose one of {', '.join(test.label_names)}.")
        number = int((test.labels[drawn] == test.label_names.index(class_name)).sum())
        if number < MIN_CLASS_IMAGES:
            raise InputError(f"Only {number} of the {len(drawn)} drawn images are of class {class_name!r}, and "
                             f"{MIN_CLASS_IMAGES} are needed; raise num_images or choose another class.")  # fmt: skip
    return drawn


def _settings(train: ImageSource, test: ImageSource, labellings: dict, num_drawn: int, seed: int) -> dict:
    return {
        "train_dataset": train.name,
        "test_dataset": test.name,
        "num_train_images": len(train),
        "num_test_images": len(test),
        "num_drawn_images": num_drawn,
        "classes": {name: names for name, (_, _, names) in labellings.items()},
        "seed": seed,
    }


def _plots(levels: list[EmbeddedLevel], drawn: np.ndarray, seed: int, progress: bool) -> list[LevelPlot]:
    return [
        LevelPlot(level.title, {method: project(level.test_x[drawn], method, seed) for method in METHODS})
        for level in tqdm(levels, desc="laying out", disable=not progress)
    ]


def _zoom(
    levels: list[EmbeddedLevel], test: ImageSource, drawn: np.ndarray, class_name: str | None, seed: int
) -> ClassView | None:
    labels = test.labels[drawn]
    silhouettes = subcluster_silhouettes([level.test_x[drawn] for level in levels], labels, seed)
    if not silhouettes:
        return None
    if class_name is not None:
        chosen, reason = test.label_names.index(class_name), "This class was asked for."
    elif len(levels) > 1:
        chosen = max(silhouettes, key=lambda label: np.ptp(silhouettes[label]))
        reason = "This class was chosen because its silhouettes differ most between levels."
    else:
        chosen = max(silhouettes, key=lambda label: silhouettes[label][0])
        reason = "This class was chosen because its sub-clusters are farthest apart."
    means = np.mean(list(silhouettes.values()), axis=0)
    members = np.flatnonzero(labels == chosen)
    plots = []
    for level, mean in zip(levels, means, strict=True):
        embeddings = level.test_x[drawn[members]]
        points, subclusters = project(embeddings, "tsne", seed), find_subclusters(embeddings, seed)
        plots.append(ClassPlot(level.title, points, subclusters, float(mean)))
    return ClassView(test.label_names[chosen], members, reason, plots)


def _zoom_results(class_view: ClassView | None) -> dict | None:
    if class_view is None:
        return None
    return {
        "class_name": class_view.name,
        "reason": class_view.reason,
        "num_images": len(class_view.members),
        "levels": [
            {
                "encoder": plot.title,
                "silhouette": plot.subclusters.silhouette,
                "mean_silhouette": plot.mean_silhouette,
                "sizes": np.bincount(plot.subclusters.clusters).tolist(),
            }
            for plot in class_view.plots
        ],
    }


def _thumbnails(test: ImageSource, drawn: np.ndarray, model: LoadedModel) -> np.ndarray:
    """What the model sees of the images (n, H, W, 3) uint8, reduced to 48 pixels if it is larger."""
    view = eval_transform(model.image_size)
    zoom = min(1.0, _LONGEST_THUMBNAIL / max(model.image_size))
    height, width = (max(1, round(side * zoom)) for side in model.image_size)
    thumbnails = []
    for index in drawn:
        image = Image.fromarray(view(test.image(int(index))).permute(1, 2, 0).numpy())
        thumbnails.append(np.asarray(image.resize((width, height), Image.Resampling.LANCZOS)))
    return np.stack(thumbnails)


def _notes(results: dict) -> list[str]:
    return [
        f"{results['num_drawn_images']:,} images of {results['test_dataset']}, a random choice, each a point where "
        "t-SNE or PCA puts its embedding, scaled to length 1. t-SNE shows who is near to whom; the sizes of its "
        "groups and the gaps between them mean nothing. PCA keeps large distances and hides small ones.",
        settings_line(results),
    ]


def _write(output_dir: Path, view: LevelView, results: dict):
    output_dir.mkdir(parents=True, exist_ok=True)
    with full_disk_named(output_dir):
        draw_levels(view, output_dir / "levels.png")
        class_picture = output_dir / "levels_class.png"
        if view.class_view is not None:
            draw_class(view.class_view, view.thumbnails, class_picture)
        else:
            class_picture.unlink(missing_ok=True)  # of an earlier call
        write_text_atomically(output_dir / "levels.html", render_page(view))
        write_json(output_dir / "levels.json", results)
