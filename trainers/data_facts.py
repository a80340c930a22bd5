"""What a model card says of the images: where they are from, and under which licence."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from trainers.sources import DataArguments, table_files


def data_facts(arguments: DataArguments) -> dict:
    """
    The name, the place and the licence of a data set, as far as they are known.

    Args:
        arguments ([`DataArguments`]): Which data set.

    Returns:
        `dict`: `dataset`, `is_on_hub`, and `license` if it is given, or the Hub tells it.
    """
    is_on_hub = _is_on_hub(arguments)
    facts = {"dataset": arguments.dataset, "is_on_hub": is_on_hub}
    license = arguments.dataset_license or (_license_on_hub(arguments.dataset) if is_on_hub else None)
    return facts | ({"license": license} if license else {})


def _is_on_hub(arguments: DataArguments) -> bool:
    is_here = Path(arguments.dataset).expanduser().exists() or table_files(arguments)[0] is not None
    return not is_here and arguments.dataset != "scenes"


def _license_on_hub(dataset: str) -> str | None:
    """The licence of a data set's card; None where it says none, or cannot be read now."""
    try:
        card = HfApi().dataset_info(dataset).card_data
    except (OSError, ValueError, HTTPError):
        return None  # the images are there, and a card without the licence is better than no run
    license = getattr(card, "license", None)
    return ", ".join(license) if isinstance(license, list) else license
