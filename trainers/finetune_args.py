"""Arguments of a fine-tuning run: what is trained, on which labelled images, and transformers' `TrainingArguments`."""

import dataclasses
from dataclasses import dataclass, field

from modeling_cjepa.configuration_cjepa import CLASSIFIER_POOLINGS
from trainers.errors import InputError
from trainers.recipe_files import SECRETS
from trainers.sources import DataArguments
from trainers.training_args import PrecisionTrainingArguments

MODES = ("full", "frozen", "lora")
# what differs between the modes where nothing is said; of a small head alone, less is needed against overfitting
_MODE_DEFAULTS = {
    "full": {"layer_decay": 0.75, "drop_path_rate": 0.1, "mixup": 0.8, "cutmix": 1.0},
    "frozen": {"layer_decay": 1.0, "drop_path_rate": 0.0, "mixup": 0.0, "cutmix": 0.0},
    "lora": {"layer_decay": 1.0, "drop_path_rate": 0.0, "mixup": 0.0, "cutmix": 0.0},
}
# what a checkpoint can be the best of, with `eval_` before it or without
METRICS = ("loss", "accuracy", "top5_accuracy")
LEARNING_RATES = {"full": 5.0e-4, "frozen": 1.0e-3, "lora": 1.0e-3}


@dataclass
class FinetuneArguments:
    """What of a classifier is trained, and how it is kept from overfitting."""

    mode: str = field(
        default="full",
        metadata={"help": "`full`: all weights; `frozen`: only the head, a probe by gradient descent; `lora`: the "
                          "head and low-rank adapters of queries and values (needs peft)"},
    )  # fmt: skip
    from_scratch: bool = field(
        default=False, metadata={"help": "take MODEL's architecture with random weights, to compare with"}
    )
    classifier_pooling: str = field(
        default="mean", metadata={"help": "what the head reads: `mean`, `last4` (C-JEPA) or `attentive`"}
    )
    level: int | None = field(default=None, metadata={"help": "level of a stack, from 0; its own when not given"})
    image_size: int | None = field(
        default=None, metadata={"help": "pixels of a side, a multiple of the patch size; MODEL's when not given"}
    )
    layer_decay: float | None = field(
        default=None, metadata={"help": "share of the learning rate left a layer further down (full: 0.75, else 1)"}
    )
    drop_path_rate: float | None = field(
        default=None, metadata={"help": "share of images that the last layer passes over, C-JEPA (full: 0.1, else 0)"}
    )
    mixup: float | None = field(
        default=None, metadata={"help": "alpha of torchvision's MixUp (full: 0.8, else 0); 0 never mixes"}
    )
    cutmix: float | None = field(
        default=None, metadata={"help": "alpha of torchvision's CutMix, in turn with MixUp (full: 1, else 0)"}
    )
    lora_rank: int = field(default=8, metadata={"help": "rank of the adapters"})
    lora_alpha: float = field(default=16.0, metadata={"help": "adapters are scaled by lora_alpha / lora_rank"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout before the adapters, in [0, 1)"})

    def __post_init__(self):
        for name, choices in (("mode", MODES), ("classifier_pooling", CLASSIFIER_POOLINGS)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; choose one of {', '.join(choices)}.")
        if self.from_scratch and self.mode != "full":
            raise InputError(f"from_scratch trains all weights; leave --mode {self.mode} out.")
        self.drop_path_was_given = self.drop_path_rate is not None
        defaults = _MODE_DEFAULTS[self.mode] | ({"layer_decay": 1.0} if self.from_scratch else {})
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay={self.layer_decay} is not in (0, 1]; 1 is the same rate for all layers.")
        for name in ("drop_path_rate", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is not in [0, 1).")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)} must be 0 or more; 0 leaves it out.")
        for name in ("lora_rank", "lora_alpha"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)} must be above 0.")


@dataclass
class FinetuneDataArguments(DataArguments):
    """Which labelled images, how many of their labels, and their augmentation."""

    horizontal_flip: bool = field(default=True, metadata={"help": "mirror half of the crops"})
    rand_augment: int = field(
        default=0, metadata={"help": "magnitude of torchvision's RandAugment, 0 to 30, such as 9; 0 leaves it out"}
    )
    label_share: float = field(
        default=1.0,
        metadata={"help": "share of the train images whose labels are used, of each class, at least one; a fixed "
                          "choice"},
    )  # fmt: skip
    validation_share: float = field(
        default=0.1,
        metadata={"help": "share of these held out to choose the best checkpoint on; 0 takes the last checkpoint"},
    )

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.label_share <= 1:
            raise InputError(f"label_share={self.label_share} is not in (0, 1]; 0.01 is one per cent.")
        if not 0 <= self.validation_share < 1:
            raise InputError(f"validation_share={self.validation_share} is not in [0, 1).")
        if not 0 <= self.rand_augment <= 30:
            raise InputError(f"rand_augment={self.rand_augment} is not in 0 to 30.")


@dataclass
class FinetuneTrainingArguments(PrecisionTrainingArguments):
    """
    `TrainingArguments` with the defaults of fine-tuning: AdamW, warm-up and cosine, an evaluation and a checkpoint
    every epoch, the best one at the end.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    learning_rate: float = field(
        default=5.0e-4, metadata={"help": "of the head, after the warm-up (mode full: 5e-4, else 1e-3)"}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "of matrices; vectors and positions have none"})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "steps of warm-up, or their share of the run if below 1"}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "what follows the warm-up"})
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "share of a label spread over all classes"})
    per_device_train_batch_size: int = field(default=128, metadata={"help": "images of a process in a batch"})
    per_device_eval_batch_size: int = field(default=256, metadata={"help": "the same in evaluation"})
    num_train_epochs: float = field(default=20.0, metadata={"help": "passes over the train images"})
    logging_steps: float = field(default=20, metadata={"help": "log every so many optimizer steps"})
    eval_strategy: str = field(default="epoch", metadata={"help": "when the held-out images are evaluated"})
    save_strategy: str = field(default="epoch", metadata={"help": "when checkpoints are saved"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept, the best among them"})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "publish the best checkpoint, not the last"})
    metric_for_best_model: str | None = field(
        default="accuracy", metadata={"help": "what is best: `accuracy`, `loss` or `top5_accuracy`"}
    )

    def __post_init__(self):
        for name in ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be above 0, or max_steps be set.")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(f"label_smoothing_factor={self.label_smoothing_factor} is not in [0, 1).")
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in METRICS:
            raise ValueError(f"metric_for_best_model={metric!r} is not known; choose one of {', '.join(METRICS)}.")
        super().__post_init__()


@dataclass
class Finetuning:
    """
    A run, ready to be started.

    Args:
        model (`str`): Folder of the encoder, or its id on the Hub.
        settings ([`FinetuneArguments`]): What of it is trained.
        data ([`FinetuneDataArguments`]): On what.
        training (`dict`): Fields of [`FinetuneTrainingArguments`] that are set.
        command (`list[str]`): The command line it came from, for the record.
    """

    model: str
    settings: FinetuneArguments
    data: FinetuneDataArguments
    training: dict = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    def values(self) -> dict:
        """Every setting that is not as its default, but for secrets, for the record and to compare when resuming."""
        return (
            {"model": self.model}
            | changed_fields(self.settings)
            | changed_fields(self.data)
            | {name: value for name, value in sorted(self.training.items()) if name not in SECRETS}
        )


def changed_fields(arguments) -> dict:
    """The fields of a dataclass that are not as their defaults."""
    defaults = type(arguments)()
    return {name: value for name, value in dataclasses.asdict(arguments).items() if value != getattr(defaults, name)}
