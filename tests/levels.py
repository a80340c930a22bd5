"""Planted groups and a small stack to look at, and how the tests read pages and pictures."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import numpy as np
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from tiny import seeded

from modeling_cjepa import SJeaConfig, SJeaModel
from trainers.datasets import ImageSource
from trainers.level_views import Labelling, LevelPlot, LevelView
from trainers.transforms import normalize

SIZE = 16
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
NASTY = '<script>alert("&")</script>'
NAMES = ["cat", "dog", NASTY]
COARSE = {"pet": ["cat", "dog"], "$x_{1$": [NASTY]}
BACKBONE = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 12], "depths": [1, 1], "layer_type": "basic",
}  # fmt: skip


def planted(labels, width=16, spread=0.05, seed=0):
    """Embeddings around a direction for each label, of lengths that mean nothing."""
    directions = torch.linalg.qr(torch.randn(width, width, generator=seeded(7)))[0]
    generator = seeded(seed)
    x = directions[labels] + spread * torch.randn(len(labels), width, generator=generator)
    return x * (0.1 + 10 * torch.rand(len(labels), 1, generator=generator))


def balanced(num_classes, each):
    return torch.arange(num_classes).repeat(each)


def silhouette_written_out(x, labels):
    """Mean of (b - a) / max(a, b): a the mean distance to the own class, b that to the nearest other one."""
    scores = []
    for i in range(len(x)):

        def distance(label, i=i):
            others = [j for j in range(len(x)) if j != i and labels[j] == label]
            return np.mean([math.dist(x[i], x[j]) for j in others])

        a = distance(labels[i])
        b = min(distance(label) for label in set(labels) - {labels[i]})
        scores.append((b - a) / max(a, b))
    return np.mean(scores)


def stack(num_levels=2, image_size=SIZE) -> SJeaModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        levels = [{"backbone": dict(BACKBONE), "stem": "small"} for _ in range(num_levels)]
        return SJeaModel(SJeaConfig(levels=levels, image_size=image_size)).eval()


def colored(num_images, seed, size=SIZE) -> ImageSource:
    """Images of three classes, each with a colour of its own, in random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num_images) % 3)
    images = rng.integers(0, 90, (num_images, size, size, 3))
    images[np.arange(num_images), :, :, labels] += 120
    return ImageSource(images.astype(np.uint8), labels, NAMES, f"images {seed}")


TRAIN, TEST = colored(45, 0), colored(60, 1)
# in which all test images are drawn with seed 0
ORDER = np.random.default_rng(0).permutation(60)


def embeddings_written_out(model, source) -> tuple[torch.Tensor, ...]:
    pixels = torch.from_numpy(source.images).permute(0, 3, 1, 2)
    with torch.no_grad():
        return model(normalize(pixels, MEAN, STD)).level_embeddings


class Page(HTMLParser):
    """What a browser would make of a page: tags with attributes, texts by tag, scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.texts, self.stack = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "link", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.stack[-1] if self.stack else None, data))

    def text_of(self, tag):
        return [text.strip() for where, text in self.texts if where == tag]


def sprite_tiles(html, number, columns, size):
    """The thumbnails of a page, cut out of its one picture."""
    (data,) = re.findall(r'url\("data:image/jpeg;base64,([^"]+)"\)', html)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"), np.int64)
    width, height = size
    tiles = [
        picture[row * height : row * height + height, column * width : column * width + width]
        for row, column in (divmod(image, columns) for image in range(number))
    ]
    assert all(tile.shape == (height, width, 3) for tile in tiles)
    return tiles


def view_of(points, labels, names=NAMES, class_view=None, thumbnails=None) -> LevelView:
    plots = [LevelPlot(title, {"tsne": points, "pca": -points}) for title in ("level 0", "level 1")]
    thumbnails = np.zeros((len(points), 8, 8, 3), np.uint8) if thumbnails is None else thumbnails
    return LevelView(
        "title", ["note"], thumbnails, [Labelling("fine", labels, names)], plots, class_view, [["a"], ["b"]]
    )


def colored_pixels(picture, color, alpha=0.85):
    """Rows and columns of pixels of a colour that is laid on white."""
    expected = 255 * (alpha * np.array(to_rgb(color)) + 1 - alpha)
    return np.nonzero(np.abs(picture - expected).max(axis=2) < 6)
