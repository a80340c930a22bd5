"""transformers' `Trainer` with checkpoints that are whole or not there, without pickles, for any processes."""

import dataclasses
import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers.trainer_callback import ExportableState

from trainers.checkpoint_files import (
    LAST,
    MANIFEST,
    all_checkpoints,
    best_beside,
    choose_checkpoint,
    finish_checkpoint,
    removed_on_error,
    rotate_checkpoints,
    set_aside_later,
    start_checkpoint,
    unfinished_folder,
)
from trainers.errors import InputError, first_line
from trainers.optimizer_files import host_state, load_optimizer, load_weights, optimizer_state, save_optimizer
from trainers.processes import in_main_process
from trainers.publishing import AUTO_MAPS, save_model
from trainers.seeded_trainer import SeededTrainer

SCHEDULER = "scheduler.json"
STATE = "trainer_state.json"
# at these training may go on; any other error is one of the program
_OF_THE_DISK = (OSError, SafetensorError)


@dataclass
class _Save:
    """A checkpoint that is being saved: the best one as of then, and in the process that writes what comes of it."""

    step: int
    output: Path
    best: tuple
    writing: Future | None = None


class CheckpointedTrainer(SeededTrainer):
    """
    A [`SeededTrainer`] with other checkpoints, which hold no state of random generators.

    Each is a folder `checkpoint-N` of safetensors and JSON that appears when it is whole (see
    [`~checkpoint_files.finish_checkpoint`]); its optimizer's state goes by parameter names, whole, so that another
    number of processes can go on, with DDP or FSDP2. Where the device is not the CPU, tensors are copied to host
    memory at the step, and a thread writes them while training goes on; the next save, and the end of training, wait
    for it. A save that fails is said and forgotten, unless it is the last of the run. `output_dir` must be on a file
    system that all machines share, or `save_on_each_node` be set.

    With DeepSpeed (not run) all processes save what is theirs into the folder by its engine, and load it by that.

    Attributes:
        checkpoint_executor (`concurrent.futures.Executor`, *optional*): What writes in the background; None writes at
            once.
        save_error (`str`, *optional*): Why the latest save failed, in all processes; None if it did not.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled and getattr(self.accelerator.state.fsdp_plugin, "fsdp_version", 1) != 2:
            raise InputError("FSDP of version 1 shards what cannot be saved by name; set fsdp_version: 2.")
        # a CPU would take the thread's time from the steps
        background = self.args.device.type != "cpu"
        self.checkpoint_executor = ThreadPoolExecutor(1, "checkpoint") if background else None
        self.save_error: str | None = None
        self._pending: _Save | None = None
        self._saved_best = self._best()

    # saving

    def write_extra_files(self, folder: Path):
        """Writes what else a checkpoint holds into its folder; the main process calls it, at the checkpoint's step."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """Saves weights, configuration and image processor in a folder; pushes them if asked to."""
        folder = Path(output_dir or self.args.output_dir)
        weights = self._host_weights(copied=False)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_model(folder, weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def wait_for_checkpoint(self):
        """
        Waits until the checkpoint that is being saved is whole; all processes call it.

        Raises:
            InputError: It could not be saved, and the run ends with it; else that is printed.
        """
        if self._pending is None:
            return
        save, self._pending = self._pending, None
        error = None if save.writing is None else save.writing.exception()
        outcome = [None, False, ""]
        if error is not None:
            outcome = [first_line(error), isinstance(error, _OF_THE_DISK), _newest_whole(save.output)]
        broadcast_object_list(outcome)
        self.save_error, is_of_the_disk, newest = outcome
        if self.save_error is not None and not is_of_the_disk:
            # the other processes must not wait for one that has failed
            raise error or InputError(f"The checkpoint of step {save.step} could not be saved ({self.save_error}).")
        if self.save_error is not None:
            self._after_failure(save, newest)
            return
        self._saved_best = save.best
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(save.output / f"checkpoint-{save.step}"))

    def _after_failure(self, save: _Save, newest: str):
        """Forgets a checkpoint that could not be saved, or ends the run if it was to be the last."""
        if self.state.best_global_step == save.step:
            self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = self._saved_best
        failed = f"The checkpoint of step {save.step} could not be saved ({self.save_error})"
        if save.step == self.state.global_step and self.control.should_training_stop:
            raise InputError(
                f"{failed}, with which the run would end; {newest}. Make room for {save.output} and go on with "
                f"--resume_from_checkpoint {LAST}."
            )
        if self.is_world_process_zero():
            print(f"{failed}: training goes on; {newest}.", flush=True)

    def _best(self) -> tuple:
        state = self.state
        return state.best_metric, state.best_global_step, state.best_model_checkpoint

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        """A checkpoint ends the window of a log, so that a resumed run logs the losses of an uninterrupted one."""
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_checkpoint(self, model, trial):
        """Takes what a checkpoint holds at this step; it is written at once, or in the background."""
        self.wait_for_checkpoint()
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        output, step = Path(self._get_output_dir(trial=trial)), self.state.global_step
        if self.state.best_global_step:
            best = output / f"checkpoint-{self.state.best_global_step}"
            if best.exists() or self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(best)
        in_background = self.checkpoint_executor and not self.is_deepspeed_enabled and not self.args.push_to_hub
        kept, copied = self.args.should_save, bool(in_background)
        weights, optimizer = self._host_weights(copied), None
        if not self.args.save_only_model and not self.is_deepspeed_enabled:
            optimizer = optimizer_state(self._plain_model(), self.optimizer, kept, copied)
        self._pending = _Save(step, output, self._best())
        if kept:
            self._pending.writing = run_now(self._start_checkpoint, output, step)
        if self.is_deepspeed_enabled:
            self.accelerator.wait_for_everyone()
            self.model_wrapped.save_checkpoint(str(unfinished_folder(output, step)))
            self.accelerator.wait_for_everyone()
        if kept and self._pending.writing.exception() is None:
            submit = self.checkpoint_executor.submit if in_background else run_now
            folder = self._pending.writing.result()
            self._pending.writing = submit(self._write, folder, step, weights, optimizer)
        if not in_background:
            self.wait_for_checkpoint()

    def _start_checkpoint(self, output: Path, step: int) -> Path:
        """Begins a checkpoint with what is small and changes from step to step."""
        folder = start_checkpoint(output, step)
        with removed_on_error(folder):
            for callback in (*self.callback_handler.callbacks, self.control):
                if isinstance(callback, ExportableState):
                    self.state.stateful_callbacks[type(callback).__name__] = callback.state()
            dataclasses.replace(self.state, best_model_checkpoint=None).save_to_json(str(folder / STATE))
            if not self.args.save_only_model:
                (folder / SCHEDULER).write_text(json.dumps(self.lr_scheduler.state_dict()) + "\n", encoding="utf-8")
            self.write_extra_files(folder)
        return folder

    def _write(self, folder: Path, step: int, weights: dict, optimizer: tuple | None):
        """Writes the tensors of a checkpoint that is begun, finishes it, and removes older ones."""
        with removed_on_error(folder):
            self._write_model(folder, weights)
            if optimizer is not None:
                save_optimizer(folder, *optimizer)
            finish_checkpoint(folder, step)
        limit, every = self.args.save_total_limit, self.args.keep_checkpoints_every
        rotate_checkpoints(folder.parent, step, limit, every, self.checkpoints_to_keep(folder.parent))

    def checkpoints_to_keep(self, output: Path) -> set[str]:
        """Names of checkpoints that are not removed, however many there are."""
        return {Path(self.state.best_model_checkpoint or "").name}

    def _plain_model(self):
        """The model without what wraps it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _host_weights(self, copied: bool) -> dict[str, torch.Tensor]:
        """The model's weights in the process that writes them; the others have a part in gathering them."""
        if self.is_deepspeed_enabled:
            return self.accelerator.get_state_dict(self.deepspeed)
        return host_state(self._plain_model(), self.args.should_save, copied)

    def _write_model(self, folder: Path, weights: dict[str, torch.Tensor]):
        model = self._plain_model()
        has_adapters = hasattr(model, "peft_config")
        if getattr(model.config, "model_type", None) in AUTO_MAPS and not has_adapters:
            save_model(model, self.processing_class, folder, weights)  # with the code, so that it loads anywhere
            return
        # a resumed run looks for weights by the names that they have in memory
        names = {} if has_adapters else {"save_original_format": False}
        model.save_pretrained(folder, state_dict=weights, **names)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _finalize_training(self, *args):
        """As in transformers, with the last checkpoint whole, and without the end's own removal of checkpoints."""
        self.wait_for_checkpoint()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    # resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """
        As in transformers; a checkpoint is resumed from only if it is whole.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint's folder; `last` or True for the newest
                whole one of `output_dir`.

        Raises:
            InputError: The checkpoint is broken or foreign, or there is none.
        """
        checkpoint = LAST if resume_from_checkpoint is True else resume_from_checkpoint or None
        if checkpoint is not None:
            output = Path(self.args.output_dir)
            checkpoint = in_main_process(choose_checkpoint, output, checkpoint)
            if Path(checkpoint).resolve().parent == output.resolve():
                in_main_process(set_aside_later, Path(checkpoint))
        return super().train(checkpoint, *args, **kwargs)

    def _init_training_state(self, max_steps, steps_per_epoch, num_epochs, checkpoint, trial):
        found = super()._init_training_state(max_steps, steps_per_epoch, num_epochs, checkpoint, trial)
        # those of this call, and not of the one that wrote the checkpoint
        self.state.compute_steps(self.args, max_steps)
        if checkpoint is not None:
            self.state.best_model_checkpoint = best_beside(Path(checkpoint), self.state.best_global_step)
        self._saved_best = self._best()
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Loads all weights of a checkpoint; raises `InputError` if they are not those of the model."""
        if self.is_deepspeed_enabled or hasattr(self.model, "peft_config"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(Path(resume_from_checkpoint), self._plain_model())

    def _load_best_model(self):
        """Loads the best checkpoint; raises `InputError` if it is no longer whole."""
        best = in_main_process(choose_checkpoint, Path(self.args.output_dir), self.state.best_model_checkpoint)
        if self.is_deepspeed_enabled or hasattr(self.model, "peft_config"):
            super()._load_best_model()
        else:
            load_weights(Path(best), self._plain_model())

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if not self.is_deepspeed_enabled:
            load_optimizer(folder, self._plain_model(), self.optimizer)
        self.lr_scheduler.load_state_dict(json.loads((folder / SCHEDULER).read_text(encoding="utf-8")))

    def _load_rng_state(self, checkpoint):
        """Nothing: each micro-batch seeds the generators."""

    def _load_scaler(self, checkpoint):
        """Nothing: no run scales its losses."""


def _newest_whole(output: Path) -> str:
    whole = [path.name for path in all_checkpoints(output) if (path / MANIFEST).exists()]
    return f"the last whole one is {whole[0]}" if whole else "there is none yet"


def run_now(function, *args) -> Future:
    """What an executor's `submit` does, at once."""
    future = Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future
