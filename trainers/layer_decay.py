"""Layer-wise learning-rate decay: the further a layer is from the head, the less fine-tuning moves it (BEiT, MAE).

Parameters are grouped by depth: 0 is what reads the pixels, the head is on top. C-JEPA: embeddings, then layer by
layer, level by level. S-JEA: level by level, since a backbone may be of any kind.
"""

import re
from collections.abc import Iterable

import torch

from modeling_cjepa import CJepaConfig, SJeaConfig
from modeling_cjepa.configuration_cjepa import choose_level

_CJEPA_PART = re.compile(r"(?:^|\.)(?:upper_levels\.(\d+)\.)?(?:(embeddings)|layers\.(\d+)|layernorm)\.")
_SJEA_LEVEL = re.compile(r"(?:^|\.)levels\.(\d+)\.")


def depth_of(name: str, config: CJepaConfig | SJeaConfig) -> int:
    """
    How deep a classifier's parameter is.

    Args:
        name (`str`): Its name, with or without a prefix such as `cjepa.`.
        config ([`CJepaConfig`] or [`SJeaConfig`]): The classifier's.

    Returns:
        `int`: From 0 to [`head_depth`].
    """
    top = head_depth(config)
    if isinstance(config, SJeaConfig):
        level = _SJEA_LEVEL.search(name)
        return min(int(level.group(1)), top) if level else top
    part = _CJEPA_PART.search(name)
    if part is None:
        return top
    upper, embeddings, layer = part.groups()
    level = 0 if upper is None else int(upper) + 1
    if level > _chosen(config):
        return top  # the classifier does not read it
    below = sum(1 + config.level_config(number).num_hidden_layers for number in range(level))
    if embeddings:
        return below
    if layer is not None:
        return below + 1 + int(layer)
    # a final norm goes with what reads it
    return top if level == _chosen(config) else below + config.level_config(level).num_hidden_layers


def head_depth(config: CJepaConfig | SJeaConfig) -> int:
    """The depth of the head, and of the encoder's final norm."""
    levels = range(_chosen(config) + 1)
    if isinstance(config, SJeaConfig):
        return len(levels)
    return sum(1 + config.level_config(number).num_hidden_layers for number in levels)


def _chosen(config) -> int:
    return choose_level(config.level, config.num_levels)


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    config: CJepaConfig | SJeaConfig,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float,
) -> list[dict]:
    """
    The groups of an optimizer, from the head down, so that the first one's learning rate is the whole run's.

    Args:
        named_parameters: Those of the classifier; what takes no gradient is left out.
        config ([`CJepaConfig`] or [`SJeaConfig`]): The classifier's.
        learning_rate (`float`): Of the head.
        weight_decay (`float`): Of matrices; vectors (biases, norms, tokens, queries) and positions have none.
        layer_decay (`float`): Share of the learning rate that is left one depth down, in (0, 1].

    Returns:
        `list[dict]`: `params`, `lr` and `weight_decay` of each.
    """
    top, members = head_depth(config), {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            is_vector = parameter.numel() == parameter.shape[-1]
            decays = not (is_vector or "position" in name)
            members.setdefault((depth_of(name, config), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": learning_rate * layer_decay ** (top - depth),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (depth, decays), parameters in sorted(members.items(), key=lambda item: item[0], reverse=True)
    ]
