"""The order of a run's images: whole passes, the same whatever the number of processes."""

from itertools import islice

import pytest

from trainers.run_order import RunOrder, shares


def test_each_pass_holds_each_image_once_in_an_order_of_its_own():
    order = RunOrder(7, seed=3)
    places = [order.place(position) for position in range(21)]
    assert [epoch for epoch, _ in places] == [0] * 7 + [1] * 7 + [2] * 7
    passes = [[index for _, index in places[start : start + 7]] for start in (0, 7, 14)]
    assert all(sorted(indices) == list(range(7)) for indices in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_place_depends_on_nothing_that_was_asked_before():
    order = RunOrder(7, seed=3)
    forward = [order.place(position) for position in range(70)]
    assert [RunOrder(7, seed=3).place(position) for position in (69, 3)] == [forward[69], forward[3]]
    assert [order.place(position) for position in (69, 3)] == [forward[69], forward[3]]
    assert [RunOrder(7, seed=4).place(position) for position in range(70)] != forward


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_any_number_of_processes_shares_the_same_batches(num_ranks):
    parts = [list(islice(shares(5, 8 // num_ranks, rank, num_ranks), 3)) for rank in range(num_ranks)]
    for batch, start in enumerate((5, 13, 21)):
        positions = [list(ranges[batch]) for ranges in parts]
        assert sorted(sum(positions, [])) == list(range(start, start + 8))
        # image i of a batch is read by process i mod W
        assert all((position - start) % num_ranks == rank for rank in range(num_ranks) for position in positions[rank])
