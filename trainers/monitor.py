"""What is watched of a run between two logs: loss terms, signs of the model, and the embeddings of the latest images.

Shapes: B images of a batch, n latest images, q views of an image, D width of a level's embedding.
"""

import functools
from collections import deque

import torch
from accelerate import Accelerator

from modeling_cjepa.losses_cjepa import level_term
from trainers.datasets import seeded
from trainers.diagnostics import correlation, feature_std, lidar, rankme

# LiDAR's cost grows with the cube of the width: of wider views a fixed projection is looked at
MAX_LIDAR_WIDTH = 256
MAX_LIDAR_IMAGES = 1024


class Monitor:
    """
    Sums what a model says of each batch and keeps its latest embeddings, on the device; [`~Monitor.summary`] is the
    only part that waits for it.

    Args:
        num_images (`int`): Latest images, over all processes, whose embeddings are looked at.
        batch_size (`int`): Images of a batch over all processes.
    """

    def __init__(self, num_images: int, batch_size: int):
        self.num_images = num_images
        # of each of the latest batches one tuple of all levels'
        self.embeddings: deque[tuple[torch.Tensor, ...]] = deque(maxlen=-(-num_images // batch_size))
        self.views: deque[tuple[torch.Tensor, ...]] = deque(maxlen=self.embeddings.maxlen)
        self.reset()

    def reset(self):
        """Starts the window of steps that the next summary is about; the latest embeddings stay."""
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.num_batches = 0
        self.begin_step()

    def begin_step(self):
        """Keeps what the window's means are made of, for [`~Monitor.leave_out_step`]."""
        self._sums_before, self._counts_before = dict(self.sums), dict(self.counts)

    def leave_out_step(self, is_bad: torch.Tensor):
        """Takes the step since [`~Monitor.begin_step`] out of the means if a boolean scalar on the device says so."""
        for totals, before in ((self.sums, self._sums_before), (self.counts, self._counts_before)):
            for name, total in totals.items():
                totals[name] = torch.where(is_bad, before.get(name, torch.zeros_like(total)), total)

    @torch.no_grad()
    def add(self, outputs):
        """
        Adds a batch, without waiting for the device. A figure that is not finite is left out of the window's mean.

        Args:
            outputs: Those of a model of pre-training: `loss_terms`, `level_embeddings` (B, D), `level_views`
                (B, q, D), and `signs` where it has any.
        """
        terms = {f"loss_{name}": term for name, term in outputs.loss_terms.items()}
        for name, term in (terms | (outputs.get("signs") or {})).items():
            term, is_finite = term.detach().float(), term.isfinite()
            self.sums[name] = self.sums.get(name, 0) + torch.where(is_finite, term, 0)
            self.counts[name] = self.counts.get(name, 0) + is_finite
        # one view of each image, where the model embeds several
        each = len(outputs.level_embeddings[0]) // len(outputs.level_views[0])
        self.embeddings.append(tuple(of_level[::each].detach().float() for of_level in outputs.level_embeddings))
        self.views.append(tuple(views.detach().float() for views in outputs.level_views))
        self.num_batches += 1

    def summary(self, accelerator: Accelerator) -> dict[str, float]:
        """
        The window's means and the figures of the latest embeddings, over all processes, all of which must call it.

        Args:
            accelerator (`Accelerator`): Joins the processes.

        Returns:
            `dict[str, float]`: By the names of the log; see [`embedding_figures`] for those of each level. They are of
            `monitored_images` images, which are few at the beginning of a run and after a resume.
        """
        totals = torch.stack([torch.stack([self.sums[name], self.counts[name].float()]) for name in self.sums])
        totals = accelerator.reduce(totals, "sum")
        summary = dict(zip(self.sums, (totals[:, 0] / totals[:, 1]).tolist(), strict=True))
        # as many however large the batches are: the effective rank depends on it
        number = max(self.num_images // accelerator.num_processes, 1)
        kept = zip(latest(self.embeddings, number), latest(self.views, number), strict=True)
        for level, (embeddings, views) in enumerate(kept):
            embeddings = accelerator.gather(embeddings)
            summary["monitored_images"] = len(embeddings)
            figures = embedding_figures(embeddings, accelerator.gather(views))
            summary |= {level_term(name, level): value for name, value in figures.items()}
        return summary


def latest(batches: deque[tuple[torch.Tensor, ...]], number: int) -> list[torch.Tensor]:
    """Each level's latest rows, up to a number."""
    return [torch.cat(of_level)[-number:] for of_level in zip(*batches, strict=True)]


def embedding_figures(embeddings: torch.Tensor, views: torch.Tensor | None = None) -> dict[str, float]:
    """
    What tells of collapse in the embeddings of a level; images whose embedding is not finite are left out.

    Args:
        embeddings (`torch.Tensor` of shape `(n, D)`): Of the latest images.
        views (`torch.Tensor` of shape `(n, q, D)`, *optional*): Of each image q embeddings that should agree: the
            means of predicted blocks, or those of its views.

    Returns:
        `dict[str, float]`: `feature_std`, `rankme` and `correlation` of the functions in `diagnostics`, and `lidar`
        where there are 2 views or more: on the latest `MAX_LIDAR_IMAGES` images, and of wider views on an orthogonal
        projection to `MAX_LIDAR_WIDTH`, the same at every call. NaN where fewer than 2 images are left.
    """
    embeddings = finite_rows(embeddings)
    figures = {
        name: function(embeddings) if len(embeddings) > 1 else float("nan")
        for name, function in (("feature_std", feature_std), ("rankme", rankme), ("correlation", correlation))
    }
    if views is not None and views.shape[1] > 1:
        views = finite_rows(views[-MAX_LIDAR_IMAGES:])
        if views.shape[2] > MAX_LIDAR_WIDTH:
            views = views @ projection(views.shape[2], MAX_LIDAR_WIDTH).to(views.device)
        figures["lidar"] = lidar(views) if len(views) > 1 else float("nan")
    return figures


def finite_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows (n, ...) without a NaN or an infinity."""
    return rows[rows.flatten(1).isfinite().all(dim=1)]


@functools.cache
def projection(width: int, narrow_width: int) -> torch.Tensor:
    """A matrix (width, narrow_width) of orthonormal columns, a function of its shape."""
    with seeded(width):
        return torch.linalg.qr(torch.randn(width, narrow_width)).Q
