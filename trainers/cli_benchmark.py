"""`cjepa benchmark`: speed and memory on this machine."""

import argparse


def add_benchmark(commands):
    """`cjepa benchmark PART`."""
    parser = commands.add_parser(
        "benchmark",
        help="measure speed and memory",
        description="Measure speed and memory on this machine, in rounds that take turns; prints medians and "
        "quartiles. `cjepa benchmark PART --help` explains each.",
    )
    parts = parser.add_subparsers(title="parts", required=True, metavar="PART")
    for add in (add_step, add_masks, add_levels, add_features, add_training, add_loading):
        add(parts)


def add_step(parts):
    """`cjepa benchmark step`."""
    parser = _add_part(
        parts,
        "step",
        "a training step beside the authors'",
        "A whole training step of C-JEPA beside one of I-JEPA's authors' code, re-stated, on the same batches and "
        "masks, in turns: forward pass, backward pass, optimizer, moving average. That both are the same function is "
        "looked at first. And the share of each part of ours.",
        batch_size=64,
        rounds=9,
    )
    sizes = "cifar, vit_t16, vit_s16, vit_b16, vit_l16 or vit_h14"
    parser.add_argument("--size", default="cifar", help=f"{sizes} (default %(default)s)")
    parser.add_argument("--precision", help="float32 or bf16, of both (default: what the device multiplies faster)")
    parser.add_argument("--output", metavar="FILE", help="also write the figures there, as JSON")
    parser.set_defaults(run=run_step)


def run_step(namespace):
    """Prints the medians."""
    from pathlib import Path

    from trainers.files import write_json
    from trainers.step_cost import benchmark_step, format_step_cost

    found = benchmark_step(namespace.size, namespace.batch_size, namespace.rounds, namespace.precision)
    print(format_step_cost(found))
    if namespace.output:
        write_json(Path(namespace.output), found)


def add_masks(parts):
    """`cjepa benchmark masks`."""
    _add_part(
        parts,
        "masks",
        "the mask sampler",
        "The mask sampler on one thread, beside a loop over images in the way of I-JEPA's published code.",
        batch_size=256,
        rounds=20,
    ).set_defaults(run=run_masks)


def run_masks(namespace):
    """Prints the medians."""
    from trainers.benchmark import benchmark_masks, format_benchmark

    print(format_benchmark(benchmark_masks(namespace.batch_size, namespace.rounds)))


def add_levels(parts):
    """`cjepa benchmark levels [RECIPE]`."""
    _add_part(
        parts,
        "levels",
        "each level of a stack",
        "Time and memory of a training step of a recipe's stack, cut to its lowest levels.",
        recipe="sjea_cifar10",
        batch_size=64,
        rounds=5,
    ).set_defaults(run=run_levels)


def run_levels(namespace):
    """Prints the medians."""
    from trainers.level_cost import benchmark_levels, format_level_cost
    from trainers.recipes import read_recipe

    print(format_level_cost(benchmark_levels(read_recipe(namespace.recipe), namespace.batch_size, namespace.rounds)))


def add_features(parts):
    """`cjepa benchmark features`."""
    parser = _add_part(
        parts,
        "features",
        "the writing of features",
        "What `cjepa features` takes beside a ViT-S's forward passes alone, on the same images.",
        batch_size=64,
        rounds=5,
    )
    parser.add_argument("--num_images", type=int, default=256, help="images of a round (default %(default)s)")
    parser.add_argument("--dataset", default="scenes", help="where they are from (default %(default)s)")
    parser.set_defaults(run=run_features)


def run_features(namespace):
    """Prints the medians."""
    from trainers.feature_cost import benchmark_features, format_feature_cost

    sizes = namespace.batch_size, namespace.rounds, namespace.num_images
    print(format_feature_cost(benchmark_features(*sizes, namespace.dataset)))


def add_training(parts):
    """`cjepa benchmark training [RECIPE]`."""
    parser = _add_part(
        parts,
        "training",
        "the training loop beside the bare steps of its model",
        "What `cjepa pretrain` takes, with logs, the doctor, checks and stops, beside bare steps of the same model: "
        "the forward pass, the backward pass, the optimizer, the moving average. And a checkpoint, beside its bytes "
        "alone.",
        recipe="cjepa_cifar10",
        rounds=9,
    )
    parser.add_argument("--dataset", help="where the images are from (default: the recipe's)")
    parser.set_defaults(run=run_training)


def run_training(namespace):
    """Prints the medians."""
    from trainers.recipes import read_recipe
    from trainers.training_cost import benchmark_training, format_training_cost

    overrides = {} if namespace.dataset is None else {"dataset": namespace.dataset}
    print(format_training_cost(benchmark_training(read_recipe(namespace.recipe, overrides), namespace.rounds)))


def add_loading(parts):
    """`cjepa benchmark loading`."""
    _add_part(
        parts,
        "loading",
        "the loading of a published encoder",
        "What `AutoModel.from_pretrained` takes of a published ViT-B, alone and out of a file with all three parts, "
        "beside transformers' IJepaModel of the same size: seconds, and the growth of the process' peak memory with "
        "a first image, each in a fresh process without this package.",
        rounds=9,
    ).set_defaults(run=run_loading)


def run_loading(namespace):
    """Prints the medians."""
    from trainers.loading_cost import benchmark_loading, format_loading_cost

    print(format_loading_cost(benchmark_loading(namespace.rounds)))


def _add_part(parts, name: str, measured: str, description: str, **defaults) -> argparse.ArgumentParser:
    """The parser of a part, with the arguments that have a default."""
    parser = parts.add_parser(name, help=measured, description=description, allow_abbrev=False)
    told = {
        "batch_size": "images of a batch",
        "rounds": "timed rounds",
        "recipe": "a YAML file or the name of a shipped recipe",
    }
    for argument, default in defaults.items():
        text = f"{told[argument]} (default %(default)s)"
        if argument == "recipe":
            parser.add_argument("recipe", nargs="?", default=default, metavar="RECIPE", help=text)
        else:
            parser.add_argument(f"--{argument}", type=int, default=default, help=text)
    parser.set_defaults(parser=parser)
    return parser
