"""transformers' `Trainer` on one stream of images for the whole run, whose position is known in images.

Trainer sees one epoch of all steps and skips nothing on a resume: the loader starts at the position that the
checkpoint tells, whatever the processes and batches were that wrote it.
"""

from collections import deque
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from trainers.errors import InputError
from trainers.progress import Progress, RunClock
from trainers.quarantine import Quarantine
from trainers.stopping import StoppableTrainer
from trainers.streams import StreamedImages, StreamedTrainData
from trainers.train_data import SAMPLE_IDS, UNREADABLE, StoredTrainData, TrainLoader


class PositionedTrainer(StoppableTrainer):
    """
    A [`StoppableTrainer`] that resumes at the image where it stopped, also with other processes or batches.

    An image that cannot be read is replaced by another, and the run stops where they are too many.

    Attributes:
        clock ([`RunClock`]): How far the run is in its images, which its schedules follow.
        quarantine ([`Quarantine`]): Which images could not be read.
    """

    def __init__(self, model, args, **kwargs):
        check_length(kwargs.get("train_dataset"), args)
        super().__init__(model, args, **kwargs)
        self.clock = RunClock(self.get_total_train_batch_size(args))
        self.train_data = None
        self.quarantine = Quarantine(Path(args.output_dir), self.accelerator, args.max_unreadable_share)
        # ids of the images of the latest steps
        self._sample_ids: deque[tuple[int, list[dict]]] = deque(maxlen=4)
        # behind transformers' own flow, before those that look at the epoch
        self.callback_handler.callbacks.insert(1, EpochCallback(self))

    def make_train_data(self, begun: Progress | None = None) -> StoredTrainData | StreamedTrainData:
        """The images in their order, from where a run has begun."""
        if self.train_dataset is None:
            raise ValueError("Training requires a train_dataset.")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        if not isinstance(self.train_dataset, StreamedImages):
            return StoredTrainData(self.train_dataset, seed)
        known = (begun.num_lanes, begun.shard_rows) if begun else ()
        return StreamedTrainData(self.train_dataset, seed, self.args.world_size, *known)

    @property
    def num_train_images(self) -> int | None:
        """Images of a pass; None of a stream that does not tell."""
        dataset = self.train_dataset
        return dataset.shards.num_images if isinstance(dataset, StreamedImages) else len(dataset)

    def schedule_place(self, step: int) -> tuple[float, int]:
        """Where the schedules are after a step, and how long; see [`RunClock.place`]."""
        return self.clock.place(step, self.state.max_steps)

    def sample_ids(self, step: int) -> list[dict]:
        """
        Which images of this process were read for a step, by `index`, or by `shard` and `offset`, and `file`.

        Args:
            step (`int`): Optimizer steps done before it; one of the latest few.
        """
        return next((ids for number, ids in self._sample_ids if number == step), [])

    def _inner_training_loop(self, *args, resume_from_checkpoint=None, **kwargs):
        """Finds the place to go on from before anything is made."""
        self.take_over(resume_from_checkpoint)
        return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def take_over(self, checkpoint: str | None):
        """
        Makes the data, the clock and the list of unreadable images as a checkpoint left them, or for a new run.

        Raises:
            InputError: The checkpoint was trained with other images, or does not tell where it was in them.
        """
        begun = None if checkpoint is None else Progress.read(checkpoint)
        self.train_data = self.make_train_data(begun)
        if begun is not None and begun.fingerprint != self.train_data.fingerprint():
            raise InputError(
                f"{checkpoint} was trained with other train images ({begun.fingerprint}) than there are now "
                f"({self.train_data.fingerprint()}); make the data set as it was, or start a new run with another "
                "--output_dir."
            )
        by_epochs = self.args.max_steps <= 0
        total = round(self.args.num_train_epochs * self.num_train_images) if by_epochs else None
        self.clock.set(self.get_total_train_batch_size(self.args), total, begun)
        self.quarantine.begin(checkpoint)

    def get_train_dataloader(self) -> TrainLoader:
        """The batches of this process from where the run is, on its device."""
        return TrainLoader(
            self.train_data, self.data_collator, self.args, self._train_batch_size, self.clock.first_sample
        )

    def set_initial_training_values(self, args, dataloader):
        """One epoch of all steps."""
        max_steps = args.max_steps if args.max_steps > 0 else self.clock.num_steps()
        num_samples = max_steps * self.clock.batch_size
        steps_in_epoch = max_steps * args.gradient_accumulation_steps
        return 1, max_steps, num_samples, num_samples, self.clock.batch_size, steps_in_epoch, max_steps

    def _init_training_state(self, *args, **kwargs):
        """No batches are skipped: the loader starts at its position."""
        epochs_trained, _ = super()._init_training_state(*args, **kwargs)
        return epochs_trained, 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an optimizer step; what no model reads is kept here."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        ids = [sample_id for batch in batches for sample_id in batch.pop(SAMPLE_IDS, [])]
        self._sample_ids.append((self.state.global_step, ids))
        self.quarantine.add([entry for batch in batches for entry in batch.pop(UNREADABLE, [])])
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None):
        """Logs, with the images seen; of what could not be read since the last time all processes learn here."""
        if self.is_in_train:
            self.quarantine.collect(self.num_distinct_seen())
        if "loss" in logs:
            logs["images_seen"] = self.clock.samples_seen(self.state.global_step)
        super().log(logs, start_time)

    def num_distinct_seen(self) -> int:
        """Images that the run has seen, those seen again not counted again."""
        seen, num_images = self.clock.samples_seen(self.state.global_step), self.num_train_images
        return seen if num_images is None else min(seen, num_images)

    def _save_checkpoint(self, model, trial):
        self.train_data.share_facts(self.args.world_size)
        super()._save_checkpoint(model, trial)

    def write_extra_files(self, folder: Path):
        """Writes into a checkpoint's folder where the run is in its data."""
        step, data = self.state.global_step, self.train_data
        Progress(
            step=step,
            samples_seen=self.clock.samples_seen(step),
            batch_size=self.clock.batch_size,
            num_processes=self.args.world_size,
            schedule_batch_size=self.clock.schedule_batch_size,
            num_lanes=data.num_lanes,
            fingerprint=data.fingerprint(),
            shard_rows=data.shard_rows,
        ).write(folder)


def check_length(train_dataset, args):
    """Refuses what needs the number of images of a stream that does not tell it."""
    if not isinstance(train_dataset, StreamedImages) or train_dataset.shards.num_images is not None:
        return
    for name in ("logging", "save", "eval"):
        if getattr(args, f"{name}_strategy") == "epoch":
            raise InputError(f"{name}_strategy=epoch: {train_dataset.shards.name} does not tell how many images it "
                             "has; choose steps.")  # fmt: skip
    if args.max_steps <= 0:
        raise InputError(f"{train_dataset.shards.name} does not tell how many images it has; say how long to train "
                         "with --max_steps.")  # fmt: skip


class EpochCallback(TrainerCallback):
    """
    Says which epoch it is, one pass over the images, and does what shall be done at the end of each.

    Args:
        trainer ([`PositionedTrainer`]): Whose.
    """

    def __init__(self, trainer: PositionedTrainer):
        self.trainer, self._ended = trainer, None

    def on_step_end(self, args, state, control, **kwargs):
        clock, num_images = self.trainer.clock, self.trainer.num_train_images
        if num_images is None:
            state.epoch = None
            return
        before, now = (clock.samples_seen(step) for step in (state.global_step - 1, state.global_step))
        state.epoch = now / num_images
        if before // num_images < now // num_images:
            self._ended = state.global_step
            control.should_log |= args.logging_strategy == IntervalStrategy.EPOCH
            control.should_save |= args.save_strategy == SaveStrategy.EPOCH
            control.should_evaluate |= args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._ended == state.global_step:  # all of it is done: Trainer's one epoch ends here, too
            control.should_save = control.should_evaluate = False
