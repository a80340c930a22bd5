"""The launch configurations, read by Accelerate and started where a CPU can; the SLURM script with a fake SLURM."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType
from tiny import FLAGS

from trainers.training_args import JepaTrainingArguments

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "scripts/accelerate"
# file -> what it starts: distributed_type, processes, machines, mixed precision
EXPECTED = {
    "one_gpu": (DistributedType.NO, 1, 1, "bf16"),
    "many_gpus": (DistributedType.MULTI_GPU, 8, 1, "bf16"),
    "two_nodes": (DistributedType.MULTI_GPU, 16, 2, "bf16"),
    "fsdp2": (DistributedType.FSDP, 8, 1, "bf16"),
    "zero2": (DistributedType.DEEPSPEED, 8, 1, "no"),
    "zero3": (DistributedType.DEEPSPEED, 8, 1, "no"),
    "cpu_two_processes": (DistributedType.MULTI_GPU, 2, 1, "no"),
}
ARGUMENTS = ["cjepa_scenes", *FLAGS, "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
# Gloo's threads must have ended with the command: one left to the interpreter's end may abort the process
THREADS_AT_END = """
import sys
from pathlib import Path
from trainers.cli import main
assert main(sys.argv[1:]) == 0
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
assert not any("gloo" in name for name in names), names
"""
FAKE_SRUN = """#!/bin/bash
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & jobs+=" $!"; done
for job in $jobs; do wait $job || exit 1; done
"""
FAKE_SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$*" >> "$(dirname "$0")/asked"; fi
"""


def load(name: str) -> ClusterConfig:
    return ClusterConfig.from_yaml_file(str(CONFIGS / f"{name}.yaml"))


def test_every_configuration_is_known():
    assert {path.stem for path in CONFIGS.glob("*")} == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_accelerate_reads_the_configuration(name):
    config = load(name)
    found = config.distributed_type, config.num_processes, config.num_machines, config.mixed_precision
    assert found == EXPECTED[name]
    assert config.use_cpu is False and config.machine_rank == 0 and config.dynamo_config == {}
    assert f"scripts/accelerate/{name}.yaml" in (CONFIGS / f"{name}.yaml").read_text()


def test_shards_are_those_that_are_tested():
    sharded = load("fsdp2").fsdp_config
    assert sharded["fsdp_version"] == 2 and sharded["fsdp_transformer_layer_cls_to_wrap"] == "CJepaLayer"
    assert sharded["fsdp_auto_wrap_policy"] == "TRANSFORMER_BASED_WRAP"
    assert sharded["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    assert [load(f"zero{stage}").deepspeed_config["zero_stage"] for stage in (2, 3)] == [2, 3]
    assert load("zero3").deepspeed_config["zero3_save_16bit_model"] is True


def test_a_process_uses_one_of_several_gpus(tmp_path):
    """transformers would put them into `DataParallel`, which it makes out by `n_gpu`."""
    args = JepaTrainingArguments(str(tmp_path), use_cpu=True, precision="float32", per_device_train_batch_size=8)
    assert args.describe_devices() == "1 process on cpu in float32"
    args._n_gpu = 4
    assert (args.n_gpu, args.train_batch_size, args.eval_batch_size) == (1, 8, args.per_device_eval_batch_size)
    assert "one of 4 GPUs; torchrun or accelerate launch" in args.describe_devices()


def run(command: list, **environment: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def assert_trained(folder: Path, printed: str):
    training = json.loads((folder / "final/results.json").read_text())["training"]
    assert training["processes"] == 2 and training["steps"] == 2
    assert "2 processes on cpu" in printed and "statistics over 2 processes" in printed


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run that Accelerate has launched by the configuration for CPUs, and what it printed."""
    output = tmp_path_factory.mktemp("launched") / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "cpu_two_processes.yaml"]
    return output, run([*launch, "scripts/pretrain.py", *ARGUMENTS, "--output_dir", output])


def test_two_processes_start_on_a_cpu(launched):
    assert_trained(*launched)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_no_thread_of_several_processes_outlives_the_command(tmp_path):
    (tmp_path / "command.py").write_text(THREADS_AT_END)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run([*launch, tmp_path / "command.py", "pretrain", *ARGUMENTS, "--output_dir", tmp_path / "run"])


def fake_slurm(folder: Path, srun: str) -> dict[str, str]:
    """Environment of a job in which `srun` is another program."""
    python = f'#!/bin/bash\nexec {sys.executable} "$@"\n'
    for name, text in (("srun", srun), ("scontrol", FAKE_SCONTROL), ("python", python)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    return {
        "PATH": path, "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_JOB_ID": str(os.getpid())
    }  # fmt: skip


@pytest.mark.parametrize(
    ("status", "is_queued"), [(0, True), (138, True), (1, False), (143, False)], ids=["saved", "usr1", "error", "term"]
)
def test_slurm_script_queues_a_job_again_that_was_stopped(tmp_path, status, is_queued):
    environment = os.environ | fake_slurm(tmp_path, f"#!/bin/bash\nexit {status}\n")
    command = ["bash", ROOT / "scripts/slurm/pretrain.sbatch", "cjepa_scenes", "--output_dir", tmp_path / "run"]
    assert subprocess.run(command, env=environment).returncode == status
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == (f"requeue {os.getpid()}\n" if is_queued else "")


def test_slurm_script_goes_on_with_a_stopped_run(tmp_path, launched):
    slurm = fake_slurm(tmp_path, FAKE_SRUN)
    # as if the run had been stopped after its first step
    output = tmp_path / "run"
    shutil.copytree(launched[0], output, ignore=shutil.ignore_patterns("final", "checkpoint-2"))
    script = ["bash", "scripts/slurm/pretrain.sbatch", *ARGUMENTS, "--output_dir", output]
    printed = run(script, **slurm)
    assert_trained(output, printed)
    assert f"going on from {output}/checkpoint-1" in printed
    assert not (tmp_path / "asked").exists()  # a run that has ended is not queued again


def test_slurm_script_asks_for_an_output_folder():
    done = subprocess.run(
        ["bash", ROOT / "scripts/slurm/pretrain.sbatch", "cjepa_scenes"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "--output_dir" in done.stderr
