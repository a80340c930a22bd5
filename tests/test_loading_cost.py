"""`cjepa benchmark loading` on models of a few layers: it loads what it says, and measures all of it."""

import pytest

from trainers.cli import main
from trainers.errors import InputError
from trainers.loading_cost import WHAT, benchmark_loading, format_loading_cost

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def test_each_kind_is_loaded_and_measured():
    results = benchmark_loading(2, **SMALL, image_size=32, patch_size=8)
    assert results.keys() == WHAT.keys()
    # the positions, 16 of 32, are parameters of IJepaModel's alone
    assert results["ijepa"]["parameters"] - 16 * 32 == results["encoder"]["parameters"]
    assert results["whole"]["parameters"] == results["encoder"]["parameters"]
    assert all(row["seconds"]["low"] > 0 and row["megabytes"]["low"] > 0 for row in results.values())
    assert results["ijepa"]["seconds"]["factor"] == results["ijepa"]["megabytes"]["factor"] == 1
    assert format_loading_cost(results).count("\n") == 4


def test_one_round_is_refused(capsys):
    with pytest.raises(InputError, match="--rounds 1"):
        benchmark_loading(1)
    assert main(["benchmark", "loading", "--rounds", "1"]) == 2 and "Traceback" not in capsys.readouterr().err
