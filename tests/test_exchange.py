"""The line that says what processes send each other."""

import pytest
from tiny import sjea_level, tiny_model, tiny_sjea

from modeling_cjepa.losses_cjepa import exchange_bytes
from trainers.exchange import describe_exchange, format_bytes


def test_shapes_are_those_of_the_levels():
    upper = {"hidden_size": 48, "regularizer": "pair"}
    stack = tiny_model(upper_levels=[upper], regularizer="blocks", num_target_blocks=3, min_context_patches=8)
    assert stack.statistic_shapes() == [(3, 32, False), (2, 48, False)]
    assert tiny_model(expander_hidden_size=8).statistic_shapes() == [(1, 32, True)]
    views = tiny_sjea(sjea_level(), sjea_level(reads="expanded", expander_sizes=[12]))
    assert views.statistic_shapes() == [(2, 24, False), (2, 12, False)]


def test_line_tells_the_form_and_the_bytes():
    # 128 images of 384 features in 8 processes: sums are fewer; of 8192 features, embeddings are
    line = describe_exchange([(1, 384, False), (2, 8192, False), (1, 384, True)], 128, 8, 2)
    small, large = exchange_bytes(128, 384, 8), exchange_bytes(128, 8192, 8)
    assert small["reduced"] < small["gathered"] and large["gathered"] < large["reduced"]
    for part in (
        "over 8 processes",
        f"level 0 summed, {2 * small['reduced'] / 1e6:.1f} MB (gathered: {2 * small['gathered'] / 1e6:.1f} MB)",
        f"level 1 gathered, {4 * large['gathered'] / 1e6:.1f} MB (summed: {4 * large['reduced'] / 1e6:.1f} MB)",
        f"level 2 gathered, {2 * small['gathered'] / 1e6:.1f} MB (as batch norm needs them)",
    ):
        assert part in line


@pytest.mark.parametrize(("number", "text"), [(3072, "3.1 kB"), (2_500_000, "2.5 MB")])
def test_bytes_are_in_fitting_units(number, text):
    assert format_bytes(number) == text
