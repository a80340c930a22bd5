"""What the doctor is given: the log of a run, finished or not, or weights alone, which it sets beside random ones.

Shapes: n images, D width of a level's embedding.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from modeling_cjepa.configuration_cjepa import pair
from trainers.baselines import random_encoders
from trainers.checkpoint_files import broken_part, present_checkpoints
from trainers.datasets import ImageDataset, ImageSource
from trainers.doctor import COLLAPSED, COLLAPSED_SPREAD, DIMENSIONAL, HEALTHY, Diagnosis, LevelDiagnosis, worst
from trainers.doctor_advice import default_arguments, run_settings
from trainers.embedding import check_finite, extract_embeddings
from trainers.errors import InputError
from trainers.loading import load_encoder_config, read_json
from trainers.monitor import embedding_figures
from trainers.pooling import EveryLevel
from trainers.recipe_files import recipe_beside
from trainers.transforms import eval_transform


@dataclass
class RunRecord:
    """
    What is known of a run.

    Args:
        place (`str`): The folder or the id of its model or checkpoint.
        history (`list[dict]`): Its log; empty of weights alone.
        facts (`dict`): Of [`~doctor_advice.run_settings`].
    """

    place: str
    history: list[dict]
    facts: dict


def read_run(path: str) -> RunRecord:
    """
    The log of a run.

    Args:
        path (`str`): Its folder, its `final` folder, a checkpoint, a model's folder, or the id of one on the Hub.

    Returns:
        [`RunRecord`], without a history where there are weights alone.

    Raises:
        InputError: There is neither, or a file is broken.
    """
    place = newest_model(path)
    config = load_encoder_config(place)
    results = read_json(place, "results.json")
    state = read_json(place, "trainer_state.json") if not results else {}
    history = results.get("history") or state.get("log_history") or []
    if not any("rankme" in entry for entry in history):
        history = []  # of fine-tuning, which tells nothing of features
    settings = results.get("settings") or recipe_beside(place)
    warmup = settings.get("warmup_steps", default_arguments(config).warmup_steps)
    num_steps = results.get("training", {}).get("steps") or state.get("max_steps", 0)
    warmup_steps = warmup if warmup >= 1 else math.ceil(warmup * num_steps)
    return RunRecord(place, history, run_settings(config, settings, warmup_steps))


def newest_model(path: str) -> str:
    """Where the newest model of a run is: the finished one, or else that of its last checkpoint."""
    folder = Path(path)
    if folder.is_file():
        raise InputError(f"{path} is a file; give the folder of a run, of a checkpoint or of a model.")
    if not folder.is_dir() or (folder / "config.json").is_file():
        return path
    if (folder / "final" / "config.json").is_file():
        return str(folder / "final")
    for checkpoint in present_checkpoints(folder):
        broken = broken_part(checkpoint, "*.json")
        if not broken:
            return str(checkpoint)
        print(f"{checkpoint} is passed over: {broken}", file=sys.stderr)
    raise InputError(f"{path} holds neither a model nor a whole checkpoint; give the folder of a run, or of a model.")


def diagnose_weights(model: PreTrainedModel, source: ImageSource, mean, std, seed: int = 0) -> tuple[Diagnosis, list]:
    """
    Judges an encoder without a log, by what it makes of images, beside a randomly initialised one of its kind.

    Its features have collapsed where their standard deviation, in units of their length, is less than
    `COLLAPSED_SPREAD` of the random encoder's, and lie in few directions where their effective rank is below it.

    Args:
        model (`PreTrainedModel`): Gives `level_embeddings`, such as [`CJepaModel`].
        source ([`ImageSource`]): 2 images or more; labels are not read.
        mean, std (`list[float]`): Of the channels.
        seed (`int`): Of the random encoder.

    Returns:
        `(diagnosis, spectra)`: [`Diagnosis`], and of each level a pair of singular values (min(n, D),) in falling
        order, each divided by the sum: the encoder's and the random one's.
    """
    ((_, random_encoder),) = random_encoders(model, 1, seed)
    own, chance = (_level_embeddings(encoder, source, mean, std) for encoder in (model, random_encoder))
    levels = [_judge(number, *pair) for number, pair in enumerate(zip(own, chance, strict=True))]
    spectra = [tuple(map(_spectrum, pair)) for pair in zip(own, chance, strict=True)]
    return Diagnosis(worst(levels), None, levels), spectra


def _level_embeddings(encoder: PreTrainedModel, source: ImageSource, mean, std) -> list[torch.Tensor]:
    levels = EveryLevel(encoder)
    dataset = ImageDataset(source, eval_transform(pair(encoder.config.image_size)))
    embeddings, _ = extract_embeddings(levels, dataset, mean, std, progress=False)
    check_finite(embeddings, "encoder")
    return levels.split(embeddings)


def _judge(number: int, own: torch.Tensor, chance: torch.Tensor) -> LevelDiagnosis:
    (figures, spread), (of_chance, chance_spread) = (
        (embedding_figures(each), _relative_spread(each)) for each in (own, chance)
    )
    sentence = (
        f"effective rank {figures['rankme']:.3g} of {own.shape[1]} (random encoder: {of_chance['rankme']:.3g}), "
        f"standard deviation {spread:.2g} of the features' size (random encoder: {chance_spread:.2g}), mean "
        f"correlation {figures['correlation']:.2f} ({of_chance['correlation']:.2f})"
    )
    state = HEALTHY
    if spread < COLLAPSED_SPREAD * chance_spread:
        state = COLLAPSED
    elif figures["rankme"] < of_chance["rankme"]:
        state = DIMENSIONAL
    return LevelDiagnosis(number, state, [sentence])


def _relative_spread(embeddings: torch.Tensor) -> float:
    """Root mean square of the features around their mean, over that of the features."""
    return (embeddings.var(dim=0, correction=0).mean() / embeddings.square().mean().clamp_min(1e-30)).sqrt().item()


def _spectrum(embeddings: torch.Tensor) -> list[float]:
    values = torch.linalg.svdvals(embeddings.double())
    return (values / values.sum().clamp_min(1e-30)).tolist()
