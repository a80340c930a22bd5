"""What the tests of pictures share: image files, what an encoder reads of one, and a command that is refused."""

import numpy as np
import torch
from test_datasets import picture

from trainers.cli import main

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def image_files(folder, number=2, size=(32, 32)) -> list[str]:
    """Files of noise, which a model of that size sees as they are."""
    files = [str(folder / f"image{index}.png") for index in range(number)]
    for index, file in enumerate(files):
        picture(index, size).save(file)
    return files


def read_by(number: int, size=(32, 32)) -> torch.Tensor:
    """What a model is given of such an image: (1, 3, H, W)."""
    pixels = torch.from_numpy(np.array(picture(number, size))) / 255
    return ((pixels - MEAN) / STD).permute(2, 0, 1).unsqueeze(0)


def refused(capsys, *arguments) -> str:
    """The one sentence with which `cjepa visualize` ends."""
    assert main(["visualize", *map(str, arguments)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("cjepa: ")
    return said
