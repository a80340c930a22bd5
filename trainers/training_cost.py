"""What the training loop costs beside the bare steps of its model, measured on this machine in turns."""

import copy
import itertools
import os
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from modeling_cjepa.configuration_cjepa import pair
from trainers.benchmark import decay_groups, quartiles, shown, step_rows
from trainers.errors import InputError
from trainers.flops import wait_for
from trainers.pretraining import build_model, build_trainer
from trainers.recipes import Recipe
from trainers.reports import markdown_table
from trainers.run_arguments import training_arguments
from trainers.sources import load_sources


def benchmark_training(recipe: Recipe, num_rounds: int = 9) -> dict:
    """
    Times steps of a recipe's trainer, with its logs, the doctor, checks and stops, and bare steps of an equal model.

    A bare step is the forward pass under the same masks or views, the backward pass, the optimizer and the moving
    average, on batches of a plain data loader. A round is as many steps of each, in turns, as lie between two logs.

    Args:
        recipe ([`Recipe`]): What to train; checkpoints go to a temporary folder.
        num_rounds (`int`): Timed rounds; one more comes before them.

    Returns:
        `dict`: `steps` of a round, `batch_size`, `device`, of `bare` and `trainer` a `dict` of `median`, `low` and
        `high` (quartiles) in seconds a step, `overhead` with the same of trainer over bare less 1, and in
        seconds `save`, what a checkpoint takes, `stall`, what training waits for it, and `write`, what its `bytes`
        take to be written alone.

    Raises:
        InputError: There are too few rounds to measure with, or the images are too few, or a signal stopped it.
    """
    if num_rounds < 2:
        raise InputError(f"--rounds {num_rounds} must be 2 or more.")
    with tempfile.TemporaryDirectory() as folder:
        recipe.training |= {
            "output_dir": folder, "disable_tqdm": True, "save_strategy": "no", "logging_first_step": False,
        }  # fmt: skip
        args = training_arguments(recipe)
        args.max_steps = (num_rounds + 1) * int(args.logging_steps) + 1
        model = build_model(recipe, args)
        source, _ = load_sources(recipe.data, max(pair(model.config.image_size)), progress=False)
        trainer = build_trainer(recipe, model, args, source)
        turns = _Turns(_LooplessSteps(trainer), int(args.logging_steps), num_rounds, args.device)
        trainer.pop_callback(PrinterCallback)
        trainer.add_callback(turns)
        trainer.train()
        if trainer.state.global_step < args.max_steps:
            raise InputError(f"Stopped at step {trainer.state.global_step} of {args.max_steps}: nothing was measured.")
        found = _summary(turns)
        save = _time_save(trainer, Path(folder))
    batch_size = args.train_batch_size * args.gradient_accumulation_steps
    return {"steps": turns.length, "batch_size": batch_size, "device": args.device.type} | found | save


class _LooplessSteps:
    """Steps of a copy of a trainer's model, with nothing beside them."""

    def __init__(self, trainer):
        self.trainer, self.model = trainer, copy.deepcopy(trainer.model).train()
        args = trainer.args
        loader = DataLoader(
            trainer.train_dataset,
            args.train_batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(0),
        )
        self.batches = itertools.chain.from_iterable(iter(lambda: loader, None))
        self.num_batches = args.gradient_accumulation_steps
        self.optimizer = None

    def step(self):
        """One optimizer step."""
        trainer, args = self.trainer, self.trainer.args
        if self.optimizer is None:
            trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            groups = decay_groups(trained, args.weight_decay)
            optimizer_class, options = trainer.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer = optimizer_class(groups, **options)
        for batch in itertools.islice(self.batches, self.num_batches):
            inputs = trainer._prepare_inputs(batch)
            with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
                loss = trainer.forward_batch(self.model, inputs).loss / self.num_batches
            loss.backward()
        if args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), args.max_grad_norm)
        self.optimizer.step()
        if hasattr(self.model, "update_target_encoder"):
            self.model.update_target_encoder(0.996)
        self.optimizer.zero_grad()


class _Turns(TrainerCallback):
    """
    Lets bare steps and the trainer's take turns: of one step on a CPU, where what else the machine does then slows
    both alike; of a whole round where steps are queued on a device, so that none waits for it in between.
    """

    def __init__(self, bare: _LooplessSteps, length: int, num_rounds: int, device: torch.device):
        self.bare, self.length, self.rounds = bare, length, iter(shown(num_rounds, "rounds"))
        self.turn = 1 if device.type == "cpu" else length
        # seconds of each round
        self.seconds: dict[str, list[float]] = {"trainer": [], "bare": []}

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step % self.turn:
            return
        wait_for(args.device)
        now = time.perf_counter()
        if state.global_step:
            self.seconds["trainer"][-1] += now - self.started
        if state.global_step % self.length == 0:
            next(self.rounds, None)
            for seconds in self.seconds.values():
                seconds.append(0.0)
        for _ in range(self.turn):
            self.bare.step()
        wait_for(args.device)
        self.started = time.perf_counter()
        self.seconds["bare"][-1] += self.started - now


def _summary(turns: _Turns) -> dict:
    # the first round sets things up; the last has only begun
    bare, trainer = (turns.seconds[name][1:-1] for name in ("bare", "trainer"))
    found = {
        "bare": [seconds / turns.length for seconds in bare],
        "trainer": [seconds / turns.length for seconds in trainer],
        "overhead": [whole / alone - 1 for whole, alone in zip(trainer, bare, strict=True)],
    }
    return {name: quartiles(values) for name, values in found.items()}


def _time_save(trainer, folder: Path) -> dict:
    """Seconds of a checkpoint, those that training waits for, and of its bytes alone, written to the same disk."""
    started = time.perf_counter()
    trainer._save_checkpoint(trainer.model, None)
    stall = time.perf_counter() - started
    trainer.wait_for_checkpoint()
    saved = time.perf_counter() - started
    contents = [path.read_bytes() for path in folder.glob("checkpoint-*/*") if path.is_file()]
    started = time.perf_counter()
    with (folder / "alone").open("wb") as file:
        for content in contents:
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"save": saved, "stall": stall, "write": time.perf_counter() - started, "bytes": sum(map(len, contents))}


def format_training_cost(found: dict) -> str:
    """The measurements as a table."""
    cells = step_rows(found, {"bare": "bare", "trainer": "of the trainer"})
    overhead = found["overhead"]
    return "\n".join(
        [
            *markdown_table(cells),
            f"\noverhead {overhead['median']:.2%} ({overhead['low']:.2%} - {overhead['high']:.2%}): the trainer's "
            f"rounds of {found['steps']} steps and a log over as many bare ones in between",
            f"a checkpoint of {found['bytes'] / 1e6:.1f} MB took {found['save']:.2f} s, of which training waited "
            f"{found['stall']:.2f} s; its bytes alone {found['write']:.2f} s",
        ]
    )
