"""The backbones of S-JEA's levels: encoders of transformers, or this package's, by the fields of their configurations.

Shapes: C channels, h and w rows and columns of what a backbone reads.
"""

import inspect
from contextlib import contextmanager

from torch import nn
from transformers import MODEL_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from .configuration_cjepa import CJepaConfig
from .configuration_sjea import SJeaConfig
from .modeling_cjepa import CJepaModel


def build_backbone_config(fields: dict, input_shape: tuple[int, int, int]) -> PreTrainedConfig:
    """
    A backbone's configuration for what it reads.

    Args:
        fields (`dict`): Its fields, `model_type` among them.
        input_shape (`(C, h, w)`): Channels, rows and columns of its input.

    Returns:
        `PreTrainedConfig`.

    Raises:
        ValueError: The type is not known, or a field contradicts the input.
    """
    channels, height, width = input_shape
    given = {name: value for name, value in fields.items() if name != "model_type"}
    if given.get("num_channels", channels) != channels:
        raise ValueError(
            f"backbone: num_channels={given['num_channels']}, but the level reads {channels}; leave it out."
        )
    model_type, square = fields["model_type"], height if height == width else (height, width)
    defaults = _default_config(model_type)
    unknown = [name for name in given if name not in vars(defaults) and name not in defaults.attribute_map]
    if unknown:
        raise ValueError(f"backbone: a {model_type!r} has no field {unknown[0]!r}; mend it.")
    sizes = {"num_channels": channels, "image_size": square}
    sizes = {name: value for name, value in sizes.items() if hasattr(defaults, name)}
    if isinstance(getattr(defaults, "image_size", None), list | tuple):
        sizes["image_size"] = [height, width]
    with mistakes_as_value_error(f"backbone: a {model_type!r} cannot be made of {given}"):
        config = type(defaults)(**{**sizes, **given})
    _check_stages(config, defaults)
    return config


def _default_config(model_type: str) -> PreTrainedConfig:
    if model_type == "cjepa":
        return CJepaConfig()
    if model_type == SJeaConfig.model_type:
        raise ValueError("backbone: a stack ('sjea') cannot be a level of another; name the encoder of one level.")
    try:
        return AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ValueError(f"backbone: model_type={model_type!r} is not transformers'; mend it.") from error


def _check_stages(config: PreTrainedConfig, defaults: PreTrainedConfig):
    """A ResNet of as many depths as widths: transformers leaves out stages of which one is not given."""
    lists = [[getattr(each, name, None) for name in ("hidden_sizes", "depths")] for each in (config, defaults)]
    has_own_widths = hasattr(defaults, "embed_dim")  # from which it makes them, whatever hidden_sizes says
    if has_own_widths or not all(isinstance(entry, list | tuple) for entry in lists[0] + lists[1]):
        return
    (widths, depths), (default_widths, default_depths) = lists
    if len(default_widths) == len(default_depths) and len(widths) != len(depths):
        raise ValueError(
            f"backbone: hidden_sizes={widths} and depths={depths} differ in length; give one each a stage."
        )


@contextmanager
def mistakes_as_value_error(what: str):
    """Says what was being made where another library's class fails on a user's fields, in whatever way it does."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {' '.join(str(error).split())} ({type(error).__name__}).") from error


def build_backbone(config: PreTrainedConfig, stem: str, attn_implementation: str | None = None) -> PreTrainedModel:
    """
    A backbone with its stem, initialised as its own class says.

    Args:
        config (`PreTrainedConfig`): Its configuration.
        stem (`str`): `"standard"` or `"small"`.
        attn_implementation (`str`, *optional*): Where it has attention.

    Returns:
        `PreTrainedModel`.

    Raises:
        ValueError: The small stem is asked of something that is no ResNet, or the type is no encoder of images.
    """
    if isinstance(config, CJepaConfig):
        model_class = CJepaModel
    else:
        model_class = _encoder_class(config)
    attention = attn_implementation if has_attention(model_class) else None
    with mistakes_as_value_error(f"backbone: a {config.model_type!r} cannot be built"):
        backbone = model_class._from_config(config, attn_implementation=attention)
    if stem == "small":
        embedder = getattr(getattr(backbone, "embedder", None), "embedder", None)
        if config.model_type != "resnet" or embedder is None:
            raise ValueError(
                f"stem='small' is one of a resnet, and the backbone is {config.model_type!r}; leave it out."
            )
        before = embedder.convolution
        embedder.convolution = nn.Conv2d(before.in_channels, before.out_channels, 3, padding=1, bias=False)
        backbone.embedder.pooler = nn.Identity()
    return backbone


def has_attention(model_class: type[PreTrainedModel]) -> bool:
    """Whether an implementation of attention can be chosen for a backbone."""
    return getattr(model_class, "_supports_sdpa", False)


def _encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    model_class = MODEL_MAPPING.get(type(config), None)
    if isinstance(model_class, tuple | list):
        model_class = model_class[0]
    inputs = [] if model_class is None else inspect.signature(model_class.forward).parameters
    if "pixel_values" not in inputs or "input_ids" in inputs:
        raise ValueError(
            f"backbone: model_type={config.model_type!r} is no encoder of images alone; choose one, such as resnet, "
            "or clip_vision_model of a clip."
        )
    return model_class
