"""The encoder that C-JEPA pre-trains, alone and with a classifier, as transformers models.

Shapes: B images, C channels, N patches, Nc encoded patches, D width.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cjepa import CJepaConfig
from .encoders_cjepa import CJepaAttention, CJepaEmbeddings, CJepaLayer, init_weights


class CJepaPreTrainedModel(PreTrainedModel):
    """What all C-JEPA models share: configuration, initialisation and the features of the attention interface."""

    config: CJepaConfig
    base_model_prefix = "cjepa"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CJepaEmbeddings", "CJepaLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": CJepaLayer, "attentions": CJepaAttention}
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_weights(module, self.config)


class CJepaModel(CJepaPreTrainedModel):
    """
    The encoder: a vision transformer without class token. `AutoModel` loads the target encoder of a pre-trained model.

    Args:
        config ([`CJepaConfig`]): Its configuration.
    """

    # what a pre-training checkpoint holds beside the target encoder
    _keys_to_ignore_on_load_unexpected = [r"^context_encoder\.", r"^predictor\.", r"^expander\.", r"^classifier\."]

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        self.embeddings = CJepaEmbeddings(config)
        self.layers = nn.ModuleList(
            CJepaLayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor, patch_ids: torch.Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPooling:
        """
        Encodes images, or only some of their patches.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images of any size of a patch or more.
            patch_ids (`torch.Tensor` of shape `(B, Nc)`, *optional*): Positions of the patches to encode; the others
                are not seen. All patches when not given.
            output_hidden_states, output_attentions (`bool`, *optional*): As in transformers (attentions with
                `attn_implementation="eager"`).

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` (B, N or Nc, D) after the final norm, `pooler_output`
            (B, D), the mean of the patch tokens.

        Raises:
            ValueError: Images smaller than a patch, or with another number of channels.
        """
        hidden_states = self.embeddings(pixel_values, patch_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states.mean(dim=1))


class CJepaForImageClassification(CJepaPreTrainedModel):
    """
    The encoder with a linear classifier on its mean patch token.

    Args:
        config ([`CJepaConfig`]): Its configuration; `num_labels` is the number of classes.
    """

    _keys_to_ignore_on_load_unexpected = [r"^context_encoder\.", r"^predictor\.", r"^expander\."]

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.cjepa = CJepaModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels) if config.num_labels > 0 else nn.Identity()
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

        Returns:
            `ImageClassifierOutput`: `logits` (B, num_labels), `loss` when labels were given.
        """
        outputs = self.cjepa(pixel_values, **kwargs, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
