"""What the protocol suite found, in the metadata of a model card (`model-index`), which the Hub shows."""

import json
import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard

from trainers.errors import InputError, first_line
from trainers.files import write_json, write_text_atomically

SUITES = "suites.json"


def eval_results(results: dict) -> list[EvalResult]:
    """
    The figures of a model's own encoders, as the Hub's model cards hold them.

    Args:
        results (`dict`): What [`~suite.evaluate_suite`] returned.

    Returns:
        `list` of `EvalResult`: Accuracies in percent, rounded to two digits; none of baselines, of models beside or of
        probes that were not run.
    """
    return [
        _accuracy(results["test_dataset"], row["accuracy"], metric_name(row))
        for row in results["rows"]
        if row["role"] == "model" and row["accuracy"] is not None
    ]


def probe_results(results: dict) -> list[EvalResult]:
    """The same of what [`~evaluation.evaluate_model`] returned: kNN and linear probe of the model's own encoders."""
    own = [
        row for row in results["rows"] if row["encoder"].startswith(("encoder", "target encoder", "context encoder"))
    ]
    names = {"knn": f"kNN accuracy (k {results['num_neighbors']}; ", "linear": "Linear probe accuracy ("}
    return [
        _accuracy(results["test_dataset"], row[probe], f"{name}{row['encoder']})")
        for row in own
        for probe, name in names.items()
    ]


def accuracy_results(results: dict) -> list[EvalResult]:
    """The same of a fine-tuned classifier's test."""
    return [_accuracy(results["test_dataset"], results["accuracy"], "Accuracy")]


def _accuracy(test_dataset: str, percent: float, metric_name: str) -> EvalResult:
    name, split = re.fullmatch(r"(.*?)(?: \((.*)\))?", test_dataset, re.DOTALL).groups()
    # a folder's place on this machine is nobody else's business
    name = Path(name).name if Path(name).expanduser().exists() else name
    return EvalResult(
        task_type="image-classification",
        task_name="Image Classification",
        dataset_type=name,
        dataset_name=name.rpartition("/")[2],
        dataset_split=split,
        metric_type="accuracy",
        metric_value=round(percent, 2),
        metric_name=metric_name,
    )


def metric_name(row: dict) -> str:
    """What a row's accuracy is called, such as `kNN accuracy (k 20; target encoder, last 4 layers)`."""
    kind, _, details = row["probe"].partition(", ")
    names = {"mean": "last layer", "last4": "last 4 layers", "patches, last4": "patches, last 4 layers"}
    features = names.get(row["features"], row["features"])
    where = f"{row['encoder']}, {features}"
    kind = {"linear": "Linear probe", "attentive": "Attentive probe"}.get(kind, kind)
    return f"{kind} accuracy ({'; '.join([details, where] if details else [where])})"


def check_card(path: str | Path) -> ModelCard:
    """
    A model card that figures can be written into.

    Args:
        path (`str` or `Path`): Its file, such as `runs/mine/final/README.md`.

    Returns:
        `ModelCard`.

    Raises:
        InputError: There is no such file, or its metadata cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"--card {path} is no file; give the model's card, such as runs/mine/final/README.md.")
    try:
        return ModelCard.load(path)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"The metadata of the card {path} cannot be read ({first_line(error)}); mend it.") from error


def write_eval_results(results: dict, path: str | Path, model_name: str):
    """
    Writes the figures into the metadata of a model card; its text and the figures of other data sets stay.

    Beside it, in [`SUITES`], all that was found is kept by the name of the test images, for the card that
    `cjepa publish` writes anew.

    Args:
        results (`dict`): What [`~suite.evaluate_suite`] returned.
        path (`str` or `Path`): The card's file.
        model_name (`str`): What the model is called, where the card does not say.

    Raises:
        InputError: As [`check_card`].
    """
    card, found = check_card(path), eval_results(results)
    known = [old for old in card.data.eval_results or [] if not any(old.is_equal_except_value(new) for new in found)]
    card.data.model_name = card.data.model_name or model_name
    card.data.eval_results = known + found
    write_text_atomically(path, str(card))
    kept = Path(path).with_name(SUITES)
    suites = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    write_json(kept, suites | {results["test_dataset"]: results})
