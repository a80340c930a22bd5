"""What to change in a run that is ill: flags with values, of what the run was set to."""

import torch
from transformers import PreTrainedConfig

from modeling_cjepa import CJepaConfig, SJeaModel
from trainers.training_args import CJepaTrainingArguments, JepaTrainingArguments, SJeaTrainingArguments

_TRAINING = ("learning_rate", "max_grad_norm", "ema_momentum", "final_ema_momentum", "num_monitored_images")
_USUAL_RATE = JepaTrainingArguments.learning_rate
_WEIGHTS = ("regularizer_weight", "variance_weight", "covariance_weight")


def run_settings(config: PreTrainedConfig, training: JepaTrainingArguments | dict, warmup_steps: float = 0) -> dict:
    """
    The facts of a run that [`~doctor.diagnose`] can use.

    Args:
        config ([`CJepaConfig`] or [`SJeaConfig`]): Of the model.
        training ([`JepaTrainingArguments`] or `dict`): How it was trained; of a dictionary, such as a recipe, what is
            missing is as the class has it.
        warmup_steps (`float`): Steps of the learning rate's warm-up.

    Returns:
        `dict`: `model_type`, `widths` and `weights` (of the regulariser) of each level, `warmup_steps`, and the
        arguments that matter.
    """
    defaults = default_arguments(config)
    if isinstance(config, CJepaConfig):
        levels = [config.level_config(number) for number in range(config.num_levels)]
        widths = [level.hidden_size for level in levels]
    else:
        levels = config.level_configs
        with torch.device("meta"):
            widths = [level.width for level in SJeaModel(config).levels]
    chosen = training if isinstance(training, dict) else vars(training)
    return {
        "model_type": config.model_type,
        "widths": widths,
        "weights": [{name: getattr(level, name) for name in _WEIGHTS if hasattr(level, name)} for level in levels],
        "warmup_steps": warmup_steps,
        **{name: chosen.get(name, getattr(defaults, name)) for name in _TRAINING if hasattr(defaults, name)},
    }


def default_arguments(config: PreTrainedConfig) -> type[JepaTrainingArguments]:
    """The class whose defaults a run of a model has."""
    return CJepaTrainingArguments if isinstance(config, CJepaConfig) else SJeaTrainingArguments


def advise(state: str, facts: dict, levels: list) -> list[str]:
    """
    What to change, the likeliest cause first.

    Args:
        state (`str`): Of the run, one of `doctor.STATES`.
        facts (`dict`): Of [`run_settings`]; without them nothing can be said.
        levels (`list` of `LevelDiagnosis`): Of which those in this state are advised on.

    Returns:
        `list[str]`: Sentences, none for a run that is well.
    """
    if state not in _CAUSES or not facts:
        return []
    ill = [level.level for level in levels if level.state == state]
    found = [sentence for cause in _CAUSES[state] if (sentence := cause(facts, ill))]
    return found or [_shorter_steps(facts, ill)]


def _regularizer(facts: dict, ill: list[int]) -> str | None:
    """The weight of VICReg's terms in C-JEPA, of level 0 or of an entry of `upper_levels`."""
    if facts["model_type"] != "cjepa":
        return None
    for number in ill:
        weights = facts["weights"][number]
        where = "" if number == 0 else f" in the entry of level {number} in upper_levels"
        if weights["regularizer_weight"] == 0:
            default = CJepaConfig.regularizer_weight
            return _set("regularizer_weight", default, 0, where, "nothing but the moving average holds the features")
        for name in ("variance_weight", "covariance_weight"):
            if weights[name] == 0:
                return _set(name, getattr(CJepaConfig, name), 0, where, "without it features may shrink or repeat")
        now = weights["regularizer_weight"]
        return _set("regularizer_weight", 3 * now, now, where, "it holds the features apart")
    return None


def _vicreg_weights(facts: dict, ill: list[int]) -> str | None:
    """The weights of VICReg's terms in S-JEA, which stand in an entry of `levels`."""
    if facts["model_type"] != "sjea":
        return None
    for number in ill:
        for name, usual in (("variance_weight", 25.0), ("covariance_weight", 1.0)):
            now = facts["weights"][number][name]
            if now < usual:
                return _set(name, usual, now, f" in the entry of level {number} in levels", "VICReg's own value")
    return None


def _ema_momentum(facts: dict, ill: list[int]) -> str | None:
    now, usual = facts.get("ema_momentum"), CJepaTrainingArguments.ema_momentum
    if now is None or 0.9 <= now < 1:
        return None
    why = "the target follows so fast that both encoders can agree on nothing" if now < 1 else "the target never moves"
    return _set("ema_momentum", usual, now, "", why)


def _shorter_steps(facts: dict, ill: list[int]) -> str:
    now = facts["learning_rate"]
    return _set("learning_rate", now / 10 if now > _USUAL_RATE else now / 3, now, "", "long steps throw features away")


def _high_rate(facts: dict, ill: list[int]) -> str | None:
    return _shorter_steps(facts, ill) if facts["learning_rate"] > _USUAL_RATE else None


def _clipping(facts: dict, ill: list[int]) -> str | None:
    if facts["max_grad_norm"]:
        return None
    return _set("max_grad_norm", 3, 0, "", "a single gradient can throw the features away")


def _low_rate(facts: dict, ill: list[int]) -> str | None:
    now = facts["learning_rate"]
    return _set("learning_rate", 10 * now, now, "", "the steps may be too short") if now < _USUAL_RATE / 2 else None


def _set(name: str, value: float, now: float, where: str, why: str) -> str:
    key = f"{name}: {value:.3g}" if where else f"--{name} {value:.3g}"
    return f"{key}{where} (is {now:.3g}): {why}"


_CAUSES = {
    "diverged": (_shorter_steps, _clipping),
    "collapsed": (_regularizer, _vicreg_weights, _ema_momentum, _high_rate),
    "dimensional collapse": (_regularizer, _vicreg_weights, _ema_momentum, _high_rate),
    "not learning": (_ema_momentum, _low_rate),
}
