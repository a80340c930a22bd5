"""Model cards: the facts of a run as Markdown with the Hub's metadata; what is not known is left out."""

from collections.abc import Collection
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from trainers.eval_results import accuracy_results, check_card, eval_results, probe_results
from trainers.model_facts import is_classifier
from trainers.recipe_files import recipe_text
from trainers.reports import format_suite, format_table
from trainers.resources import render_template

CARD = "README.md"
_TEMPLATES = {"cjepa": "cjepa.md.j2", "sjea": "sjea.md.j2", "classifier": "classifier.md.j2"}
_PICTURES = "*.png"


def card_kind(model: PreTrainedModel) -> str:
    """The kind of a model's card: `cjepa`, `sjea` or `classifier`."""
    return "classifier" if is_classifier(model) else model.config.model_type


def write_card(folder: Path, kind: str, facts: dict, repo: str):
    """
    Writes the card of a model into its folder, beside the pictures that it shows.

    Args:
        folder (`Path`): The model's.
        kind (`str`): `cjepa`, `sjea` or `classifier`.
        facts (`dict`): What is known: `model` always, and of `recipe`, `command`, `seed`, `settings`, `data`,
            `training`, `conversion`, `diagnosis`, `machine`, `software`, `evaluation`, `suites` and `license` what
            there is.
        repo (`str`): Where the model will be loaded from: a folder, or an id of the Hub.
    """
    pictures, has_code = {path.name for path in folder.glob(_PICTURES)}, any(folder.glob("*.py"))
    (folder / CARD).write_text(card_text(kind, facts, repo, pictures, has_code), encoding="utf-8")


def card_text(kind: str, facts: dict, repo: str, pictures: Collection[str] = (), has_code: bool = True) -> str:
    """
    A card as Markdown with its metadata.

    Args:
        kind, facts, repo: As of [`write_card`].
        pictures (`Collection[str]`): Names of those that lie beside it.
        has_code (`bool`): Whether the code of this package lies beside it.
    """
    body = render_template(_TEMPLATES[kind], _context(facts, repo) | {"pictures": pictures, "code": has_code})
    return f"---\n{card_metadata(kind, facts, repo).to_yaml()}\n---\n\n{body.lstrip()}"


def _context(facts: dict, repo: str) -> dict:
    """The facts with what is derived of them: tables, limits, the settings as a recipe."""
    derived = {
        "repo": repo,
        "title": card_title(facts, repo),
        "hours": hours,
        "millions": millions,
        "limits": limits(facts),
    }
    parameters = facts["model"].get("parameters", {})
    derived["has_heads"] = isinstance(parameters, dict) and bool({"predictor", "expanders"} & parameters.keys())
    if "settings" in facts:
        derived["settings_text"] = recipe_text(facts["settings"])
    if "rows" in facts.get("evaluation", {}):
        derived["evaluation_table"] = format_table(facts["evaluation"])
    derived["suite_tables"] = [format_suite(suite) for suite in facts.get("suites", {}).values()]
    return facts | derived


def card_title(facts: dict, repo: str) -> str:
    """What the model is called: by its repository's name, or in a run's folder by the recipe's."""
    path = Path(repo)
    return facts.get("recipe", path.parent.name) if path.name in ("final", "published") else path.name


def hours(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def millions(number: int) -> str:
    """A number of parameters, as `85.6 M`."""
    return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number / 1e6:.3f} M"


def card_metadata(kind: str, facts: dict, repo: str) -> ModelCardData:
    """
    The metadata of a card, with the figures of its evaluations as `model-index`.

    Args:
        kind, facts, repo: As of [`write_card`].

    Returns:
        `ModelCardData`.
    """
    is_classifier = kind == "classifier"
    data, start = facts.get("data", {}), facts.get("start") or facts["model"].get("start", "")
    results = found_results(facts)
    return ModelCardData(
        license=facts.get("license"),
        library_name="transformers",
        pipeline_tag="image-classification" if is_classifier else "image-feature-extraction",
        tags=["image-classification", "jepa"] if is_classifier else ["self-supervised-learning", "jepa", kind],
        datasets=[data["dataset"]] if data.get("is_on_hub") else None,
        metrics=["accuracy"] if results else None,
        base_model=start if start.count("/") == 1 and not Path(start).exists() else None,
        model_name=card_title(facts, repo) if results else None,
        eval_results=results or None,
    )


def found_results(facts: dict) -> list[EvalResult]:
    """The figures of a model's own evaluations, as the Hub's metadata hold them."""
    evaluation = facts.get("evaluation", {})
    found = probe_results(evaluation) if "rows" in evaluation else []
    if "accuracy" in evaluation:
        found = accuracy_results(evaluation)
    return found + [result for suite in facts.get("suites", {}).values() for result in eval_results(suite)]


def limits(facts: dict) -> list[str]:
    """What the facts say the model should not be trusted with."""
    size = facts["model"].get("image_size")
    size = "x".join(map(str, size)) if isinstance(size, list) else size
    found = [f"Images of other sizes than {size} pixels, and of other kinds than it was trained on, were not tried."]
    training, evaluation = facts.get("training", {}), facts.get("evaluation", {})
    if "rows" not in evaluation and "accuracy" not in evaluation and "suites" not in facts:
        found.append("It was not evaluated.")
    found += [f"{sentence}." for sentence in _no_better(facts)]
    if training:
        found.append("It is one run of one seed.")
    diagnosis = facts.get("diagnosis", {})
    if diagnosis.get("state", "healthy") != "healthy":
        found.append(f"By its log the run is {diagnosis['state']}.")
    found.append("Whom it may treat unfairly was not looked at.")
    return found


def _no_better(facts: dict) -> list[str]:
    """Probes at which the features that `AutoModel` gives are not clearly above a random encoder's or raw pixels."""
    rows = facts.get("evaluation", {}).get("rows")
    if not rows:
        return []
    where = _default_level(facts["model"])
    label = rows[0]["encoder"].partition(",")[0]
    named = {row["encoder"]: row for row in rows}
    own, sentences = named[f"{label}{where}"], []
    for baseline in filter(None, (named.get(f"random encoder{where}"), named.get("raw pixels"))):
        for probe, name in (("knn", "neighbours"), ("linear", "a linear probe")):
            if own[f"{probe}_interval"][0] <= baseline[f"{probe}_interval"][1]:
                what = f"{own[probe]:.1f} and {baseline[probe]:.1f} %"
                compared = baseline["encoder"].replace("random", "a random")
                sentences.append(f"By {name} it is not clearly better than {compared} ({what})")
    return sentences


def _default_level(model: dict) -> str:
    """How rows of an evaluation name the level whose features are given; nothing where there is one."""
    num_levels = len(model["levels"]) if "levels" in model else 1 + len(model.get("upper_levels") or [])
    if num_levels == 1:
        return ""
    return f", level {(num_levels - 1 if model.get('level') is None else model['level']) % num_levels}"


def kept_license(folder: Path) -> str | None:
    """
    The licence that a model's card says, if there is a card and it says one.

    Raises:
        InputError: The card cannot be read.
    """
    path = folder / CARD
    return check_card(path).data.license if path.is_file() else None
