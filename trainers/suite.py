"""The protocol suite: what a frozen encoder is good for by every usual probe, in one table.

Weighted kNN (k 20 and 200), a linear probe, linear probes on 1 % and 10 % of the labels (I-JEPA's low-shot protocol),
and an attentive probe on the tokens; of the target and the context encoder, each of the last and the last four layers
(S-JEA: of the last), beside random encoders and raw pixels. No setting is chosen on test images. Intervals are by
bootstrap over these; where an accuracy is 0 or 100 %, Wilson's.

Shapes: n images to fit on, m to test on, D width of an embedding.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from trainers.attentive_probe import attentive_predict
from trainers.baselines import random_encoders, raw_pixels_label
from trainers.datasets import ImageSource
from trainers.errors import InputError
from trainers.evaluation import EvaluationArguments
from trainers.flags import closest
from trainers.linear_sweep import sweep_predict
from trainers.pooling import level_of
from trainers.precision import precision_name
from trainers.probes import NUM_RESAMPLES, bootstrap_interval, knn_predict, linear_predict, share_of_each_class
from trainers.subject import Subject
from trainers.suite_features import Features, ImageReader

NUM_NEIGHBORS = (20, 200)
LABEL_SHARES = (0.01, 0.1)
_TOO_FEW = "not run: one train image a class leaves none to choose settings on"


def exact_linear(train_x, train_y, test_x, seed: int, progress: bool) -> tuple[torch.Tensor, dict]:
    """Predictions of [`~probes.linear_predict`], and what it chose."""
    probe = linear_predict(train_x, train_y, test_x, seed, progress)
    return probe.predictions, {"C": probe.C} | ({} if probe.converged else {"converged": False})


def swept_linear(train_x, train_y, test_x, seed: int, progress: bool) -> tuple[torch.Tensor, dict]:
    """Predictions of [`~linear_sweep.sweep_predict`], and what it chose."""
    probe = sweep_predict(train_x, train_y, test_x, seed, progress)
    return probe.predictions, {"learning_rate": probe.learning_rate, "weight_decay": probe.penalty}


SUITES = {"small": exact_linear, "imagenet": swept_linear}
"""The linear probe of each suite: fitted exactly, or swept."""


def check_suite(name: str):
    """Refuses a suite that is not known."""
    if name not in SUITES:
        meant = closest(name, SUITES)
        advice = f"did you mean {meant}?" if meant else f"choose one of {', '.join(SUITES)}."
        raise InputError(f"suite {name!r} is not known; {advice}")


def evaluate_suite(
    model: "str | Path | PreTrainedModel",
    train_source: ImageSource,
    test_source: ImageSource,
    suite: str = "small",
    arguments: EvaluationArguments | None = None,
    image_mean=IMAGENET_DEFAULT_MEAN,
    image_std=IMAGENET_DEFAULT_STD,
    level: int | str | None = None,
    beside: "dict[str, str | Path | PreTrainedModel] | None" = None,
) -> dict:
    """
    Every probe on every kind of features of a model's encoders, of models beside it, of random encoders and of pixels.

    Args:
        model, train_source, test_source, image_mean, image_std, level, beside: As in [`~evaluation.evaluate_model`].
        suite (`str`): `"small"` fits linear probes exactly; `"imagenet"` sweeps over learning rates and penalties.
        arguments ([`EvaluationArguments`], *optional*): How; `num_neighbors` and `context_encoder` are not read.

    Returns:
        `dict`: `rows`, one for each encoder, features and probe: `encoder`, `role` (`model`, `beside`, `baseline`),
        `features` (`mean`, `last4`; of the attentive probe `patches`, `patches, last4`; `pixels`), `probe`, `accuracy`
        in percent (None if the probe could not be run), `interval` (95 %), `num_labels`, `settings` (chosen on train
        images), `dim` (of an embedding or a token), `num_parameters`, and `note` where a probe was not run; and the
        data sets' names and sizes, `skipped` (images left out), `chance` and the settings of all rows.

    Raises:
        InputError: As [`~evaluation.evaluate_model`]; the suite is not known.
    """
    check_suite(suite)
    arguments = arguments or EvaluationArguments()
    subject = Subject.load(model, train_source, test_source, arguments, image_mean, image_std, level, beside)
    subject.leave_out_unreadable(arguments.dataloader_num_workers, not arguments.disable_tqdm)
    sources, rows = (subject.train, subject.test), []
    for role, read in _all_features(subject, arguments, level):
        # read in here, where nothing outlives the list: the memory is the next encoder's
        rows += [
            {"role": role} | row
            for features in read()
            for row in probe_features(features, *sources, SUITES[suite], arguments)
        ]
    return {
        "suite": suite,
        **subject.facts(),
        "temperature": arguments.temperature,
        "num_resamples": NUM_RESAMPLES,
        "seed": arguments.seed,
        "precision": precision_name(arguments.precision, subject.model.device),
        "rows": rows,
    }


def _all_features(
    subject: Subject, arguments: EvaluationArguments, level
) -> Iterator[tuple[str, Callable[[], list[Features]]]]:
    """The role of each encoder in turn, and what reads its features when called, so that only these are in memory."""
    model, sources = subject.model, (subject.train, subject.test)
    image_size = model.config.image_size
    reader = ImageReader(sources, image_size, *subject.statistics, arguments, model.device)
    levels = _levels(model, level)
    is_cjepa = isinstance(model, CJepaForPreTraining)
    encoders = [("model", "target encoder" if is_cjepa else "encoder", model.base_model, reader, levels)]
    if is_cjepa:
        encoders.append(("model", "context encoder", model.context_encoder, reader, levels))
    for name, (other, *theirs) in subject.others.items():
        other_reader = ImageReader(sources, other.config.image_size, *theirs, arguments, other.device)
        other_levels = _levels(other, "all" if level == "all" else None)
        encoders.append(("beside", name, other.base_model, other_reader, other_levels))
    for role, label, encoder, images, chosen in encoders:
        yield role, partial(images.read, encoder, chosen, label)
    for label, encoder in random_encoders(model.base_model, arguments.num_random_encoders, arguments.seed):
        yield "baseline", partial(reader.read, encoder, levels, label)
    yield "baseline", partial(reader.read_pixels, raw_pixels_label(pair(image_size)))


def _levels(model: PreTrainedModel, level: int | str | None) -> list[int]:
    """The levels of a model that are asked for: one, or all."""
    return list(range(model.config.num_levels)) if level == "all" else [level_of(model.config, level)]


def probe_features(
    features: Features, train: ImageSource, test: ImageSource, linear, arguments: EvaluationArguments
) -> Iterator[dict]:
    """
    The rows of one encoder: every probe on each of its features.

    Args:
        features ([`Features`]): Its features.
        train, test ([`ImageSource`]): The images with their labels, whose classes are alike.
        linear (`Callable`): The linear probe, one of `SUITES`.
        arguments ([`EvaluationArguments`]): Temperature, seed, progress.

    Yields:
        `dict`: As in [`evaluate_suite`], without `role`.
    """
    device = next(iter(features.embeddings.values()))[0].device
    train_y, test_y = (torch.from_numpy(source.labels).to(device) for source in (train, test))
    common = {"encoder": features.label, "num_parameters": features.num_parameters}
    seed, progress = arguments.seed, not arguments.disable_tqdm
    for name, (train_x, test_x) in features.embeddings.items():
        here = common | {"features": name, "dim": test_x.shape[1]}
        for k in dict.fromkeys(min(k, len(train_y)) for k in NUM_NEIGHBORS):
            found = knn_predict(train_x, train_y, test_x, len(train.label_names), k, arguments.temperature)
            yield here | {"probe": f"kNN, k {k}"} | _score(found, test_y, len(train_y), seed)
        for share in (1, *reversed(LABEL_SHARES)):
            ids = torch.from_numpy(share_of_each_class(train.labels, share, seed)).to(device)
            probe = "linear" if share == 1 else f"linear, {100 * share:g} % of labels"
            row = here | {"probe": probe}
            if _is_too_few(train_y[ids]):
                yield row | _not_run(len(ids))
                continue
            found, settings = linear(train_x[ids], train_y[ids], test_x, seed, progress)
            yield row | _score(found, test_y, len(ids), seed, settings)
    for name, (train_tokens, test_tokens) in features.tokens.items():
        row = common | {"features": name, "dim": test_tokens.width, "probe": "attentive"}
        if _is_too_few(train_y):
            yield row | _not_run(len(train_y))
            continue
        # of more layers the tokens are wider, and the embedding is not: a probe of the same kind, and no more costly
        width = features.tokens["patches"][0].width
        probe = attentive_predict(train_tokens, train_y, test_tokens, len(test_y), seed, progress, width)
        settings = {"learning_rate": probe.learning_rate}
        yield row | _score(probe.predictions, test_y, len(train_y), seed, settings)


def _is_too_few(targets: torch.Tensor) -> bool:
    return len(targets.unique()) == len(targets)


def _score(
    found: torch.Tensor, test_y: torch.Tensor, num_labels: int, seed: int, settings: dict | None = None
) -> dict:
    num_correct, total = int((found == test_y).sum()), len(test_y)
    return {
        "accuracy": 100 * num_correct / total,
        "interval": list(bootstrap_interval(num_correct, total, seed)),
        "num_labels": num_labels,
        "settings": settings or {},
    }


def _not_run(num_labels: int) -> dict:
    return {"accuracy": None, "interval": None, "num_labels": num_labels, "settings": {}, "note": _TOO_FEW}
