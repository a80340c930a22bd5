"""The ways of pre-training: of each the classes of its model, data, arguments and trainer, and how they are joined.

A recipe names one by `model_type`.
"""

import logging

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from modeling_cjepa import CJepaConfig, CJepaForPreTraining, SJeaConfig, SJeaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from trainers.backbones import describe_backbones, load_backbones
from trainers.datasets import ImageDataset, ImageSource
from trainers.errors import InputError
from trainers.stream_sources import PretrainDataArguments
from trainers.streams import Shards, StreamedImages
from trainers.trainer import JepaTrainer
from trainers.trainer_cjepa import CJepaTrainer
from trainers.trainer_sjea import SJeaTrainer
from trainers.training_args import CJepaTrainingArguments, JepaTrainingArguments, SJeaTrainingArguments
from trainers.transforms import image_processor
from trainers.views import DeviceColors, TwoViewDataArguments, ViewDataArguments, view_transform

logger = logging.getLogger(__name__)


class Objective:
    """
    A way of pre-training.

    Attributes:
        title (`str`): Its name and what it is.
        config_class, model_class, data_class, training_class, trainer_class (`type`): Its classes.
        downstream (`str`): What `AutoModel` loads of it.
    """

    title: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    data_class: type[PretrainDataArguments]
    training_class: type[JepaTrainingArguments]
    trainer_class: type[JepaTrainer]
    downstream: str

    def build_config(self, fields: dict) -> PreTrainedConfig:
        """The configuration of a recipe's fields."""
        return self.config_class(**fields)

    def build_model(self, fields: dict, attn_implementation: str) -> PreTrainedModel:
        """The model of a configuration's fields, initialised from torch's default generator, ready for a batch."""
        return self.model_class._from_config(self.build_config(fields), attn_implementation=attn_implementation)

    def batch_of_one_is_error(self, config: PreTrainedConfig) -> bool:
        """Whether the loss needs the statistics of a batch."""
        return True

    def num_views(self, config) -> int:
        """How many views the model reads of an image."""
        raise NotImplementedError

    def transform(self, config, data: ViewDataArguments, device: torch.device):
        """What makes the uint8 tensor of a view, or of views, of an image that [`~decoding.open_image`] gives."""
        size = pair(config.image_size)
        return view_transform(size, data, self.num_views(config), with_colors=not data.colors_on(device, size))

    def trainer_options(self, config, data: ViewDataArguments, device: torch.device) -> dict:
        """Arguments of the trainer that depend on the data's."""
        size = pair(config.image_size)
        colors = DeviceColors(size, data) if data.colors_on(device, size) else None
        return {"image_mean": data.image_mean, "image_std": data.image_std, "colors": colors}

    def build_trainer(
        self, model, args: JepaTrainingArguments, data: PretrainDataArguments, source: ImageSource | Shards
    ):
        """The trainer on an [`ImageSource`] or [`Shards`]; what its own checks refuse is raised as they raise it."""
        config = model.config
        if config.num_channels != 3:
            raise InputError(f"num_channels={config.num_channels}, but images are read as RGB; set it to 3.")
        transform = self.transform(config, data, args.device)
        if isinstance(source, Shards):
            dataset = StreamedImages(source, transform, data.shuffle_buffer)
        else:
            dataset = ImageDataset(source, transform, args.seed)
        processor = image_processor(pair(config.image_size), data.image_mean, data.image_std)
        options = self.trainer_options(config, data, args.device)
        return self.trainer_class(model, args, train_dataset=dataset, processing_class=processor, **options)

    def lowest_levels(self, config, number: int):
        """The configuration of so many of a stack's levels, from the image up."""
        raise NotImplementedError

    def random_batch(self, config, batch_size: int) -> torch.Tensor:
        """Noise in the shape of what the model reads."""
        raise NotImplementedError

    def describe(self, model) -> str:
        """What the model is beside its parameters, in a few words."""
        raise NotImplementedError


class CJepa(Objective):
    """C-JEPA: prediction of masked blocks, with VICReg's terms."""

    title = "C-JEPA (I-JEPA + VICReg)"
    config_class, model_class, trainer_class = CJepaConfig, CJepaForPreTraining, CJepaTrainer
    data_class, training_class = ViewDataArguments, CJepaTrainingArguments
    downstream = "the target encoder"

    def build_model(self, fields, attn_implementation):
        model = super().build_model(fields, attn_implementation)
        model.sample_masks(2)
        return model

    def batch_of_one_is_error(self, config):
        return any(config.level_config(level).regularizer_weight > 0 for level in range(config.num_levels))

    def num_views(self, config):
        return config.num_views

    def lowest_levels(self, config, number):
        config.upper_levels, config.level = config.upper_levels[: number - 1], None
        return config

    def random_batch(self, config, batch_size):
        views = [config.num_views] if config.num_views > 1 else []
        return torch.randn(batch_size, *views, config.num_channels, *pair(config.image_size))

    def describe(self, model):
        config = model.config
        levels = [config.level_config(number) for number in range(config.num_levels)]
        grids = " > ".join("{}x{}".format(*level.grid_size) for level in levels)
        return f"grid {grids}, regularizer {config.regularizer!r} x {config.regularizer_weight:g}"


class SJea(Objective):
    """S-JEA: VICReg on two views at every level of a stack."""

    title = "S-JEA (stacked VICReg)"
    config_class, model_class, trainer_class = SJeaConfig, SJeaForPreTraining, SJeaTrainer
    data_class, training_class = TwoViewDataArguments, SJeaTrainingArguments
    downstream = "the stack of encoders"

    def build_config(self, fields):
        if isinstance(fields.get("levels"), list):
            fields = fields | {"levels": describe_backbones(fields["levels"])[0]}
        return super().build_config(fields)

    def build_model(self, fields, attn_implementation):
        if not isinstance(fields.get("levels"), list):
            return super().build_model(fields, attn_implementation)
        levels, names = describe_backbones(fields["levels"])
        model = super().build_model(fields | {"levels": levels}, attn_implementation)
        for sentence in load_backbones(model, names):
            logger.warning(sentence)
        return model

    def num_views(self, config):
        return 2

    def lowest_levels(self, config, number):
        config.levels, config.level = config.levels[:number], None
        return config

    def random_batch(self, config, batch_size):
        return torch.randn(batch_size, 2, config.num_channels, *pair(config.image_size))

    def describe(self, model):
        levels = model.sjea.levels
        read = ", ".join(
            f"level {number} reads {'x'.join(map(str, level.input_shape))} and gives {level.width}"
            for number, level in enumerate(levels)
        )
        return f"{len(levels)} level{'s' if len(levels) > 1 else ''}: {read}"


OBJECTIVES: dict[str, Objective] = {"cjepa": CJepa(), "sjea": SJea()}
