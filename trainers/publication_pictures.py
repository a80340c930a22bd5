"""The pictures of a model card: masks or views, attention, and embeddings in the plane, all of rendered scenes.

No image of the run is shown: those may be nobody else's business.
"""

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from transformers import PreTrainedModel

from modeling_cjepa import CJepaConfig
from modeling_cjepa.configuration_cjepa import pair
from trainers.attention_maps import visualize_attention
from trainers.datasets import seeded
from trainers.errors import InputError
from trainers.files import save_figure
from trainers.level_views import class_colors
from trainers.mask_figure import visualize_masks
from trainers.panels import Panel, draw_panels
from trainers.projections import project
from trainers.scenes import FAMILIES, Scene, render_scene
from trainers.transforms import normalize
from trainers.views import TwoViewDataArguments, view_transform

MASKS, VIEWS, ATTENTION, EMBEDDINGS = "masks.png", "views.png", "attention.png", "tsne.png"
_NUM_SHOWN, _NUM_EMBEDDED, _BATCH = 3, 300, 50
# of the scenes, which no recipe is trained or tested on
_SEED = 7


def draw_pictures(place: Path, model: PreTrainedModel, processor, settings: dict | None, folder: Path):
    """
    Draws what can be drawn of a model.

    Args:
        place (`Path`): The model's folder.
        model (`PreTrainedModel`): The model.
        processor: Its image processor.
        settings (`dict`, *optional*): The keys of its recipe that were set; None of a model that no run has made,
            of which masks and views are left out.
        folder (`Path`): Where to write [`MASKS`] and [`ATTENTION`] of C-JEPA, [`VIEWS`] of S-JEA, and [`EMBEDDINGS`].
    """
    if model.config.num_channels != 3:
        print(f"No pictures: scenes have 3 channels, and the model reads {model.config.num_channels}.", flush=True)
        return
    size = pair(model.config.image_size)
    scenes = [render_scene(_SEED, number, max(size)) for number in range(_NUM_EMBEDDED)]
    shown = [Image.fromarray(scene.image).resize(size[::-1]) for scene in scenes[:_NUM_SHOWN]]
    if isinstance(model.config, CJepaConfig):
        _draw_patches(place, shown, folder, with_masks=settings is not None)
    elif settings is not None:
        draw_views(shown, size, settings, folder / VIEWS)
    draw_embeddings(model, processor, scenes, folder / EMBEDDINGS)


def _draw_patches(place: Path, shown: list[Image.Image], folder: Path, with_masks: bool):
    """Masks and attention, of which the card shows the pictures alone."""
    drawn = ({MASKS: visualize_masks} if with_masks else {}) | {ATTENTION: visualize_attention}
    with tempfile.TemporaryDirectory() as temporary:
        files = [Path(temporary) / f"{number}.png" for number in range(len(shown))]
        for image, file in zip(shown, files, strict=True):
            image.save(file)
        for name, draw in drawn.items():
            try:
                draw(place, files, temporary)
            except InputError as error:  # such as a grid too small for masks
                print(f"{name} is left out: {error}", flush=True)
                continue
            (folder / name).write_bytes(Path(temporary, name).read_bytes())


def draw_views(images: list[Image.Image], size: tuple[int, int], settings: dict, path: Path):
    """
    Draws images and two views of each, as pre-training makes them.

    Args:
        images (`list` of `PIL.Image`): RGB.
        size (`(height, width)`): Pixels of a view.
        settings (`dict`): The keys of the recipe that were set.
        path (`Path`): The PNG to write.
    """
    names = {field.name for field in dataclasses.fields(TwoViewDataArguments)}
    data = TwoViewDataArguments(**{name: value for name, value in settings.items() if name in names})
    transform, rows = view_transform(size, data, 2), []
    with seeded(_SEED):
        for image in images:
            views = transform(image).permute(0, 2, 3, 1).numpy()
            rows.append([Panel(np.asarray(image)), *map(Panel, views)])
    for panel, title in zip(rows[0], ("image", "first view", "second view"), strict=True):
        panel.title = title
    draw_panels(rows, path)


def draw_embeddings(model: PreTrainedModel, processor, scenes: list[Scene], path: Path):
    """
    Draws the embeddings of scenes by t-SNE, an axis a level, coloured by the families of what they show.

    Args:
        model (`PreTrainedModel`): Whose base model embeds them.
        processor: Its image processor, for the channels' mean and standard deviation.
        scenes (`list` of [`Scene`]): Rendered ones.
        path (`Path`): The PNG to write.
    """
    size, encoder = pair(model.config.image_size), model.base_model
    pixels = np.stack([np.asarray(Image.fromarray(scene.image).resize(size[::-1])) for scene in scenes])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    with torch.no_grad():
        batches = [
            encoder(normalize(batch, processor.image_mean, processor.image_std), level=-1).level_embeddings
            for batch in pixels.split(_BATCH)
        ]
    levels = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    names, colors = list(FAMILIES), class_colors(len(FAMILIES))
    figure = Figure(figsize=(0.2 + 3.6 * len(levels) + 1.2, 3.6), layout="constrained")
    grid = figure.subplots(1, len(levels), squeeze=False)
    for number, (axes, embeddings) in enumerate(zip(grid[0], levels, strict=True)):
        axes.scatter(*project(embeddings).T, s=9, c=[colors[scene.family] for scene in scenes], linewidths=0)
        axes.set_title(f"level {number}" if len(levels) > 1 else "embeddings", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    dots = [Line2D([], [], color=color, marker="o", linestyle="") for color in colors]
    figure.legend(dots, names, loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)
