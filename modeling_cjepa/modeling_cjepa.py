"""The encoder that C-JEPA pre-trains, alone and with a classifier, as transformers models.

Shapes: B images, C channels, N patches, Nc encoded patches, D width.
"""

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checks_cjepa import check_choice
from .configuration_cjepa import CLASSIFIER_POOLINGS, CJepaConfig, choose_level
from .encoders_cjepa import CJepaAttention, CJepaEmbeddings, CJepaLayer, forget_other_grids, init_weights
from .heads_cjepa import CJepaAttentivePooling
from .masking_cjepa import ids_by_level, tokens_on_grid
from .outputs_cjepa import CJepaModelOutput

# the parts of a pre-training checkpoint that are not the target encoder's
_ONLY_PRE_TRAINED = [r"^context_encoder\.", r"^(upper_)?predictors?\.", r"^(upper_)?expanders?\."]


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
        if isinstance(module, CJepaAttentivePooling):
            module.init_query(self.config.initializer_range)

    def _adjust_missing_and_unexpected_keys(self, loading_info):
        super()._adjust_missing_and_unexpected_keys(loading_info)
        forget_other_grids(self, loading_info.mismatched_keys)

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
    _keys_to_ignore_on_load_unexpected = [*_ONLY_PRE_TRAINED, r"^(classifier|pooling)\."]

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        self.embeddings = CJepaEmbeddings(config)
        self.layers = nn.ModuleList(
            CJepaLayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size, rate)
            for rate in drop_path_rates(config)
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
        return self.join_last_layers(of_level.hidden_states, num_layers, level)

    def join_last_layers(
        self, hidden_states: tuple[torch.Tensor, ...], num_layers: int = 4, level: int | None = None
    ) -> torch.Tensor:
        """The mean tokens of [`~CJepaModel.last_layers`], side by side, `(B, num_layers * D)`."""
        return torch.cat([tokens.mean(dim=1) for tokens in self.last_layers(hidden_states, num_layers, level)], dim=1)

    def last_layers(
        self, hidden_states: tuple[torch.Tensor, ...], num_layers: int = 4, level: int | None = None
    ) -> list[torch.Tensor]:
        """
        The tokens of a level's last layers.

        Args:
            hidden_states (`tuple` of `torch.Tensor` of shape `(B, N, D)`): The level's, the first of which is what its
                layers read.
            num_layers, level: As in [`~CJepaModel.embed_last_layers`].

        Returns:
            `list` of `torch.Tensor` of shape `(B, N, D)`: From the lower to the last layer, each after the final norm.

        Raises:
            ValueError: There is no such level.
        """
        level = choose_level(self.config.level if level is None else level, self.config.num_levels)
        layernorm = self.upper_levels[level - 1].layernorm if level else self.layernorm
        return [layernorm(tokens) for tokens in hidden_states[1:][-num_layers:]]

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


def drop_path_rates(config: CJepaConfig) -> list[float]:
    """Stochastic depth of each layer: from 0 in the first linearly to `drop_path_rate` in the last."""
    last = max(config.num_hidden_layers - 1, 1)
    return [config.drop_path_rate * layer / last for layer in range(config.num_hidden_layers)]


class CJepaForImageClassification(CJepaPreTrainedModel):
    """
    The encoder with a linear classifier on its mean patch token, on those of its last four layers side by side, or on
    an attentive pooling of its tokens, as `classifier_pooling` says.

    Args:
        config ([`CJepaConfig`]): Its configuration; `num_labels` is the number of classes.
    """

    # the loss is the mean over a batch: Trainer shall divide it by the accumulation steps
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = _ONLY_PRE_TRAINED

    def __init__(self, config: CJepaConfig):
        super().__init__(config)
        check_choice("classifier_pooling", config.classifier_pooling, CLASSIFIER_POOLINGS)
        self.num_labels = config.num_labels
        self.cjepa = CJepaModel(config)
        chosen = config.level_config(choose_level(config.level, config.num_levels))
        width = chosen.hidden_size
        if config.classifier_pooling == "last4":
            width *= min(4, chosen.num_hidden_layers)
        elif config.classifier_pooling == "attentive":
            self.pooling = CJepaAttentivePooling(width, chosen.num_attention_heads, config.layer_norm_eps)
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> ImageClassifierOutput:
        """
        Classifies images.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images.
            labels (`torch.Tensor` of shape `(B,)`, *optional*): Class indices; with them the loss is computed.
            output_hidden_states, output_attentions (`bool`, *optional*): As in [`~CJepaModel.forward`].

        Returns:
            `ImageClassifierOutput`: `logits` (B, num_labels), `loss` when labels were given.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        records = output_hidden_states or self.config.classifier_pooling == "last4"
        levels = self.cjepa.encode(pixel_values, level=self.config.level, output_hidden_states=records, **kwargs)
        logits = self.classifier(self._pool(levels[-1]))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        outputs = combine(levels, self.config.num_levels)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states if output_hidden_states else None,
            attentions=outputs.attentions,
        )

    def _pool(self, encoded: BaseModelOutputWithPooling) -> torch.Tensor:
        """What the classifier reads (B, D) of the chosen level's output."""
        if self.config.classifier_pooling == "last4":
            return self.cjepa.join_last_layers(encoded.hidden_states)
        if self.config.classifier_pooling == "attentive":
            return self.pooling(encoded.last_hidden_state)
        return encoded.pooler_output
