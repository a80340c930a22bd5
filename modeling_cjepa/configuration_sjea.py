"""Configuration of S-JEA models: a stack of levels, each with a backbone, an expander and VICReg's weights."""

from dataclasses import asdict, dataclass, field, fields

from transformers import PreTrainedConfig

from .checks_cjepa import check_choice, check_count, check_flag, check_level_weights, check_weight, is_count
from .configuration_cjepa import choose_level

STEMS = ("standard", "small")
INPUTS = ("vector", "map", "tokens")
READS = ("embedding", "expanded")
CLASSIFIER_POOLINGS = ("mean", "attentive")


@dataclass
class SJeaLevelConfig:
    r"""
    One level of a stack, an entry of [`SJeaConfig`]'s `levels`.

    Args:
        backbone (`dict`): A configuration of transformers by its fields, `model_type` among them: `resnet`, or any
            other encoder that gives pooled features; `cjepa` is this package's vision transformer. The number of
            channels and the image size are set by what the level reads. (A recipe may name a model of the Hub or a
            folder instead, from whose weights the level starts.)
        stem (`"standard"` or `"small"`, defaults to `"standard"`): `"small"` replaces a ResNet's first convolution by
            a 3x3 one of stride 1 and leaves out the pooling after it, as is usual for images of 32 pixels.
        input (`"vector"`, `"map"` or `"tokens"`, defaults to `"vector"`): What a level above the lowest reads of the
            one below: its embedding folded to a map of one channel (the authors' code), its feature map before the
            pooling, or that map token by token, with a transformer's blocks (`backbone` of type `cjepa`).
        reads (`"embedding"` or `"expanded"`, defaults to `"embedding"`): Whether `"vector"` is the embedding Y of the
            level below (Fig. 1 of the paper) or what its expander makes of it, Z (the authors' code).
        fold_height (`int`, *optional*): Rows of the folded vector; those of the squarest map when not given.
        expander_sizes (`list[int]`, defaults to `[512, 512, 512]`): Widths of the expander's linear layers, batch norm
            and ReLU between them; one width is a plain linear layer.
        level_weight (`float`, defaults to 1.0): Weight of the level's loss in the sum of all.
        invariance_weight (`float`, defaults to 25.0): VICReg's weight of the squared distance.
        variance_weight (`float`, defaults to 25.0): VICReg's weight of the variance.
        covariance_weight (`float`, defaults to 1.0): VICReg's weight of the covariance.
        stop_gradient (`bool`, defaults to `False`): Whether the level's loss in pre-training leaves the levels
            below alone.

    Raises:
        ValueError: A field has a value a level cannot be built with; the message names the field.
    """

    backbone: dict = field(default_factory=lambda: {"model_type": "resnet"})
    stem: str = "standard"
    input: str = "vector"
    reads: str = "embedding"
    fold_height: int | None = None
    expander_sizes: list[int] = field(default_factory=lambda: [512, 512, 512])
    level_weight: float = 1.0
    invariance_weight: float = 25.0
    variance_weight: float = 25.0
    covariance_weight: float = 1.0
    stop_gradient: bool = False

    def __post_init__(self):
        for name, choices in (("stem", STEMS), ("input", INPUTS), ("reads", READS)):
            check_choice(name, getattr(self, name), choices)
        for name in ("level_weight", "invariance_weight", "variance_weight", "covariance_weight"):
            check_weight(name, getattr(self, name))
        if not isinstance(self.backbone, dict) or not isinstance(self.backbone.get("model_type"), str):
            raise ValueError(
                f"backbone={self.backbone!r} must be a mapping of a transformers configuration's fields, with a "
                "model_type such as resnet."
            )
        sizes = self.expander_sizes
        if not isinstance(sizes, list | tuple) or not sizes or not all(map(is_count, sizes)):
            raise ValueError(f"expander_sizes={sizes!r} must be a list of widths, such as [512, 512, 512].")
        if self.fold_height is not None:
            check_count("fold_height", self.fold_height)
        check_flag("stop_gradient", self.stop_gradient)
        if self.input != "vector" and (self.reads != "embedding" or self.fold_height is not None):
            raise ValueError(f"reads and fold_height belong to input='vector', not to input={self.input!r}.")
        if self.input == "tokens" and self.backbone["model_type"] != "cjepa":
            raise ValueError(
                f"input='tokens' is read by transformer blocks, not by a {self.backbone['model_type']!r}; use a "
                "backbone of model_type cjepa, or input='map'."
            )


class SJeaConfig(PreTrainedConfig):
    r"""
    Configuration of [`SJeaModel`], [`SJeaForPreTraining`] and [`SJeaForImageClassification`].

    S-JEA (stacked joint embedding architectures, arXiv 2305.11701) trains a stack of encoders on two views of each
    image: level 0 reads the image, each other one what the level below it makes of the image, and every level has an
    expander and a VICReg loss of its own. One level is VICReg (arXiv 2105.04906).

    Args:
        levels (`list[dict]`, *optional*): The levels from the image up, each with the fields of [`SJeaLevelConfig`];
            two ResNet-18 with a small stem, the second on the folded embedding of the first, when not given.
        level (`int`, *optional*): The level whose features [`SJeaModel`] gives, from 0, or counted from the top as -1,
            -2; the top one when not given.
        image_size (`int`, defaults to 32): Pixels of a training image's side.
        num_channels (`int`, defaults to 3): Channels of an image.
        classifier_pooling (`"mean"` or `"attentive"`, defaults to `"mean"`): What the classifier of
            [`SJeaForImageClassification`] reads: the level's embedding, as its backbone pools it, or what a learned
            query finds by attending to the level's map or tokens.

    Raises:
        ValueError: A field has a value the model cannot be built with; the message names level and field.
    """

    model_type = "sjea"
    keys_to_ignore_at_inference = [
        "loss_terms", "level_embeddings", "level_views", "expanded", "hidden_states", "attentions",
    ]  # fmt: skip

    levels: list[dict] | None = None
    level: int | None = None
    image_size: int = 32
    num_channels: int = 3
    classifier_pooling: str = "mean"

    def __post_init__(self, **kwargs):
        self.levels = [asdict(level) for level in self._read_levels()]
        for name in ("image_size", "num_channels"):
            check_count(name, getattr(self, name))
        check_choice("classifier_pooling", self.classifier_pooling, CLASSIFIER_POOLINGS)
        check_level_weights([level["level_weight"] for level in self.levels])
        choose_level(self.level, len(self.levels))
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; the configuration of another model is refused."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"This is a {model_type!r} model, no S-JEA one; load it with AutoModel.")
        return super().from_dict(config_dict, **kwargs)

    def _read_levels(self) -> list[SJeaLevelConfig]:
        levels = _two_resnets() if self.levels is None else self.levels
        if not isinstance(levels, list | tuple) or not levels:
            raise ValueError(f"levels={levels!r} must be a list with an entry for each level, at least one.")
        known, read = [entry.name for entry in fields(SJeaLevelConfig)], []
        for number, level in enumerate(levels):
            if not isinstance(level, dict):
                raise ValueError(f"levels[{number}]={level!r} must be a mapping of {', '.join(known)}.")
            unknown = [str(name) for name in level if name not in known]
            if unknown:
                raise ValueError(f"levels[{number}]: unknown key {unknown[0]!r}; a level has {', '.join(known)}.")
            try:
                read.append(SJeaLevelConfig(**level))
            except ValueError as error:
                raise ValueError(f"levels[{number}]: {error}") from error
        plain = SJeaLevelConfig()
        for name in ("input", "reads", "fold_height", "stop_gradient"):
            if getattr(read[0], name) != getattr(plain, name):
                raise ValueError(
                    f"levels[0]: {name}={getattr(read[0], name)!r} says what is read of the level below, and level 0 "
                    "reads the image; leave it out."
                )
        return read

    @property
    def num_levels(self) -> int:
        """Levels of the stack."""
        return len(self.levels)

    @property
    def level_configs(self) -> list[SJeaLevelConfig]:
        """The levels as objects, from the image up."""
        return [SJeaLevelConfig(**level) for level in self.levels]


def _two_resnets() -> list[dict]:
    resnet18 = {
        "model_type": "resnet",
        "embedding_size": 64,
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
    }
    return [{"backbone": resnet18, "stem": "small"}, {"backbone": dict(resnet18), "stem": "small"}]
