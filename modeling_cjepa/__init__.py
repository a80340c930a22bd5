"""C-JEPA models for transformers; importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from .configuration_cjepa import CJepaConfig
from .modeling_cjepa import CJepaForImageClassification, CJepaModel, CJepaPreTrainedModel
from .pretraining_cjepa import CJepaForPreTraining, CJepaForPreTrainingOutput

AutoConfig.register("cjepa", CJepaConfig, exist_ok=True)
AutoModel.register(CJepaConfig, CJepaModel, exist_ok=True)
AutoModelForPreTraining.register(CJepaConfig, CJepaForPreTraining, exist_ok=True)
AutoModelForImageClassification.register(CJepaConfig, CJepaForImageClassification, exist_ok=True)

__all__ = [
    "CJepaConfig",
    "CJepaForImageClassification",
    "CJepaForPreTraining",
    "CJepaForPreTrainingOutput",
    "CJepaModel",
    "CJepaPreTrainedModel",
]
