"""`cjepa evaluate`, and what the commands on saved models share; `cli_visualize.py` has the pictures."""

import argparse
import dataclasses

from trainers.errors import InputError

# what of a run's recipe makes its evaluation, beside the seed
_REPEATED = (
    "dataset", "dataset_config", "train_split", "eval_split", "image_column", "label_column", "num_train_images",
    "num_eval_images", "image_mean", "image_std", "num_neighbors", "temperature", "num_probe_images",
)  # fmt: skip


def add_evaluate(commands):
    """`cjepa evaluate MODEL`."""
    from trainers.evaluation import EvaluationArguments
    from trainers.flags import add_flags, type_hints
    from trainers.sources import AUGMENTATIONS, DataArguments

    parser = model_parser(
        commands,
        "evaluate",
        usage="cjepa evaluate MODEL [--key value ...]",
        help="kNN and linear probe of a frozen encoder, beside a random encoder and raw pixels",
        description="Evaluate the frozen encoder of a model (C-JEPA: the target encoder; a stack: one level or "
        "all) by weighted kNN and a linear probe, beside other models, a randomly initialised encoder and raw pixels, "
        "with 95 % intervals; the table goes to the screen, all figures to --output. Without --dataset the images "
        "are those of the run that made the model. With --suite every usual probe is run on every kind of features.",
        epilog="examples:  cjepa evaluate runs/mine/final --dataset my/photos --output results.json\n"
        "           cjepa evaluate runs/mine/final --suite small --card runs/mine/final/README.md\n"
        "           cjepa evaluate runs/stack/final --level all --beside vicreg=runs/vicreg/final",
    )
    parser.add_argument("--output", metavar="FILE", help="write all figures to this JSON file")
    parser.add_argument(
        "--level", metavar="K", type=level_value, help="level of a stack, from 0; `all`: each, and all side by side "
        "(default: the level that AutoModel gives)",
    )  # fmt: skip
    parser.add_argument(
        "--beside", metavar="[NAME=]MODEL", nargs="*", action="extend", default=[],
        help="other models to evaluate in the same table",
    )  # fmt: skip
    parser.add_argument(
        "--suite", metavar="NAME", help="run the protocol suite: kNN with k 20 and 200, linear probe, linear probe on "
        "1 %% and 10 %% of the labels, attentive probe; of target and context encoder, of the last and the last four "
        "layers; 95 %% intervals by bootstrap. `small` fits linear probes exactly; `imagenet` sweeps over learning "
        "rates and weight decays at once, for features too many for that",
    )  # fmt: skip
    parser.add_argument(
        "--card", metavar="FILE", help="with --suite: write the figures into the metadata (model-index) of this model "
        "card, too, such as runs/mine/final/README.md",
    )  # fmt: skip
    hints = {name: hint for name, hint in type_hints(DataArguments).items() if name not in AUGMENTATIONS}
    add_data_flags(parser, DataArguments(), hints)
    add_flags(parser, "evaluation", EvaluationArguments(), type_hints(EvaluationArguments))
    parser.set_defaults(run=run_evaluate, parser=parser)


def model_parser(commands, name: str, usage: str, metavar: str = "MODEL", **texts: str) -> argparse.ArgumentParser:
    """
    The parser of a command on a saved model.

    Args:
        commands: Where to, the subparsers of `cjepa` or of one of its commands.
        name (`str`): What the command is called.
        usage (`str`): The first line of its `--help`.
        metavar (`str`): What its argument is called.
        texts (`str`): `help`, `description` and `epilog`, as argparse has them.

    Returns:
        `argparse.ArgumentParser`: With that argument.
    """
    parser = commands.add_parser(
        name, usage=usage, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **texts
    )
    parser.add_argument(
        "model",
        metavar=metavar,
        help="a folder such as runs/mine/final, or the id of a model on the Hub; before all flags",
    )
    return parser


def run_evaluate(namespace):
    """Evaluates a model and prints the table."""
    from pathlib import Path

    from modeling_cjepa.configuration_cjepa import pair
    from trainers.eval_results import write_eval_results
    from trainers.evaluation import EvaluationArguments, evaluate_model
    from trainers.files import full_disk_named, write_json
    from trainers.flags import dataclass_from_flags
    from trainers.loading import load_encoder_config
    from trainers.reports import format_suite, format_table
    from trainers.sources import DataArguments, load_sources
    from trainers.subject import check_level
    from trainers.suite import evaluate_suite

    if namespace.output and (Path(namespace.output).is_dir() or not Path(namespace.output).parent.is_dir()):
        raise InputError(f"--output {namespace.output} is no file in an existing folder; mend it.")
    check_suite_flags(namespace)
    data = dataclass_from_flags(namespace, DataArguments)
    evaluation = dataclass_from_flags(namespace, EvaluationArguments)
    config = load_encoder_config(namespace.model)
    check_level(namespace.level, config)
    beside = named_models(namespace.beside, ("encoder", "target encoder", "context encoder", "random encoder"))
    for other in beside.values():
        load_encoder_config(other)  # a mistake is told before images are read
    data, evaluation = as_in_the_run(namespace, namespace.model, data, evaluation)
    train_source, eval_source = load_sources(data, max(pair(config.image_size)), not evaluation.disable_tqdm)
    images = train_source, eval_source
    settings = {
        "arguments": evaluation, "image_mean": data.image_mean, "image_std": data.image_std,
        "level": namespace.level, "beside": beside,
    }  # fmt: skip
    if namespace.suite:
        results = evaluate_suite(namespace.model, *images, namespace.suite, **settings)
        print(format_suite(results))
    else:
        results = evaluate_model(namespace.model, *images, **settings)
        print(format_table(results))
    if namespace.output:
        with full_disk_named(Path(namespace.output).parent):
            write_json(namespace.output, results)
    if namespace.card:
        write_eval_results(results, namespace.card, own_name(namespace.model))


def check_suite_flags(namespace):
    """Refuses a suite or a card that is not there, and flags that do not go together, before images are read."""
    from trainers.eval_results import check_card
    from trainers.suite import NUM_NEIGHBORS, check_suite

    if namespace.card and not namespace.suite:
        raise InputError(f"--card {namespace.card} holds what a suite finds; give --suite small, too.")
    if not namespace.suite:
        return
    check_suite(namespace.suite)
    if "num_neighbors" in vars(namespace):
        raise InputError(f"--num_neighbors: a suite's are {NUM_NEIGHBORS[0]} and {NUM_NEIGHBORS[1]}; leave it out.")
    if "context_encoder" in vars(namespace):
        raise InputError("--context_encoder: a suite evaluates it wherever a model has one; leave it out.")
    if namespace.card:
        check_card(namespace.card)


def add_level(parser: argparse.ArgumentParser):
    """The flag that chooses a level of a stack."""
    parser.add_argument("--level", metavar="K", type=int, help="level of a stack, from 0 (default: as AutoModel)")


def add_output(parser: argparse.ArgumentParser, what: str):
    """The flag for the folder that [`output_folder`] gives."""
    parser.add_argument("--output", metavar="FOLDER", help=f"where to (default: `{what}` in the model's folder)")


def output_folder(namespace, what: str):
    """Where a command writes: the folder of `--output`, or one called as `what` in the model's or the current one."""
    from pathlib import Path

    in_model = Path(namespace.model) / what if Path(namespace.model).is_dir() else Path(what)
    folder = Path(namespace.output or in_model)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; name a folder.")
    return folder


def own_name(model: str) -> str:
    """What a model is called that nobody named: by its run's folder."""
    return str(model).rstrip("/").removesuffix("/final").rpartition("/")[2]


def add_data_flags(parser: argparse.ArgumentParser, defaults, hints: dict[str, object]):
    """The flags of the images, as [`add_flags`] makes them, for a command that calls [`as_in_the_run`]."""
    from trainers.flags import add_flags

    title = "data (without --dataset what is not given is as in the run that made MODEL)"
    told = {"dataset": "that of the run", "image_mean": "MODEL's", "image_std": "MODEL's"}
    add_flags(parser, title, defaults, hints, told=told)


def level_value(text: str) -> int | str:
    """A level as a number, or `all`."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no level; give a number from 0, or all") from error


def named_models(given: list[str], taken=()) -> dict[str, str]:
    """Models by the names they were given as `NAME=MODEL`; a folder's own where none was given."""
    named = {}
    for text in given:
        name, equals, path = text.partition("=")
        path = path if equals else text
        name = name if equals else own_name(path)
        if not name or not path:
            raise InputError(f"--beside {text}: give a name and a model, as in vicreg=runs/vicreg/final.")
        if name in named or name in taken:
            raise InputError(f"--beside {text}: there is a {name!r} already; give another name, as in other={path}.")
        named[name] = path
    return named


def as_in_the_run(namespace, model: str, *arguments) -> list:
    """
    Arguments of the command line with what it leaves out as it was in the run that made the model.

    Nothing is taken from the run where the command line names other images.
    """
    if "dataset" in vars(namespace):
        return list(arguments)
    from trainers.loading import load_run_settings

    settings = load_run_settings(model)
    if not settings:
        raise InputError(f"{model} does not tell which images it was made of; name some with --dataset.")
    names = [name for name in _REPEATED if name in settings and name not in vars(namespace)]
    return [
        dataclasses.replace(each, **{name: settings[name] for name in names if hasattr(each, name)})
        for each in arguments
    ]
