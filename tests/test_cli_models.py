"""What `--help` says of the images that a command on a saved model takes."""

import pytest

from trainers.cli import main


@pytest.mark.parametrize(
    ("command", "dataset", "mean"),
    [
        ("evaluate", "that of the run", "MODEL's"),
        ("finetune", "that of the run", "MODEL's"),
        ("features", "that of the run", "MODEL's"),
        ("visualize levels", "that of the run", "MODEL's"),
        ("visualize predictions", "that of the run", "MODEL's"),
        ("probe segmentation", "scenes", "[0.485, 0.456, 0.406]"),
    ],
)
def test_help_says_which_images_are_the_default(capsys, command, dataset, mean):
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    defaults = [
        said.split(f" --{name} [X ...]")[1].split("(default ")[1].split(")")[0] for name in ("dataset", "image_mean")
    ]
    assert defaults == [dataset, mean]
    assert ("without --dataset what is not given is as in the run that made MODEL" in said) == (dataset != "scenes")
