"""Carries out the runs of an experiment: trains each, or goes on with it, and evaluates it."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import yaml
from tqdm import tqdm
from transformers.utils import logging

from trainers.checkpoint_files import LAST, present_checkpoints
from trainers.checkpoints import WITHOUT_EFFECT
from trainers.errors import InputError, Stopped, plain_message
from trainers.evaluation import EvaluationArguments
from trainers.experiment_evaluation import check_images, evaluate_run
from trainers.experiment_file import read_experiment
from trainers.experiment_plan import Experiment, Run, choose_runs
from trainers.experiment_processes import Processes
from trainers.files import write_json, write_text_atomically
from trainers.flags import type_hints
from trainers.loading import load_model
from trainers.pretraining import pretrain
from trainers.public_facts import public_facts
from trainers.recipe_files import recipe_text
from trainers.rival_training import train_rival
from trainers.rivals import RIVALS

EVALUATION = "evaluation.json"
FAILURE = "failure.json"
SETTINGS = "settings.yaml"
# what of an experiment the figures of its runs depend on, beside their settings
_MEASURED = ("num_checkpoints", "context_encoder", "level", "baselines")
# what of a recipe changes no figure
_WITHOUT_EFFECT = (WITHOUT_EFFECT - type_hints(EvaluationArguments).keys()) | {
    "disable_tqdm", "eval_batch_size", "evaluate", "dataloader_num_workers",
}  # fmt: skip
# at which shares of a run it is saved where it is evaluated at its end alone
_SAVED = 0.2
# the exit status after Ctrl-C, and of a run that a signal or `max_hours` has stopped
_INTERRUPTED = Stopped.status
_STOPPED = (_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGHUP)


@dataclass
class Call:
    """
    A call of `cjepa experiment`.

    Args:
        experiment (`str`): The file or the name that was given.
        overrides (`dict`): Keys of a recipe that are laid on all runs.
        output (`str`): The folder of all runs.
        command (`str`): The command as results tell it.
    """

    experiment: str
    overrides: dict
    output: str
    command: str

    def folder(self, run: Run) -> Path:
        """That of a run."""
        return Path(self.output) / run.place


def carry_out(experiment: Experiment, runs: list[Run], call: Call, num_jobs: int = 1) -> list[str]:
    """
    Trains and evaluates the runs that are not done yet, each in a process of its own.

    Args:
        experiment ([`Experiment`]): What they belong to.
        runs (`list` of [`Run`]): Which of its runs.
        call ([`Call`]): How.
        num_jobs (`int`): How many at a time. What several print is kept in `log.txt` of their folders.

    Returns:
        `list[str]`: A sentence for each run that failed, such as one that diverged; the others are carried out.

    Raises:
        InputError: The first run of all failed at its first try, and no other is begun; or a folder holds a run with
            other settings. What is done is kept.
        Stopped: One was stopped by a signal or `max_hours`, and no other is begun.
    """
    for run in experiment.runs():
        check_settings(experiment, run, call.folder(run))
    missing = [run for run in runs if not is_done(call.folder(run))]
    processes, failures = Processes(), []
    with (
        processes.told_of_signals(),
        tqdm(total=len(runs), initial=len(runs) - len(missing), desc=experiment.name, unit="run") as bar,
        ThreadPoolExecutor(num_jobs) as pool,
    ):
        try:
            settings = [settings_text(experiment, run) for run in missing]
            tried = (is_done(call.folder(run)) or (call.folder(run) / FAILURE).is_file() for run in experiment.runs())
            first = missing[:1] if not any(tried) else []
            carry_out_one = partial(_carry_out_elsewhere, call, num_jobs, processes, first)
            for run, (status, sentence) in zip(missing, pool.map(carry_out_one, missing, settings), strict=True):
                bar.update(status == 0)
                failures += [sentence] if status else []
                if status and processes.stopped.is_set():
                    error = InputError if run in first and status not in _STOPPED else Stopped
                    raise error(f"{'; '.join(failures)}; what is done is kept, and the same command goes on.")
        finally:
            processes.stopped.set()  # those that wait do not begin
    return failures


def is_done(folder: Path) -> bool:
    """Whether the run of a folder is trained and evaluated."""
    return (folder / EVALUATION).is_file()


def check_settings(experiment: Experiment, run: Run, folder: Path) -> str:
    """The [`settings_text`] of a run; one that has other settings in its folder is refused, begun or done."""
    path, settings = folder / SETTINGS, settings_text(experiment, run)
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if (before is not None or is_done(folder)) and before != settings:
        raise InputError(
            f"{folder} holds a run with other settings than {experiment.name} has now, see {SETTINGS} there; name "
            "another --output, or remove that folder."
        )
    return settings


def settings_text(experiment: Experiment, run: Run) -> str:
    """All that a run's figures depend on, as its folder keeps it."""
    values = {name: value for name, value in run.read(Path()).values.items() if name not in _WITHOUT_EFFECT}
    values |= {"rival": run.rival} if run.rival else {}
    values |= {"structure": True} if experiment.structure else {}
    return recipe_text(values | {name: getattr(experiment, name) for name in _MEASURED})


def digest_of(run: Run, settings: str) -> str:
    """A hash of a run and its [`settings_text`], by which what is told of it is known on other machines, too."""
    values = yaml.safe_load(settings) | {"method": run.method}
    values.pop("decoded_cache", None)
    text = json.dumps(public_facts({"settings": values}), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _carry_out_elsewhere(
    call: Call, num_jobs: int, processes: Processes, first: list[Run], run: Run, settings: str
) -> tuple[int, str]:
    """A run in a process of its own, as [`main`] does it: its exit status, and how it ended."""
    name = f"{run.method}, seed {run.seed}"
    if processes.stopped.is_set():
        return _INTERRUPTED, f"{name}, was not begun"
    folder = call.folder(run)
    told = asdict(call) | {"method": run.method, "seed": run.seed, "settings": settings, "folder": str(folder)}
    command = [sys.executable, "-m", __name__, json.dumps(told)]
    (folder / FAILURE).unlink(missing_ok=True)
    if num_jobs == 1:
        tqdm.write(f"\n{name}")
        status, where = processes.run(command), "see above"
    else:
        threads = max(torch.get_num_threads() // num_jobs, 1)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
            status = processes.run(command, stdout=log, stderr=log, env=environment)
        where = f"see {log.name}"
        tqdm.write(f"{name}: {'failed' if status else 'done'}")
    if status and status not in _STOPPED:
        _record_failure(run, settings, folder, status)
    # what ails the first ails all, and such a signal is meant for all
    if status and (run in first or status in _STOPPED):
        processes.stopped.set()
    return status, f"{name}, ended with status {status}, {where}"


def _record_failure(run: Run, settings: str, folder: Path, status: int):
    """Keeps why a run failed, for the results; a process that was killed or broke has left no reason itself."""
    file = folder / FAILURE
    why = {"why": f"It ended with status {status} and gave no reason."}
    own = {"method": run.method, "seed": run.seed, "asked": digest_of(run, settings)}
    write_json(file, own | (json.loads(file.read_text(encoding="utf-8")) if file.is_file() else why))


def carry_out_run(experiment: Experiment, run: Run, call: Call):
    """
    Trains a run to its end, from its last checkpoint where there is one, evaluates it, and writes what was found.

    Its checkpoints are removed then; the model is in `final`.

    Args:
        experiment ([`Experiment`]), run ([`Run`]), call ([`Call`]): Which run, and how.

    Raises:
        InputError: It cannot be trained.
        Stopped: It was stopped by a signal or `max_hours`.
    """
    folder, settings = call.folder(run), settings_text(experiment, run)
    final = folder / "final"
    if not final.is_dir():
        check_images(run.read(Path(call.output)))  # before the folder is one of these settings
        write_text_atomically(folder / SETTINGS, settings)
        share, limit = (1 / experiment.num_checkpoints, None) if experiment.num_checkpoints > 1 else (_SAVED, 1)
        saving = {"save_strategy": "steps", "save_steps": share, "save_total_limit": limit}
        resuming = {"resume_from_checkpoint": LAST} if present_checkpoints(folder) else {}
        recipe = run.read(Path(call.output), **saving, **resuming)
        recipe.command = shlex.split(call.command)[1:]
        trained = pretrain(recipe) if run.rival is None else train_rival(run.rival, recipe)
        if trained is None:
            raise Stopped(f"{run.method}, seed {run.seed}, was stopped; repeat the command to go on.")
    facts = public_facts(json.loads((final / "results.json").read_text(encoding="utf-8")))
    told = {name: facts[name] for name in ("settings", "training", "machine", "software", "data")}
    told["diagnosis"] = facts.get("diagnosis", {}).get("state")
    load = load_model if run.rival is None else RIVALS[run.rival].load
    found = evaluate_run(experiment, run.read(Path(call.output)), folder, facts["training"], load)
    own = {"method": run.method, "seed": run.seed, "swept": run.swept, "asked": digest_of(run, settings)}
    write_json(folder / EVALUATION, own | public_facts(told | found))
    remove_checkpoints(folder)


def remove_checkpoints(folder: Path):
    """Removes those of a run that is trained and evaluated: of many runs they fill a disk."""
    for checkpoint in present_checkpoints(folder):
        shutil.rmtree(checkpoint)


def main(told: str) -> int:
    """
    Carries out one run, for [`carry_out`].

    Args:
        told (`str`): The fields of [`Call`], `method`, `seed`, `settings` and `folder` as JSON.

    Returns:
        `int`: The exit status.
    """
    fields = json.loads(told)
    method, seed, settings, folder = (fields.pop(name) for name in ("method", "seed", "settings", "folder"))
    call = Call(**fields)
    logging.disable_progress_bar()  # of single files, which would break up the run's own
    try:
        experiment = read_experiment(call.experiment, call.overrides)
        (run,) = choose_runs(experiment, [method], [seed])
        if settings_text(experiment, run) != settings:
            raise InputError(f"{call.experiment} was changed while it was carried out; repeat the command.")
        carry_out_run(experiment, run, call)
    except Stopped as error:
        print(f"\ncjepa: {error}", file=sys.stderr)
        return _INTERRUPTED
    except InputError as error:
        why = plain_message(error)
        print(f"\ncjepa: {why}", file=sys.stderr)
        write_json(Path(folder, FAILURE), public_facts({"why": why}))
        return 2
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
