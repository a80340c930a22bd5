"""`cjepa visualize`: pictures of what a saved model has learned; `cli_pictures.py` has those of single images."""

from trainers.cli_models import add_data_flags, add_output, as_in_the_run, model_parser, named_models, output_folder
from trainers.cli_pictures import add_attention, add_masks, add_pca, add_predictions
from trainers.errors import InputError


def add_visualize(commands):
    """`cjepa visualize WHAT MODEL`."""
    parser = commands.add_parser(
        "visualize",
        help="draw what a model has learned",
        description="Draw what a model has learned; `cjepa visualize WHAT --help` explains each picture.",
    )
    pictures = parser.add_subparsers(title="pictures", required=True, metavar="WHAT")
    for add in (add_levels, add_neighbours, add_attention, add_pca, add_masks, add_predictions):
        add(pictures)


def add_levels(pictures):
    """`cjepa visualize levels MODEL`."""
    from trainers.flags import type_hints
    from trainers.sources import AUGMENTATIONS, DataArguments

    parser = model_parser(
        pictures,
        "levels",
        usage="cjepa visualize levels MODEL [--key value ...]",
        help="what the levels of a stack tell apart, drawn and measured",
        description="Draw what each level of a stack tells apart, and of other models beside it: t-SNE and PCA of the "
        "embeddings of evaluation images coloured by class, one class zoomed in with the nearest images of its "
        "sub-clusters, and numbers: silhouette, NMI of k-means and kNN for fine and coarse classes. Writes "
        "levels.html (a page to explore, on its own), levels.png, levels_class.png and levels.json. Without --dataset "
        "the images are those of the run that made the model.",
        epilog="examples:  cjepa visualize levels runs/stack/final --beside vicreg=runs/vicreg/final\n"
        "           cjepa visualize levels runs/a1/final,runs/a2/final --beside vicreg=runs/b1/final,runs/b2/final\n"
        "           (several runs, such as one a seed: the first is drawn, the numbers are means with intervals)",
    )
    parser.add_argument(
        "--beside",
        metavar="[NAME=]MODEL",
        nargs="*",
        action="extend",
        default=[],
        help="other models to draw, such as single-level ones",
    )
    parser.add_argument("--output", metavar="FOLDER", help="where to (default: `levels` in the first model's folder)")
    parser.add_argument("--num_images", type=int, default=2000, help="images to draw (default 2000)")
    parser.add_argument("--class_name", metavar="NAME", help="class to zoom in (default: the one that changes most)")
    parser.add_argument("--coarse", metavar="FILE", help="YAML file with the fine classes of each coarse one")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images, t-SNE and k-means (default 0)")
    hints = {name: hint for name, hint in type_hints(DataArguments).items() if name not in AUGMENTATIONS}
    add_data_flags(parser, DataArguments(), hints)
    parser.set_defaults(run=run_levels, parser=parser)


def run_levels(namespace):
    """Writes page, pictures and numbers, and prints the numbers."""
    from pathlib import Path

    from modeling_cjepa.configuration_cjepa import pair
    from trainers.flags import dataclass_from_flags
    from trainers.level_views import format_structure
    from trainers.loading import load_encoder_config
    from trainers.sources import DataArguments, load_sources
    from trainers.visualize import visualize_levels

    models = {"stack": runs_of(namespace.model)}
    models |= {name: runs_of(runs) for name, runs in named_models(namespace.beside, models).items()}
    first = models["stack"][0]
    configs = [load_encoder_config(run) for runs in models.values() for run in runs]
    data = dataclass_from_flags(namespace, DataArguments)
    image_size = max(pair(configs[0].image_size))
    (data,) = as_in_the_run(namespace, first, data)
    folder = Path(namespace.output or (Path(first) / "levels" if Path(first).is_dir() else "levels"))
    results = visualize_levels(
        models, *load_sources(data, image_size), folder, namespace.num_images, namespace.class_name,
        data.image_mean, data.image_std, namespace.coarse, namespace.seed,
    )  # fmt: skip
    print(format_structure(results))
    print(f"\nWritten to {folder}: open levels.html in a browser.")


def add_neighbours(pictures):
    """`cjepa visualize neighbours MODEL IMAGE... --features DIR`."""
    parser = model_parser(
        pictures,
        "neighbours",
        usage="cjepa visualize neighbours MODEL IMAGE... --features DIR [--key value ...]",
        help="the images of a features folder that are nearest to some images",
        description="Show the images of a features folder, which `cjepa features` wrote with this model, that are "
        "nearest to some images by cosine similarity of their embeddings. Writes neighbours.html (on its own, images "
        "included), neighbours.png and neighbours.json.",
        epilog="example:  cjepa features runs/mine/final --dataset my/photos --output features\n"
        "          cjepa visualize neighbours runs/mine/final cat.jpg dog.jpg --features features",
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files to look for")
    parser.add_argument("--features", metavar="DIR", required=True, help="folder that `cjepa features` has written")
    parser.add_argument("--k", type=int, default=8, help="nearest images to show of each (default 8)")
    parser.add_argument("--split", help="split of the features (default: train if there is one, else the first)")
    add_output(parser, "neighbours")
    parser.set_defaults(run=run_neighbours, parser=parser)


def run_neighbours(namespace):
    """Writes page, picture and numbers, and prints the nearest one of each image."""
    from trainers.neighbours import visualize_neighbours

    folder = output_folder(namespace, "neighbours")
    results = visualize_neighbours(
        namespace.model, namespace.images, namespace.features, folder, namespace.k, namespace.split
    )
    for query in results["queries"]:
        near = query["neighbours"][0]
        label = f", {near['label']}" if near["label"] else ""
        print(f"{query['image']}: nearest is image {near['index']} ({near['similarity']:.3f}{label})")
    print(f"\nWritten to {folder}: open neighbours.html in a browser.")


def runs_of(text: str) -> list[str]:
    """The runs of a model, such as one a seed, which commas separate."""
    runs = text.split(",")
    if not all(runs):
        raise InputError(f"{text!r} names a run of no name; give folders with one comma between two.")
    return runs
