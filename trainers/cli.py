"""The `cjepa` command; the other `cli_*.py` have those on saved models."""

import argparse
import os
import sys

from transformers.utils import logging

from trainers.cli_benchmark import add_benchmark
from trainers.cli_convert import add_convert
from trainers.cli_doctor import add_doctor
from trainers.cli_experiment import add_experiment
from trainers.cli_features import add_features
from trainers.cli_finetune import add_finetune
from trainers.cli_models import add_evaluate
from trainers.cli_probe import add_probe
from trainers.cli_publish import add_publish
from trainers.cli_visualize import add_visualize
from trainers.errors import InputError, plain_message
from trainers.flags import GOES_ON_FROM_CHECKPOINT, closest


def main(arguments: list[str] | None = None) -> int:
    """
    Runs a command; a user's mistake ends it with one sentence and exit status 2, a stop of an experiment with 130.

    Args:
        arguments (`list[str]`, *optional*): The command line; that of the process when not given.

    Returns:
        `int`: The exit status, 0 unless the command says otherwise.
    """
    namespace = parse(arguments)
    namespace.command = sys.argv[1:] if arguments is None else arguments
    # one bar says how far a command is; those of single files would break it up
    logging.disable_progress_bar()
    try:
        status = namespace.run(namespace) or 0
        if "WORLD_SIZE" in os.environ:
            from trainers.processes import end_processes

            end_processes()
        return status
    except InputError as error:
        return fail(plain_message(error), error.status)
    except KeyboardInterrupt:
        return fail(f"interrupted; {namespace.after_interruption}.", 130)


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
    parser.set_defaults(after_interruption="repeat the call to start again")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        add_pretrain, add_doctor, add_evaluate, add_probe, add_finetune, add_features, add_visualize, add_convert,
        add_publish, add_benchmark, add_experiment,
    ):  # fmt: skip
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
        "           cjepa pretrain cjepa_cifar10 --per_device_train_batch_size 512 --estimate\n"
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
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="train nothing; tell parameters, arithmetic, memory, time and disk, and whether memory and disk suffice "
        "(exit status 1 if not)",
    )
    add_recipe_flags(parser)
    parser.set_defaults(run=run_pretrain, parser=parser, after_interruption=GOES_ON_FROM_CHECKPOINT)


def run_pretrain(namespace) -> int:
    """Pre-trains by the recipe and the flags given, or tells what that will take."""
    from trainers.pretraining import pretrain
    from trainers.recipe_files import without_flags
    from trainers.recipes import overrides_of, read_recipe

    recipe = read_recipe(namespace.recipe, overrides_of(namespace))
    if namespace.estimate:
        from trainers.estimate import estimate, format_estimate

        found = estimate(recipe)
        print(format_estimate(found))
        return 0 if found["fits"] else 1
    recipe.command = without_flags(namespace.command)
    pretrain(recipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
