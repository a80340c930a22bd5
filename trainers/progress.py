"""How far a run is in its data, in images: what a checkpoint keeps of it, and the clock that its schedules follow."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

from trainers.errors import InputError
from trainers.files import write_json

PROGRESS = "progress.json"


@dataclass
class Progress:
    """
    Where a run is in its data.

    Args:
        step (`int`): Optimizer steps done.
        samples_seen (`int`): Images read by all processes since the run began: the position to go on from.
        batch_size (`int`): Images of an optimizer step over all processes.
        num_processes (`int`): How many processes there were.
        schedule_batch_size (`int`): Images of an optimizer step when the run began, by which its schedules count.
        num_lanes (`int`, *optional*): Lanes of a stream.
        fingerprint (`str`, *optional*): What tells whether the images are the same.
        shard_rows (`dict[int, int]`, *optional*): Of a stream's shards how many rows they have, as far as is known.
    """

    step: int
    samples_seen: int
    batch_size: int
    num_processes: int
    schedule_batch_size: int
    num_lanes: int | None = None
    fingerprint: str | None = None
    shard_rows: dict[int, int] | None = None

    def write(self, folder: Path):
        """Writes it into a checkpoint's folder as `progress.json`."""
        write_json(folder / PROGRESS, dataclasses.asdict(self))

    @classmethod
    def read(cls, checkpoint: str | Path) -> "Progress":
        """That of a checkpoint; raises `InputError` if it has none."""
        path = Path(checkpoint, PROGRESS)
        try:
            progress = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{path} is missing or broken, and so where the run was in its data; resume from another checkpoint."
            ) from error
        if progress.shard_rows is not None:
            progress.shard_rows = {int(shard): rows for shard, rows in progress.shard_rows.items()}
        return progress


class RunClock:
    """
    How many images a run has seen after a step, and where its schedules are.

    A run by epochs is as long as its images, and so are its schedules: when it goes on with other batches they do not
    jump. A run of a given number of steps counts in steps.

    Args:
        batch_size (`int`): Images of an optimizer step over all processes.
        total_samples (`int`, *optional*): Images of the whole run, if it is by epochs.
        begun ([`Progress`], *optional*): Where it goes on from.
    """

    def __init__(self, batch_size: int, total_samples: int | None = None, begun: Progress | None = None):
        self.set(batch_size, total_samples, begun)

    def set(self, batch_size: int, total_samples: int | None = None, begun: Progress | None = None):
        """Sets it anew for all that follow it."""
        self.batch_size, self.total_samples = batch_size, total_samples
        self.first_step, self.first_sample = (begun.step, begun.samples_seen) if begun else (0, 0)
        self.schedule_batch_size = begun.schedule_batch_size if begun else batch_size

    def samples_seen(self, step: int) -> int:
        """Images that all processes have read after a step; those read again count again."""
        return self.first_sample + (step - self.first_step) * self.batch_size

    def num_steps(self) -> int:
        """Steps of a run by epochs: each image is seen as often as asked, the last batch being full."""
        rest = max(self.total_samples - self.first_sample, 0)
        return self.first_step + math.ceil(rest / self.batch_size)

    def place(self, step: int, num_steps: int) -> tuple[float, int]:
        """
        Where the schedules are, and how long.

        Args:
            step (`int`): Optimizer steps done.
            num_steps (`int`): Steps of the whole run.

        Returns:
            Both in steps of as many images as the run began with.
        """
        if self.total_samples is None:
            return step, num_steps
        length = math.ceil(self.total_samples / self.schedule_batch_size)
        return self.samples_seen(step) / self.schedule_batch_size, length
