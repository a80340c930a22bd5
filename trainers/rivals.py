"""Other ways to train an encoder on a recipe's images, for experiments to compare with: MAE and labels.

The models are transformers' ViTMAE and this package's classifiers, the training is transformers' `Trainer`; sizes,
crops and settings are those of the recipe.
"""

import copy
import time
from pathlib import Path

import torch
from torch.utils.data import default_collate
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    ProgressCallback,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.trainer_utils import set_seed

from modeling_cjepa import CJepaConfig
from modeling_cjepa.configuration_cjepa import pair
from trainers.callbacks import CropEpochCallback, ImagesPerSecondBar
from trainers.checkpoints import find_checkpoint
from trainers.data_facts import data_facts
from trainers.datasets import ImageDataset, ImageSource
from trainers.errors import InputError
from trainers.files import write_json
from trainers.loading import CLASSIFIERS, load_model
from trainers.nonfinite import check_finite_weights
from trainers.pretraining import choose_attention, training_arguments
from trainers.publishing import whole_folder
from trainers.recipes import Recipe
from trainers.reports import machine_facts, software_facts
from trainers.sources import load_sources
from trainers.stopping import StoppableTrainer, stopped_sentence
from trainers.training_args import PrecisionTrainingArguments
from trainers.transforms import image_processor, normalize
from trainers.views import ViewDataArguments, view_transform

# what of a recipe's training a rival is trained with; the rest is of joint embeddings
_TAKEN = (
    "output_dir", "resume_from_checkpoint", "seed", "per_device_train_batch_size", "gradient_accumulation_steps",
    "num_train_epochs", "max_steps", "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "adam_beta1",
    "adam_beta2", "precision", "use_cpu", "dataloader_num_workers", "save_strategy", "save_steps", "save_total_limit",
    "logging_steps", "disable_tqdm",
)  # fmt: skip


class MaeEncoder(ViTMAEModel):
    """transformers' encoder of MAE with every patch in sight; its embedding is the mean of them, as C-JEPA's is."""

    def __init__(self, config: ViTMAEConfig):
        config = copy.deepcopy(config)
        config.mask_ratio, config.num_levels, config.level = 0.0, 1, 0
        super().__init__(config)

    def num_parameters_up_to(self, level: int) -> int:
        """Parameters of the encoder, which has one level."""
        return self.num_parameters()

    def forward(self, pixel_values: torch.Tensor, level: int = 0) -> BaseModelOutputWithPooling:
        """Images (B, C, H, W) as tokens (B, N, D), in their order, and embeddings (B, D)."""
        order = torch.arange(self.embeddings.patch_embeddings.num_patches, device=pixel_values.device)
        tokens = super().forward(pixel_values, noise=order.expand(len(pixel_values), -1)).last_hidden_state[:, 1:]
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(dim=1))


class Rival:
    """A way of training that experiments compare with."""

    def check(self, config: PreTrainedConfig):
        """Raises `InputError` where it cannot take the sizes of a recipe's model."""

    def build(self, config: PreTrainedConfig, label_names: list[str] | None) -> PreTrainedModel:
        """
        The model to train, from torch's default generator.

        Args:
            config ([`CJepaConfig`] or [`SJeaConfig`]): The recipe's model, whose sizes it takes.
            label_names (`list[str]`, *optional*): The classes of the images, if they have labels.

        Raises:
            InputError: It needs labels, and there are none.
        """
        raise NotImplementedError

    def load(self, place: Path) -> PreTrainedModel:
        """The encoder of a saved model, as [`~evaluation.evaluate_levels`] takes it, in float32 on the CPU."""
        raise NotImplementedError


class Mae(Rival):
    """Masked autoencoder (arXiv 2111.06377): 75 % of the patches are hidden, and their normalised pixels predicted."""

    def check(self, config):
        if not isinstance(config, CJepaConfig) or config.num_levels > 1 or config.stem_hidden_sizes:
            raise InputError("rival mae takes the sizes of a C-JEPA recipe with one level and without a stem.")

    def build(self, config, label_names):
        width, heads = config.predictor_hidden_size, config.predictor_num_attention_heads
        shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size",
                  "patch_size", "num_channels", "layer_norm_eps")  # fmt: skip
        return ViTMAEForPreTraining(
            ViTMAEConfig(
                **{name: getattr(config, name) for name in shared},
                decoder_hidden_size=width,
                decoder_num_hidden_layers=config.predictor_num_hidden_layers,
                decoder_num_attention_heads=heads or config.num_attention_heads,
                decoder_intermediate_size=config.predictor_intermediate_size or 4 * width,
                norm_pix_loss=True,
            )
        )

    def load(self, place):
        # which knows the names that weights have in files
        trained = ViTMAEForPreTraining.from_pretrained(place, dtype=torch.float32)
        encoder = MaeEncoder(trained.config)
        encoder.load_state_dict(trained.vit.state_dict())
        return encoder


class Supervised(Rival):
    """The recipe's encoder trained with labels, from the start: what they are worth on as many images."""

    def build(self, config, label_names):
        if label_names is None:
            raise InputError("rival supervised needs labels, and these images have none; leave the method out.")
        id2label = dict(enumerate(label_names))
        fields = {"id2label": id2label, "label2id": {name: number for number, name in id2label.items()}}
        config = type(config).from_dict(config.to_dict() | fields)
        return CLASSIFIERS[type(config)]._from_config(config)

    def load(self, place):
        return load_model(place)


RIVALS = {"mae": Mae(), "supervised": Supervised()}


class _Batches:
    """Batches of normalised images, with their labels where a loss reads them."""

    def __init__(self, data: ViewDataArguments, with_labels: bool):
        self.data, self.with_labels = data, with_labels

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = default_collate(items)
        batch["pixel_values"] = normalize(batch["pixel_values"], self.data.image_mean, self.data.image_std)
        return batch if self.with_labels else {"pixel_values": batch["pixel_values"]}


def train_rival(name: str, recipe: Recipe) -> Path | None:
    """
    Trains a rival on the images of a recipe, one view of each, and saves it.

    Args:
        name (`str`): Of [`RIVALS`].
        recipe ([`Recipe`]): Images, views, sizes, and of the training the batch, the length, AdamW's settings, the
            warm-up (a cosine to 0 follows) and the seed.

    Returns:
        `Path`: The `final` folder: weights, configuration, image processor and `results.json`. None if a signal has
        stopped the run, with a checkpoint.

    Raises:
        InputError: It cannot be trained.
    """
    torch.set_flush_denormal(True)
    asked = training_arguments(recipe)
    taken = {field: getattr(asked, field) for field in _TAKEN}
    args = PrecisionTrainingArguments(**taken, lr_scheduler_type="cosine", report_to="none")
    config = recipe.objective.build_config(recipe.model)
    source, _ = load_sources(recipe.data, max(pair(config.image_size)), not args.disable_tqdm)
    checkpoint = find_checkpoint(args)
    set_seed(args.seed)
    model = RIVALS[name].build(config, source.label_names)
    model.set_attn_implementation(choose_attention(recipe, asked))
    trainer = _build_trainer(name, model, args, recipe.data, source)
    first_step = 0 if checkpoint is None else int(checkpoint.rpartition("-")[2])
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    if trainer.stop.reason is not None:
        print(stopped_sentence(trainer), flush=True)
        return None
    check_finite_weights(trainer)
    steps = trainer.state.global_step
    # as if the steps before a resume had taken as long
    seconds *= steps / max(steps - first_step, 1)
    return _save(recipe, trainer, seconds, Path(args.output_dir, "final"))


def _build_trainer(
    name: str, model: PreTrainedModel, args: PrecisionTrainingArguments, data: ViewDataArguments, source: ImageSource
) -> StoppableTrainer:
    size = pair(model.config.image_size)
    trainer = StoppableTrainer(
        model,
        args,
        data_collator=_Batches(data, with_labels=name == "supervised"),
        train_dataset=ImageDataset(source, view_transform(size, data), args.seed),
        processing_class=image_processor(size, data.image_mean, data.image_std),
        callbacks=[CropEpochCallback()],
    )
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(ImagesPerSecondBar(f"training {name}", {"loss": "loss"}))
    return trainer


def _save(recipe: Recipe, trainer: StoppableTrainer, seconds: float, folder: Path) -> Path:
    """The model, and of `results.json` what experiments read."""
    args, steps = trainer.args, trainer.state.global_step
    batch_size = args.train_batch_size * args.gradient_accumulation_steps
    training = {"steps": steps, "batch_size": batch_size, "images_seen": steps * batch_size, "seconds": seconds}
    with whole_folder(folder) as unfinished:
        trainer.save_model(str(unfinished))
        facts = {"settings": recipe.values, "training": training, "machine": machine_facts()}
        facts |= {"software": software_facts(), "data": data_facts(recipe.data)}
        write_json(unfinished / "results.json", facts | {"history": trainer.state.log_history})
    return folder
