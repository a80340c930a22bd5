"""A model small enough for tests: 8 x 8 patches of 4 pixels, two layers of 32 features."""

import torch

from modeling_cjepa import CJepaConfig, CJepaForPreTraining, SJeaConfig, SJeaForPreTraining
from modeling_cjepa.losses_cjepa import block_vicreg_terms

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
    "predictor_hidden_size": 16,
    "predictor_num_hidden_layers": 2,
    # large enough for attention and positions to matter in an untrained model
    "initializer_range": 0.2,
}

# a run of `cjepa pretrain` that takes seconds
FLAGS = [
    "--hidden_size", "32", "--num_hidden_layers", "2", "--num_attention_heads", "2", "--intermediate_size", "64",
    "--predictor_hidden_size", "16", "--predictor_num_hidden_layers", "1", "--predictor_num_attention_heads", "2",
    "--num_train_images", "64", "--num_eval_images", "48", "--per_device_train_batch_size", "16",
    "--logging_steps", "1", "--precision", "float32", "--dataloader_num_workers", "0", "--use_cpu",
]  # fmt: skip


def pair_terms(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    """VICReg's terms of two views (B, D)."""
    return block_vicreg_terms(torch.stack([a, b], dim=1))


def tiny_config(**changes) -> CJepaConfig:
    return CJepaConfig(**{**SIZES, **changes})


def tiny_model(**changes) -> CJepaForPreTraining:
    """A pre-training model, the same at every call, whose encoders differ and whose norms and biases matter."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CJepaForPreTraining(tiny_config(**changes)).train()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


# a ResNet of 32 features, and our vision transformer that reads a map token by token
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 32],
    "depths": [1, 1, 1],
    "layer_type": "basic",
}
TRANSFORMER = {
    "model_type": "cjepa",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.2,
}


def sjea_level(**changes) -> dict:
    """A level of S-JEA with a small ResNet and an expander of three layers."""
    return {"backbone": dict(RESNET), "stem": "small", "expander_sizes": [24, 24, 24]} | changes


def tiny_sjea(*levels: dict, **changes) -> SJeaForPreTraining:
    """A stack in training mode, the same at every call; two plain levels when none are given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SJeaForPreTraining(SJeaConfig(levels=list(levels) or [sjea_level(), sjea_level()], **changes))
    return model.train()


def images(batch_size=4, height=32, width=32, channels=3, seed=0) -> torch.Tensor:
    return torch.randn(batch_size, channels, height, width, generator=seeded(seed))


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(model) -> dict[str, torch.Tensor]:
    """The gradients of a model by parameter name, where there are any."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
