"""The benchmark of memory measures processes, and the estimate of a step is near what they take."""

import json

import pytest
import torch
from tiny import SIZES as TINY

from modeling_cjepa import CJepaConfig, CJepaForPreTraining
from trainers import memory_cost
from trainers.bare_steps import SIZES
from trainers.cli import main
from trainers.dry_step import DryStep
from trainers.estimate import MARGIN
from trainers.memory_cost import benchmark_memory
from trainers.objectives import OBJECTIVES

WIDE = TINY | {"hidden_size": 128, "intermediate_size": 512, "predictor_hidden_size": 64,
               "predictor_num_attention_heads": 2}  # fmt: skip


def test_a_process_takes_what_its_tensors_are_and_the_estimate_s_margin():
    few, many = memory_cost._in_a_process("ours", WIDE, (32, 256), "float32")
    with torch.device("meta"):
        model = CJepaForPreTraining._from_config(CJepaConfig(**WIDE))
    objective = OBJECTIVES["cjepa"]
    dry = DryStep(model, lambda size: objective.random_batch(model.config, size), False, torch.optim.AdamW)
    assert dry.peak(256) == pytest.approx(many["tensors"], rel=0.15)  # of other masks
    taken, tensors = (many[name] - few[name] for name in ("peak", "tensors"))
    assert 224 * 2**19 < tensors < taken < 1.3 * MARGIN["cpu"] * tensors


@pytest.fixture
def processes(monkeypatch):
    """What processes would find: a fixed part, and a part of each image."""
    asked, megabytes = [], {"reference": (100, 10), "ours": (100, 5), "checkpointed": (100, 1)}

    def found(kind, sizes, batch_sizes, precision):
        asked.append((kind, sizes, precision))
        fixed, of_image = megabytes[kind]
        return [{"peak": (fixed + of_image * size) * 2**20, "tensors": 7 * 2**20} for size in batch_sizes]

    monkeypatch.setattr(memory_cost, "_in_a_process", found)
    monkeypatch.setattr(memory_cost, "free_memory", lambda device: 1100 * 2**20)
    monkeypatch.setitem(SIZES, "small", WIDE)
    return asked


def test_ratios_bytes_an_image_and_the_largest_batch(processes):
    found = benchmark_memory("small", 40, 2, "float32")
    assert found["batch_sizes"] == [10, 40]
    assert found["ours"]["ratio"] == 300 / 500 and found["ours"]["bytes_per_image"] == 5 * 2**20
    largest = [found[kind]["largest_batch_size"] for kind in ("reference", "ours", "checkpointed")]
    assert largest == [100, 200, 1000]
    # in turns, twice each
    assert [kind for kind, _, _ in processes] == 2 * ["reference", "ours", "checkpointed"]


def test_the_command_prints_and_writes(processes, tmp_path, capsys):
    output = tmp_path / "memory.json"
    flags = ["--size", "small", "--batch_size", "40", "--rounds", "2", "--precision", "bf16", "--output", str(output)]
    assert main(["benchmark", "memory", *flags]) == 0
    assert "300 (300 - 300)" in capsys.readouterr().out
    assert json.loads(output.read_text())["checkpointed"]["40"]["peak"]["median"] == 140 * 2**20
    assert (tmp_path / "memory.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--size", "huge"], "--size 'huge' is not known"), (["--rounds", "1"], "--rounds 1 2 or more"),
     (["--batch_size", "4"], "--batch_size 4 must be 8 or more"), (["--precision", "fp8"], "'fp8' is not known")],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_sentence(arguments, sentence, capsys):
    assert main(["benchmark", "memory", *arguments]) == 2
    assert sentence in capsys.readouterr().err
