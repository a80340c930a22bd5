"""transformers' `Trainer` for classifiers that are published, and what is refused before it trains."""

import math
from contextlib import contextmanager

from trainers.cards import card_text
from trainers.errors import InputError
from trainers.finetune_args import FinetuneTrainingArguments
from trainers.model_facts import classifier_facts
from trainers.stopping import StoppableTrainer

_DIVERGED = (
    "the run has diverged, and nothing is published; lower --learning_rate or lengthen --warmup_steps, and start anew "
    "with another --output_dir."
)


class ClassifierTrainer(StoppableTrainer):
    """
    A [`StoppableTrainer`] with two differences: `dataloader_drop_last` leaves out train images alone, where
    transformers' evaluates and predicts without the last, too; and a training loss that is not finite ends the run.
    """

    def card_text(self) -> str:
        """The card of the classifier as it is now."""
        facts = {"model": classifier_facts(self._plain_model())}
        if self.state.global_step < self.state.max_steps:
            facts["unfinished"] = {"steps": self.state.global_step, "planned_steps": self.state.max_steps}
        return card_text("classifier", facts, self.hub_model_id)

    @contextmanager
    def _every_image(self):
        """Data loaders that are made here give the last, smaller batch, too."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_eval_dataloader(self, eval_dataset=None):
        """Batches of all held-out images."""
        with self._every_image():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """Batches of all images to predict."""
        with self._every_image():
            return super().get_test_dataloader(test_dataset)

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Logs; raises `InputError` at a training loss that is not finite."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise InputError(f"The training loss is {logs['loss']} at step {self.state.global_step}: {_DIVERGED}")
        super().log(logs, start_time)

    def check_weights(self):
        """Raises `InputError` where the trained weights are not finite, whether or not a loss was logged since."""
        tensors = self.accelerator.unwrap_model(self.model).state_dict().values()
        if not all(tensor.isfinite().all() for tensor in tensors):
            step = (self.args.load_best_model_at_end and self.state.best_global_step) or self.state.global_step
            raise InputError(f"The weights of step {step} are not finite: {_DIVERGED}")


def check_possible(args: FinetuneTrainingArguments, num_images: int, num_classes: int):
    """
    Refuses what cannot be trained, or chosen by, with the images that there are.

    Args:
        args ([`FinetuneTrainingArguments`]): How is trained.
        num_images (`int`): Train images.
        num_classes (`int`): Their classes.

    Raises:
        InputError: There is no whole batch of train images where smaller ones are left out, or the best checkpoint
            is to be that of the best top-5 accuracy and there are five classes or fewer.
    """
    batch_size = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and num_images < batch_size:
        raise InputError(
            f"dataloader_drop_last leaves out all {num_images} train images, fewer than the {batch_size} of a batch "
            "over all processes; lower --per_device_train_batch_size or leave --dataloader_drop_last out."
        )
    metric = args.metric_for_best_model or ""
    if metric.removeprefix("eval_") == "top5_accuracy" and num_ranks(num_classes) < 5:
        raise InputError(
            f"metric_for_best_model={metric!r}: of {num_classes} classes each is among the likeliest five; choose by "
            "accuracy or loss."
        )


def num_ranks(num_classes: int) -> int:
    """How many of an image's likeliest classes are looked at: five where they are not all of them, or one."""
    return 5 if num_classes > 5 else 1
