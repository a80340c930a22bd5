"""Which of the images that were found are used: some of them, a part held out, those of common classes."""

import dataclasses

import numpy as np

from trainers.datasets import ImageSource
from trainers.errors import InputError
from trainers.probes import spare_positions

# of the images that are used or held out where not all are
_CHOICE_SEED = 0


def choose_images(source: ImageSource, number: int | None, flag: str | None = None) -> ImageSource:
    """
    A fixed random choice of so many images, in their own order; all of them if there are not more.

    Args:
        source ([`ImageSource`]): The images.
        number (`int`, *optional*): How many; all when not given.
        flag (`str`, *optional*): What an error that comes of the choice calls the number.

    Returns:
        [`ImageSource`].
    """
    if number is None or number >= len(source):
        return source
    order = np.random.default_rng(_CHOICE_SEED).permutation(len(source))
    chosen = source.take(np.sort(order[:number]))
    return dataclasses.replace(chosen, chosen_by=f"{flag} {number}") if flag else chosen


def hold_out(source: ImageSource) -> tuple[ImageSource, ImageSource]:
    """
    A fixed random tenth held out for evaluation; of each class at least one image stays, if labels are known.

    Args:
        source ([`ImageSource`]): 2 images or more.

    Returns:
        The images to train on and those held out, each in their own order.

    Raises:
        InputError: There is one image only.
    """
    if len(source) < 2:
        raise InputError(f"{source.name} has {len(source)} image; give at least 2, one to train on, one to evaluate.")
    if source.labels is None:
        order = np.random.default_rng(_CHOICE_SEED).permutation(len(source))
    else:
        # one of each class comes last: it is held out when there is nothing else
        order = np.concatenate(spare_positions(source.labels, _CHOICE_SEED))
    num_held_out = max(len(source) // 10, 1)
    return source.take(np.sort(order[num_held_out:])), source.take(np.sort(order[:num_held_out]))


def with_common_classes(train: ImageSource, test: ImageSource) -> tuple[ImageSource, ImageSource]:
    """
    Both sources with the classes that train images have, numbered alike: each may have numbered its own.

    Args:
        train, test ([`ImageSource`]): Labelled images.

    Returns:
        The two sources.

    Raises:
        InputError: There are no labels, or a test class is not in the train images.
    """
    for source in (train, test):
        if source.labels is None:
            raise InputError(source.without_labels or f"{source.name} has no labels; say which with --label_column.")
        if len(source.labels) != len(source) or len(source) == 0:
            raise InputError(f"{source.name} has {len(source)} images and {len(source.labels)} labels; mend it.")
        if min(source.labels) < 0:
            raise InputError(f"{source.name} has images with label {min(source.labels)}, which is none; choose "
                             "another split or mend it.")  # fmt: skip
    train_names, test_names = _class_names(train), _class_names(test)
    names = list(dict.fromkeys(train_names[label] for label in np.unique(train.labels)))
    numbers = {name: number for number, name in enumerate(names)}
    unseen = [test_names[label] for label in np.unique(test.labels) if test_names[label] not in numbers]
    if unseen:
        shown = ", ".join(unseen[:5]) + (", ..." if len(unseen) > 5 else "")
        some = f"the {len(train):,} of " if train.chosen_by else ""
        advice = f"raise {train.chosen_by}, or " if train.chosen_by else ""
        raise InputError(f"{test.name} has images of {len(unseen)} classes that no image of {some}{train.name} has "
                         f"({shown}); {advice}evaluate on splits with the same classes.")  # fmt: skip
    return tuple(
        dataclasses.replace(
            source, labels=np.array([numbers[class_names[label]] for label in source.labels]), label_names=names
        )
        for source, class_names in ((train, train_names), (test, test_names))
    )


def _class_names(source: ImageSource) -> list[str]:
    return source.label_names or [str(label) for label in range(max(source.labels) + 1)]
