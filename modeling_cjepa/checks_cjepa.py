"""What a field of a configuration may be; a mistake is told by a `ValueError` that names the field."""

from collections.abc import Collection

_COUNTS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
    "num_channels", "predictor_hidden_size", "predictor_num_hidden_layers", "predictor_num_attention_heads",
    "predictor_intermediate_size", "expander_hidden_size", "num_target_blocks", "num_mask_sets",
    "num_views", "min_context_patches",
)  # fmt: skip


def check_fields(config, choices: dict[str, Collection[str]]):
    """
    Refuses fields with which no model can be built.

    Args:
        config ([`~configuration_cjepa.CJepaConfig`]): Whose.
        choices (`dict`): The words that a field may have.

    Raises:
        ValueError: The message names the field and what it may be.
    """
    for name in _COUNTS:
        value = getattr(config, name)
        may_be_two = name in ("image_size", "patch_size")
        if value is not None and not (is_count(value) or may_be_two and is_size(value)):
            two = ", or two of them, height and width" if may_be_two else ""
            raise ValueError(f"{name}={value!r} must be a whole number of 1 or more{two}.")
    for prefix in ("", "predictor_"):
        size, heads = getattr(config, f"{prefix}hidden_size"), getattr(config, f"{prefix}num_attention_heads")
        if size % 4 or size % heads:
            raise ValueError(
                f"{prefix}hidden_size={size} must be a multiple of 4 (sin-cos positions) and of "
                f"{prefix}num_attention_heads={heads}; change one of them."
            )
    if min(config.grid_size) < 1:
        raise ValueError(
            f"image_size={config.image_size} is smaller than patch_size={config.patch_size}; "
            "choose a smaller patch_size or larger images."
        )
    for name, known in choices.items():
        check_choice(name, getattr(config, name), known)
    for name in ("regularizer_weight", "invariance_weight", "variance_weight", "covariance_weight",
                 "level_weight"):  # fmt: skip
        check_weight(name, getattr(config, name))
    for name in ("stop_gradient", "qkv_bias"):
        check_flag(name, getattr(config, name))
    for name in ("initializer_range", "layer_norm_eps"):
        if not (is_weight(getattr(config, name)) and getattr(config, name) > 0):
            raise ValueError(f"{name}={getattr(config, name)!r} must be a number above 0, such as 1.0e-6.")
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
        if not (is_weight(getattr(config, name)) and getattr(config, name) < 1):
            raise ValueError(f"{name}={getattr(config, name)!r} is not a number in [0, 1).")
    for name in ("target_scale", "target_aspect_ratio", "context_scale"):
        if len(getattr(config, name)) != 2:
            raise ValueError(f"{name}={getattr(config, name)} must be two numbers, low and high.")
    if config.regularizer == "blocks" and config.num_target_blocks < 2 and config.regularizer_weight > 0:
        raise ValueError("regularizer='blocks' compares target blocks; set num_target_blocks to 2 or more.")
    if config.regularizer == "views" and config.num_views * config.num_mask_sets < 2 and config.regularizer_weight > 0:
        raise ValueError("regularizer='views' compares views of an image; set num_views to 2 or more.")


def is_count(value) -> bool:
    """Whether it is a whole number of 1 or more."""
    return type(value) is int and value >= 1


def is_size(value) -> bool:
    """Whether it is a whole number of 1 or more, or two of them, height and width."""
    return is_count(value) or isinstance(value, list | tuple) and len(value) == 2 and all(map(is_count, value))


def check_stem(widths: list[int] | None, patch_size: tuple[int, int]):
    """Refuses widths of convolutional stages that do not make patches of that size."""
    if widths is None:
        return
    if not isinstance(widths, list | tuple) or not widths or not all(map(is_count, widths)):
        raise ValueError(f"stem_hidden_sizes={widths!r} must be a list of whole numbers of 1 or more.")
    if patch_size != (2 ** len(widths),) * 2:
        raise ValueError(
            f"stem_hidden_sizes={list(widths)} halve the image {len(widths)} times, which makes patches of "
            f"{2 ** len(widths)}x{2 ** len(widths)} pixels, and patch_size is {patch_size[0]}x{patch_size[1]}; change "
            "one of them."
        )


def is_weight(value) -> bool:
    """Whether it can weigh a term of the loss: a finite number of 0 or more."""
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 <= value < float("inf")


def check_weight(name: str, value):
    """Refuses what cannot weigh a term of the loss."""
    if not is_weight(value):
        raise ValueError(f"{name}={value!r} is not a loss weight, which must be a number of 0 or more.")


def check_flag(name: str, value):
    """Refuses what is not true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be true or false.")


def check_count(name: str, value):
    """Refuses what is not a whole number of 1 or more."""
    if not is_count(value):
        raise ValueError(f"{name}={value!r} must be a whole number of 1 or more.")


def check_level_weights(weights: list[float]):
    """Refuses a stack of which no level has a loss."""
    if not any(weights):
        raise ValueError("level_weight is 0 at every level, so that nothing is trained; raise one.")


def check_choice(name: str, value: str, known: Collection[str]):
    """Refuses a word that a field does not know."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(known)}.")
