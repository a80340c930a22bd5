"""What `cjepa visualize WHAT --help` teaches."""

import pytest

from trainers.cli import main
from trainers.cli_pictures import place


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("attention", "softmax(Q K^T / sqrt(d)) of one layer"),
        ("pca", "from its 1st to its 99th percentile"),
        ("masks", "each outlined in a colour of its own"),
        ("predictions", "50 % is chance"),
    ],
)
def test_help_has_recipe_example_and_default(capsys, what, words):
    with pytest.raises(SystemExit) as ended:
        main(["visualize", what, "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert words in said and f"  cjepa visualize {what} runs/mine/final cat.jpg" in said
    assert f"default: `{what}` in the model's folder" in " ".join(said.split())


def test_a_place_is_a_row_and_a_column():
    assert place("3,4") == (3, 4)
