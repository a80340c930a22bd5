"""The encoder as a backbone of detectors and segmenters: maps of features at chosen layers, at any resolution.

Shapes: B images, C channels, N tokens, h and w rows and columns of a level's grid, D its width.
"""

import torch
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_cjepa import CJepaConfig
from .masking_cjepa import grids_by_level
from .modeling_cjepa import CJepaModel


class CJepaBackbone(BackboneMixin, CJepaModel):
    """
    The encoder whose outputs are feature maps. [`~CJepaBackbone.from_pretrained`] loads the target encoder of a
    pre-trained model; `AutoBackbone.from_config` gives one without its weights, and `AutoBackbone.from_pretrained` of
    transformers 5.23 reads no folders.

    `out_features` or `out_indices` of the configuration choose the maps among `config.stage_names`: `stem` (patches
    with their positions), `stage1` to the last layer, and of a stack `level1_stem`, `level1_stage1` and so on, whose
    grids are coarser; the last one when not given.

    Args:
        config ([`CJepaConfig`]): Its configuration.

    Raises:
        ValueError: There is no such stage, or they are not in order.
    """

    def __init__(self, config: CJepaConfig):
        if config.out_indices is None:
            config.set_output_features_output_indices(None, None)
        super().__init__(config)
        levels = [self, *self.upper_levels]
        self._level_of_stage = [
            number for number, level in enumerate(levels) for _ in range(1 + level.config.num_hidden_layers)
        ]
        self.num_features = [levels[number].config.hidden_size for number in self._level_of_stage]

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BackboneOutput:
        """
        Encodes images to feature maps.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images of any size of a patch or more;
                pixels on the right and at the bottom that fill no patch are left out. For an upper level of a stack
                the grid of patches must divide into what is merged: 9x11 patches do not into 2x2.
            output_hidden_states (`bool`, *optional*): Whether to return the tokens (B, N, D) of every stage that was
                run, before the final norm.
            output_attentions (`bool`, *optional*): Those of the last level that was run (with
                `attn_implementation="eager"`).

        Returns:
            `BackboneOutput`: `feature_maps`, one (B, D, h, w) a chosen stage, after the final norm of its level.

        Raises:
            ValueError: Images are smaller than a patch, or the grid of a level cannot be merged.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        chosen = [self.stage_names.index(name) for name in self.out_features]
        top = self._level_of_stage[max(chosen)]
        outputs = self.encode(pixel_values, level=top, output_hidden_states=True, **kwargs)
        hidden_states = tuple(tokens for output in outputs for tokens in output.hidden_states)
        grids = grids_by_level(self.embeddings.patch_embeddings.grid_size(pixel_values), self.merges[:top])
        feature_maps = []
        for stage in chosen:
            number = self._level_of_stage[stage]
            layernorm = self.upper_levels[number - 1].layernorm if number else self.layernorm
            feature_map = layernorm(hidden_states[stage]).transpose(1, 2).unflatten(2, grids[number])
            feature_maps.append(feature_map.contiguous())
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=hidden_states if output_hidden_states else None,
            attentions=outputs[-1].attentions,
        )
