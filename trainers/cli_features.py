"""`cjepa features`: embeddings of a whole data set."""

from trainers.cli_models import add_data_flags, as_in_the_run, model_parser

# fields of the data arguments that say which images, and how they are normalised; features take splits as they are
_DATA_FIELDS = ("dataset", "dataset_config", "image_column", "label_column", "image_mean", "image_std")


def add_features(commands):
    """`cjepa features MODEL`."""
    from trainers.feature_encoder import FeatureArguments
    from trainers.flags import add_flags, type_hints
    from trainers.sources import DataArguments

    parser = model_parser(
        commands,
        "features",
        usage="cjepa features MODEL --output DIR [--key value ...]",
        help="embed all images of a data set, into parquet files",
        description="Embed all images of a data set by a model (C-JEPA: the target encoder) and write them as "
        "parquet files that `datasets` and --dataset read: SPLIT-00000.parquet and so on, with the columns `index` "
        "(the image's position in its split), `path` (its file, if it is one), the label, and `embedding`. "
        "features.json says what they were made of, skipped.jsonl which images could not be read. An interrupted "
        "call goes on where it was when it is repeated. Without --dataset the images are those of the run that made "
        "the model.",
        epilog="examples:  cjepa features runs/mine/final --dataset my/photos --output features\n"
        "           cjepa features runs/mine/final --pooling patches --dtype float16 --output maps\n"
        '           cjepa features runs/mine/final --dataset "shards/train-*.tar" --streaming --output features\n'
        "           torchrun --nproc_per_node 2 -m trainers.cli features runs/mine/final --output features\n"
        '           then in Python:  datasets.load_dataset("parquet", data_dir="features")',
    )
    parser.add_argument("--output", "--out", metavar="DIR", required=True, help="the folder to write to")
    hints = {name: hint for name, hint in type_hints(DataArguments).items() if name in _DATA_FIELDS}
    add_data_flags(parser, DataArguments(), hints)
    add_flags(parser, "features", FeatureArguments(), type_hints(FeatureArguments))
    parser.set_defaults(
        run=run_features,
        parser=parser,
        after_interruption="repeat the call to go on after the last whole file",
    )


def run_features(namespace):
    """Writes the features and says what is there."""
    from pathlib import Path

    from accelerate import PartialState

    from trainers.errors import InputError
    from trainers.feature_encoder import FeatureArguments
    from trainers.features import write_features
    from trainers.flags import dataclass_from_flags
    from trainers.loading import load_encoder_config
    from trainers.sources import DataArguments

    folder = Path(namespace.output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; name a folder.")
    data = dataclass_from_flags(namespace, DataArguments)
    arguments = dataclass_from_flags(namespace, FeatureArguments)
    load_encoder_config(namespace.model)  # a mistake is told before images are read
    (data,) = as_in_the_run(namespace, namespace.model, data)
    manifest = write_features(namespace.model, data, folder, arguments)
    if PartialState().is_main_process:
        print(describe(manifest, folder))


def describe(manifest: dict, folder) -> str:
    """What a features folder holds, as lines for the screen."""
    lines = [
        f"{split}: {summary['num_images'] - summary['num_skipped']:,} embeddings in {summary['num_shards']} "
        f"file{'s' * (summary['num_shards'] != 1)}"
        + (
            f"; {summary['num_skipped']:,} images could not be read, see skipped.jsonl"
            if summary["num_skipped"]
            else ""
        )
        for split, summary in manifest["splits"].items()
    ]
    load = f'datasets.load_dataset("parquet", data_dir="{folder}")'
    return "\n".join([*lines, f"Written to {folder}. Load them:  {load}"])
