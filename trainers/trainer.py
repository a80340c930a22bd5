"""The pre-training loop: transformers' `Trainer` with I-JEPA's schedules and a log that tells of collapse.

A step's randomness is a function of (seed, step, micro-step), so that a resumed run repeats an uninterrupted one.
"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProgressCallback
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from trainers.callbacks import ImagesPerSecondBar, WeightDecayCallback, weight_decay
from trainers.cards import card_text
from trainers.datasets import sample_seed, seeded
from trainers.doctor_callback import DoctorCallback
from trainers.exact_accumulation import check_is_whole, rows_of_step
from trainers.exchange import ExchangeCallback
from trainers.model_facts import model_facts
from trainers.monitor import Monitor
from trainers.nonfinite import NonFiniteSteps, check_finite_weights, spoil_gradients
from trainers.positioned_trainer import PositionedTrainer
from trainers.public_facts import public_facts
from trainers.schedules import warmup_cosine
from trainers.sharding import match_deepspeed
from trainers.training_args import JepaTrainingArguments
from trainers.transforms import normalize
from trainers.views import DeviceColors


class JepaTrainer(PositionedTrainer):
    """
    Pre-trains a model that returns its loss, named `loss_terms` and `level_embeddings`; see `CJepaTrainer` and
    `SJeaTrainer`.

    Logged beside transformers' own values: what [`Monitor`] sums up (every loss term, and the figures of each level's
    latest embeddings, over all processes, anew after a resume; of a level above the lowest as `level1_rankme` and so
    on), weight decay, images per second, the share of time spent waiting for data, and the doctor's `collapsed`, 0 or
    1 ([`DoctorCallback`]). Steps that are not finite are skipped ([`NonFiniteSteps`]) and left out of these;
    `skipped_steps` says how many there were, if any.

    Args:
        model (`PreTrainedModel`): What to train.
        args ([`JepaTrainingArguments`]): How.
        image_mean, image_std (`list[float]`): With which uint8 images are normalised on the device; float images are
            taken as they are.
        colors ([`DeviceColors`], *optional*): Changes the views' colours on the device, where workers only crop.
        kwargs: Further arguments of `transformers.Trainer`, such as `train_dataset`.

    Attributes:
        describe_run (`Callable`, *optional*): Gives the facts of the run so far, for the cards pushed with its
            checkpoints; model and step are told without.
    """

    loss_is_scaled_for_ga = False
    describe_run: Callable[[], dict] | None = None

    def __init__(
        self,
        model,
        args: JepaTrainingArguments,
        *,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        colors: DeviceColors | None = None,
        **kwargs,
    ):
        super().__init__(model, args, **kwargs)
        if args.exact_accumulation:
            check_is_whole(self)
        if self.is_deepspeed_enabled:
            match_deepspeed(self)
        self._rows: list[tuple[torch.Tensor, ...]] = []
        # on the device once, so that no step waits for a copy
        self.image_mean, self.image_std = (
            torch.tensor(list(values), device=args.device) for values in (image_mean, image_std)
        )
        self.colors = colors
        self.doctor = DoctorCallback(model.config, args)
        self.add_callback(self.doctor)
        self.add_callback(WeightDecayCallback(self.clock))
        self.add_callback(ExchangeCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ImagesPerSecondBar)
        self.nonfinite = NonFiniteSteps(self)
        self.add_callback(self.nonfinite)
        self.monitor = Monitor(args.num_monitored_images, args.train_batch_size * args.world_size)
        self._reset_window()

    def model_inputs(self, inputs) -> tuple[torch.Tensor, ...]:
        """What the model reads of a batch; of each objective its own."""
        raise NotImplementedError

    def views(self, inputs) -> torch.Tensor:
        """A batch's images, or their views (B, V, C, H, W), coloured where workers have not done so, normalised."""
        views = inputs["pixel_values"]
        if self.colors is not None and views.dtype == torch.uint8:
            # those of this process: their colours are its own, and the same again after a resume
            with seeded(sample_seed(*self.seed_numbers(), self.args.process_index)):
                views = self.colors(views.flatten(end_dim=-4)).view_as(views)
        return normalize(views.flatten(end_dim=-4), self.image_mean, self.image_std).view(views.shape)

    def forward_batch(self, model, inputs):
        """The model's output for a batch."""
        return model(*self.model_inputs(inputs), **self.loss_options(model.training))

    def loss_options(self, training: bool) -> dict:
        """Further arguments of the model's forward pass, in training or in evaluation."""
        others = self._rows[: self._micro_step] + self._rows[self._micro_step + 1 :]
        return {"other_rows": others} if training and others else {}

    def step_facts(self, step: float, num_steps: int) -> dict[str, float]:
        """What else is logged of a step; where it is in the schedules, see [`~RunClock.place`]."""
        return {"weight_decay": weight_decay(self.args, step, num_steps)}

    def _reset_window(self):
        """Starts the window of steps that the next log summarises."""
        self.nonfinite.start_window()
        self.monitor.reset()
        self._num_images = 0
        self._window_started, self._waited = time.perf_counter(), 0.0

    def create_optimizer(self, model=None):
        """AdamW without decay on biases, norms, the mask token and all else of one dimension."""
        model = self.model if model is None else model
        if self.optimizer is None:
            trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            decaying = [p for name, p in trainable if p.ndim > 1 and not name.endswith("mask_token")]
            others = [p for name, p in trainable if p.ndim <= 1 or name.endswith("mask_token")]
            groups = [
                {"params": decaying, "weight_decay": self.args.weight_decay, "decays": True},
                {"params": others, "weight_decay": 0.0, "decays": False},
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Linear warm-up, then a cosine over `schedule_scale` times the run."""
        if self.lr_scheduler is None:
            args = self.args

            def factor(step: int) -> float:
                place, num_steps = self.clock.place(step, num_training_steps)
                rates = args.start_learning_rate, args.learning_rate, args.final_learning_rate
                rate = warmup_cosine(place, num_steps * args.schedule_scale, args.get_warmup_steps(num_steps), *rates)
                return rate / args.learning_rate

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetches the batches of an optimizer step and counts the time that takes."""
        started = time.perf_counter()
        result = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.perf_counter() - started
        if self.args.exact_accumulation and len(result[0]) > 1:
            self._rows = rows_of_step(self, result[0])
        return result

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of a batch, which is watched for the next log."""
        outputs = self.forward_batch(model, inputs)
        loss = outputs.loss
        if model.training:
            self.nonfinite.watch(outputs)
            self._monitor(outputs)
            loss = spoil_gradients(loss)
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The gradient's norm over all processes, by which it is judged whether the step is made."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:
            self.nonfinite.judge(norm)
        return norm

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of an evaluation batch, without labels and with the randomness of step 0."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def seed_numbers(self) -> tuple[int, int, int]:
        """What seeds the randomness of a batch that all processes share: (seed, step, micro-step)."""
        step, micro_step = (self.state.global_step, self._micro_step) if self.model.training else (0, 0)
        return self.args.seed, step, micro_step

    def _monitor(self, outputs):
        """Adds a batch to the window of the next log, without waiting for the device."""
        self.monitor.add(outputs)
        self._num_images += len(outputs.level_views[0]) * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Adds what the window since the last log has seen, over all processes, without skipped steps."""
        is_window = "loss" in logs and self.monitor.num_batches > 0
        self.nonfinite.settle()
        self.nonfinite.leave_out_skipped(logs)
        if is_window:
            if "loss" in logs:
                logs |= self._summary()
                logs |= self.doctor.examine([*self.state.log_history, logs | {"step": self.state.global_step}])
            self._reset_window()
        super().log(logs, start_time)

    def _summary(self) -> dict[str, float]:
        summary = self.monitor.summary(self.accelerator)
        seconds = time.perf_counter() - self._window_started
        summary |= self.step_facts(*self.schedule_place(max(self.state.global_step - 1, 0)))
        return summary | {
            "images_per_second": self._num_images / seconds,
            "data_wait_share": self._waited / seconds,
        }

    def _load_optimizer_and_scheduler(self, checkpoint):
        """As the checkpoint was, but with the learning rates of this run's arguments at its step."""
        scheduler = self.lr_scheduler
        if checkpoint is None or not isinstance(scheduler, LambdaLR):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        base_rates = list(scheduler.base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler.base_lrs = base_rates
        for group, base, factor in zip(self.optimizer.param_groups, base_rates, scheduler.lr_lambdas, strict=True):
            group["initial_lr"], group["lr"] = base, base * factor(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def card_text(self) -> str:
        """The card of the model as it is now, of what the run tells of itself."""
        model = self._plain_model()
        facts = {"model": model_facts(model), "training": {"steps": self.state.global_step}}
        if self.describe_run is not None:
            facts = public_facts(self.describe_run())
        if self.state.global_step < self.state.max_steps:
            facts["training"]["planned_steps"] = self.state.max_steps
        return card_text(model.config.model_type, facts, self.hub_model_id)

    def checkpoints_to_keep(self, output: Path) -> set[str]:
        """While steps are skipped, the checkpoint to go on from if there are too many stays, too."""
        kept = super().checkpoints_to_keep(output)
        good = self.nonfinite.last_good_checkpoint(output) if self.nonfinite.is_skipping else None
        return kept | {good.name} if good else kept

    def _save_checkpoint(self, model, trial):
        """Saves a checkpoint; raises `InputError` if the weights are not finite."""
        check_finite_weights(self)
        super()._save_checkpoint(model, trial)

    def floating_point_ops(self, inputs) -> int:
        """None are counted: transformers' estimate is one of text models."""
        return 0
