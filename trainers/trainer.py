"""The pre-training loop: transformers' `Trainer` with seeded masks, I-JEPA's schedules and its own log.

The masks of a step are a function of (seed, step, micro-step): every process draws those of the global batch and keeps
its rows, so that several processes compute the gradients of one, and a resumed run those of an uninterrupted one.
"""

import math
import shutil
import time
from collections import deque
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import ProgressCallback, Trainer

from modeling_cjepa import CJepaForPreTraining
from trainers.callbacks import (
    CropEpochCallback,
    ImagesPerSecondBar,
    TargetUpdateCallback,
    WeightDecayCallback,
    weight_decay,
)
from trainers.datasets import sample_seed
from trainers.diagnostics import feature_std, rankme
from trainers.errors import InputError
from trainers.schedules import cosine, warmup_cosine
from trainers.training_args import CJepaTrainingArguments
from trainers.transforms import normalize


class CJepaTrainer(Trainer):
    """
    Pre-trains a [`CJepaForPreTraining`].

    Logged beside transformers' own values: every loss term, weight decay, the regulariser's weight, EMA momentum,
    standard deviation and RankMe of the latest target features (over all processes, anew after a resume), images per
    second, and the share of time spent waiting for data.

    Args:
        model ([`CJepaForPreTraining`]): What to train.
        args ([`CJepaTrainingArguments`]): How.
        image_mean, image_std (`list[float]`): With which uint8 images are normalised on the device; float images are
            taken as they are.
        kwargs: Further arguments of `transformers.Trainer`, such as `train_dataset`.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: CJepaForPreTraining,
        args: CJepaTrainingArguments,
        *,
        image_mean=(0.485, 0.456, 0.406),
        image_std=(0.229, 0.224, 0.225),
        **kwargs,
    ):
        if model.config.regularizer_weight == 0 and args.final_regularizer_weight:
            raise ValueError(
                f"final_regularizer_weight={args.final_regularizer_weight} cannot follow a model's "
                "regularizer_weight=0; set --final_regularizer_weight 0, too."
            )
        super().__init__(model, args, **kwargs)
        # on the device once, so that no step waits for a copy
        self.image_mean, self.image_std = (
            torch.tensor(list(values), device=args.device) for values in (image_mean, image_std)
        )
        self.add_callback(CropEpochCallback)
        self.target_update = TargetUpdateCallback(args.ema_momentum, args.final_ema_momentum, args.schedule_scale)
        self.add_callback(self.target_update)
        self.add_callback(WeightDecayCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ImagesPerSecondBar)
        self._micro_step = 0
        self._reset_window()
        batch_size = args.train_batch_size * args.world_size
        self._embeddings: deque[torch.Tensor] = deque(maxlen=max(args.num_monitored_images // batch_size, 1))

    def _reset_window(self):
        """Starts the window of steps that the next log summarises."""
        self._term_sums: dict[str, torch.Tensor] = {}
        self._num_micro_batches = self._num_images = 0
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
            args, num_warmup_steps = self.args, self.args.get_warmup_steps(num_training_steps)

            def factor(step: int) -> float:
                rates = args.start_learning_rate, args.learning_rate, args.final_learning_rate
                rate = warmup_cosine(step, num_training_steps * args.schedule_scale, num_warmup_steps, *rates)
                return rate / args.learning_rate

            self.lr_scheduler = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetches the batches of an optimizer step and counts the time that takes."""
        started = time.perf_counter()
        result = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._waited += time.perf_counter() - started
        self._micro_step = 0
        return result

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The C-JEPA loss of a batch under masks seeded by (seed, step, micro-step)."""
        pixel_values = normalize(inputs["pixel_values"], self.image_mean, self.image_std)
        context_ids, target_ids = self._masks(pixel_values)
        weight = self._regularizer_weight(self.state.global_step) if model.training else None
        outputs = model(pixel_values, context_ids, target_ids, regularizer_weight=weight)
        if model.training:
            self._monitor(outputs)
            self._micro_step += 1
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The loss of an evaluation batch, without labels and under the masks of step 0."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _masks(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of the global batch's masks that belong to this process."""
        model, args = self.accelerator.unwrap_model(self.model), self.args
        step, micro_step = (self.state.global_step, self._micro_step) if self.model.training else (0, 0)
        generator = torch.Generator().manual_seed(sample_seed(args.seed, step, micro_step))
        grid_size = model.cjepa.embeddings.patch_embeddings.grid_size(pixel_values)
        num_images = pixel_values.shape[0]
        rows = slice(args.process_index * num_images, (args.process_index + 1) * num_images)
        masks = model.sample_masks(num_images * args.world_size, grid_size, generator)
        return tuple(ids[rows].to(pixel_values.device, non_blocking=True) for ids in masks)

    def _regularizer_weight(self, step: int) -> float:
        """The regulariser's weight in the step that follows `step` finished ones."""
        args, start = self.args, self.accelerator.unwrap_model(self.model).config.regularizer_weight
        if args.final_regularizer_weight is None:
            return start
        return cosine(step, self.state.max_steps * args.schedule_scale, start, args.final_regularizer_weight)

    def _monitor(self, outputs):
        """Adds a batch to the window of the next log, without waiting for the device."""
        for name, term in outputs.loss_terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + term
        self._embeddings.append(outputs.embeddings.detach().float())
        self._num_micro_batches += 1
        self._num_images += outputs.embeddings.shape[0] * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Adds what the window since the last log has seen, over all processes."""
        if "loss" in logs and self._num_micro_batches:
            logs |= self._summary()
            self._reset_window()
            if not math.isfinite(logs["loss"]):
                raise InputError(
                    f"The loss is {logs['loss']} at step {self.state.global_step}: the run has diverged; lower "
                    "--learning_rate or set --max_grad_norm, and resume from a checkpoint before that."
                )
        super().log(logs, start_time)

    def _summary(self) -> dict[str, float]:
        values = {f"loss_{name}": total / self._num_micro_batches for name, total in self._term_sums.items()}
        stacked = torch.stack([value.float() for value in values.values()])
        summary = dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist(), strict=True))
        embeddings = self.accelerator.gather(torch.cat(list(self._embeddings)))
        summary |= {"target_std": feature_std(embeddings), "target_rankme": rankme(embeddings)}
        seconds = time.perf_counter() - self._window_started
        step, num_steps = max(self.state.global_step - 1, 0), self.state.max_steps
        return summary | {
            "weight_decay": weight_decay(self.args, step, num_steps),
            "regularizer_weight": self._regularizer_weight(step),
            "ema_momentum": self.target_update.momentum_at(step, num_steps),
            "images_per_second": self._num_images / seconds,
            "data_wait_share": self._waited / seconds,
        }

    def _save_checkpoint(self, model, trial):
        """Saves a checkpoint whole: one that cannot be finished, such as on a full disk, is taken away again."""
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}"), ignore_errors=True)
            raise

    def floating_point_ops(self, inputs) -> int:
        """None are counted: transformers' estimate is one of text models."""
        return 0

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Loads weights through the model's own loader, and refuses a checkpoint that lacks some."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        loaded, info = type(model).from_pretrained(
            resume_from_checkpoint, config=model.config, output_loading_info=True
        )
        missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
        if missing or unexpected:
            raise InputError(
                f"Checkpoint {resume_from_checkpoint} does not fit the model: missing {missing[:3] or 'nothing'}, not "
                f"known {unexpected[:3] or 'nothing'}; resume with the recipe it was trained with."
            )
        model.load_state_dict(loaded.state_dict())
