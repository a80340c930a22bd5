"""What is evaluated, and on what: a model, others beside it, and images whose classes are common to both splits."""

from dataclasses import dataclass, field

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_cjepa.configuration_cjepa import pair
from trainers.datasets import ImageSource
from trainers.errors import InputError
from trainers.loading import load_with_statistics
from trainers.pooling import level_of
from trainers.readable import readable_splits
from trainers.subsets import choose_images, with_common_classes


@dataclass
class Subject:
    """
    What is evaluated, and on what.

    Args:
        model (`PreTrainedModel`): The model.
        statistics (`list` of `list[float]`): Mean and deviation of the channels of its images.
        others (`dict`): Models beside it, each with its statistics, by the names of their rows.
        train, test ([`ImageSource`]): Labelled images of the same classes.
        skipped (`list[dict]`): Those left out, of [`~readable.readable_positions`].
    """

    model: PreTrainedModel
    statistics: list
    others: dict[str, tuple]
    train: ImageSource
    test: ImageSource
    skipped: list[dict] = field(default_factory=list)

    @classmethod
    def load(cls, model, train, test, arguments, image_mean, image_std, level, beside) -> "Subject":
        """What [`evaluate_model`] was given, with its errors."""
        chosen = choose_images(train, arguments.num_probe_images, "--num_probe_images")
        train, test = with_common_classes(chosen, test)
        model, *statistics = load_with_statistics(model, image_mean, image_std)
        check_level(level, model.config)
        others = {name: load_with_statistics(other, image_mean, image_std) for name, other in (beside or {}).items()}
        return cls(model, statistics, others, train, test)

    def leave_out_unreadable(self, num_workers: int, progress: bool):
        """Leaves out the images that cannot be read, and notes which; raises `InputError` if they are too many."""
        self.train, self.test, self.skipped = readable_splits(self.train, self.test, num_workers, progress)

    def facts(self) -> dict:
        """What results say of images and classes."""
        return {
            "train_dataset": self.train.name,
            "test_dataset": self.test.name,
            "num_train_images": len(self.train),
            "num_test_images": len(self.test),
            "skipped": self.skipped,
            "num_classes": len(self.train.label_names),
            "chance": 100 * float(np.bincount(self.test.labels).max()) / len(self.test),
            "image_size": list(pair(self.model.config.image_size)),
            "image_mean": list(self.statistics[0]),
            "image_std": list(self.statistics[1]),
        }


def check_level(level: int | str | None, config: PreTrainedConfig):
    """Refuses a level that a model of this configuration does not have, unless it is `all` of them."""
    if level == "all":
        return
    try:
        level_of(config, level)
    except InputError as error:
        raise InputError(f"{str(error).removesuffix('.')}, or say all.") from error
