"""`cjepa probe`: what frozen patch features say about pixels."""

from pathlib import Path

from trainers.cli_models import add_level, add_output, model_parser, output_folder
from trainers.errors import InputError

DAVIS_FRAME_SIZE = 480


def add_probe(commands):
    """`cjepa probe WHAT MODEL`."""
    parser = commands.add_parser(
        "probe",
        help="dense tasks on frozen patch features: segmentation, propagation",
        description="Dense tasks on the frozen patch features of a model; `cjepa probe WHAT --help` explains each.",
    )
    tasks = parser.add_subparsers(title="tasks", required=True, metavar="WHAT")
    for add in (add_segmentation, add_propagation):
        add(tasks)


def add_segmentation(tasks):
    """`cjepa probe segmentation MODEL`."""
    from trainers.flags import add_flags, type_hints
    from trainers.mask_sources import MaskArguments
    from trainers.segmentation import SegmentationArguments
    from trainers.sources import AUGMENTATIONS

    parser = model_parser(
        tasks,
        "segmentation",
        usage="cjepa probe segmentation MODEL [--key value ...]",
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
    )
    add_level(parser)
    add_output(parser, "segmentation")
    parser.add_argument(
        "--segment", metavar="IMAGE", nargs="*", action="extend", default=[], help="images of your own to segment"
    )
    left_out = (*AUGMENTATIONS, "label_column")
    hints = {name: hint for name, hint in type_hints(MaskArguments).items() if name not in left_out}
    add_flags(parser, "data", MaskArguments(), hints)
    add_flags(parser, "probe", SegmentationArguments(), type_hints(SegmentationArguments))
    parser.set_defaults(run=run_segmentation, parser=parser)


def run_segmentation(namespace):
    """Writes figures, picture and maps, and prints the figures."""
    from modeling_cjepa.configuration_cjepa import pair
    from trainers.dense_evaluation import evaluate_segmentation, format_segmentation
    from trainers.files import full_disk_named, write_json
    from trainers.flags import dataclass_from_flags
    from trainers.loading import load_encoder_config
    from trainers.mask_sources import MaskArguments, load_mask_sources
    from trainers.pooling import level_of
    from trainers.segmentation import SegmentationArguments
    from trainers.segmentation_maps import check_files, draw_segmentation, segment_files

    config = load_encoder_config(namespace.model)
    level_of(config, namespace.level)
    data = dataclass_from_flags(namespace, MaskArguments)
    arguments = dataclass_from_flags(namespace, SegmentationArguments)
    for file in namespace.segment:
        if not Path(file).is_file():
            raise InputError(f"--segment {file} is no file; mend it.")
    check_files(namespace.segment)
    folder = output_folder(namespace, "segmentation")
    train, test, names = load_mask_sources(
        data, max(pair(config.image_size)), not arguments.disable_tqdm, arguments.dataloader_num_workers
    )
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


def add_propagation(tasks):
    """`cjepa probe propagation MODEL`."""
    from trainers.clips import ClipArguments
    from trainers.flags import add_flags, type_hints
    from trainers.propagation import PropagationArguments

    parser = model_parser(
        tasks,
        "propagation",
        usage="cjepa probe propagation MODEL [--key value ...]",
        help="the masks of a video's first frame carried on by the likeness of patches",
        description="Carry the masks of objects from the first frame of a video through the others by the likeness of "
        "the frozen patch features of a model (C-JEPA: the target encoder; a stack: one level), and print DAVIS' J "
        "(regions) and F (contours), beside a randomly initialised encoder, raw pixels, and masks that do not move. "
        "Nothing is trained. --dataset is `scenes` (rendered clips with masks; the default) or DAVIS 2017's folder as "
        "it is downloaded. Writes propagation.json, propagation.png (frames with masks) and masks/VIDEO/FRAME.png, "
        "which DAVIS' own evaluation reads.",
        epilog="examples:  cjepa probe propagation runs/mine/final\n"
        "           cjepa probe propagation runs/mine/final --dataset DAVIS --output runs/mine/davis\n"
        "           cjepa probe propagation runs/mine/final --dataset DAVIS --num_clips 3 --frame_size 240",
    )
    add_level(parser)
    add_output(parser, "propagation")
    add_flags(parser, "data", ClipArguments(), type_hints(ClipArguments))
    add_flags(parser, "probe", PropagationArguments(), type_hints(PropagationArguments))
    parser.set_defaults(run=run_propagation, parser=parser)


def run_propagation(namespace):
    """Writes figures, picture and masks, and prints the figures."""
    from modeling_cjepa.configuration_cjepa import pair
    from trainers.clips import ClipArguments, load_clips
    from trainers.files import full_disk_named, write_json
    from trainers.flags import dataclass_from_flags
    from trainers.loading import load_encoder_config
    from trainers.pooling import level_of
    from trainers.propagation import PropagationArguments
    from trainers.propagation_evaluation import evaluate_propagation, format_propagation
    from trainers.propagation_maps import MaskWriter

    config = load_encoder_config(namespace.model)
    level_of(config, namespace.level)
    data = dataclass_from_flags(namespace, ClipArguments)
    arguments = dataclass_from_flags(namespace, PropagationArguments)
    folder = output_folder(namespace, "propagation")
    own_size = max(pair(config.image_size))
    clips = load_clips(data, arguments.frame_size or own_size, not arguments.disable_tqdm)
    frame_size = arguments.frame_size or (own_size if data.dataset == "scenes" else DAVIS_FRAME_SIZE)
    writer = MaskWriter(folder, clips)
    with full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        results = evaluate_propagation(
            namespace.model, clips, arguments, level=namespace.level, frame_size=frame_size, on_masks=writer
        )
        print(format_propagation(results, data.dataset))
        write_json(folder / "propagation.json", {"dataset": data.dataset} | results)
        writer.draw(folder / "propagation.png")
    print(f"\nWritten to {folder}: propagation.json, propagation.png and {len(clips)} folders of masks.")
