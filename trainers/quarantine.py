"""Images that cannot be read are replaced while a run goes on, listed beside it, and end it if they are too many."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from trainers.errors import InputError
from trainers.files import write_text_atomically
from trainers.readable import allowed_to_skip

QUARANTINE = "quarantine.jsonl"
_NUM_SHOWN = 3


class Quarantine:
    """
    What could not be read, the same list in every process.

    An entry has `dataset`, `file` (None where an image is in no file of its own), `offset` (its row) and `reason`.

    Args:
        folder (`Path`): Where `quarantine.jsonl` is written, by the first process.
        accelerator (`Accelerator`): The processes.
        share (`float`): Share of the images seen that may be unreadable, in [0, 1]; see [`~readable.allowed_to_skip`].
    """

    def __init__(self, folder: Path, accelerator: Accelerator, share: float):
        self.file, self.accelerator, self.share = folder / QUARANTINE, accelerator, share
        self._entries: dict[tuple, dict] = {}
        self._found: list[dict] = []

    @property
    def entries(self) -> list[dict]:
        """All that is known to all processes."""
        return list(self._entries.values())

    def begin(self, checkpoint: str | None):
        """Takes over the list of the run that wrote a checkpoint, or begins a new one."""
        read = [[]]
        if self.accelerator.is_main_process and checkpoint is not None:
            read = [_read(Path(checkpoint).parent / QUARANTINE)]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(read)
        self._found, self._entries = [], {}
        self._take_in(read[0])
        # the checkpoint may be in another folder than the run now is
        self._write()

    def add(self, found: list[dict]):
        """Keeps what this process has found for the next [`~Quarantine.collect`]."""
        self._found += found

    def collect(self, num_seen: int):
        """
        Shares what all processes have found, and writes the list if it has grown; called by all of them.

        Args:
            num_seen (`int`): Images that the run has seen, each counted once.

        Raises:
            InputError: Too many of them could not be read.
        """
        found, self._found = self._found, []
        if self.accelerator.num_processes > 1:
            anything = self.accelerator.reduce(torch.tensor(len(found), device=self.accelerator.device)).item()
            found = gather_object(found) if anything else []
        if not self._take_in(found):
            return
        self._write()
        allowed = allowed_to_skip(num_seen, self.share)
        if len(self._entries) > allowed:
            raise InputError(
                f"{self.summary()} of {num_seen:,} seen, and up to {allowed:,} would be replaced; repair or remove "
                "them, or raise --max_unreadable_share."
            )

    def _write(self):
        """Makes the file what is known; without any entry, there is none."""
        if not self.accelerator.is_main_process:
            return
        if self._entries:
            write_text_atomically(self.file, "".join(f"{json.dumps(entry)}\n" for entry in self.entries))
        else:
            self.file.unlink(missing_ok=True)

    def _take_in(self, entries: list[dict]) -> bool:
        """Adds entries that are new; whether there was one."""
        before = len(self._entries)
        for entry in entries:
            self._entries.setdefault((entry["dataset"], entry["file"], entry["offset"]), entry)
        return len(self._entries) > before

    def summary(self) -> str:
        """How many there are, the first of them, and where all are listed."""
        entries = self.entries
        shown = "; ".join(f"{entry['file'] or 'number {offset}'.format(**entry)}: {entry['reason']}"
                          for entry in entries[:_NUM_SHOWN])  # fmt: skip
        more = "; ..." if len(entries) > _NUM_SHOWN else ""
        return f"{len(entries):,} image{'s' * (len(entries) > 1)} cannot be read ({shown}{more}; all in {self.file})"


def _read(file: Path) -> list[dict]:
    if not file.exists():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(
            f"{file}, the images that a run could not read, cannot be read; mend or remove it."
        ) from error
