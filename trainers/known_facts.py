"""What is known of a saved model: of a finished run its results, of a checkpoint what lies beside it."""

from pathlib import Path

from transformers import PreTrainedModel

from trainers.doctor import diagnose
from trainers.doctor_runs import read_run
from trainers.errors import InputError
from trainers.eval_results import SUITES
from trainers.loading import read_json
from trainers.log_facts import log_facts
from trainers.model_facts import classifier_facts, is_classifier, model_facts
from trainers.recipe_files import recipe_beside

# what `cjepa convert` leaves beside a model, as it may be published: `source`, `format`, `notes` and `checks`
CONVERSION = "conversion.json"


def known_facts(place: Path, model: PreTrainedModel) -> dict:
    """
    The facts of a saved model.

    Args:
        place (`Path`): Its folder.
        model (`PreTrainedModel`): The model.

    Returns:
        `dict`: As `results.json` of a finished run; of a checkpoint its place in the run, settings, `history` and what
        that says; of weights alone the model. `suites` and `conversion` where there were some.

    Raises:
        InputError: A file beside the model is not what this package writes.
    """
    facts = _mapping(place, "results.json")
    if not facts:
        facts = {"model": classifier_facts(model)} if is_classifier(model) else _unfinished(place, model)
    elif not isinstance(facts.get("model"), dict) or "parameters" not in facts["model"]:
        raise InputError(f"results.json of {place} says nothing of the model; remove it, or write it again.")
    others = {"suites": _mapping(place, SUITES), "conversion": _mapping(place, CONVERSION)}
    return facts | {name: found for name, found in others.items() if found}


def _mapping(place: Path, name: str) -> dict:
    found = read_json(str(place), name)
    if not isinstance(found, dict):
        raise InputError(f"{name} of {place} holds no mapping; remove it, or write it again.")
    return found


def _unfinished(place: Path, model: PreTrainedModel) -> dict:
    """The facts of a checkpoint, or of weights alone."""
    facts = {"model": model_facts(model)}
    state = _mapping(place, "trainer_state.json")
    if not state:
        return facts
    settings, record = recipe_beside(place), read_run(str(place))
    step, planned = state["global_step"], state["max_steps"]
    facts["training"] = {"steps": step, **log_facts(record.history)}
    if planned > step:
        facts["training"]["planned_steps"] = planned
    if record.history:
        facts["diagnosis"] = diagnose(record.history, record.facts).to_dict()
        facts["history"] = record.history
    return facts | ({"settings": settings} if settings else {})
