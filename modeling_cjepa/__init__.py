"""C-JEPA and S-JEA models for transformers; importing this package registers them with the Auto classes."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
)

from .backbone_cjepa import CJepaBackbone
from .configuration_cjepa import CJepaConfig
from .configuration_sjea import SJeaConfig
from .modeling_cjepa import CJepaForImageClassification, CJepaModel, CJepaPreTrainedModel
from .modeling_sjea import SJeaForImageClassification, SJeaModel, SJeaPreTrainedModel
from .pretraining_cjepa import CJepaForPreTraining, CJepaForPreTrainingOutput
from .pretraining_sjea import SJeaForPreTraining, SJeaForPreTrainingOutput

for config, model, pretraining, classification in (
    (CJepaConfig, CJepaModel, CJepaForPreTraining, CJepaForImageClassification),
    (SJeaConfig, SJeaModel, SJeaForPreTraining, SJeaForImageClassification),
):
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForPreTraining.register(config, pretraining, exist_ok=True)
    AutoModelForImageClassification.register(config, classification, exist_ok=True)
    # so that what is saved holds the code it needs where this package is not installed
    config.register_for_auto_class()
    model.register_for_auto_class()
    pretraining.register_for_auto_class("AutoModelForPreTraining")
    classification.register_for_auto_class("AutoModelForImageClassification")
AutoBackbone.register(CJepaConfig, CJepaBackbone, exist_ok=True)
CJepaBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "CJepaBackbone",
    "CJepaConfig",
    "CJepaForImageClassification",
    "CJepaForPreTraining",
    "CJepaForPreTrainingOutput",
    "CJepaModel",
    "CJepaPreTrainedModel",
    "SJeaConfig",
    "SJeaForImageClassification",
    "SJeaForPreTraining",
    "SJeaForPreTrainingOutput",
    "SJeaModel",
    "SJeaPreTrainedModel",
]
