"""The benchmark of scale sets the growth of seconds beside that of the work."""

import json

import pytest
from tiny import SIZES as TINY

from modeling_cjepa import CJepaConfig
from trainers import scale_cost
from trainers.bare_steps import SIZES
from trainers.cli import main
from trainers.scale_cost import PROCESSES, benchmark_scale, grown_by


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(SIZES, "small", TINY | {"predictor_num_attention_heads": 2, "min_context_patches": 4})


def test_what_grows():
    grown = {name: (CJepaConfig(**TINY | changes), factor) for name, (changes, factor) in grown_by(TINY).items()}
    assert [config.grid_size for config, _ in grown.values()] == [(16, 16), (8, 8), (8, 8), (8, 8)]
    assert [factor for _, factor in grown.values()] == [1, 8, 1, 1]
    assert [config.num_levels for config, _ in grown.values()] == [1, 1, 2, 1]
    assert [config.num_hidden_layers for config, _ in grown.values()] == [2, 2, 2, 4]


def test_every_growth_is_measured_and_two_processes_do_the_work_of_one(small, tmp_path, capsys):
    output = tmp_path / "scale.json"
    flags = ["--size", "small", "--batch_size", "8", "--rounds", "2", "--precision", "float32"]
    assert main(["benchmark", "scale", *flags, "--output", str(output)]) == 0
    found = json.loads(output.read_text())["growths"]
    assert list(found) == ["image side x2", "batch x8", "levels +1", "layers x2", PROCESSES]
    # more images of a batch leave fewer patches in all of its contexts
    assert 5 < found["batch x8"]["flops"] <= 8 and found["image side x2"]["flops"] > 3
    assert 1 < found["levels +1"]["flops"] < 2 and 1 < found["layers x2"]["flops"] < 2
    assert found[PROCESSES]["flops"] == pytest.approx(1.1, rel=0.2)  # of longer contexts, as of smaller batches
    assert all(row["before"]["low"] > 0 for row in found.values())
    assert "processes x2" in capsys.readouterr().out and (tmp_path / "scale.png").stat().st_size > 0


def test_excess_is_the_growth_of_seconds_over_that_of_the_work():
    found = scale_cost._summary([((1.0, 10), (6.0, 40)), ((2.0, 10), (8.0, 20))])
    assert found["seconds"]["median"] == 5 and found["flops"] == 3
    assert found["excess"]["median"] == (6 / 4 + 4 / 2) / 2
    assert found["before"]["median"] == 1.5 and found["after"]["median"] == 7


def test_a_step_s_work_is_that_of_all_of_its_images(small, monkeypatch):
    monkeypatch.setattr(scale_cost, "model_flops", lambda config, *lengths: {"predictor": 3, "context encoder": 2})
    monkeypatch.setattr(scale_cost, "_rounds_of_processes", lambda *arguments: [((1.0, 1), (1.0, 1))] * 2)
    steps = scale_cost.Steps(SIZES["small"], 4, "float32", scale_cost.torch.device("cpu"))
    before = steps.model.predictor.mask_token.clone()
    assert steps.round()[1] == 20 and not before.equal(steps.model.predictor.mask_token)
    assert benchmark_scale("small", 4, 2, "float32")["growths"]["batch x8"]["flops"] == 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["--size", "huge"], "--size 'huge' is not known"), (["--rounds", "1"], "--rounds 1 2 or more"),
     (["--batch_size", "7"], "--batch_size 7 must be an even number from 4 up"),
     (["--output", "cost.png"], "--output cost.png is no JSON file")],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_sentence(arguments, sentence, capsys):
    assert main(["benchmark", "scale", *arguments]) == 2
    assert sentence in capsys.readouterr().err
