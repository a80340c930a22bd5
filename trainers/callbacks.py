"""Callbacks of pre-training: the target encoder's update, the weight decay's schedule, the progress bar."""

import time

from transformers import ProgressCallback, TrainerCallback

from trainers.progress import RunClock
from trainers.schedules import cosine, linear


class TargetUpdateCallback(TrainerCallback):
    """
    Moves the target encoder once after each optimizer step; works with any `Trainer`.

    Args:
        momentum (`float`): Share of the old target kept in the first step, in [0, 1].
        final_momentum (`float`): The same at the schedule's end; linear in between.
        schedule_scale (`float`): Length of the schedule in units of the run.
        clock ([`RunClock`], *optional*): What it counts by; the optimizer's steps when not given.
    """

    def __init__(
        self,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
        schedule_scale: float = 1.0,
        clock: RunClock | None = None,
    ):
        self.momentum, self.final_momentum, self.schedule_scale = momentum, final_momentum, schedule_scale
        self.clock = clock

    def momentum_at(self, step: float, num_steps: int) -> float:
        """Share of the old target kept after the step that follows `step` of `num_steps` finished ones."""
        return linear(step, num_steps * self.schedule_scale, self.momentum, self.final_momentum)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        place = state.global_step, state.max_steps
        model.update_target_encoder(self.momentum_at(*(self.clock.place(*place) if self.clock else place)))


class WeightDecayCallback(TrainerCallback):
    """
    Sets the weight decay of the parameters that have any, before each optimizer step.

    Args:
        clock ([`RunClock`]): What its schedule counts by.
    """

    def __init__(self, clock: RunClock):
        self.clock = clock

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            if group.get("decays", False):
                group["weight_decay"] = weight_decay(args, *self.clock.place(state.global_step, state.max_steps))


class CropEpochCallback(TrainerCallback):
    """Tells the data set its epoch; accelerate forgets to when it skips the batches a resumed run has seen."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        dataset = train_dataloader.dataset
        if hasattr(dataset, "set_epoch"):
            # a fraction while resuming, and a sum of fractions otherwise
            dataset.set_epoch(int(state.epoch + 1e-6))


class ImagesPerSecondBar(ProgressCallback):
    """
    One progress bar over the run with the speed and the latest figures; no lines in between.

    Args:
        description (`str`): What the bar is called.
        figures (`dict[str, str]`, *optional*): Keys of the log that it shows, and what it calls them; the loss and the
            effective rank when not given.
    """

    def __init__(self, description: str = "pre-training", figures: dict[str, str] | None = None):
        super().__init__()
        self.description, self.figures = description, figures or {"loss": "loss", "rankme": "RankMe"}

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.started, self.first_step, self.shown = time.perf_counter(), state.global_step, {}
        if self.training_bar is not None:
            self.training_bar.set_description(self.description)

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if self.training_bar is not None:
            elapsed = time.perf_counter() - self.started
            speed = (state.global_step - self.first_step) * self.images_per_step / elapsed
            self.training_bar.set_postfix({"images/s": f"{speed:.0f}", **self.shown}, refresh=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.shown |= {title: f"{logs[name]:.4g}" for name, title in self.figures.items() if name in logs}


def weight_decay(args, step: float, num_steps: int) -> float:
    """Weight decay of the step that follows `step` finished ones."""
    return cosine(step, num_steps * args.schedule_scale, args.weight_decay, args.final_weight_decay)
