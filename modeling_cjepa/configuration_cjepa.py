"""Configuration of the C-JEPA models: encoder, predictor, mask geometry and loss weights."""

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

from .checks_cjepa import check_fields, check_level_weights, check_stem, is_size

READINGS = ("blocks", "context", "pair")  # of the paper
REGULARIZERS = (*READINGS, "views")
PREDICTOR_ATTENTIONS = ("per_block", "shared_context")
PREDICTION_LOSSES = ("smooth_l1", "mse")
CLASSIFIER_POOLINGS = ("mean", "last4", "attentive")
_CHOICES = {
    "regularizer": REGULARIZERS, "predictor_attention": PREDICTOR_ATTENTIONS, "prediction_loss": PREDICTION_LOSSES,
    "hidden_act": ACT2FN, "classifier_pooling": CLASSIFIER_POOLINGS,
}  # fmt: skip
# what a level of a stack has of its own, and what all have in common
_LEVEL_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "initializer_range",
    "layer_norm_eps", "qkv_bias",
    "predictor_hidden_size", "predictor_num_hidden_layers", "predictor_num_attention_heads",
    "predictor_intermediate_size", "predictor_attention", "prediction_loss", "regularizer", "regularizer_weight",
    "invariance_weight", "variance_weight", "covariance_weight", "expander_hidden_size",
)  # fmt: skip
_SHARED_FIELDS = (
    "num_target_blocks", "target_scale", "target_aspect_ratio", "context_scale", "min_context_patches",
    "num_mask_sets", "num_views",
)  # fmt: skip


class CJepaConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`CJepaModel`], [`CJepaForPreTraining`], [`CJepaForImageClassification`] and [`CJepaBackbone`].

    The encoder's fields carry the names of transformers' `IJepaConfig`. C-JEPA is the *contrastive* joint-embedding
    predictive architecture of Mo & Tong (NeurIPS 2024, arXiv 2410.19560): I-JEPA with VICReg's terms.

    Args:
        hidden_size (`int`, defaults to 768): Width D of the encoder; a multiple of 4 and of `num_attention_heads`.
        num_hidden_layers (`int`, defaults to 12): Transformer layers of the encoder.
        num_attention_heads (`int`, defaults to 12): Attention heads of the encoder.
        intermediate_size (`int`, defaults to 3072): Width of the encoder's MLPs.
        hidden_act (`str`, defaults to `"gelu"`): Activation in the MLPs.
        hidden_dropout_prob (`float`, defaults to 0.0): Dropout after attention and MLP, in [0, 1).
        attention_probs_dropout_prob (`float`, defaults to 0.0): Dropout of attention weights, in [0, 1).
        drop_path_rate (`float`, defaults to 0.0): Share of images for which the last layer's attention or MLP is left
            out in training (stochastic depth, arXiv 1603.09382), in [0, 1); it grows from 0 in the first layer.
        initializer_range (`float`, defaults to 0.02): Standard deviation of the truncated normal initialisation.
        layer_norm_eps (`float`, defaults to 1e-6): The authors' value (`IJepaConfig` has 1e-12).
        image_size (`int` or `[height, width]`, defaults to 224): Pixels of a training image. Any other size works too.
        patch_size (`int` or `[height, width]`, defaults to 16): Pixels of a patch.
        num_channels (`int`, defaults to 3): Channels of an image.
        stem_hidden_sizes (`list[int]`, *optional*): Widths of convolutional stages in place of the projection of
            patches, each of which halves the image: k of them make patches of 2^k pixels. A projection when not given.
        qkv_bias (`bool`, defaults to `True`): Whether query, key and value projections have a bias.
        predictor_hidden_size (`int`, defaults to 384): Width P of the predictor.
        predictor_num_hidden_layers (`int`, defaults to 6): Layers of the predictor (I-JEPA: 6 for S, B; 12 for L, H).
        predictor_num_attention_heads (`int`, *optional*): Heads of the predictor; the encoder's number when not given.
        predictor_intermediate_size (`int`, *optional*): Width of the predictor's MLPs; four times its own when not
            given.
        predictor_attention (`"per_block"` or `"shared_context"`, defaults to `"per_block"`): Whether the predictor's
            context sees the block that is predicted, as in I-JEPA, and is so computed for every block, or only itself,
            and is computed once an image, which is faster.
        prediction_loss (`"smooth_l1"` or `"mse"`, defaults to `"smooth_l1"`): Distance of predictions and targets;
            I-JEPA's code has the first, its paper the second.
        regularizer (`"blocks"`, `"context"`, `"pair"` or `"views"`, defaults to `"context"`): What VICReg's term acts
            on, in three readings of the C-JEPA paper and one beyond it. `"blocks"`: Algorithm 1, every pair of
            predicted blocks. `"context"`: the appendix's listing, variance and covariance of the context encoder's
            mean token, the prediction loss as invariance. `"pair"`: the mean context token and the mean predicted
            token. `"views"`: the mean context tokens of an image's views and mask sets, of which there are 2 or more.
        regularizer_weight (`float`, defaults to 0.001): beta_vicreg; 0 is exactly I-JEPA.
        invariance_weight (`float`, defaults to 25.0): beta_sim.
        variance_weight (`float`, defaults to 25.0): beta_std.
        covariance_weight (`float`, defaults to 1.0): beta_cov.
        expander_hidden_size (`int`, *optional*): Width of a three-layer expander in front of the regulariser; none
            when not given (the paper is silent on its size).
        num_target_blocks (`int`, defaults to 4): Target blocks M of an image.
        target_scale (`[float, float]`, defaults to `[0.15, 0.2]`): Share of the image a target block covers.
        target_aspect_ratio (`[float, float]`, defaults to `[0.75, 1.5]`): Height over width of a target block, in
            units of the image's own.
        context_scale (`[float, float]`, defaults to `[0.85, 1.0]`): Share of the image the context block covers.
        min_context_patches (`int`, defaults to 10): Fewest patches a context may have.
        num_mask_sets (`int`, defaults to 1): Pairs of a context and its target blocks that are drawn of an image in a
            step. They share the target encoder's pass; each is one more image to the regulariser.
        num_views (`int`, defaults to 1): Crops that are made of an image, each with masks and predictions of its own.
            With 2 or more, pre-training reads images as `(B, num_views, C, H, W)`.
        upper_levels (`list[dict]`, *optional*): Levels on top of this one, none when not given: level 1 reads this
            encoder's tokens, 2x2 of them merged, level 2 those of level 1, and so on, each with encoders, predictor
            and regulariser of its own. An entry holds the fields of this class that differ from level 0's (sizes of
            encoder, predictor and expander, loss and regulariser; `patch_size` is the tokens merged a side, 2 when not
            given).
        level (`int`, *optional*): The level whose features [`CJepaModel`] gives, from 0, or counted from the top as
            -1, -2; the top one when not given.
        level_weight (`float`, defaults to 1.0): Weight of the level's loss in the sum over levels.
        stop_gradient (`bool`, defaults to `False`): In an entry of `upper_levels`: whether the level's loss in
            pre-training leaves the levels below alone.
        classifier_pooling (`"mean"`, `"last4"` or `"attentive"`, defaults to `"mean"`): What the classifier of
            [`CJepaForImageClassification`] reads: the mean token, the mean tokens of the last four layers side by
            side, or what a learned query finds by attending to all tokens.
        out_features (`list[str]`, *optional*): The stages, of `stage_names`, whose maps [`CJepaBackbone`] gives; the
            last one when not given.
        out_indices (`list[int]`, *optional*): The same by their places in `stage_names`.

    Raises:
        ValueError: A field has a value the model cannot be built with; the message names the field.
    """

    model_type = "cjepa"
    keys_to_ignore_at_inference = [
        "loss_terms", "predictions", "targets", "level_embeddings", "level_views", "signs", "context_ids",
        "target_ids", "hidden_states", "attentions",
    ]  # fmt: skip

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    stem_hidden_sizes: list[int] | None = None
    qkv_bias: bool = True
    predictor_hidden_size: int = 384
    predictor_num_hidden_layers: int = 6
    predictor_num_attention_heads: int | None = None
    predictor_intermediate_size: int | None = None
    predictor_attention: str = "per_block"
    prediction_loss: str = "smooth_l1"
    regularizer: str = "context"
    regularizer_weight: float = 0.001
    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0
    expander_hidden_size: int | None = None
    num_target_blocks: int = 4
    target_scale: list[float] | tuple[float, float] = (0.15, 0.2)
    target_aspect_ratio: list[float] | tuple[float, float] = (0.75, 1.5)
    context_scale: list[float] | tuple[float, float] = (0.85, 1.0)
    min_context_patches: int = 10
    num_mask_sets: int = 1
    num_views: int = 1
    upper_levels: list[dict] | None = None
    level: int | None = None
    level_weight: float = 1.0
    stop_gradient: bool = False
    classifier_pooling: str = "mean"

    def __post_init__(self, **kwargs):
        if self.predictor_num_attention_heads is None:
            self.predictor_num_attention_heads = self.num_attention_heads
        if self.predictor_intermediate_size is None:
            self.predictor_intermediate_size = 4 * self.predictor_hidden_size
        check_fields(self, _CHOICES)
        check_stem(self.stem_hidden_sizes, pair(self.patch_size))
        if not isinstance(self.upper_levels, list | tuple | None):
            raise ValueError(f"upper_levels={self.upper_levels!r} must be a list of mappings, one a level.")
        self.upper_levels = list(self.upper_levels or [])
        self._out_features = self._out_indices = None
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        super().__post_init__(**kwargs)
        if self.upper_levels:
            self.level_config(self.num_levels - 1)  # which names what is wrong with one
            above = [entry.get("level_weight", CJepaConfig.level_weight) for entry in self.upper_levels]
            check_level_weights([self.level_weight, *above])
        choose_level(self.level, self.num_levels)
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; the configuration of an S-JEA model is refused."""
        if config_dict.get("model_type") == "sjea":
            raise ValueError("This is an S-JEA model, no C-JEPA one; load it with AutoModel or SJeaModel.")
        return super().from_dict(config_dict, **kwargs)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the patch grid of an image of `image_size`."""
        (height, width), (patch_height, patch_width) = pair(self.image_size), pair(self.patch_size)
        return height // patch_height, width // patch_width

    @property
    def num_levels(self) -> int:
        """Levels of the stack; 1 is plain C-JEPA."""
        return 1 + len(self.upper_levels)

    @property
    def stage_names(self) -> list[str]:
        """What [`CJepaBackbone`] can give: of each level the embedded patches, `stem`, and every layer's output."""
        names = []
        for number, entry in enumerate([{}, *self.upper_levels]):
            level = f"level{number}_" if number else ""
            num_layers = entry.get("num_hidden_layers", self.num_hidden_layers)
            names += [f"{level}stem", *(f"{level}stage{layer}" for layer in range(1, num_layers + 1))]
        return names

    def level_config(self, level: int) -> "CJepaConfig":
        """
        The configuration of one level alone, which reads the tokens of the level below as a map of many channels.

        Args:
            level (`int`): From 0; level 0 is this configuration without the levels above.

        Returns:
            [`CJepaConfig`].

        Raises:
            ValueError: An entry of `upper_levels` has a field that is not one of a level's, or a wrong value.
        """
        shared = {name: getattr(self, name) for name in _LEVEL_FIELDS}
        shared |= {name: getattr(self, name) for name in _SHARED_FIELDS}
        own = ("num_channels", "image_size", "patch_size", "stem_hidden_sizes")
        reads = {name: getattr(self, name) for name in own}
        config = CJepaConfig(**shared, **reads, level_weight=self.level_weight)
        for number, entry in enumerate(self.upper_levels[:level], start=1):
            config = self._upper_config(number, entry, config, shared)
        config._attn_implementation_internal = self._attn_implementation_internal
        return config

    def _upper_config(self, number: int, entry: dict, below: "CJepaConfig", shared: dict) -> "CJepaConfig":
        where = f"upper_levels[{number - 1}]"
        known = (*_LEVEL_FIELDS, "patch_size", "level_weight", "stop_gradient")
        if not isinstance(entry, dict):
            raise ValueError(f"{where}={entry!r} must be a mapping of fields, such as hidden_size, that differ.")
        unknown = [name for name in entry if name not in known]
        if unknown:
            raise ValueError(f"{where}: {unknown[0]!r} is no field of an upper level; it has {', '.join(known)}.")
        if not is_size(entry.get("patch_size", 2)):
            raise ValueError(
                f"{where}: patch_size={entry['patch_size']!r} must be a whole number of 1 or more, or two of them, "
                "height and width."
            )
        merged = pair(entry.get("patch_size", 2))
        if any(size % tokens for size, tokens in zip(below.grid_size, merged, strict=True)):
            rows, columns = below.grid_size
            raise ValueError(
                f"{where}: the {rows}x{columns} tokens below cannot be merged by {merged[0]}x{merged[1]}; choose an "
                "image_size and patch_size whose grid they divide, or fewer levels."
            )
        # a merged token is as large as several: fewer of them are as much context
        fewest = -(-below.min_context_patches // (merged[0] * merged[1]))
        reads = {"num_channels": below.hidden_size, "image_size": list(below.grid_size), "patch_size": list(merged)}
        try:
            return CJepaConfig(**{**shared, **entry, **reads, "min_context_patches": fewest})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}") from error


def pair(size) -> tuple[int, int]:
    """`(height, width)` of a size given as one integer or as two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def choose_level(level: int | None, num_levels: int) -> int:
    """
    The index of a level, counted from the image up.

    Args:
        level (`int`, *optional*): From 0, or from the top as -1, -2; the top one when not given.
        num_levels (`int`): How many there are.

    Returns:
        `int`: From 0 to `num_levels - 1`.

    Raises:
        ValueError: There is no such level.
    """
    if level is None:
        return num_levels - 1
    if type(level) is not int or not -num_levels <= level < num_levels:
        only = "one level, 0" if num_levels == 1 else f"{num_levels} levels, 0 to {num_levels - 1}"
        raise ValueError(f"level={level!r} is not in this model, which has {only}; choose one of its own.")
    return level % num_levels
