"""The `cjepa` command."""

import argparse
import sys

from transformers.utils import logging

from trainers.errors import InputError, plain_message
from trainers.flags import closest


def main(arguments: list[str] | None = None) -> int:
    """
    Runs a command; a user's mistake ends it with one sentence and exit status 2.

    Args:
        arguments (`list[str]`, *optional*): The command line; that of the process when not given.

    Returns:
        `int`: The exit status.
    """
    namespace = parse(arguments)
    namespace.command = sys.argv[1:] if arguments is None else arguments
    # one bar says how far a command is; those of single files would break it up
    logging.disable_progress_bar()
    try:
        namespace.run(namespace)
    except InputError as error:
        return fail(plain_message(error))
    except KeyboardInterrupt:
        return fail("interrupted; a run that has saved a checkpoint goes on with --resume_from_checkpoint last.", 130)
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The parsed command line; a flag that is not known ends the command with the one that was probably meant."""
    parser = build_parser()
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for flag in namespace.parser._option_string_actions if flag.startswith("--")]
        meant = closest(unknown[0].partition("=")[0], flags)
        advice = f"did you mean {meant}?" if meant else "see --help."
        namespace.parser.error(f"{unknown[0]!r} is not known; {advice}")
    return namespace


def fail(sentence: str, status: int = 2) -> int:
    """Says why the command ends, on a line of its own below any progress bar."""
    print(f"\ncjepa: {sentence}", file=sys.stderr)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="cjepa",
        description="Self-supervised pre-training of image encoders with C-JEPA (contrastive JEPA, NeurIPS 2024) and "
        "S-JEA (stacked joint embedding architectures).",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (add_pretrain, add_evaluate, add_visualize, add_benchmark):
        add(commands)
    return parser


def add_pretrain(commands):
    """`cjepa pretrain RECIPE --any_field value`."""
    from trainers.recipes import add_recipe_flags
    from trainers.resources import recipe_names

    parser = commands.add_parser(
        "pretrain",
        help="pre-train an encoder by a recipe, evaluate and save it",
        description="Pre-train an encoder by a recipe: a YAML file, or one of those shipped "
        f"({', '.join(recipe_names())}). Every key of a recipe is a flag, too, which overrides it, and so is every "
        "other field of transformers.TrainingArguments.",
        epilog="examples:  cjepa pretrain cjepa_scenes --max_steps 100\n"
        "           cjepa pretrain cjepa_cifar10 --dataset my/photos --output_dir runs/mine\n"
        "           cjepa pretrain cjepa_cifar10 --output_dir runs/mine --resume_from_checkpoint last\n"
        "           accelerate launch scripts/pretrain.py cjepa_cifar10",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="cjepa pretrain RECIPE [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file or the name of a shipped recipe; before all flags"
    )
    add_recipe_flags(parser)
    parser.set_defaults(run=run_pretrain, parser=parser)


def run_pretrain(namespace):
    """Pre-trains by the recipe and the flags given."""
    from trainers.pretraining import pretrain
    from trainers.recipes import overrides_of, read_recipe

    recipe = read_recipe(namespace.recipe, overrides_of(namespace))
    recipe.command = namespace.command
    pretrain(recipe)


def add_evaluate(commands):
    """`cjepa evaluate MODEL --dataset ...`."""
    from trainers.evaluation import EvaluationArguments
    from trainers.flags import add_flags, type_hints
    from trainers.sources import AUGMENTATIONS, DataArguments

    parser = commands.add_parser(
        "evaluate",
        help="kNN and linear probe of a frozen encoder, beside a random encoder and raw pixels",
        description="Evaluate the frozen encoder of a model (C-JEPA: the target encoder; a stack: one level or "
        "all) by weighted kNN and a linear probe, beside other models, a randomly initialised encoder and raw pixels, "
        "with 95 % intervals; the table goes to the screen, all figures to --output.",
        epilog="examples:  cjepa evaluate runs/mine/final --dataset my/photos --output results.json\n"
        "           cjepa evaluate runs/stack/final --level all --beside vicreg=runs/vicreg/final",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="cjepa evaluate MODEL --dataset DATASET [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder such as runs/mine/final, or the id of a model on the Hub; before all flags",
    )
    parser.add_argument("--output", metavar="FILE", help="write all figures to this JSON file")
    parser.add_argument(
        "--level", metavar="K", type=level_value, help="level of a stack, from 0; `all`: each, and all side by side "
        "(default: the level that AutoModel gives)",
    )  # fmt: skip
    parser.add_argument(
        "--beside", metavar="[NAME=]MODEL", nargs="*", default=[], help="other models to evaluate in the same table"
    )
    hints = {name: hint for name, hint in type_hints(DataArguments).items() if name not in AUGMENTATIONS}
    add_flags(parser, "data", DataArguments(), hints)
    add_flags(parser, "evaluation", EvaluationArguments(), type_hints(EvaluationArguments))
    parser.set_defaults(run=run_evaluate, parser=parser)


def run_evaluate(namespace):
    """Evaluates a model and prints the table."""
    from pathlib import Path

    from modeling_cjepa.configuration_cjepa import pair
    from trainers.evaluation import EvaluationArguments, evaluate_model
    from trainers.files import full_disk_named, write_json
    from trainers.flags import dataclass_from_flags
    from trainers.loading import load_encoder_config
    from trainers.reports import format_table
    from trainers.sources import DataArguments, load_sources

    if namespace.output and (Path(namespace.output).is_dir() or not Path(namespace.output).parent.is_dir()):
        raise InputError(f"--output {namespace.output} is no file in an existing folder; mend it.")
    data = dataclass_from_flags(namespace, DataArguments)
    evaluation = dataclass_from_flags(namespace, EvaluationArguments)
    image_size = max(pair(load_encoder_config(namespace.model).image_size))
    train_source, eval_source = load_sources(data, image_size, not evaluation.disable_tqdm)
    beside = named_models(namespace.beside)
    statistics = data.image_mean, data.image_std
    results = evaluate_model(
        namespace.model, train_source, eval_source, evaluation, *statistics, level=namespace.level, beside=beside
    )
    print(format_table(results))
    if namespace.output:
        with full_disk_named(Path(namespace.output).parent):
            write_json(namespace.output, results)


def add_visualize(commands):
    """`cjepa visualize levels MODEL ... --dataset ...`."""
    from trainers.flags import add_flags, type_hints
    from trainers.sources import AUGMENTATIONS, DataArguments

    parser = commands.add_parser(
        "visualize",
        help="draw and measure what the levels of a stack tell apart",
        description="Draw what each level of a stack tells apart, and of other models beside it: t-SNE and PCA of the "
        "embeddings of evaluation images coloured by class, one class zoomed in with the nearest images of its "
        "sub-clusters, and numbers: silhouette, NMI of k-means and kNN for fine and coarse classes. Writes "
        "levels.html (a page to explore, on its own), levels.png, levels_class.png and levels.json.",
        epilog="examples:  cjepa visualize levels runs/stack/final --beside vicreg=runs/vicreg/final\n"
        "           cjepa visualize levels runs/a1/final,runs/a2/final --beside vicreg=runs/b1/final,runs/b2/final\n"
        "           (several runs, such as one a seed: the first is drawn, the numbers are means with intervals)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="cjepa visualize levels MODEL --dataset DATASET [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=["levels"], help="what to draw")
    parser.add_argument(
        "model", metavar="MODEL", help="a folder such as runs/mine/final, or the id of a model on the Hub"
    )
    parser.add_argument(
        "--beside",
        metavar="[NAME=]MODEL",
        nargs="*",
        default=[],
        help="other models to draw, such as single-level ones",
    )
    parser.add_argument("--output", metavar="FOLDER", help="where to (default: `levels` in the first model's folder)")
    parser.add_argument("--num_images", type=int, default=2000, help="images to draw (default 2000)")
    parser.add_argument("--class_name", metavar="NAME", help="class to zoom in (default: the one that changes most)")
    parser.add_argument("--coarse", metavar="FILE", help="YAML file with the fine classes of each coarse one")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images, t-SNE and k-means (default 0)")
    hints = {name: hint for name, hint in type_hints(DataArguments).items() if name not in AUGMENTATIONS}
    add_flags(parser, "data", DataArguments(), hints)
    parser.set_defaults(run=run_visualize, parser=parser)


def run_visualize(namespace):
    """Writes page, pictures and numbers, and prints the numbers."""
    from pathlib import Path

    from modeling_cjepa.configuration_cjepa import pair
    from trainers.flags import dataclass_from_flags
    from trainers.level_views import format_structure
    from trainers.loading import load_encoder_config
    from trainers.sources import DataArguments, load_sources
    from trainers.visualize import visualize_levels

    data = dataclass_from_flags(namespace, DataArguments)
    first = namespace.model.split(",")[0]
    image_size = max(pair(load_encoder_config(first).image_size))
    models = {"stack": namespace.model, **named_models(namespace.beside)}
    models = {name: path.split(",") for name, path in models.items()}
    folder = Path(namespace.output or (Path(first) / "levels" if Path(first).is_dir() else "levels"))
    results = visualize_levels(
        models, *load_sources(data, image_size), folder, namespace.num_images, namespace.class_name,
        data.image_mean, data.image_std, namespace.coarse, namespace.seed,
    )  # fmt: skip
    print(format_structure(results))
    print(f"\nWritten to {folder}: open levels.html in a browser.")


def level_value(text: str) -> int | str:
    """A level as a number, or `all`."""
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no level; give a number from 0, or all") from error


def named_models(given: list[str]) -> dict[str, str]:
    """Models by the names they were given as `NAME=MODEL`; a folder's own where none was given."""
    named = {}
    for text in given:
        name, equals, path = text.partition("=")
        path = path if equals else text
        name = name if equals else str(path).rstrip("/").removesuffix("/final").rpartition("/")[2]
        if not name or not path or name in named:
            raise InputError(f"--beside {text}: name each model once, as in vicreg=runs/vicreg/final.")
        named[name] = path
    return named


def add_benchmark(commands):
    """`cjepa benchmark masks` and `cjepa benchmark levels RECIPE`."""
    parser = commands.add_parser(
        "benchmark",
        help="measure speed and memory",
        description="Measure the speed of the mask sampler, or what each level of a stack costs in time and memory.",
    )
    parser.add_argument(
        "part", choices=["masks", "levels"], help="the mask sampler, or the levels of a recipe's model"
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="levels: the recipe (default sjea_cifar10)")
    parser.add_argument("--batch_size", type=int, help="images of a batch (default: masks 256, levels 64)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: masks 20, levels 5)")
    parser.set_defaults(run=run_benchmark, parser=parser)


def run_benchmark(namespace):
    """Prints the medians."""
    sizes = {"batch_size": namespace.batch_size, "num_rounds": namespace.rounds}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if namespace.part == "masks":
        from trainers.benchmark import benchmark_masks, format_benchmark

        if namespace.recipe:
            raise InputError(f"The mask sampler needs no recipe {namespace.recipe!r}; leave it out.")
        print(format_benchmark(benchmark_masks(**sizes)))
        return
    from trainers.level_cost import benchmark_levels, format_level_cost
    from trainers.recipes import read_recipe

    print(format_level_cost(benchmark_levels(read_recipe(namespace.recipe or "sjea_cifar10"), **sizes)))


if __name__ == "__main__":
    sys.exit(main())
