"""Bare training steps of C-JEPA, with nothing beside them, for the benchmarks."""

import torch

from modeling_cjepa import CJepaConfig, CJepaForPreTraining
from trainers.benchmark import decay_groups
from trainers.errors import InputError
from trainers.recipes import RunArguments


def _vit(width, layers, heads, predictor_width, predictor_layers, image_size=224, patch_size=16) -> dict:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "intermediate_size": 4 * width, "predictor_hidden_size": predictor_width,
        "predictor_num_hidden_layers": predictor_layers, "predictor_num_attention_heads": heads,
        "image_size": image_size, "patch_size": patch_size,
    }  # fmt: skip


# the authors' sizes, and one for images of CIFAR-10
SIZES = {
    "cifar": _vit(192, 6, 3, 96, 3, image_size=32, patch_size=4),
    "vit_t16": _vit(192, 12, 3, 192, 6),
    "vit_s16": _vit(384, 12, 6, 384, 6),
    "vit_b16": _vit(768, 12, 12, 384, 6),
    "vit_l16": _vit(1024, 24, 16, 384, 12),
    "vit_h14": _vit(1280, 32, 16, 384, 12, patch_size=14),
}


def fields_of(size: str) -> dict:
    """The fields of a model of one of [`SIZES`]; `InputError` if it is not known."""
    if size not in SIZES:
        raise InputError(f"--size {size!r} is not known; choose {', '.join(SIZES)}.")
    return SIZES[size]


class BareSteps:
    """
    Whole steps of a model: forward and backward pass, optimizer, moving average; attention as in pre-training.

    Args:
        fields (`dict`): Of [`CJepaConfig`].
        precision (`"float32"` or `"bf16"`): Whether under autocast.
        device (`torch.device`): Where.

    Attributes:
        model ([`CJepaForPreTraining`]): What is trained.
        run (`Callable`): What is called in a step; the model, or what is put around it.
    """

    def __init__(self, fields: dict, precision: str, device: torch.device):
        attention = RunArguments().attention(device, bf16=precision == "bf16")
        self.model = CJepaForPreTraining._from_config(CJepaConfig(**fields), attn_implementation=attention)
        self.model.to(device).train()
        self.run = self.model
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(decay_groups(trained, 0.05), lr=1e-4, fused=True)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def images(self, batch_size: int) -> torch.Tensor:
        """Noise in the shape of images (B, C, H, W)."""
        config = self.model.config
        size = config.image_size, config.image_size
        return torch.randn(batch_size, config.num_channels, *size, device=self.model.device)

    def take(self, images: torch.Tensor, context_ids: torch.Tensor, target_ids: torch.Tensor):
        """One step on images (B, C, H, W) under masks."""
        with self.autocast:
            loss = self.run(images, context_ids, target_ids).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.update_target_encoder(0.996)
