"""How the embeddings of a frozen encoder are arranged: whether classes, fine and coarse, form groups of their own.

A picture of a projection shows what its eye wants to see; these numbers say it of the embeddings themselves. Three for
each labelling: the silhouette (Rousseeuw 1987) of the classes, the normalised mutual information (NMI) of the classes
and of what k-means finds, and the accuracy of the weighted kNN. Embeddings are scaled to length 1, so that Euclidean
distances order as cosine similarities do.

Shapes: n train images, m test images, D width of an embedding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score, silhouette_score
from threadpoolctl import threadpool_limits

from trainers.datasets import ImageSource
from trainers.errors import InputError, first_line
from trainers.probes import accuracy_interval, knn_predict, mean_interval
from trainers.scenes import FAMILIES

NUMBERS = ("silhouette", "nmi", "knn")
"""What is said of each labelling; each has an interval beside it, called `..._interval`."""
CIFAR10_GROUPS: dict[str, tuple[str, ...]] = {
    "animal": ("bird", "cat", "deer", "dog", "frog", "horse"),
    "vehicle": ("airplane", "automobile", "ship", "truck"),
}
"""The coarse classes of CIFAR-10."""
# seeds of k-means, unless others are given
NUM_K_MEANS = 3
MAX_SILHOUETTE_IMAGES = 5000
"""A silhouette takes all pairs of images; of more images than these, a fixed choice stands for all."""

# of the images of a silhouette
_CHOICE_SEED = 0
# random starts of a k-means, the best of which counts
_NUM_STARTS = 3


def unit_vectors(embeddings: torch.Tensor | np.ndarray) -> np.ndarray:
    """
    Embeddings scaled to length 1.

    Args:
        embeddings (`torch.Tensor` or `np.ndarray` of shape `(n, D)`): Of any float type and device.

    Returns:
        `np.ndarray` of shape `(n, D)`, float32; an embedding of zeros stays one.

    Raises:
        InputError: The embeddings are not finite.
    """
    embeddings = torch.as_tensor(embeddings).detach().float().cpu()
    if not embeddings.isfinite().all():
        num_broken = int((~embeddings.isfinite()).any(dim=1).sum())
        raise InputError(f"{num_broken} of {len(embeddings)} embeddings are not finite; the training of this encoder "
                         "diverged, take an earlier one.")  # fmt: skip
    return F.normalize(embeddings, dim=1).numpy()


def structure_of(
    train_x: torch.Tensor,
    train_y: Mapping[str, torch.Tensor],
    test_x: torch.Tensor,
    test_y: Mapping[str, torch.Tensor],
    seeds: Sequence[int] = (0, 1, 2),
) -> dict[str, dict]:
    """
    How well the classes of each labelling are kept apart by embeddings; the same at every call.

    Args:
        train_x (`torch.Tensor` of shape `(n, D)`): The embeddings that vote in the kNN.
        train_y (`dict` of `torch.Tensor` of shape `(n,)`, int64): Their classes under each labelling, such as `fine`
            and `coarse`.
        test_x (`torch.Tensor` of shape `(m, D)`): The embeddings that are looked at.
        test_y (`dict` of `torch.Tensor` of shape `(m,)`, int64): Their classes under the same labellings.
        seeds (`Sequence[int]`): One k-means each.

    Returns:
        `dict` by labelling: `num_classes`, those of the test images; `silhouette`, from -1 to 1, of at most
        `MAX_SILHOUETTE_IMAGES` test images, and no interval (None); `nmi`, from 0 to 1, of k-means with as many
        clusters as there are classes, its mean over the seeds, and `nmi_interval`, 95 % over the seeds; `knn`, percent
        correct, and `knn_interval`, 95 % over the choice of the test images.

    Raises:
        InputError: Train and test have other labellings, the test images show one class or as many as there are
            images, or embeddings are not finite.
    """
    if set(train_y) != set(test_y):
        raise InputError(f"The train images are labelled by {', '.join(train_y)}, the test images by "
                         f"{', '.join(test_y)}; give the same labellings.")  # fmt: skip
    unit_x = unit_vectors(test_x)
    return {
        name: {"num_classes": count_classes(name, labels)}
        | arrangement(unit_x, labels.cpu().numpy(), seeds)
        | _neighbors(train_x, train_y[name], test_x, labels)
        for name, labels in test_y.items()
    }


def count_classes(name: str, labels: torch.Tensor) -> int:
    """How many classes test images show under a labelling; `InputError` if these have no structure to tell of."""
    number = len(labels.unique())
    if not 1 < number < len(labels):
        raise InputError(f"The {len(labels)} test images show {number} {name} classes; structure takes at least 2 "
                         "classes and an image more than classes, give other images.")  # fmt: skip
    return number


def arrangement(unit_x: np.ndarray, labels: np.ndarray, seeds: Sequence[int]) -> dict:
    """
    How apart classes lie, and whether k-means finds them.

    Args:
        unit_x (`np.ndarray` of shape `(m, D)`): Of [`unit_vectors`].
        labels (`np.ndarray` of shape `(m,)`, int64): Their classes, two or more and fewer than images.
        seeds (`Sequence[int]`): One k-means each.

    Returns:
        `dict`: `silhouette`, `silhouette_interval`, `nmi` and `nmi_interval` as of [`structure_of`].
    """
    num_classes = len(np.unique(labels))
    # one thread: the order in which several add up is chance, and with it the last bits and the cluster of an image
    with threadpool_limits(1):
        silhouette = _silhouette(unit_x, labels)
        nmis = []
        for seed in seeds:
            clusters = KMeans(num_classes, n_init=_NUM_STARTS, random_state=seed).fit_predict(unit_x)
            nmis.append(float(normalized_mutual_info_score(labels, clusters)))
    return {"silhouette": silhouette, "silhouette_interval": None} | _mean_and_interval("nmi", nmis)


def _silhouette(unit_x: np.ndarray, labels: np.ndarray) -> float:
    if len(labels) > MAX_SILHOUETTE_IMAGES:
        chosen = np.random.default_rng(_CHOICE_SEED).permutation(len(labels))[:MAX_SILHOUETTE_IMAGES]
        unit_x, labels = unit_x[chosen], labels[chosen]
    return float(silhouette_score(unit_x, labels))


def _neighbors(train_x: torch.Tensor, train_y: torch.Tensor, test_x: torch.Tensor, test_y: torch.Tensor) -> dict:
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    num_correct = int((knn_predict(train_x, train_y, test_x, num_classes) == test_y).sum())
    return {
        "knn": 100 * num_correct / len(test_y),
        "knn_interval": list(accuracy_interval(num_correct, len(test_y))),
    }


def summarize(structures: Sequence[Mapping[str, Mapping]]) -> dict[str, dict]:
    """
    The numbers of several runs as means, with the interval that the training's randomness leaves open.

    Args:
        structures (`list` of `dict`): What [`structure_of`] or [`difference`] gave for each run, such as one a
            training seed.

    Returns:
        `dict` of the same form: each number its mean over the runs, each interval the 95 % interval of that mean by
        Student's t, None for a single run; and `num_runs`.

    Raises:
        InputError: There is no run, or the runs have other labellings or numbers of classes.
    """
    if not structures:
        raise InputError("There is no run to summarize; give the structure of one or more.")
    shapes = [{name: entry["num_classes"] for name, entry in structure.items()} for structure in structures]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(f"Runs with other classes have no mean ({'; '.join(map(str, shapes))}); give runs that were "
                         "tested on the same images.")  # fmt: skip
    summary = {}
    for labelling, num_classes in shapes[0].items():
        summary[labelling] = {"num_classes": num_classes, "num_runs": len(structures)}
        for number in NUMBERS:
            values = [structure[labelling][number] for structure in structures]
            summary[labelling] |= _mean_and_interval(number, values)
    return summary


def difference(above: Mapping[str, Mapping], below: Mapping[str, Mapping]) -> dict[str, dict]:
    """
    How much more one level of a run tells apart than another of the same run: the numbers of `above` less those of
    `below`, both of [`structure_of`].

    Returns:
        `dict` by labelling: `num_classes` and the differences, for [`summarize`].
    """
    return {
        labelling: {"num_classes": entry["num_classes"]}
        | {number: entry[number] - below[labelling][number] for number in NUMBERS}
        for labelling, entry in above.items()
    }


def _mean_and_interval(name: str, values: Sequence[float]) -> dict:
    """A mean and its [`~probes.mean_interval`]."""
    return {name: float(np.mean(values)), f"{name}_interval": mean_interval(values)}


def read_groups(path: str | Path) -> dict[str, list[str]]:
    """
    Coarse classes from a YAML file such as `animal: [cat, dog]`.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `dict`: The fine classes of each coarse one, all of them words: `no` and `1` are names here.

    Raises:
        InputError: There is no such file, or it does not map names to lists of names.
    """
    try:
        groups = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"The coarse classes {path} cannot be read ({first_line(error)}); mend it.") from error
    is_list = isinstance(groups, dict) and all(isinstance(members, list) for members in groups.values())
    if not is_list or not all(isinstance(name, str) for members in groups.values() for name in members):
        raise InputError(f"The coarse classes {path} are not lists of class names; write lines such as "
                         "`animal: [cat, dog]`.")  # fmt: skip
    return groups


def coarse_labels(
    source: ImageSource, groups: Mapping[str, Sequence[str]] | None = None
) -> tuple[np.ndarray, list[str]] | None:
    """
    The coarse class of each image, by the name of its class.

    Args:
        source ([`ImageSource`]): Labelled images with names of classes.
        groups (`dict`, *optional*): The fine classes of each coarse one, as of [`read_groups`]. When not given, those
            of CIFAR-10 (animals and vehicles) and of rendered scenes (the families of the kinds) are known.

    Returns:
        Indices of the coarse classes, int64 (n,), and their names, those that have a class here; None when no groups
        are given and none are known.

    Raises:
        InputError: A class of the images is in none of the groups given, or in several, or in one twice.
    """
    names = source.label_names or []
    if groups is None:
        known = [groups for groups in (CIFAR10_GROUPS, FAMILIES) if set(names) <= set(_members(groups))]
        groups = next((groups for groups in known if len(_used(groups, names)) > 1), None)
        if groups is None:
            return None
    _check_groups(names, groups, source.name)
    used = _used(groups, names)
    group_of = np.array([next(i for i, group in enumerate(used) if name in groups[group]) for name in names])
    return group_of[source.labels].astype(np.int64), used


def _members(groups: Mapping[str, Sequence[str]]) -> list[str]:
    return [name for members in groups.values() for name in members]


def _used(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[str]:
    return [group for group, members in groups.items() if set(members) & set(names)]


def _check_groups(names: Sequence[str], groups: Mapping[str, Sequence[str]], source_name: str):
    if not names:
        raise InputError(f"{source_name} has no names of classes to group; give images with named classes.")
    members = _members(groups)
    for name in names:
        if members.count(name) != 1:
            fault = "is in none of them" if name not in members else f"is in them {members.count(name)} times"
            raise InputError(f"The coarse classes {', '.join(groups)} must have each class of {source_name} once, but "
                             f"{name!r} {fault}; mend the file of coarse classes.")  # fmt: skip
    if len(_used(groups, names)) < 2:
        raise InputError(f"All classes of {source_name} are in the coarse class {_used(groups, names)[0]!r}; give two "
                         "coarse classes or more.")  # fmt: skip
