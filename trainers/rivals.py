"""Other ways to train an encoder on a recipe's images, for experiments to compare with: MAE and labels.

The models are transformers' ViTMAE and this package's classifiers, of the sizes of the recipe. [`JepaTrainer`] trains
them: images, crops, colours, optimizer, schedules and log are those of all methods.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
from transformers.utils import ModelOutput

from modeling_cjepa import CJepaConfig, SJeaConfig
from modeling_cjepa.configuration_cjepa import pair
from modeling_cjepa.outputs_cjepa import CJepaModelOutput
from trainers.errors import InputError
from trainers.loading import CLASSIFIERS, load_model, read_weights
from trainers.objectives import Objective
from trainers.trainer import JepaTrainer

_MASK_RATIO = 0.75
_ADVISED = ("learning_rate", "max_grad_norm")
_SHARED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "hidden_dropout_prob", "attention_probs_dropout_prob", "qkv_bias", "layer_norm_eps", "image_size", "num_channels",
)  # fmt: skip


class MaeConfig(CJepaConfig):
    """The configuration of an MAE with the sizes of a C-JEPA model: its predictor's are those of the decoder."""

    model_type = "cjepa_mae"

    def of_transformers(self, mask_ratio: float) -> ViTMAEConfig:
        """As transformers has it."""
        config = ViTMAEConfig(
            **{name: getattr(self, name) for name in _SHARED},
            patch_size=pair(self.patch_size)[0],
            decoder_hidden_size=self.predictor_hidden_size,
            decoder_num_hidden_layers=self.predictor_num_hidden_layers,
            decoder_num_attention_heads=self.predictor_num_attention_heads,
            decoder_intermediate_size=self.predictor_intermediate_size,
            mask_ratio=mask_ratio,
            norm_pix_loss=True,
        )
        config._attn_implementation = self._attn_implementation
        return config


class MaeEncoder(PreTrainedModel):
    """The encoder of an MAE with every patch in sight; its embedding is the mean of them, as C-JEPA's is."""

    config_class = MaeConfig
    _supports_sdpa = True

    def __init__(self, config: MaeConfig):
        super().__init__(config)
        self.vit = ViTMAEModel(config.of_transformers(mask_ratio=0.0))
        self.post_init()
        _initialize_embeddings(self.vit)

    def num_parameters_up_to(self, level: int) -> int:
        """Parameters of the encoder, which has one level."""
        return self.num_parameters()

    def forward(self, pixel_values: torch.Tensor, level: int = 0) -> CJepaModelOutput:
        """Images (B, C, H, W) as tokens (B, N, D), in their order, and embeddings (B, D)."""
        order = torch.arange(self.vit.embeddings.patch_embeddings.num_patches, device=pixel_values.device)
        tokens = self.vit(pixel_values, noise=order.expand(len(pixel_values), -1)).last_hidden_state[:, 1:]
        embeddings = tokens.mean(dim=1)
        return CJepaModelOutput(last_hidden_state=tokens, pooler_output=embeddings, level_embeddings=(embeddings,))


class MaeForPreTraining(PreTrainedModel):
    """A masked autoencoder (arXiv 2111.06377): 75 % of the patches are hidden, their normalised pixels predicted."""

    config_class = MaeConfig
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    supports_gradient_checkpointing = True

    def __init__(self, config: MaeConfig):
        super().__init__(config)
        self.mae = ViTMAEForPreTraining(config.of_transformers(_MASK_RATIO))
        self.post_init()
        _initialize_embeddings(self.mae.vit)
        # made by the constructor, and zero after transformers 5.24 has initialised the weights
        self.mae.decoder.initialize_weights(self.mae.vit.embeddings.patch_embeddings.num_patches)

    def forward(self, pixel_values: torch.Tensor) -> ModelOutput:
        """What [`JepaTrainer`] reads, of images (B, C, H, W); an embedding is the mean of the patches in sight."""
        outputs = self.mae(pixel_values, output_hidden_states=True)
        with torch.no_grad():
            tokens = self.mae.vit.layernorm(outputs.hidden_states[-1][:, 1:])
        return _watched("reconstruction", outputs.loss, tokens.mean(dim=1))


@torch.no_grad()
def _initialize_embeddings(vit: ViTMAEModel):
    """
    Positions and projection as MAE has them. transformers 5.24 passes over them (their projection is marked as
    initialised before its turn comes), and leaves the positions zero.
    """
    vit.embeddings.patch_embeddings.projection._is_hf_initialized = False
    vit.embeddings.initialize_weights()


def _watched(name: str, loss: torch.Tensor, embeddings: torch.Tensor) -> ModelOutput:
    """An output whose loss has one term."""
    return ModelOutput(
        loss=loss,
        loss_terms={name: loss.detach()},
        level_embeddings=(embeddings,),
        level_views=(embeddings.unsqueeze(1),),
    )


class RivalTrainer(JepaTrainer):
    """Trains a rival as [`JepaTrainer`] trains all else. The doctor tells its signs, and stops nothing."""

    def __init__(self, model, args, **kwargs):
        super().__init__(model, args, **kwargs)
        # its advice is of what JEPA has
        self.doctor.facts = {"model_type": "rival", **{name: self.doctor.facts[name] for name in _ADVISED}}
        self.doctor.stops = False

    def model_inputs(self, inputs: dict) -> tuple[torch.Tensor]:
        """One view of each image (B, C, H, W), normalised."""
        return (self.views(inputs),)


class SupervisedTrainer(RivalTrainer):
    """The same with labels, which no other training is given; the log's figures are those of the logits."""

    def forward_batch(self, model: nn.Module, inputs: dict) -> ModelOutput:
        """The classifier's output for a batch."""
        (images,) = self.model_inputs(inputs)
        # the images of all micro-batches of a step follow each other
        first = self._micro_step * self.args.train_batch_size
        of_step = self.sample_ids(self.state.global_step)[first : first + len(images)]
        labels = self.train_dataset.source.labels[[sample_id["index"] for sample_id in of_step]]
        outputs = model(images, labels=torch.as_tensor(labels, device=images.device))
        return _watched("cross_entropy", outputs.loss, outputs.logits)


class Rival(Objective):
    """A way of training that experiments compare with; one view is made of an image."""

    trainer_class = RivalTrainer

    def num_views(self, config):
        return 1

    def check(self, config: PreTrainedConfig):
        """Raises `InputError` where it cannot take the sizes of a recipe's model."""

    def build(self, config: PreTrainedConfig, label_names: list[str] | None, attention: str) -> PreTrainedModel:
        """
        The model to train, from torch's default generator.

        Args:
            config ([`CJepaConfig`] or [`SJeaConfig`]): The recipe's model, whose sizes it takes.
            label_names (`list[str]`, *optional*): The classes of the images, if they have labels.
            attention (`str`): Implementation of attention.

        Raises:
            InputError: It needs labels, and there are none.
        """
        raise NotImplementedError

    def load(self, place: Path) -> PreTrainedModel:
        """The encoder of a saved model, as [`~evaluation.evaluate_levels`] takes it, in float32 on the CPU."""
        raise NotImplementedError


def _is_square(config: CJepaConfig) -> bool:
    """Whether a model's images and patches are square, and no part of a patch is left over."""
    (height, width), (rows, columns) = pair(config.image_size), pair(config.patch_size)
    return height == width and rows == columns and height % rows == 0


class Mae(Rival):
    """[`MaeForPreTraining`]."""

    def check(self, config):
        is_plain = isinstance(config, CJepaConfig) and config.num_levels == 1 and not config.stem_hidden_sizes
        if not is_plain or config.drop_path_rate or not _is_square(config):
            raise InputError(
                "rival mae takes the sizes of a C-JEPA recipe with one level, without a stem and without drop path, "
                "and with square images of whole, square patches."
            )

    def build(self, config, label_names, attention):
        config = MaeConfig.from_dict({**config.to_dict(), "model_type": MaeConfig.model_type})
        return MaeForPreTraining._from_config(config, attn_implementation=attention)

    def load(self, place):
        trained, missing = read_weights(MaeForPreTraining, place)
        if missing:
            raise InputError(f"{place} lacks weights of an MAE ({missing[0]}); train it again.")
        encoder = MaeEncoder(trained.config)
        encoder.vit.load_state_dict(trained.mae.vit.state_dict())
        return encoder


class Supervised(Rival):
    """The recipe's encoder trained with labels, from the start: what they are worth on as many images."""

    trainer_class = SupervisedTrainer

    def build(self, config, label_names, attention):
        if label_names is None:
            raise InputError("rival supervised needs labels, and these images have none; leave the method out.")
        id2label = dict(enumerate(label_names))
        fields = {"id2label": id2label, "label2id": {name: number for number, name in id2label.items()}}
        config = type(config).from_dict(config.to_dict() | fields)
        model = CLASSIFIERS[type(config)]._from_config(config, attn_implementation=attention)
        # as S-JEA's own trainer has it
        return model.to(memory_format=torch.channels_last) if isinstance(config, SJeaConfig) else model

    def load(self, place):
        return load_model(place)


RIVALS: dict[str, Rival] = {"mae": Mae(), "supervised": Supervised()}
