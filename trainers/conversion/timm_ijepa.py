"""timm's vision transformers without class token, whose patch tokens are averaged, in and out.

They need timm (`pip install "cjepa[timm]"`). `vit_*_gap_*` are of this kind, those of I-JEPA among them; the names of
their tensors are the authors'.
"""

import math
from pathlib import Path

import torch
from transformers import ViTImageProcessor
from transformers.utils import cached_file, has_file

from modeling_cjepa import CJepaConfig, CJepaModel
from modeling_cjepa.configuration_cjepa import pair
from trainers.conversion.checks import Check, Converted, Written, compare, in_float64, random_images
from trainers.conversion.formats import ReadOptions, Source
from trainers.conversion.names import FUSED_ENCODER, build, exact_positions, has_fixed_positions, rounding_notes
from trainers.conversion.outputs import require
from trainers.conversion.transformers_models import predictor_heads
from trainers.conversion.weight_files import check_tensors, read_weight_file
from trainers.errors import InputError, first_line

_ARCHITECTURE = "vit_base_patch16_gap_224"  # of which every size is an argument
_EPS = 1e-6
# transformers' names of activations -> timm's
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}
_ACTIVATIONS |= {"silu": "silu"}
_RESAMPLE = {"bilinear": 2, "bicubic": 3}
# what of a folder's arguments makes the architecture; others name files, addresses or code
_ARGUMENTS = {
    "img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm",
    "init_values", "class_token", "global_pool", "fc_norm", "act_layer", "reg_tokens", "pos_embed", "no_embed_class",
    "pre_norm", "final_norm", "dynamic_img_size", "num_classes", "norm_layer",
}  # fmt: skip
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read_timm(source: Source, options: ReadOptions) -> Converted:
    """
    Reads a vision transformer of timm and compares it with timm's own class.

    Args:
        source ([`Source`]): A folder or an id with timm's `config.json`, or `timm:` and a name of its registry.
        options ([`ReadOptions`]): Not needed.

    Returns:
        [`Converted`]: A [`CJepaModel`].

    Raises:
        InputError: timm is not installed, the model cannot be loaded or has parts that ours has not.
    """
    (timm,) = require("timm", "timm")
    name = source.name.removeprefix("timm:")
    if source.config is None and ":" in name:
        place = name.partition(":")[2]
        raise InputError(
            f"{source.name} is no name of timm's; give the folder, or the id on the Hub, itself: {place}."
        )
    original, left = (_from_registry(timm, name), []) if source.config is None else _from_folder(timm, source)
    if type(original) is not timm.models.vision_transformer.VisionTransformer or original.num_prefix_tokens:
        raise InputError(f"{name} is a {type(original).__name__} with other tokens than patches; ours has none.")
    config = _our_config(original, name)
    tensors = FUSED_ENCODER.to_ours(original.state_dict())
    if not has_fixed_positions(config.grid_size, tensors.get("embeddings.position_embeddings", torch.empty(0))):
        raise InputError(
            f"{name} has learned positions, not the fixed 2-D sin-cos table of I-JEPA; they do not map to ours."
        )
    original.pos_embed.data, rounded = exact_positions(config.grid_size, original.pos_embed)
    tensors["embeddings.position_embeddings"] = original.pos_embed.data
    model = build(CJepaModel, config, tensors, name)
    notes = ["There is no predictor in it: an encoder comes in.", *left, *rounded]
    if "ijepa" in name:
        notes.append("timm takes the context encoder of the authors' checkpoint, which has the target encoder, too.")
    return Converted(model, notes, _check(model, original), _processor(original, config))


def write_timm(model: CJepaModel, processor, folder: Path) -> Written:
    """
    Writes an encoder as a folder that `timm.create_model("local-dir:FOLDER")` loads.

    Args:
        model ([`CJepaModel`]): The encoder.
        processor: Its image processor, whose size, mean and std go into timm's configuration.
        folder (`Path`): An existing folder.

    Returns:
        [`Written`]: The check is of the folder, loaded again by timm.

    Raises:
        InputError: timm is not installed, or its class cannot compute what the model does.
    """
    (timm,) = require("timm", "timm")
    arguments = _timm_arguments(model.config)
    written = timm.create_model(_ARCHITECTURE, pretrained=False, **arguments)
    written.load_state_dict(FUSED_ENCODER.to_theirs(model.state_dict()))
    timm.models.save_for_hf(
        written, folder, safe_serialization=True, model_args=arguments, data_config=_data_config(model, processor)
    )
    return Written(_check(model, timm.create_model(f"local-dir:{folder}", pretrained=True).eval()))


def _from_registry(timm, name: str):
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:  # of the registry, the network or torch, as timm has no errors of its own
        raise InputError(f"timm:{name} cannot be loaded ({first_line(error)}); see timm.list_models().") from error
    check_tensors(model.state_dict(), name)
    return model


def _from_folder(timm, source: Source):
    """timm's class with the weights of a folder, which are read by us, not by timm, and what is not taken of them."""
    arguments = source.config.get("model_args") or {}
    if not isinstance(arguments, dict):
        raise InputError(f"config.json of {source.name} says model_args={arguments!r}, no mapping; mend it.")
    weights = next((file for file in _WEIGHTS if has_file(source.name, file)), None)
    if weights is None:
        raise InputError(f"{source.name} has no {' and no '.join(_WEIGHTS)}; it is no folder of timm's.")
    unknown = sorted(set(arguments) - _ARGUMENTS)
    if unknown or not timm.is_model(source.config["architecture"]):
        what = f"model_args {unknown[0]!r}" if unknown else f"architecture {source.config['architecture']!r}"
        raise InputError(f"config.json of {source.name} has {what}, which is none of timm's vision transformers'.")
    tensors = read_weight_file(cached_file(source.name, weights))
    try:
        with torch.device("meta"):
            options = arguments | {"num_classes": 0, "pretrained": False}
            model = timm.create_model(source.config["architecture"], **options)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
        model.load_state_dict({name: tensor.float() for name, tensor in kept.items()}, assign=True)
    except Exception as error:  # timm's assertions, torch's RuntimeError of names and shapes
        raise InputError(f"{source.name} is no whole model of timm ({first_line(error)}).") from error
    model.pretrained_cfg.update(source.config.get("pretrained_cfg") or {})
    left = ["Its classifier head is left out."] if len(kept) < len(tensors) else []
    return model.eval(), left + rounding_notes(tensors)


def _our_config(original, name: str) -> CJepaConfig:
    block, stem = original.blocks[0], original.patch_embed
    if (
        type(block).__name__ != "Block"
        or original.global_pool != "avg"
        or isinstance(original.norm, torch.nn.Identity)
    ):
        raise InputError(
            f"{name} has blocks, a pooling or a final norm (fc_norm) of another kind than ours, which normalises "
            "patch tokens and averages them."
        )
    try:
        return CJepaConfig(
            hidden_size=original.embed_dim,
            num_hidden_layers=len(original.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            hidden_act=_activation(block.mlp.act, name),
            layer_norm_eps=original.norm.eps,
            image_size=_size(stem.img_size),
            patch_size=_size(stem.patch_size),
            num_channels=original.in_chans,
            qkv_bias=block.attn.qkv.bias is not None,
            **predictor_heads(block.attn.num_heads),
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{name} makes no model of ours ({first_line(error)}).") from error


def _activation(module, name: str) -> str:
    """transformers' name of an activation of timm's."""
    from timm.layers import get_act_layer

    if isinstance(module, torch.nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    known = {type(get_act_layer(theirs)()): ours for ours, theirs in _ACTIVATIONS.items()}
    if type(module) not in known:
        raise InputError(f"{name} has the activation {type(module).__name__}, which does not map.")
    return known[type(module)]


def _timm_arguments(config: CJepaConfig) -> dict:
    if config.layer_norm_eps != _EPS:
        raise InputError(f"layer_norm_eps={config.layer_norm_eps}: timm's has {_EPS}; use another --to.")
    if config.hidden_act not in _ACTIVATIONS:
        raise InputError(f"hidden_act={config.hidden_act!r} is not known to timm; use another --to.")
    width, wide = config.hidden_size, config.intermediate_size
    # timm rounds the product down
    ratio = wide / width if int(wide / width * width) == wide else (wide + 0.5) / width
    activation = {} if config.hidden_act == "gelu" else {"act_layer": _ACTIVATIONS[config.hidden_act]}
    return {
        "img_size": list(pair(config.image_size)),
        "patch_size": list(pair(config.patch_size)),
        "in_chans": config.num_channels,
        "num_classes": 0,
        "embed_dim": width,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": ratio,
        "qkv_bias": config.qkv_bias,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    } | activation


def _data_config(model: CJepaModel, processor) -> dict:
    """timm's words for an image processor."""
    height, width = pair(model.config.image_size)
    num_means = len(processor.image_mean or [])
    if num_means != model.config.num_channels:
        raise InputError(
            f"The image processor has {num_means} means, the model {model.config.num_channels} "
            "channels; mend preprocessor_config.json."
        )
    edge = processor.size.get("shortest_edge")
    names = {number: name for name, number in _RESAMPLE.items()}
    return {
        "input_size": (model.config.num_channels, height, width),
        "mean": tuple(processor.image_mean),
        "std": tuple(processor.image_std),
        "interpolation": names.get(int(processor.resample), "bicubic"),
        "crop_pct": min(height, width) / edge if edge else 1.0,
        "crop_mode": "center" if edge else "squash",
    }


def _processor(original, config: CJepaConfig) -> ViTImageProcessor:
    """The image processor that does what timm's configuration says."""
    data, (height, width) = original.pretrained_cfg, pair(config.image_size)
    crop = data.get("crop_mode", "center") != "squash" and height == width
    edge = math.floor(height / (data.get("crop_pct") or 1.0))
    return ViTImageProcessor(
        size={"shortest_edge": edge} if crop else {"height": height, "width": width},
        do_center_crop=crop,
        crop_size={"height": height, "width": width},
        resample=_RESAMPLE.get(data.get("interpolation"), 3),
        image_mean=list(data["mean"]),
        image_std=list(data["std"]),
        do_convert_rgb=True,
    )


def _size(size) -> int | list[int]:
    height, width = size
    return height if height == width else [height, width]


@torch.no_grad()
def _check(model: CJepaModel, original) -> Check:
    images = random_images(model.config, dtype=torch.float64)
    with in_float64(model):
        ours = model.eval()(images)
    with in_float64(original):
        theirs = [original.forward_features(images), original(images)]
    return compare("timm's VisionTransformer on 2 random images", [ours.last_hidden_state, ours.pooler_output], theirs)
