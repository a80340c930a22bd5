"""The encoder that C-JEPA pre-trains, alone and with a classifier, as transformers models.

Shapes: B images, C channels, N patches, Nc encoded patches, D width.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_cjepa import CJepaConfig, choose_level
from .encoders_cjepa import CJepaAttention, CJepaEmbeddings, CJepaLayer, init_weights
from .masking_cjepa import ids_by_level, tokens_on_grid

# the parts of a pre-training checkpoint that are not the target encoder's
_ONLY_PRE_TRAINED = [r"^context_encoder\.", r"^(upper_)?predictors?\.", r"^(upper_)?expanders?\."]


@dataclass
class CJepaModelOutput(BaseModelOutputWithPooling):
    """
    Output of [`CJepaModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, N or Nc, D)`): The chosen level's tokens after its final norm.
        pooler_output (`torch.Tensor` of shape `(B, D)`): Their mean.
        hidden_states (`tuple` of `torch.Tensor`, *optional*): The input of the first layer and the output of each; in
            a stack the last tokens of each level up to the chosen one.
        attentions (`tuple` of `torch.Tensor` of shape `(B, heads, N, N)`, *optional*): Those of the chosen level.
        level_embeddings (`tuple` of `torch.Tensor` of shape `(B, D)`): The mean token of each level up to the chosen.
    """

    level_embeddings: tuple[torch.Tensor, ...] | None = None


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

    def set_attn_implementation(self, *args, **kwargs):
        """As in transformers, and in every level of a stack."""
        super().set_attn_implementation(*args, **kwargs)
        for module in self.modules():
            if isinstance(getattr(module, "config", None), CJepaConfig):
                module.config._attn_implementation_internal = self.config._attn_implementation


class CJepaModel(CJepaPreTrainedModel):
    """
    The encoder: a vision transformer without class token. `AutoModel` loads the target encoder of a pre-trained model.

    A stack has `upper_levels` on top: encoders like this one, whose patches are tokens of the level below.

    Args:
        config ([`CJepaConfig`]): Its configuration; `level` says whose features it gives.
    """

    # what a pre-training checkpoint holds beside the target encoder
    _keys_to_ignore_on_load_unexpected = [*_ONLY_PRE_TRAINED, r"^classifier\."]

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        self.embeddings = CJepaEmbeddings(config)
        self.layers = nn.ModuleList(
            CJepaLayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.upper_levels = nn.ModuleList(
            CJepaModel(config.level_config(number)) for number in range(1, config.num_levels)
        )
        choose_level(config.level, config.num_levels)
        self.post_init()

    @property
    def merges(self) -> list[tuple[int, int]]:
        """Rows and columns of tokens that each level above the lowest merges."""
        return [upper.embeddings.patch_embeddings.patch_size for upper in self.upper_levels]

    def num_parameters_up_to(self, level: int) -> int:
        """Parameters of the encoders that make the features of a level, from 0."""
        above = sum(upper.num_parameters() for upper in self.upper_levels[level:])
        return self.num_parameters() - above

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _encode_patches(self, pixel_values, patch_ids=None, **kwargs) -> BaseModelOutputWithPooling:
        """The output of the lowest level."""
        hidden_states = self.embeddings(pixel_values, patch_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layernorm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states.mean(dim=1))

    def encode(
        self,
        pixel_values: torch.Tensor,
        patch_ids: torch.Tensor | None = None,
        level: int | None = None,
        stop_gradients: bool = False,
        **kwargs,
    ) -> list[BaseModelOutputWithPooling]:
        """
        Encodes images level by level.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images.
            patch_ids (`torch.Tensor` of shape `(B, Nc)`, *optional*): Positions, on the grid of the last level that is
                run, of the patches to encode; the lower levels see the patches below these.
            level (`int`, *optional*): The last level to run; all of them when not given.
            stop_gradients (`bool`): Whether gradients end at levels with `stop_gradient`, as in pre-training, and do
                not reach those below.
            kwargs: `output_hidden_states`, `output_attentions`, as in transformers.

        Returns:
            `list` of `BaseModelOutputWithPooling`, from the image up.
        """
        upper_levels = self.upper_levels[: choose_level(level, self.config.num_levels)]
        grid_size = self.embeddings.patch_embeddings.grid_size(pixel_values)
        ids = ids_by_level(patch_ids, grid_size, self.merges[: len(upper_levels)])
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None:
                kwargs[name] = getattr(self.config, name)  # which the configurations of upper levels do not have
        outputs = [self._encode_patches(pixel_values, ids[0], return_dict=True, **kwargs)]
        for upper, ids_below, ids_here in zip(upper_levels, ids, ids[1:], strict=False):
            tokens = tokens_on_grid(outputs[-1].last_hidden_state, ids_below, grid_size)
            if stop_gradients and upper.config.stop_gradient:
                tokens = tokens.detach()
            outputs.append(upper._encode_patches(tokens, ids_here, return_dict=True, **kwargs))
            grid_size = upper.embeddings.patch_embeddings.grid_size(tokens)
        return outputs

    def embed_last_layers(
        self, pixel_values: torch.Tensor, num_layers: int = 4, level: int | None = None
    ) -> torch.Tensor:
        """
        The mean tokens of a level's last layers, side by side: I-JEPA's second protocol of evaluation.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images.
            num_layers (`int`, defaults to 4): How many layers; all of the level's if it has fewer.
            level (`int`, *optional*): As in [`~CJepaModel.forward`].

        Returns:
            `torch.Tensor` of shape `(B, num_layers * D)`: From the lower to the last layer, each after the final norm.
        """
        level = choose_level(self.config.level if level is None else level, self.config.num_levels)
        of_level = self.encode(pixel_values, level=level, output_hidden_states=True)[-1]
        layernorm = self.upper_levels[level - 1].layernorm if level else self.layernorm
        layers = of_level.hidden_states[1:][-num_layers:]  # the first is what the layers read
        return torch.cat([layernorm(tokens).mean(dim=1) for tokens in layers], dim=1)

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, patch_ids: torch.Tensor | None = None, level: int | None = None, **kwargs
    ) -> CJepaModelOutput:
        """
        Encodes images, or only some of their patches.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images of any size of a patch or more.
            patch_ids (`torch.Tensor` of shape `(B, Nc)`, *optional*): Positions of the patches to encode, on the grid
                of the level that is given; the others are not seen. All patches when not given.
            level (`int`, *optional*): The level whose features are given; the configuration's when not given.
            output_hidden_states, output_attentions (`bool`, *optional*): As in transformers (attentions with
                `attn_implementation="eager"`).

        Returns:
            [`CJepaModelOutput`].

        Raises:
            ValueError: Images smaller than a patch, or with another number of channels, or there is no such level.
        """
        outputs = self.encode(pixel_values, patch_ids, self.config.level if level is None else level, **kwargs)
        return combine(outputs, self.config.num_levels)


def combine(outputs: list[BaseModelOutputWithPooling], num_levels: int) -> CJepaModelOutput:
    """
    The outputs of several levels as that of the last one.

    Args:
        outputs (`list` of `BaseModelOutputWithPooling`): From the image up, as [`CJepaModel.encode`] gives them.
        num_levels (`int`): Levels of the whole stack, whose `hidden_states` are by level if there are several.

    Returns:
        [`CJepaModelOutput`].
    """
    last = outputs[-1]
    hidden_states = last.hidden_states
    if hidden_states is not None and num_levels > 1:
        hidden_states = tuple(output.last_hidden_state for output in outputs)
    return CJepaModelOutput(
        last_hidden_state=last.last_hidden_state,
        pooler_output=last.pooler_output,
        hidden_states=hidden_states,
        attentions=last.attentions,
        level_embeddings=tuple(output.pooler_output for output in outputs),
    )


class CJepaForImageClassification(CJepaPreTrainedModel):
    """
    The encoder with a linear classifier on its mean patch token.

    Args:
        config ([`CJepaConfig`]): Its configuration; `num_labels` is the number of classes.
    """

    _keys_to_ignore_on_load_unexpected = _ONLY_PRE_TRAINED

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.cjepa = CJepaModel(config)
        width = config.level_config(choose_level(config.level, config.num_levels)).hidden_size
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

        Returns:
            `ImageClassifierOutput`: `logits` (B, num_labels), `loss` when labels were given.
        """
        outputs = self.cjepa(pixel_values, **kwargs, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
