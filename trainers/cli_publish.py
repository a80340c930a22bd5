"""`cjepa publish`: a run as a repository on the Hub."""

from trainers.cli_models import model_parser
from trainers.errors import InputError


def add_publish(commands):
    """`cjepa publish RUN --repo user/name`."""
    parser = model_parser(
        commands,
        "publish",
        usage="cjepa publish RUN (--repo USER/NAME | --dry-run FOLDER) [--key value ...]",
        metavar="RUN",
        help="publish a run on the Hub: weights, code, image processor, card and results",
        description="Publish a model on the Hub, so that it loads anywhere with transformers alone: the weights of "
        "all parts (to use the encoder, and to continue pre-training), configuration, code, image processor, results, "
        "pictures and a model card made of what the run recorded. RUN is the folder of a run, its `final`, a "
        "checkpoint, or any model's folder. Nothing is uploaded before all of it is made, and then by one commit: the "
        "repository is never half full. Repeat an interrupted call: large files that arrived are not sent again. Sign "
        "in first by `hf auth login`, or set HF_TOKEN. Paths of this machine, and images of the run, stay here.",
        epilog="examples:  cjepa publish runs/mine --dry-run runs/mine/published\n"
        "           cjepa publish runs/mine --repo me/encoder --private --license cc-by-4.0\n"
        "           cjepa publish runs/mine --repo me/encoder-ijepa --native",
    )
    parser.add_argument(
        "--repo", metavar="USER/NAME",
        help="the repository, made if it is not there; without it the card of a dry run names the folder",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", metavar="FOLDER", dest="dry_run",
        help="write the folder that would be uploaded, list its files and upload nothing; without network",
    )  # fmt: skip
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to fill, made if it is not there (main)")
    parser.add_argument("--update", action="store_true", help="replace the model in a repository that exists")
    parser.add_argument(
        "--shard-size", metavar="SIZE", dest="shard_size", default="5GB",
        help="bytes of the largest file of weights, such as 500MB (default: 5GB)",
    )  # fmt: skip
    parser.add_argument("--license", metavar="NAME", help="licence of the weights, such as apache-2.0, for the card")
    parser.add_argument(
        "--encoder-only", action="store_true", dest="encoder_only",
        help="only the target encoder (S-JEA: the stack): a smaller download, from which pre-training cannot continue",
    )  # fmt: skip
    parser.add_argument(
        "--native", action="store_true",
        help="the target encoder as transformers' own IJepaModel, which loads without trust_remote_code",
    )  # fmt: skip
    parser.set_defaults(run=run_publish, parser=parser, after_interruption="repeat the call to go on")


def run_publish(namespace):
    """Makes the folder, lists it, and uploads it unless that is not wanted."""
    import tempfile
    from pathlib import Path

    from huggingface_hub.utils import enable_progress_bars

    from trainers.files import full_disk_named
    from trainers.hub import Destination, check_destination, upload
    from trainers.publication import Publication
    from trainers.publishing import whole_folder

    if not (namespace.repo or namespace.dry_run):
        raise InputError("--repo is missing; say where to, as in --repo me/encoder, or write a folder by --dry-run.")
    named = namespace.repo or namespace.dry_run
    options = {name: getattr(namespace, name) for name in ("encoder_only", "native", "shard_size", "license")}
    publication = Publication(namespace.model, named, **options)
    if namespace.repo:
        destination = Destination(namespace.repo, namespace.private, namespace.revision, namespace.update)
    if namespace.dry_run:
        preview = Path(namespace.dry_run)
        with whole_folder(preview) as folder, full_disk_named(preview.parent):
            publication.write(folder)
        print(f"{listing(preview)}\nNothing was uploaded.")
        return
    print(f"signed in as {check_destination(destination)}", flush=True)
    with tempfile.TemporaryDirectory() as temporary, full_disk_named(Path(temporary).parent):
        publication.write(Path(temporary))
        print(listing(Path(temporary)), flush=True)
        enable_progress_bars()
        url = upload(Path(temporary), destination, f"Publish {Path(namespace.model).name} by cjepa")
    print(f"Published: {url}")


def listing(folder) -> str:
    """The files of a folder with their sizes, a line each, and all together."""
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    lines = [f"{size / 1e6:10.3f} MB  {name}" for name, size in sorted(sizes.items())]
    return "\n".join([*lines, f"{sum(sizes.values()) / 1e6:10.3f} MB  in {len(sizes)} files"])
