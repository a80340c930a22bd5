"""`cjepa probe`: what frozen patch features say about pixels."""

import argparse

from trainers.errors import InputError


def add_probe(commands):
    """`cjepa probe WHAT MODEL`."""
    parser = commands.add_parser(
        "probe",
        help="dense tasks on frozen patch features: segmentation",
        description="Dense tasks on the frozen patch features of a model; `cjepa probe WHAT --help` explains each.",
    )
    tasks = parser.add_subparsers(title="tasks", required=True, metavar="WHAT")
    for add in (add_segmentation,):
        add(tasks)


def add_segmentation(tasks):
    """`cjepa probe segmentation MODEL`."""
    from trainers.flags import add_flags, type_hints
    from trainers.mask_sources import MaskArguments
    from trainers.segmentation import SegmentationArguments
    from trainers.sources import AUGMENTATIONS

    parser = tasks.add_parser(
        "segmentation",
        help="a linear classifier of patches, its logits enlarged to the image",
        description="Fit a linear classifier on the frozen patch features of a model (C-JEPA: the target encoder; a "
        "stack: one level), enlarge its logits to the image, and print the mean intersection over union on images it "
        "has not seen, beside a randomly initialised encoder and raw pixels. --dataset is `scenes` (rendered, with "
        "masks; the default), a folder with images/training, images/validation and annotations/ of the same names "
        "(ADE20K as it is downloaded), or a table with a column of masks. Writes segmentation.json, segmentation.png "
        "(images, masks and predictions) and, of --segment, a map each.",
        epilog="examples:  cjepa probe segmentation runs/mine/final --output runs/mine/segmentation\n"
        "           cjepa probe segmentation runs/mine/final --dataset ADEChallengeData2016 --output maps\n"
        "           cjepa probe segmentation runs/mine/final --output maps --segment a.jpg b.jpg",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="cjepa probe segmentation MODEL [--key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a folder such as runs/mine/final, or the id of a model on the Hub"
    )
    parser.add_argument("--level", metavar="K", type=int, help="level of a stack, from 0 (default: as AutoModel)")
    parser.add_argument("--output", metavar="FOLDER", help="where to (default: `segmentation` in the model's folder)")
    parser.add_argument("--segment", metavar="IMAGE", nargs="*", default=[], help="images of your own to segment")
    left_out = (*AUGMENTATIONS, "label_column")
    hints = {name: hint for name, hint in type_hints(MaskArguments).items() if name not in left_out}
    add_flags(parser, "data", MaskArguments(), hints)
    add_flags(parser, "probe", SegmentationArguments(), type_hints(SegmentationArguments))
    parser.set_defaults(run=run_segmentation, parser=parser)


def run_segmentation(namespace):
    """Writes figures, picture and maps, and prints the figures."""
    from pathlib import Path

    from modeling_cjepa.configuration_cjepa import pair
    from trainers.dense_evaluation import evaluate_segmentation, format_segmentation
    from trainers.evaluation import check_level
    from trainers.files import full_disk_named, write_json
    from trainers.flags import dataclass_from_flags
    from trainers.loading import load_encoder_config
    from trainers.mask_sources import MaskArguments, load_mask_sources
    from trainers.segmentation import SegmentationArguments
    from trainers.segmentation_maps import draw_segmentation, segment_files

    config = load_encoder_config(namespace.model)
    check_level(namespace.level, config)
    data = dataclass_from_flags(namespace, MaskArguments)
    arguments = dataclass_from_flags(namespace, SegmentationArguments)
    for file in namespace.segment:
        if not Path(file).is_file():
            raise InputError(f"--segment {file} is no file; mend it.")
    in_model = Path(namespace.model) / "segmentation" if Path(namespace.model).is_dir() else Path("segmentation")
    folder = Path(namespace.output or in_model)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; name a folder.")
    train, test, names = load_mask_sources(data, max(pair(config.image_size)), not arguments.disable_tqdm)
    statistics = data.image_mean, data.image_std
    results, segmenters = evaluate_segmentation(
        namespace.model, train, test, names, arguments, *statistics, level=namespace.level
    )
    print(format_segmentation(results))
    with full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "segmentation.json", results)
        draw_segmentation(segmenters, test, names, folder / "segmentation.png")
        maps = segment_files(segmenters[0], names, namespace.segment, folder)
    said = f", and {len(maps)} map{'s' * (len(maps) > 1)} of --segment" if maps else ""
    print(f"\nWritten to {folder}: segmentation.json, segmentation.png{said}.")
