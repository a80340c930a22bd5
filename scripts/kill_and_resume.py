"""Kills a run again and again, resumes it, and compares what it ends with to a run that was left alone.

    python scripts/kill_and_resume.py --kills 20
    python scripts/kill_and_resume.py --kills 20 --processes 2 -- --gradient_accumulation_steps 2

Both runs are `cjepa pretrain RECIPE` with a tiny model on rendered scenes; what follows `--` is added to its flags.
The moments of the kills (SIGKILL, no warning) take turns: at the start, in the steps, in a save, and with several
processes in a save first one process and then the others. Weights and every logged loss must be equal bit for bit; the
exit status says whether they are.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PRETRAIN = Path(__file__).with_name("pretrain.py")
TINY = [
    "--hidden_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--intermediate_size", "128",
    "--predictor_hidden_size", "32", "--predictor_num_hidden_layers", "1", "--predictor_num_attention_heads", "2",
    "--num_train_images", "256", "--num_eval_images", "64", "--per_device_train_batch_size", "16",
    "--logging_steps", "7", "--save_strategy", "steps", "--save_steps", "5", "--save_total_limit", "3",
    "--precision", "float32", "--use_cpu",
]  # fmt: skip
# figures of the clock, and of the window of latest images, which a resumed run fills anew
COMPARED = ("loss", "grad_norm", "learning_rate", "weight_decay", "ema_momentum", "regularizer_weight")
PATIENCE = 300  # seconds for a process to come to its moment


def main() -> int:
    """Runs, kills, compares; returns the exit status."""
    arguments = parse()
    folder = Path(arguments.output or tempfile.mkdtemp(prefix="kill-and-resume-"))
    moments = random.Random(arguments.seed)
    print(f"a run left alone, into {folder / 'whole'}", flush=True)
    wait_for(start(arguments, folder / "whole"), folder / "whole")
    killed = folder / "killed"
    print(f"{'kill':>4}  {'moment':<46}{'went on from':<18}{'whole after it':<18}seconds", flush=True)
    for number, moment in enumerate(itertools.islice(moments_of(arguments), arguments.kills), start=1):
        before, started = newest(killed), time.perf_counter()
        if (killed / "final").exists():
            print(f"the run ended before kill {number}; give more steps with --steps", file=sys.stderr)
            return 2
        leftovers = unfinished(killed)
        told = kill(start(arguments, killed), killed, moment, moments, leftovers)
        seconds = time.perf_counter() - started
        print(f"{number:>4}  {told:<46}{before:<18}{newest(killed):<18}{seconds:.1f}", flush=True)
    wait_for(start(arguments, killed), killed)
    return compare(folder, arguments.kills)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often the run is killed (default 20)")
    parser.add_argument("--processes", type=int, default=1, help="processes of the run (default 1)")
    parser.add_argument("--steps", type=int, help="steps of the run (default: 40 a kill)")
    parser.add_argument("--recipe", default="cjepa_scenes", help="what is trained (default cjepa_scenes)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--output", help="an empty folder for both runs (default: a temporary one)")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags of `cjepa pretrain`")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or 40 * (arguments.kills + 1)
    return arguments


def moments_of(arguments) -> Iterator[str]:
    """The kinds of moments, taking turns."""
    kinds = ["steps", "save", "steps", "start"]
    return itertools.cycle(["steps", "save", "between processes", "start"] if arguments.processes > 1 else kinds)


def start(arguments, output: Path) -> subprocess.Popen:
    """Starts the run, or goes on from its last checkpoint, in a process group of its own."""
    launcher = [sys.executable]
    if arguments.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.processes}"]
    flags = [*TINY, "--max_steps", str(arguments.steps), "--output_dir", str(output), *arguments.flags]
    if checkpoints(output):
        flags += ["--resume_from_checkpoint", "last"]
    log = output.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [*launcher, str(PRETRAIN), arguments.recipe, *flags, "--disable_tqdm"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("a") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, env=environment)


def wait_for(process: subprocess.Popen, output: Path):
    """Waits for a run's end; ends with its last words if it failed."""
    if process.wait() != 0:
        sys.exit("\n".join(["the run failed:", *output.with_suffix(".log").read_text().splitlines()[-15:]]))


def kill(
    process: subprocess.Popen, output: Path, moment: str, moments: random.Random, leftovers: dict[tuple, str]
) -> str:
    """Kills a run at a moment of a kind; returns in words when that was."""
    members = []
    if moment == "start":
        seconds = moments.uniform(0.5, 8)
        stop_waiting_at(process, output, time.monotonic() + seconds)
        told = f"{seconds:.1f} s after the start"
    elif moment == "steps":
        first = newest(output)
        stop_waiting_at(process, output, until=lambda: newest(output) != first)
        seconds = moments.uniform(0, 0.3)
        time.sleep(seconds)
        told = f"{seconds:.2f} s after a save"
    else:
        # not what an earlier kill has left
        stop_waiting_at(process, output, until=lambda: unfinished(output).keys() - leftovers.keys())
        seconds = moments.uniform(0, 0.01)
        time.sleep(seconds)
        being_saved = [name for key, name in unfinished(output).items() if key not in leftovers]
        told = f"{seconds * 1000:.0f} ms into the save of {being_saved[0] if being_saved else 'one, just done'}"
        if moment == "between processes":
            rank, members = moments.randrange(2), family(process)
            kill_rank(members, rank)
            told = f"rank {rank} {told}"
            time.sleep(moments.uniform(0, 0.5))
    kill_all({*members, *family(process)})
    process.wait()
    return told


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A run's processes: torchrun gives each of its own a session of its own, which no signal to a group reaches."""
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def kill_all(members: set[psutil.Process]):
    """Kills processes and waits until all are gone."""
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    _, alive = psutil.wait_procs(members, timeout=30)
    if alive:
        sys.exit(f"processes {[member.pid for member in alive]} could not be killed")


def stop_waiting_at(process: subprocess.Popen, output: Path, deadline: float | None = None, until=lambda: False):
    """Returns at a time or as soon as something is so; the run has to be going on."""
    patience = time.monotonic() + PATIENCE
    while not until() and (deadline is None or time.monotonic() < deadline):
        if process.poll() is not None or time.monotonic() > patience:
            wait_for(process, output)
            sys.exit("the run ended before it could be killed; give more steps with --steps")
        time.sleep(0.0005)


def kill_rank(members: list[psutil.Process], rank: int):
    """Kills one of the processes that a launcher started, which must be there."""
    (chosen,) = (member for member in members[1:] if member.environ().get("RANK") == str(rank))
    chosen.kill()


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run, the oldest first."""
    return sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def newest(output: Path) -> str:
    """The name of the newest whole checkpoint."""
    found = checkpoints(output)
    return found[-1].name if found else "none"


def unfinished(output: Path) -> dict[tuple, str]:
    """The names of checkpoints that are being written, or were left so, by what tells one folder from another."""
    found = {}
    for path in output.glob(".checkpoint-*.unfinished"):
        with contextlib.suppress(FileNotFoundError):
            found[path.stat().st_ino, path.stat().st_mtime_ns] = path.name.strip(".").split(".")[0]
    return found


def compare(folder: Path, kills: int) -> int:
    """Compares weights and logged losses of both runs; returns the exit status."""
    weights = [(folder / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    logs = [
        [
            {key: value for key, value in entry.items() if key == "step" or key.startswith(COMPARED)}
            for entry in json.loads((folder / name / "final" / "results.json").read_text())["history"]
            if "loss" in entry
        ]
        for name in ("whole", "killed")
    ]
    same = sum(one == other for one, other in zip(*logs, strict=False))
    is_same = weights[0] == weights[1] and logs[0] == logs[1] and len(logs[0]) > 0
    print(f"{kills} kills: weights {'equal' if weights[0] == weights[1] else 'DIFFER'} ({len(weights[0]):,} bytes), "
          f"{same} of {len(logs[0])} logged losses equal")  # fmt: skip
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
