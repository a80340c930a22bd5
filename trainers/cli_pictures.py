"""`cjepa visualize attention|pca|masks|predictions`: pictures of what a model does with images of the user's."""

import argparse
from pathlib import Path

from trainers.cli_models import (
    add_data_flags,
    add_level,
    add_output,
    as_in_the_run,
    model_parser,
    named_models,
    output_folder,
)


def add_attention(pictures):
    """`cjepa visualize attention MODEL IMAGE...`."""
    parser = picture_parser(
        pictures,
        "attention",
        run_attention,
        summary="where the encoders look: attention maps laid over images",
        description="Draw the attention maps of a C-JEPA model's target and context encoder, as in the paper's "
        "figures: image, I-JEPA target (of --beside), C-JEPA target, C-JEPA context. The encoders have no class token "
        "whose attention could be shown; a map is made of the weights softmax(Q K^T / sqrt(d)) of one layer, averaged "
        "over heads and then over the patches that ask, so that it says what share of attention each patch receives; "
        "with --query it says where one patch looks. It is scaled from its least to its greatest value, enlarged "
        "bilinearly and laid over the image. Writes attention.png, and attention.json with the maps as they were "
        "before that.",
        examples=[
            "runs/mine/final cat.jpg dog.jpg --beside I-JEPA=runs/ijepa/final",
            "runs/mine/final cat.jpg --layer 0 --query 3,4",
        ],
    )
    add_columns(parser)
    parser.add_argument(
        "--layer", type=int, default=-1, help="which layer, from 0, or from the last as -1 (default -1)"
    )
    parser.add_argument(
        "--query", metavar="ROW,COLUMN", type=place, help="patch whose attention is drawn, from 0,0 at the top left "
        "(default: the mean over all patches)",
    )  # fmt: skip


def run_attention(namespace, folder: Path):
    """Writes maps over images, and their numbers."""
    from trainers.attention_maps import visualize_attention

    beside = named_models(namespace.beside)
    visualize_attention(
        namespace.model, namespace.images, folder, beside, namespace.layer, namespace.query, namespace.level
    )


def add_pca(pictures):
    """`cjepa visualize pca MODEL IMAGE...`."""
    parser = picture_parser(
        pictures,
        "pca",
        run_pca,
        summary="patch tokens as colours: their first three principal components",
        description="Draw the first three principal components of patch tokens as red, green and blue, of all images "
        "together, so that a colour means the same in each; each component from its 1st to its 99th percentile. For "
        "every encoder whose features lie on a grid, ResNets of a stack included; of C-JEPA for target and context "
        "encoder. Writes pca.png, and pca.json with the shares of the variance that the components explain.",
        examples=["runs/mine/final cat.jpg dog.jpg", "runs/stack/final cat.jpg --level 0 --beside runs/vicreg/final"],
    )
    add_columns(parser)


def run_pca(namespace, folder: Path):
    """Writes colours, and what they explain."""
    from trainers.patch_pca import visualize_pca

    visualize_pca(namespace.model, namespace.images, folder, named_models(namespace.beside), namespace.level)


def add_masks(pictures):
    """`cjepa visualize masks MODEL IMAGE...`."""
    parser = picture_parser(
        pictures,
        "masks",
        run_masks,
        summary="context and target blocks, as pre-training draws them",
        description="Draw the masks of C-JEPA's pre-training on images, of the geometry in the model's "
        "configuration: the image, the patches that the context encoder sees, and the target blocks, each outlined in "
        "a colour of its own. The images are one batch, which shares the size of its blocks and the number of its "
        "context patches. Of a stack the masks of all levels lie over each other, so that one picture shows them. "
        "Writes masks.png, and masks.json with all positions and their numbers.",
        examples=["runs/mine/final cat.jpg dog.jpg --num_draws 3"],
    )
    parser.add_argument("--num_draws", type=int, default=1, help="masks to draw of each image, a row each (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default 0)")


def run_masks(namespace, folder: Path):
    """Writes images with masks, and the positions."""
    from trainers.mask_figure import visualize_masks

    visualize_masks(namespace.model, namespace.images, folder, namespace.seed, namespace.num_draws)


def add_predictions(pictures):
    """`cjepa visualize predictions MODEL IMAGE... --dataset DATA`."""
    from trainers.flags import type_hints
    from trainers.sources import AUGMENTATIONS, DataArguments

    parser = picture_parser(
        pictures,
        "predictions",
        run_predictions,
        summary="what the predictor predicts: the patches of a data set that are nearest to it",
        description="Mask images as in pre-training, predict the target blocks from the context, and draw for some "
        "predicted patches the true one and those of a data set's evaluation images whose tokens of the target "
        "encoder are nearest by cosine similarity, each with the patches around it. Prints how many of the data set's "
        "patches are nearer to a predicted token than the true one, over all predicted tokens: 50 % is chance, for "
        "images like those of the data set; of others nearly all may be nearer. A predictor that knows nothing but "
        "the place beats chance, too, unless only patches of the same place are compared, which is the second number. "
        "Without --dataset the data set is that of the run that made the model; of a stack level 0 is shown. Writes "
        "predictions.png and predictions.json.",
        examples=[
            "runs/mine/final cat.jpg dog.jpg",
            "runs/mine/final cat.jpg --dataset my/photos --num_images 2000 --k 8",
        ],
    )
    parser.add_argument("--k", type=int, default=6, help="nearest patches to draw of each predicted one (default 6)")
    parser.add_argument(
        "--num_tokens", type=int, default=2, help="predicted patches to draw of each image (default 2)"
    )
    parser.add_argument("--num_images", type=int, default=500, help="images of the data set to search (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks and of the choice of patches (default 0)")
    left_out = (*AUGMENTATIONS, "num_train_images", "num_eval_images")
    hints = {name: hint for name, hint in type_hints(DataArguments).items() if name not in left_out}
    add_data_flags(parser, DataArguments(), hints)


def run_predictions(namespace, folder: Path):
    """Writes predicted and nearest patches, and prints how good the predictions are."""
    import dataclasses

    from modeling_cjepa.configuration_cjepa import pair
    from trainers.errors import InputError
    from trainers.flags import dataclass_from_flags
    from trainers.loading import load_encoder_config
    from trainers.predictions import format_predictions, visualize_predictions
    from trainers.sources import DataArguments, load_sources

    config = load_encoder_config(namespace.model)
    if namespace.num_images < 1:
        raise InputError(f"num_images={namespace.num_images} leaves nothing to search; set it to 1 or more.")
    (data,) = as_in_the_run(namespace, namespace.model, dataclass_from_flags(namespace, DataArguments))
    # train images are not searched, and of rendered scenes need not be many
    data = dataclasses.replace(data, num_train_images=1, num_eval_images=namespace.num_images)
    _, source = load_sources(data, max(pair(config.image_size)))
    results = visualize_predictions(
        namespace.model, namespace.images, source, folder, namespace.k, namespace.num_tokens, namespace.seed,
        data.image_mean, data.image_std,
    )  # fmt: skip
    print(format_predictions(results))


def picture_parser(pictures, what: str, run, summary: str, description: str, examples: list[str]):
    """
    The parser of a picture, with the arguments that all of these share.

    Args:
        pictures: Where to, the subparsers of `cjepa visualize`.
        what (`str`): What is drawn, which is also what folder and files are called.
        run (`Callable`): Draws it, called with the parsed arguments and the folder to write to.
        summary, description (`str`): For `--help`.
        examples (`list[str]`): Arguments, beginning with the model.

    Returns:
        `argparse.ArgumentParser`.
    """
    lines = [f"cjepa visualize {what} {example}" for example in examples]
    parser = model_parser(
        pictures,
        what,
        usage=f"cjepa visualize {what} MODEL IMAGE... [--key value ...]",
        help=summary,
        description=description,
        epilog=f"example{'s' * (len(lines) > 1)}:  " + "\n           ".join(lines),
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files with images")
    add_output(parser, what)

    def draw(namespace):
        folder = output_folder(namespace, what)
        run(namespace, folder)
        print(f"Written to {folder}: {what}.png, {what}.json.")

    parser.set_defaults(run=draw, parser=parser)
    return parser


def add_columns(parser: argparse.ArgumentParser):
    """The flags of a picture with a column for each encoder."""
    parser.add_argument(
        "--beside",
        metavar="[NAME=]MODEL",
        nargs="*",
        action="extend",
        default=[],
        help="other models, whose encoders (C-JEPA: the target encoder) are the first columns",
    )
    add_level(parser)


def place(text: str) -> tuple[int, int]:
    """Row and column of a patch."""
    try:
        row, column = map(int, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no place; give row and column, as in 3,4") from error
    return row, column
