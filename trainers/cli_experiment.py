"""`cjepa experiment`: what a comparison of methods says, with seeds and intervals."""

import argparse
import sys

from trainers.errors import InputError


def add_experiment(commands):
    """`cjepa experiment EXPERIMENT`."""
    from trainers.recipes import add_recipe_flags
    from trainers.resources import experiment_names

    parser = commands.add_parser(
        "experiment",
        help="compare methods over seeds, with 95 %% intervals, as a table and a picture",
        description="Pre-train several methods with several seeds, evaluate each at several of its steps, and tell "
        "the means with 95 % intervals. An experiment is a YAML file, or one of those shipped "
        f"({', '.join(experiment_names())}). Each run has a folder of its own; the same command goes on where it was "
        "interrupted. Every key of a recipe is a flag, too, laid on all runs.",
        epilog="examples:  cjepa experiment cpu_15min --list\n"
        "           cjepa experiment cpu_15min --dataset my/cifar10 --results docs/results\n"
        "           cjepa experiment collapse --jobs 2 --max_steps 50 --output runs/try",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="cjepa experiment EXPERIMENT [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "experiment", metavar="EXPERIMENT", help="a YAML file or the name of a shipped experiment; before all flags"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="where runs and results are (default: runs/experiments/EXPERIMENT)"
    )
    parser.add_argument(
        "--results", metavar="FOLDER", help="write table, picture and figures there, too, and the rows into its "
        "summary.json; what is there of the experiment is kept if it is of runs with the same settings",
    )  # fmt: skip
    parser.add_argument("--methods", metavar="METHOD", nargs="+", help="only these, as --list calls them")
    parser.add_argument("--seeds", metavar="SEED", nargs="+", type=int, help="only these of the experiment's seeds")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--list", action="store_true", help="train nothing; list the runs, and which are done")
    add_recipe_flags(parser)
    again = "the same command goes on where it was"
    parser.set_defaults(run=run_experiment, parser=parser, after_interruption=again)


def run_experiment(namespace):
    """Carries out what is missing of an experiment and tells what it says so far."""
    from pathlib import Path

    from trainers.experiment_file import read_experiment
    from trainers.experiment_plan import choose_runs
    from trainers.experiment_report import report
    from trainers.experiment_runs import Call, carry_out, check_settings, is_done
    from trainers.files import make_place
    from trainers.recipes import overrides_of

    if namespace.jobs < 1:
        raise InputError(f"--jobs {namespace.jobs} is too small; give 1 or more.")
    overrides = overrides_of(namespace)
    experiment = read_experiment(namespace.experiment, overrides)
    output = namespace.output or f"runs/experiments/{experiment.name}"
    call = Call(namespace.experiment, overrides, output, public_command(namespace.command))
    runs = choose_runs(experiment, namespace.methods, namespace.seeds)
    if namespace.list:
        for run in runs:
            check_settings(experiment, run, call.folder(run))
            print(f"{'done' if is_done(call.folder(run)) else 'to do'}  {run.method}, seed {run.seed}")
        return
    results = namespace.results and Path(namespace.results)
    make_place(Path(output, "results"), "--output")
    if results:
        make_place(results / "results", "--results")
        _tell_of_outdated(experiment, results)
    try:
        failures = carry_out(experiment, runs, call, namespace.jobs)
    except (InputError, KeyboardInterrupt):
        print("\n" + report(experiment, call, results, is_whole=False))
        raise
    print("\n" + report(experiment, call, results))
    if failures:
        raise InputError(f"{'; '.join(failures)}. The table is of the others; the same command tries these again.")


def _tell_of_outdated(experiment, results):
    """Says which figures the next ones will replace, before hours are spent on those."""
    from trainers.experiment_store import outdated

    if runs := outdated(experiment, results):
        print(
            f"cjepa: {results / experiment.name}.json has figures of other settings than {experiment.name} has now "
            f"({'; '.join(runs)}), which new ones replace; name another --results to keep them.",
            file=sys.stderr,
        )


def public_command(command: list[str]) -> str:
    """What repeats an experiment elsewhere: without what chooses runs and says where things are on this machine."""
    import shlex

    from trainers.public_facts import public_facts
    from trainers.recipe_files import without_flags

    kept = without_flags(command, ("methods", "seeds", "results", "output", "disable_tqdm"))
    return public_facts({"command": shlex.join(["cjepa", *kept])})["command"]
