"""`cjepa doctor`: has a run collapsed?"""

import json
import sys

from trainers.cli_models import add_data_flags, as_in_the_run, model_parser
from trainers.errors import InputError

NUM_IMAGES = 2048
# 1 is Python's own for an error of the program
ILL_STATUS = 3


def add_doctor(commands):
    """`cjepa doctor RUN`."""
    from trainers.flags import type_hints
    from trainers.sources import AUGMENTATIONS, DataArguments

    parser = model_parser(
        commands,
        "doctor",
        usage="cjepa doctor RUN [--key value ...]",
        metavar="RUN",
        help="say whether a run has collapsed, and what to change",
        description="Judge a run by its log: healthy, collapsed (the features shrank), dimensional collapse (few "
        "directions are left), diverged, not learning, or too short to tell; with what was seen, what to change, and "
        "the curves as doctor.png. RUN is the folder of a run, its `final`, or a checkpoint. Weights without a log, "
        "such as a model of the Hub, are judged by what they make of images (--dataset: by default those of the run, "
        f"or rendered scenes; {NUM_IMAGES:,} of the evaluation images, a fixed choice), beside a random encoder.",
        epilog=f"exit status: 0 healthy or too short to tell, {ILL_STATUS} ill, 2 a mistake in the command\n"
        "examples:  cjepa doctor runs/mine\n"
        "           cjepa doctor runs/mine/checkpoint-600 --json",
    )
    parser.add_argument("--output", metavar="FILE", help="the PNG to write (default: doctor.png beside the model)")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    hints = {name: hint for name, hint in type_hints(DataArguments).items() if name not in AUGMENTATIONS}
    add_data_flags(parser, DataArguments(), hints)
    parser.set_defaults(run=run_doctor, parser=parser)


def run_doctor(namespace) -> int:
    """Prints the verdict and draws the picture; gives `ILL_STATUS` of an ill run, else 0."""
    from trainers.doctor import diagnose
    from trainers.doctor_figure import draw_diagnosis, draw_spectra
    from trainers.doctor_runs import read_run

    record = read_run(namespace.model)
    picture = _picture(namespace, record.place)
    if record.history:
        diagnosis = diagnose(record.history, record.facts)
        draw_diagnosis(record.history, diagnosis, picture)
    else:
        diagnosis, spectra = _look_at_weights(namespace, record.place)
        draw_spectra(spectra, diagnosis, picture)
    if namespace.json:
        print(json.dumps({"run": namespace.model, "picture": str(picture), **diagnosis.to_dict()}, indent=2))
    else:
        print(f"{diagnosis}\nCurves in {picture}.")
    return ILL_STATUS if diagnosis.is_ill else 0


def _picture(namespace, place: str):
    from pathlib import Path

    picture = Path(namespace.output or (Path(place) if Path(place).is_dir() else Path()) / "doctor.png")
    if picture.is_dir() or not picture.parent.is_dir():
        raise InputError(f"--output {picture} is no file in an existing folder; mend it.")
    return picture


def _look_at_weights(namespace, place: str):
    """The diagnosis of weights alone on the images asked for."""
    from modeling_cjepa.configuration_cjepa import pair
    from trainers.doctor_runs import diagnose_weights
    from trainers.flags import dataclass_from_flags
    from trainers.loading import load_run_settings, load_with_statistics
    from trainers.sources import DataArguments, load_sources
    from trainers.subsets import choose_images

    data = dataclass_from_flags(namespace, DataArguments)
    if "dataset" not in vars(namespace) and load_run_settings(place):
        (data,) = as_in_the_run(namespace, place, data)
    model, *statistics = load_with_statistics(place, data.image_mean, data.image_std)
    print(
        f"no log of features in {place}: its weights are judged by their embeddings of {data.dataset}", file=sys.stderr
    )
    _, images = load_sources(data, max(pair(model.config.image_size)))
    return diagnose_weights(model.base_model, choose_images(images, NUM_IMAGES), *statistics)
