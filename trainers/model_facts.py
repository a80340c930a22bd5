"""What a model says of itself: its parameters by part, and the fields of its configuration."""

import inspect

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_cjepa import (
    CJepaForImageClassification,
    CJepaForPreTraining,
    SJeaForImageClassification,
    SJeaForPreTraining,
    SJeaModel,
)
from modeling_cjepa.configuration_cjepa import pair


def model_fields(config_class: type) -> dict[str, object]:
    """Types of a configuration's own fields, without those every transformers model has."""
    fields: dict[str, object] = {}
    for cls in reversed(config_class.__mro__):
        if issubclass(cls, PreTrainedConfig) and cls is not PreTrainedConfig:
            fields |= inspect.get_annotations(cls)
    return fields


def model_facts(model: PreTrainedModel) -> dict:
    """
    The facts of a model, for its card and its results.

    Args:
        model (`PreTrainedModel`): One of this package.

    Returns:
        `dict`: `parameters` by part, and every field of its kind of configuration.
    """
    fields = model_fields(type(model.config))
    return {"parameters": parameters_by_part(model), **{name: getattr(model.config, name) for name in fields}}


def classifier_facts(model: PreTrainedModel) -> dict:
    """As [`model_facts`], of a classifier: `parameters`, `image_size` and the names of its `classes`."""
    config = model.config
    size = list(pair(config.image_size))
    return {"parameters": model.num_parameters(), "image_size": size, "classes": list(config.id2label.values())}


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether a model of this package is an image classifier."""
    return isinstance(model, CJepaForImageClassification | SJeaForImageClassification)


def parameters_by_part(model: PreTrainedModel) -> dict[str, int]:
    """How many parameters the parts of a model have, that which is published first."""
    encoder = model.base_model
    if isinstance(encoder, SJeaModel):
        parts = {f"encoder {number}": count(level.backbone) for number, level in enumerate(encoder.levels)}
    else:
        parts = {"encoder": encoder.num_parameters()}
    if isinstance(model, CJepaForPreTraining):
        parts["predictor"] = count(model.predictor) + count(model.upper_predictors)
    if isinstance(model, SJeaForPreTraining):
        inside = sum(count(level.expander) for level in encoder.levels if level.expander is not None)
        parts["expanders"] = count(model.expanders) + inside
    return parts


def count(module: nn.Module) -> int:
    """Parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
