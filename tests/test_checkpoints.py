"""Whether a checkpoint fits the recipe it is resumed with, and what is said where it does not."""

import pytest
from tiny import sjea_level

from modeling_cjepa import SJeaConfig
from trainers.checkpoints import check_same_model
from trainers.errors import InputError
from trainers.recipes import first_difference


@pytest.mark.parametrize(
    ("before", "now", "where", "values"),
    [
        (4, 8, "levels", (4, 8)),
        ([{"a": 1}, {"a": 1, "b": [2, 3]}], [{"a": 1}, {"a": 1, "b": [2, 4]}], "levels[1].b[1]", (3, 4)),
        ([{"a": 1}], [{"a": 1, "b": 2}], "levels[0].b", (None, 2)),
        ([{"a": 1}], [{"a": 1}, {}], "number of levels", (1, 2)),
        ({"a": [1]}, {"a": {"b": 1}}, "levels.a", ([1], {"b": 1})),
    ],
)
def test_the_first_difference_of_settings_is_found_inside_them(before, now, where, values):
    assert first_difference("levels", before, now) == (where, *values)


def test_a_changed_level_is_named_on_resuming(tmp_path):
    SJeaConfig(levels=[sjea_level(), sjea_level(covariance_weight=0.04)]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"trained with levels\[1\].covariance_weight=0.04, the recipe says 0.5"):
        check_same_model(str(tmp_path), SJeaConfig(levels=[sjea_level(), sjea_level(covariance_weight=0.5)]))
