"""The cost of levels: a row for each number of them, of the models the recipe builds, and memory that adds up."""

import pytest
import torch
from tiny import FLAGS, sjea_level
from torch import nn

from trainers.cli import main
from trainers.errors import InputError
from trainers.level_cost import _Step, benchmark_levels, format_level_cost
from trainers.model_facts import count
from trainers.recipes import read_recipe

LEVELS = [sjea_level(), sjea_level(), sjea_level()]
UPPER = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}


def recipe_of(name):
    if name == "sjea":
        return read_recipe("sjea_cifar10", {"levels": LEVELS, "level": 1})
    sizes = {flag.removeprefix("--"): int(value) for flag, value in zip(FLAGS[:14:2], FLAGS[1:14:2], strict=True)}
    return read_recipe("cjepa_scenes", sizes | {"upper_levels": [UPPER], "min_context_patches": 8})


@pytest.mark.parametrize(("name", "num_levels"), [("sjea", 3), ("cjepa", 2)])
def test_a_row_for_each_number_of_levels(name, num_levels):
    recipe = recipe_of(name)
    rows = benchmark_levels(recipe, batch_size=4, num_rounds=2)
    assert [row["levels"] for row in rows] == list(range(1, num_levels + 1))
    whole = recipe.objective.build_model(recipe.model, "sdpa")
    assert rows[-1]["parameters"] == count(whole) > rows[0]["parameters"]
    for before, after in zip(rows, rows[1:], strict=False):
        assert after["activations"] > before["activations"] > 0 and after["states"] > before["states"]
    assert rows[0]["factor"] == 1 and rows[1]["factor"] == pytest.approx(rows[1]["median"] / rows[0]["median"])
    table = format_level_cost(rows)
    assert table.count("\n") == 1 + num_levels and f"\n| {num_levels} " in table


class Loss(nn.Module):
    """A layer of 512 x 1024 whose loss keeps its input and its output, of 256 rows, for the backward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(512, 1024, bias=False)

    def forward(self, x):
        output = self.layer(x)
        self.loss = (output * output).sum()
        return self


def test_memory_is_that_of_what_is_kept(monkeypatch):
    monkeypatch.setattr("trainers.level_cost.computes_in_bf16", lambda device: False)
    memory = _Step(Loss(), torch.randn(256, 512)).memory()
    assert memory["parameters"] == 512 * 1024
    assert memory["states"] == 4 * 512 * 1024 * 4 / 2**20  # weights, gradients and two averages
    assert memory["activations"] == (256 * 512 + 256 * 1024) * 4 / 2**20  # the weights are no activations


def test_command(capsys):
    assert main(["benchmark", "levels", "no_such_recipe"]) == 2
    assert "no recipe 'no_such_recipe'" in capsys.readouterr().err
    with pytest.raises(InputError, match="--batch_size 1 and --rounds 5 must be 2 or more"):
        benchmark_levels(recipe_of("sjea"), batch_size=1)
