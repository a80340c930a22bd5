"""Other vision transformers of transformers as a start of our encoder: DINOv2, ViT-MAE, ViT, DeiT, ViT-MSN.

Their patch embeddings, layers and final norm map; class tokens and learned positions do not, so that features differ
from theirs until the encoder is trained on.
"""

import torch
from transformers import AutoModel, PreTrainedModel

from modeling_cjepa import CJepaModel
from trainers.conversion.checks import FEATURE_LIMITS, Check, Converted, compare, in_float64, random_images
from trainers.conversion.formats import ReadOptions, Source
from trainers.conversion.names import DINOV2, build, has_fixed_positions
from trainers.conversion.transformers_models import encoder_config, left_out, load_transformers
from trainers.errors import InputError
from trainers.loading import load_processor

# layer scale that is folded into weights is rounded with them
_FOLDED_LIMIT = FEATURE_LIMITS[torch.float32]
# parts outside of the layers, by the beginning of their names, and what is said of each
_LEFT_BEHIND = {
    "embeddings.cls_token": "The class token does not map: our features are the mean of the patch tokens.",
    "embeddings.distillation_token": "The distillation token does not map.",
    "embeddings.register_tokens": "The register tokens do not map.",
    "embeddings.mask_token": "The mask token does not map: hidden patches are not encoded at all.",
    "pooler.": "The pooler does not map.",
}
_EMBEDDED = "embeddings.patch_embeddings."


def read_start(source: Source, options: ReadOptions) -> Converted:
    """
    Reads an encoder to start from and compares our layers with its own, run on our embedded patches.

    Args:
        source ([`Source`]): Its folder or id.
        options ([`ReadOptions`]): Not needed.

    Returns:
        [`Converted`]: A [`CJepaModel`]; the notes say what did not map.

    Raises:
        InputError: It cannot be loaded, or computes what ours cannot.
    """
    if source.config.get("use_swiglu_ffn"):
        raise InputError(f"{source.name} has use_swiglu_ffn=true, whose gated MLPs ours has not; take a smaller one.")
    original, unused, missing = load_transformers(AutoModel, source.name, unneeded=_LEFT_BEHIND)
    is_dino = source.config["model_type"].startswith("dinov2")
    changes = {}
    if is_dino:
        changes["intermediate_size"] = int(original.config.hidden_size * original.config.mlp_ratio)
        changes["drop_path_rate"] = float(original.config.drop_path_rate)
    config = encoder_config(original.config, source.name, **changes)
    tensors, notes = original.state_dict(), []
    prefix = f"{original.base_model_prefix}."
    there = [name.removeprefix(prefix) for name in unused] + [name for name in tensors if name not in missing]
    for beginning, sentence in _LEFT_BEHIND.items():
        if any(name.startswith(beginning) for name in there):
            notes.append(sentence)
    notes.append(_positions_note(config, tensors))
    if is_dino:
        tensors = _fold_layer_scale(DINOV2.to_ours(tensors))
        notes.append("Layer scale is folded into o_proj and fc2, which it multiplies; it is no parameter any more.")
    unsaid = [name for name in unused if not name.removeprefix(prefix).startswith(tuple(_LEFT_BEHIND))]
    notes += left_out(unsaid, original.base_model_prefix)
    notes.append("There is no predictor in it: an encoder comes in.")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith((_EMBEDDED, "layers.", "layernorm."))}
    model = build(CJepaModel, config, kept, source.name)
    check = _check(model, original, _FOLDED_LIMIT if is_dino else None)
    return Converted(model, notes, check, load_processor(source.name))


def _positions_note(config, tensors: dict[str, torch.Tensor]) -> str:
    table = tensors["embeddings.position_embeddings"]
    rows, columns = config.grid_size
    if has_fixed_positions(config.grid_size, table[:, table.shape[1] - rows * columns :]):
        return "Its positions are the fixed 2-D sin-cos table that ours has, too."
    return "Learned positions do not map: the fixed 2-D sin-cos table takes their place."


def _fold_layer_scale(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The outputs of attention and MLP multiplied by their layer scale, which is left out."""
    folded = dict(tensors)
    for scale, linear in (("layer_scale1.lambda1", "attention.o_proj"), ("layer_scale2.lambda1", "mlp.fc2")):
        for name in [name for name in tensors if name.endswith(scale)]:
            factor, layer = folded.pop(name), name.removesuffix(scale) + linear
            folded[f"{layer}.weight"] = folded[f"{layer}.weight"] * factor.unsqueeze(1)
            folded[f"{layer}.bias"] = folded[f"{layer}.bias"] * factor
    return folded


@torch.no_grad()
def _check(model: CJepaModel, original: PreTrainedModel, limit: float | None) -> Check:
    images = random_images(model.config, dtype=torch.float64)
    with in_float64(model):
        ours = model(images).last_hidden_state
    with in_float64(original):
        tokens = original.embeddings.patch_embeddings(images) + model.embeddings.position_embeddings
        for layer in original.encoder.layer if hasattr(original, "encoder") else original.layers:
            tokens = layer(tokens)
        theirs = original.layernorm(tokens)
    what = f"{type(original).__name__}'s own layers on the patches of 2 random images"
    return compare(what, [ours], [theirs], limit)
