"""The stack of encoders that S-JEA (arXiv 2305.11701) pre-trains, alone and with a classifier, as transformers models.

Shapes: B images, C channels, D width of a level's embedding.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from .backbones_sjea import has_attention
from .checks_cjepa import check_choice
from .configuration_cjepa import choose_level
from .configuration_sjea import CLASSIFIER_POOLINGS, SJeaConfig
from .encoders_cjepa import forget_other_grids
from .heads_cjepa import CJepaAttentivePooling
from .levels_sjea import LevelOutput, SJeaLevel, as_tokens
from .stems_cjepa import check_floating_point


@dataclass
class SJeaModelOutput(BaseModelOutputWithPooling):
    """
    Output of [`SJeaModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, D, h, w)` or `(B, N, D)`): The chosen level's features before
            pooling: a convolutional backbone's map, a transformer's tokens.
        pooler_output (`torch.Tensor` of shape `(B, D)`): The chosen level's embedding.
        hidden_states (`tuple` of `torch.Tensor`, *optional*): The features of each level up to the chosen one.
        level_embeddings (`tuple` of `torch.Tensor` of shape `(B, D)`): The embedding of each level up to the chosen.
    """

    level_embeddings: tuple[torch.Tensor, ...] | None = None


class SJeaPreTrainedModel(PreTrainedModel):
    """What all S-JEA models share."""

    config: SJeaConfig
    base_model_prefix = "sjea"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SJeaLevel"]
    # for backbones that have attention; the others take no notice
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module):
        # backbones initialise themselves; what is left are the expanders' and the classifier's layers, in torch's way
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.in_features)
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, CJepaAttentivePooling):
            module.init_query(std=0.02)

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        super()._adjust_missing_and_unexpected_keys(loading_info)
        forget_other_grids(self, loading_info.mismatched_keys)

    def set_attn_implementation(self, attn_implementation: str, *args, **kwargs):
        """As in transformers, in every level whose backbone has attention; the others take no notice."""
        chosen = self.get_correct_attn_implementation(attn_implementation)
        for module in self.modules():
            if isinstance(module, SJeaLevel) and has_attention(type(module.backbone)):
                module.backbone.set_attn_implementation(attn_implementation, *args, **kwargs)
        self.config._attn_implementation_internal = chosen

    def save_pretrained(self, *args, **kwargs):
        """As in transformers; backbones keep their present parameter names, so that the stack loads as it is."""
        kwargs.setdefault("save_original_format", False)
        return super().save_pretrained(*args, **kwargs)


class SJeaModel(SJeaPreTrainedModel):
    """
    The stack of encoders; `config.level` says whose features it gives.

    Args:
        config ([`SJeaConfig`]): Its configuration.

    Raises:
        ValueError: A level cannot read what the one below gives, or there is no such level as `config.level`.
    """

    # what a pre-training checkpoint holds beside the encoders
    _keys_to_ignore_on_load_unexpected = [r"^expanders\.", r"^(classifier|pooling)\."]

    def __init__(self, config: SJeaConfig):
        super().__init__(config)
        choose_level(config.level, len(config.levels))
        image_shape = (config.num_channels, config.image_size, config.image_size)
        levels, configs = [], config.level_configs
        for number, level_config in enumerate(configs):
            above = configs[number + 1] if number + 1 < len(configs) else None
            is_read_expanded = above is not None and above.input == "vector" and above.reads == "expanded"
            below = levels[-1] if levels else None
            try:
                level = SJeaLevel(level_config, below, image_shape, is_read_expanded, config._attn_implementation)
            except ValueError as error:
                raise ValueError(f"levels[{number}]: {error}") from error
            levels.append(level)
        self.levels = nn.ModuleList(levels)
        self.post_init()

    def num_parameters_up_to(self, level: int) -> int:
        """Parameters of the encoders that make the features of a level, from 0."""
        # an expander inside the stack is part of what the level above it reads
        expanders = [module.expander for module in self.levels[:level] if module.expander is not None]
        used = [*(module.backbone for module in self.levels[: level + 1]), *expanders]
        return sum(parameter.numel() for module in used for parameter in module.parameters())

    def encode(
        self, pixel_values: torch.Tensor, level: int | None = None, stop_gradients: bool = False
    ) -> list[LevelOutput]:
        """
        Encodes images level by level.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images.
            level (`int`, *optional*): The last level to run; all of them when not given.
            stop_gradients (`bool`): Whether gradients end at levels with `stop_gradient`, as in pre-training, and do
                not reach those below.

        Returns:
            `list` of [`~levels_sjea.LevelOutput`], from the image up.

        Raises:
            ValueError: There is no such level, or the images have another number of channels or are whole numbers.
        """
        check_floating_point(pixel_values)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; give images "
                f"(B, {self.config.num_channels}, H, W)."
            )
        outputs, below = [], pixel_values.to(self.dtype)
        for module in self.levels[: choose_level(level, len(self.levels)) + 1]:
            below = module(below, stop_gradients)
            outputs.append(below)
        return outputs

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        level: int | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SJeaModelOutput:
        """
        Encodes images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images.
            level (`int`, *optional*): The level whose features are given; the configuration's when not given.
            output_hidden_states (`bool`, *optional*): Whether to return the features of each level.

        Returns:
            [`SJeaModelOutput`].

        Raises:
            ValueError: There is no such level, or the images have another number of channels or are whole numbers.
        """
        outputs = self.encode(pixel_values, self.config.level if level is None else level)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return SJeaModelOutput(
            last_hidden_state=outputs[-1].features,
            pooler_output=outputs[-1].embedding,
            hidden_states=tuple(output.features for output in outputs) if output_hidden_states else None,
            level_embeddings=tuple(output.embedding for output in outputs),
        )


class SJeaForImageClassification(SJeaPreTrainedModel):
    """
    The stack with a linear classifier on the embedding of one level, `config.level`, or on an attentive pooling of its
    features, as `classifier_pooling` says.

    Args:
        config ([`SJeaConfig`]): Its configuration; `num_labels` is the number of classes.
    """

    # the loss is the mean over a batch: Trainer shall divide it by the accumulation steps
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"^expanders\."]

    def __init__(self, config: SJeaConfig):
        super().__init__(config)
        check_choice("classifier_pooling", config.classifier_pooling, CLASSIFIER_POOLINGS)
        self.num_labels = config.num_labels
        self.sjea = SJeaModel(config)
        level = self.sjea.levels[choose_level(config.level, len(config.levels))]
        width = level.width
        if config.classifier_pooling == "attentive":
            width = level.features_shape[0 if len(level.features_shape) == 3 else 1]
            self.pooling = CJepaAttentivePooling(width, math.gcd(width, 8))
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """
        Classifies images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images.
            labels (`torch.Tensor` of shape `(B,)`, *optional*): Class indices; with them the loss is computed.
            output_hidden_states (`bool`, *optional*): Whether to return the features of each level.

        Returns:
            `ImageClassifierOutput`: `logits` (B, num_labels), `loss` when labels were given.
        """
        outputs = self.sjea(pixel_values, **kwargs, return_dict=True)
        if self.config.classifier_pooling == "attentive":
            logits = self.classifier(self.pooling(as_tokens(outputs.last_hidden_state)))
        else:
            logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states)
