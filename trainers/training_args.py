"""Arguments of training runs: transformers' `TrainingArguments` with the device's precision, and of pre-training with
schedules and each objective's defaults.
"""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from trainers.precision import check_precision, is_bf16, precision_name


@dataclass
class PrecisionTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` for images, in the precision that suits the device.

    Args:
        precision (`"auto"`, `"bf16"` or `"float32"`): Autocast; `auto` is bf16 where the device computes in it.
        keep_checkpoints_every (`int`, *optional*): Checkpoints of steps that are multiples of it are never removed;
            1 or more.
        max_hours (`float`, *optional*): Hours of training of this call after which it stops with a checkpoint, as at
            SIGTERM and SIGUSR1; the time of saving comes on top.
        hub_update (`bool`): Whether `push_to_hub` may replace the model of a repository that holds something; a
            resumed run may.

    Raises:
        ValueError: The precision is not known, or a number is out of its range.
    """

    precision: str = field(
        default="auto", metadata={"help": "`auto` (bf16 where the device computes in it), `bf16` or `float32`"}
    )
    keep_checkpoints_every: int | None = field(
        default=None, metadata={"help": "never remove the checkpoints of steps that are multiples of it"}
    )
    max_hours: float | None = field(
        default=None, metadata={"help": "stop with a checkpoint after so many hours, as at SIGTERM and SIGUSR1"}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "go on from a checkpoint: its folder, or `last`, the newest whole one in --output_dir"},
    )
    hub_update: bool = field(
        default=False,
        metadata={"help": "with --push_to_hub: replace the model of a repository that holds one (a resumed run does)"},
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "it would wait for the device each step"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "images have no column to keep"})

    def __post_init__(self):
        check_precision(self.precision)
        if self.keep_checkpoints_every is not None and self.keep_checkpoints_every < 1:
            raise ValueError(f"keep_checkpoints_every={self.keep_checkpoints_every} must be 1 or more steps.")
        if self.max_hours is not None and not self.max_hours > 0:
            raise ValueError(f"max_hours={self.max_hours} must be above 0; leave it out to train without a limit.")
        if self.fp16:
            raise ValueError(
                "fp16 is not supported: its range is too small for what is trained here; --precision bf16 or float32."
            )
        if self.bf16:
            if self.precision == "float32":
                raise ValueError("bf16=True and precision='float32' contradict each other; leave one of them out.")
            self.precision = "bf16"
        self.bf16 = False  # decided below, when the device is known
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
        self.bf16 = is_bf16(self.precision, self.device)
        # the field that Trainer hands to Accelerate, which the parent has set before the device was known
        self.mixed_precision = "bf16" if self.bf16 else "no"

    @property
    def n_gpu(self) -> int:
        """GPUs of this process: one; over several `DataParallel` would split a batch, and its statistics."""
        return min(super().n_gpu, 1)

    def describe_devices(self) -> str:
        """The processes, their device and its precision, in words, and whether GPUs are left idle."""
        processes = "1 process" if self.world_size == 1 else f"{self.world_size} processes"
        visible = super().n_gpu
        idle = f" (one of {visible} GPUs; torchrun or accelerate launch uses all)" if visible > 1 else ""
        return f"{processes} on {self.device.type}{idle} in {precision_name(self.precision, self.device)}"


@dataclass
class JepaTrainingArguments(PrecisionTrainingArguments):
    """
    [`PrecisionTrainingArguments`] with what all ways of pre-training share.

    The schedules run over `schedule_scale` times the run's steps, so that the run can end before they do (I-JEPA's
    code: 1.25): the learning rate (linear warm-up of `warmup_steps` from `start_learning_rate`, cosine to
    `final_learning_rate`) and the weight decay (cosine).

    Args:
        start_learning_rate (`float`): Learning rate of the first step.
        final_learning_rate (`float`): Learning rate at the schedules' end.
        final_weight_decay (`float`): Weight decay at the schedules' end.
        schedule_scale (`float`): Length of the schedules in units of the run; 1 or more.
        num_monitored_images (`int`): Latest images whose embeddings the logged standard deviation, RankMe and so on
            are computed on.
        max_unreadable_share (`float`): Share of the train images seen that may be unreadable, and are replaced, in
            [0, 1]; of few images ten may be, but none at 0.
        exact_accumulation (`bool`): Whether VICReg's statistics are those of all images of a step, and not of a
            micro-batch, when gradients are accumulated; costs a forward pass without gradients.
        max_skipped_steps (`int`): Steps in a row whose loss or gradient is not finite that are skipped; one more stops
            the run. 0 stops at the first.
        stop_on_collapse (`bool`): Whether a run that the doctor finds ill is saved and stopped; it says so either way.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    learning_rate: float = field(default=1.0e-3, metadata={"help": "learning rate after the warm-up"})
    start_learning_rate: float = field(default=2.0e-4, metadata={"help": "learning rate of the first step"})
    final_learning_rate: float = field(default=1.0e-6, metadata={"help": "learning rate at the schedules' end"})
    warmup_steps: float = field(
        default=0.1, metadata={"help": "steps of warm-up, or their share of the run if below 1"}
    )
    weight_decay: float = field(default=0.04, metadata={"help": "weight decay of the first step"})
    final_weight_decay: float = field(default=0.4, metadata={"help": "weight decay at the schedules' end"})
    schedule_scale: float = field(default=1.25, metadata={"help": "length of the schedules in units of the run"})
    num_monitored_images: int = field(
        default=2048, metadata={"help": "latest images that the logged feature statistics are computed on"}
    )
    max_unreadable_share: float = field(
        default=0.01,
        metadata={"help": "stop if a larger share of the train images seen (and over ten) is unreadable; 0: if any"},
    )
    exact_accumulation: bool = field(
        default=False,
        metadata={"help": "accumulate gradients as of one batch: statistics of all images of a step, recomputed"},
    )
    max_skipped_steps: int = field(
        default=10, metadata={"help": "steps in a row that are skipped as their loss or gradient is not finite"}
    )
    stop_on_collapse: bool = field(
        default=False, metadata={"help": "save and stop a run whose features have collapsed, by its own alarm"}
    )
    per_device_train_batch_size: int = field(default=128, metadata={"help": "images of a process in a batch"})
    num_train_epochs: float = field(default=100.0, metadata={"help": "passes over the train images"})
    max_grad_norm: float = field(default=0.0, metadata={"help": "clip gradients to this norm; 0 never clips"})
    logging_steps: float = field(default=20, metadata={"help": "log every so many optimizer steps"})
    logging_first_step: bool = field(default=True, metadata={"help": "log the first step, too"})
    dataloader_drop_last: bool | None = field(
        default=None, metadata={"help": "refused: there is no smaller last batch, passes follow without a break"}
    )
    prediction_loss_only: bool = field(default=True, metadata={"help": "do not gather predictions in evaluation"})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "every parameter is used"})

    def __post_init__(self):
        if self.schedule_scale < 1:
            raise ValueError(f"schedule_scale={self.schedule_scale} is below 1; the schedules must outlast the run.")
        positive = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "adam_epsilon",
                    "num_monitored_images")  # fmt: skip
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0, and finite.")
        if self.max_steps <= 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs} must be above 0, or max_steps be set.")
        if self.dataloader_persistent_workers and self.dataloader_num_workers == 0:
            raise ValueError("dataloader_persistent_workers needs workers; set dataloader_num_workers to 1 or more.")
        for name in ("seed", "dataloader_num_workers", "max_skipped_steps", "start_learning_rate",
                     "final_learning_rate", "weight_decay", "final_weight_decay"):  # fmt: skip
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} is not a number from 0 up; give 0 or more.")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1).")
        if not 0 <= self.max_unreadable_share <= 1:
            raise ValueError(f"max_unreadable_share={self.max_unreadable_share} is not in [0, 1].")
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size would change the batch statistics; set per_device_train_batch_size."
            )
        if self.lr_scheduler_type not in ("linear", SchedulerType.LINEAR):
            raise ValueError(
                f"lr_scheduler_type={self.lr_scheduler_type!r} has no effect: the schedule is set by warmup_steps, "
                "start_learning_rate, final_learning_rate and schedule_scale."
            )
        if self.dataloader_drop_last is not None:
            raise ValueError(
                f"dataloader_drop_last={self.dataloader_drop_last} has no effect: all batches are full, each pass "
                "over the images beginning in the batch in which the last one ends; leave it out."
            )
        self.dataloader_drop_last = False
        super().__post_init__()

    def schedule_facts(self) -> dict[str, str]:
        """The optimiser and what changes from step to step, in words, for the model card."""
        is_share = self.warmup_steps < 1
        warmup = f"the first {100 * self.warmup_steps:g} % of the" if is_share else f"{self.warmup_steps:g}"
        rates = (self.start_learning_rate, self.learning_rate, self.final_learning_rate)
        facts = {
            "optimizer": self.optim.value if hasattr(self.optim, "value") else str(self.optim),
            "learning rate": "{:g} to {:g} over {} steps, then by a cosine to {:g}".format(
                *rates[:2], warmup, rates[2]
            ),
            "weight decay": _from_to(self.weight_decay, self.final_weight_decay),
        }
        if self.schedule_scale != 1:
            facts["length of the schedules"] = f"{self.schedule_scale:g} times the run"
        return facts


def _from_to(first: float, last: float) -> str:
    return f"{first:g}" if first == last else f"{first:g} to {last:g}"


@dataclass
class CJepaTrainingArguments(JepaTrainingArguments):
    """
    Arguments of pre-training by C-JEPA, with I-JEPA's defaults; see [`JepaTrainingArguments`] for the others.

    Args:
        final_regularizer_weight (`float`, *optional*): The regulariser's weight at the schedules' end, by a cosine
            from the model's `regularizer_weight`; constant when not given.
        ema_momentum (`float`): Share of the old target encoder kept in the first step, in [0, 1]; linear in between.
        final_ema_momentum (`float`): The same at the schedules' end.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    final_regularizer_weight: float | None = field(
        default=None, metadata={"help": "regularizer_weight at the schedules' end; constant when not given"}
    )
    ema_momentum: float = field(
        default=0.996, metadata={"help": "share of the old target encoder kept in a step, at the start"}
    )
    final_ema_momentum: float = field(default=1.0, metadata={"help": "the same at the schedules' end"})

    def __post_init__(self):
        for name in ("ema_momentum", "final_ema_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1]; it is the share that is kept.")
        if not (self.final_regularizer_weight or 0) >= 0:
            raise ValueError(
                f"final_regularizer_weight={self.final_regularizer_weight} is not a number from 0 up; give 0 or more."
            )
        super().__post_init__()

    def schedule_facts(self) -> dict[str, str]:
        """As of [`JepaTrainingArguments`], with the moving average."""
        kept = _from_to(self.ema_momentum, self.final_ema_momentum)
        return super().schedule_facts() | {"share of the old target encoder kept in a step": kept}


@dataclass
class SJeaTrainingArguments(JepaTrainingArguments):
    """
    Arguments of pre-training by S-JEA, with the authors' defaults: Adam without weight decay, learning rate 1e-3 after
    a short warm-up, batches of 256 images; see [`JepaTrainingArguments`] for the others.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    final_learning_rate: float = field(default=0.0, metadata={"help": "learning rate at the schedules' end"})
    warmup_steps: float = field(
        default=0.02, metadata={"help": "steps of warm-up, or their share of the run if below 1"}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "weight decay of the first step"})
    final_weight_decay: float = field(default=0.0, metadata={"help": "weight decay at the schedules' end"})
    schedule_scale: float = field(default=1.0, metadata={"help": "length of the schedules in units of the run"})
    per_device_train_batch_size: int = field(default=256, metadata={"help": "images of a process in a batch"})
    num_train_epochs: float = field(default=200.0, metadata={"help": "passes over the train images"})
