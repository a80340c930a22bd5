"""The benchmark measures what it says: the same grids, two samplers that both draw legal masks."""

import pytest
import torch

from trainers.benchmark import GRIDS, benchmark_masks, format_benchmark, loop_masks
from trainers.errors import InputError


@pytest.mark.parametrize("grid", [6, 14])
def test_loop_draws_i_jepas_masks(grid):
    context_ids, target_ids = loop_masks(16, grid, torch.Generator().manual_seed(0))
    assert context_ids.shape[0] == 16 and target_ids.shape[:2] == (16, 4)
    assert context_ids.shape[1] > 10
    assert (context_ids[:, 1:] > context_ids[:, :-1]).all()
    if grid == 14:
        for context, targets in zip(context_ids, target_ids, strict=True):
            assert not set(context.tolist()) & set(targets.flatten().tolist())
    # the fault of the authors' law: neither the last row nor the last column is ever used
    ids = torch.cat([context_ids.flatten(), target_ids.flatten()])
    assert (ids // grid).max() < grid - 1 and (ids % grid).max() < grid - 1


def test_benchmark_has_a_row_a_grid_and_leaves_the_threads_alone():
    threads = torch.get_num_threads()
    rows = benchmark_masks(batch_size=4, num_rounds=2)
    assert [row["grid"] for row in rows] == [f"{grid}x{grid}" for grid in GRIDS]
    assert all(row["factor"] == pytest.approx(row["loop"] / row["median"]) for row in rows)
    assert torch.get_num_threads() == threads
    table = format_benchmark(rows)
    assert table.count("\n") == 1 + len(GRIDS) and "14x14" in table


@pytest.mark.parametrize("sizes", [(0, 5), (4, 1)])
def test_benchmark_refuses_sizes_that_measure_nothing(sizes):
    with pytest.raises(InputError, match="--batch_size"):
        benchmark_masks(*sizes)
