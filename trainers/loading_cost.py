"""What loading a published encoder costs beside transformers' own of the same size: time and memory, in turns."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import IJepaConfig, IJepaModel

from modeling_cjepa import CJepaConfig, CJepaForPreTraining
from trainers.benchmark import quartiles, shown
from trainers.errors import InputError
from trainers.publishing import save_model
from trainers.reports import markdown_table

# a ViT-B; everything else is the default of both
VIT_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
WHAT = {
    "ijepa": "transformers' IJepaModel",
    "encoder": "our encoder, published alone",
    "whole": "our encoder, of all three parts",
}
# begins a program that shall not find this package, wherever it is installed
WITHOUT_PACKAGE = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("modeling_cjepa", "trainers"):
            raise ModuleNotFoundError(f"No module named {name!r}")


sys.meta_path.insert(0, Absent())
"""
# in a process of its own: what is imported first is not measured, the code of the folder is
_LOAD = """
import json, re, sys, time
import torch
from transformers import AutoModel, IJepaModel
from transformers.utils import logging


def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))


logging.disable_progress_bar()
before = peak()
started = time.perf_counter()
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
seconds = time.perf_counter() - started
size = model.config.image_size
with torch.no_grad():
    model(torch.zeros(1, 3, size, size))  # reads the weights, which the file's mapping has put off
print(json.dumps({"seconds": seconds, "megabytes": (peak() - before) / 1024, "parameters": model.num_parameters()}))
"""


def benchmark_loading(num_rounds: int = 9, **sizes) -> dict:
    """
    Loads a published encoder and transformers' `IJepaModel` of the same size, each in a fresh process.

    Args:
        num_rounds (`int`): Rounds, each once of every kind, after one that is not counted.
        sizes: Fields of both configurations other than those of a ViT-B at 224 pixels.

    Returns:
        `dict`: Of each of [`WHAT`] the `parameters` and, of `seconds` (of loading) and `megabytes` (by which the
        process' peak grows in loading and a forward pass of one image), `median`, `low` and `high` (quartiles);
        `factor`, the median of the rounds' ratios to `IJepaModel`.

    Raises:
        InputError: Too few rounds to measure with, or a system that does not tell a process' peak.
    """
    if not Path("/proc/self/status").is_file():
        raise InputError("`cjepa benchmark loading` reads peaks of memory from /proc; run it on Linux.")
    if num_rounds < 2:
        raise InputError(f"--rounds {num_rounds} must be 2 or more.")
    sizes = VIT_B | sizes
    with tempfile.TemporaryDirectory() as temporary:
        folders = {name: Path(temporary, name) for name in WHAT}
        IJepaModel(IJepaConfig(**sizes)).save_pretrained(folders["ijepa"])
        model = CJepaForPreTraining(CJepaConfig(**sizes))
        save_model(model, None, folders["whole"])
        save_model(model.cjepa, None, folders["encoder"])
        rounds = [{name: _load(folder) for name, folder in folders.items()} for _ in shown(num_rounds, "loading")][1:]
    return {name: _summary([each[name] for each in rounds], [each["ijepa"] for each in rounds]) for name in WHAT}


def _load(folder: Path) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder.parent / "modules")}
    command = [sys.executable, "-c", WITHOUT_PACKAGE + _LOAD, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"loading {folder.name} failed: {done.stderr}")
    return json.loads(done.stdout)


def _summary(found: list[dict], theirs: list[dict]) -> dict:
    summary = {"parameters": found[0]["parameters"]}
    for unit in ("seconds", "megabytes"):
        ratios = [ours[unit] / other[unit] for ours, other in zip(found, theirs, strict=True)]
        summary[unit] = quartiles([each[unit] for each in found]) | {"factor": statistics.median(ratios)}
    return summary


def format_loading_cost(results: dict) -> str:
    """The results of [`benchmark_loading`] as a table."""
    cells = [["what is loaded", "parameters", "seconds (quartiles)", "factor", "MB of memory (quartiles)", "factor"]]
    for name, title in WHAT.items():
        row = results[name]
        seconds, memory = row["seconds"], row["megabytes"]
        cells.append([
            title,
            f"{row['parameters'] / 1e6:.1f} M",
            "{median:.2f} ({low:.2f}-{high:.2f})".format(**seconds),
            f"{seconds['factor']:.2f}",
            "{median:.0f} ({low:.0f}-{high:.0f})".format(**memory),
            f"{memory['factor']:.2f}",
        ])  # fmt: skip
    return "\n".join(markdown_table(cells))
