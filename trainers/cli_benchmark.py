"""`cjepa benchmark`: speed and memory on this machine."""

import argparse
from collections.abc import Callable


def add_benchmark(commands):
    """`cjepa benchmark PART`."""
    parser = commands.add_parser(
        "benchmark",
        help="measure speed and memory",
        description="Measure speed and memory on this machine, in rounds that take turns; prints medians and "
        "quartiles. `cjepa benchmark PART --help` explains each.",
    )
    parts = parser.add_subparsers(title="parts", required=True, metavar="PART")
    for add in (
        add_step, add_memory, add_scale, add_masks, add_data, add_levels, add_features, add_training, add_loading,
    ):  # fmt: skip
        add(parts)


def add_step(parts):
    """`cjepa benchmark step`."""
    parser = _add_part(
        parts,
        "step",
        "a training step beside the authors'",
        "A whole training step of C-JEPA beside one of I-JEPA's authors' code, re-stated, on the same batches and "
        "masks, in turns: forward pass, backward pass, optimizer, moving average. That both are the same function is "
        "looked at first. Beside them two that are other functions: a predictor with a shared context "
        "(predictor_attention), and with it half of the images with two mask sets each (num_mask_sets), which is as "
        "many masks. And the share of each part of ours.",
        batch_size=64,
        rounds=9,
    )
    _add_size_and_precision(parser)
    parser.add_argument(
        "--compile", metavar="MODE", nargs="?", const="default", help="compile ours, in a mode of torch.compile if "
        "one is given, such as reduce-overhead, which makes CUDA graphs; all rounds then have the same masks",
    )  # fmt: skip
    parser.set_defaults(run=run_step)


def run_step(namespace):
    """Prints the medians."""
    from trainers.cost_panels import step_panels
    from trainers.step_cost import benchmark_step, format_step_cost

    sizes = namespace.size, namespace.batch_size, namespace.rounds, namespace.precision, namespace.compile
    _report(namespace, lambda: benchmark_step(*sizes), format_step_cost, step_panels)


def add_memory(parts):
    """`cjepa benchmark memory`."""
    parser = _add_part(
        parts,
        "memory",
        "memory of a training step",
        "What training steps of C-JEPA need of memory at most, with and without gradient checkpointing, beside those "
        "of I-JEPA's authors' code, re-stated, on the same masks: each in a fresh process, at two batch sizes, with "
        "the largest batch that fits here.",
        batch_size=64,
        rounds=3,
    )
    _add_size_and_precision(parser)
    parser.set_defaults(run=run_memory)


def run_memory(namespace):
    """Prints the medians."""
    from trainers.cost_panels import memory_panels
    from trainers.memory_cost import benchmark_memory, format_memory_cost

    sizes = namespace.size, namespace.batch_size, namespace.rounds, namespace.precision
    _report(namespace, lambda: benchmark_memory(*sizes), format_memory_cost, memory_panels)


def add_scale(parts):
    """`cjepa benchmark scale`."""
    parser = _add_part(
        parts,
        "scale",
        "how the cost grows with the work",
        "Seconds of a training step of C-JEPA (of the processors on a CPU), before and after the image's side, the "
        "batch, the levels, the layers or the processes (on a CPU) have grown, beside the operations: an excess of 1 "
        "is a cost that grows as the work does.",
        batch_size=16,
        rounds=7,
    )
    _add_size_and_precision(parser)
    parser.set_defaults(run=run_scale)


def run_scale(namespace):
    """Prints the medians."""
    from trainers.cost_panels import scale_panels
    from trainers.scale_cost import benchmark_scale, format_scale_cost

    sizes = namespace.size, namespace.batch_size, namespace.rounds, namespace.precision
    _report(namespace, lambda: benchmark_scale(*sizes), format_scale_cost, scale_panels)


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
    from trainers.cost_panels import mask_panels

    _report(namespace, lambda: benchmark_masks(namespace.batch_size, namespace.rounds), format_benchmark, mask_panels)


def add_data(parts):
    """`cjepa benchmark data`."""
    parser = _add_part(
        parts,
        "data",
        "the crops of train images",
        "Crops of 224 pixels from JPEGs of 500 x 375, and from a cache of decoded images, beside those of I-JEPA's "
        "published code: Pillow, float32, normalised. The pictures are drawn, with as many bytes as photographs.",
        rounds=9,
    )
    parser.add_argument("--num_images", type=int, default=64, help="images of a round (default %(default)s)")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that make crops; 0: this one, on one thread (default)"
    )
    parser.set_defaults(run=run_data)


def run_data(namespace):
    """Prints the medians."""
    from trainers.cost_panels import data_panels
    from trainers.data_cost import benchmark_data, format_data_cost

    sizes = namespace.num_images, namespace.rounds, namespace.workers
    _report(namespace, lambda: benchmark_data(*sizes), format_data_cost, data_panels)


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
    from trainers.cost_panels import level_panels
    from trainers.level_cost import benchmark_levels, format_level_cost
    from trainers.recipes import read_recipe

    recipe, sizes = read_recipe(namespace.recipe), (namespace.batch_size, namespace.rounds)
    _report(namespace, lambda: benchmark_levels(recipe, *sizes), format_level_cost, level_panels)


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
    from trainers.cost_panels import feature_panels
    from trainers.feature_cost import benchmark_features, format_feature_cost

    sizes = namespace.batch_size, namespace.rounds, namespace.num_images
    _report(namespace, lambda: benchmark_features(*sizes, namespace.dataset), format_feature_cost, feature_panels)


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
    from trainers.cost_panels import training_panels
    from trainers.recipes import read_recipe
    from trainers.training_cost import benchmark_training, format_training_cost

    overrides = {} if namespace.dataset is None else {"dataset": namespace.dataset}
    recipe = read_recipe(namespace.recipe, overrides)
    _report(namespace, lambda: benchmark_training(recipe, namespace.rounds), format_training_cost, training_panels)


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
    from trainers.cost_panels import loading_panels
    from trainers.loading_cost import benchmark_loading, format_loading_cost

    _report(namespace, lambda: benchmark_loading(namespace.rounds), format_loading_cost, loading_panels)


def _report(namespace, measure: Callable, text_of: Callable, panels_of: Callable):
    """Measures, prints the table, and writes the figures and their picture where `--output` says."""
    from trainers.cost_figure import check_output, write_costs

    check_output(namespace.output)
    found = measure()
    print(text_of(found))
    if namespace.output is not None:
        write_costs(namespace.output, found, panels_of(found))


def _add_size_and_precision(parser: argparse.ArgumentParser):
    sizes = "cifar, vit_t16, vit_s16, vit_b16, vit_l16 or vit_h14"
    parser.add_argument("--size", default="cifar", help=f"{sizes} (default %(default)s)")
    parser.add_argument(
        "--precision", default="auto", help="float32 or bf16, of both (default: what the device multiplies faster)"
    )


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
    parser.add_argument(
        "--output", metavar="FILE", help="also write the figures there, as JSON, and a picture of them beside, as PNG"
    )
    parser.set_defaults(parser=parser)
    return parser
