"""A training step of I-JEPA the way the authors' code (facebookresearch/ijepa) takes it, re-stated: the baseline of
`cjepa benchmark step`.

Attention is written out, all patches are embedded before those of the context are taken, the context is repeated for
every target block, the moving average goes weight by weight, and the gradients' norms are asked for one by one.
"""

import torch
from torch.nn import functional

from modeling_cjepa import CJepaForPreTraining
from trainers.benchmark import decay_groups
from trainers.conversion.ijepa_forward import encode, predict
from trainers.conversion.names import FUSED_ENCODER, FUSED_PREDICTOR, NameTable


class ReferenceStep:
    """
    Steps of a copy of a model's weights.

    Args:
        model ([`CJepaForPreTraining`]): One level, whose predictor has as many heads as its encoder, with GELU and a
            layer norm eps of 1e-6, as in the authors' code; its regulariser is left out.
        learning_rate (`float`): Of AdamW.
        weight_decay (`float`): Of weights of two dimensions and more.
        precision (`"float32"` or `"bf16"`): Whether losses are computed under autocast.

    Attributes:
        encoder, target_encoder, predictor (`dict[str, torch.Tensor]`): The weights by the authors' names.
    """

    def __init__(
        self,
        model: CJepaForPreTraining,
        learning_rate: float = 1e-4,
        weight_decay: float = 0.05,
        precision: str = "float32",
    ):
        self.autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16")
        self.heads, self.grid_size = model.config.num_attention_heads, model.config.grid_size
        self.encoder = _copied(FUSED_ENCODER, model.context_encoder)
        self.predictor = _copied(FUSED_PREDICTOR, model.predictor)
        self.target_encoder = _copied(FUSED_ENCODER, model.cjepa)
        trained = [tensor for part in (self.encoder, self.predictor) for tensor in _weights(part)]
        for tensor in trained:
            tensor.requires_grad_()
        self.optimizer = torch.optim.AdamW(decay_groups(trained, weight_decay), lr=learning_rate)

    def take(self, images: torch.Tensor, context_ids: torch.Tensor, target_ids: torch.Tensor) -> float:
        """A whole step on what [`~ReferenceStep.loss`] reads; returns the loss."""
        with self.autocast:
            loss = self.loss(images, context_ids, target_ids)
        return self.finish(loss)

    def loss(self, images: torch.Tensor, context_ids: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
        """
        The prediction loss of a batch.

        Args:
            images (`torch.Tensor` of shape `(B, C, H, W)`): Normalised images.
            context_ids (`torch.Tensor` of shape `(B, Nc)`), target_ids (`torch.Tensor` of shape `(B, M, K)`):
                Positions of the context, and of the target blocks.

        Returns:
            `torch.Tensor`, scalar.
        """
        with torch.no_grad():
            tokens = encode(self.target_encoder, images, self.heads, self.grid_size)
            tokens = functional.layer_norm(tokens, tokens.shape[-1:])
            rows = torch.arange(len(images), device=images.device)[:, None, None]
            targets = tokens[rows, target_ids]
        context = encode(self.encoder, images, self.heads, self.grid_size, context_ids)
        predictions = predict(self.predictor, context, self.heads, self.grid_size, context_ids, target_ids)
        return functional.smooth_l1_loss(predictions, targets)

    def finish(self, loss: torch.Tensor, momentum: float = 0.996) -> float:
        """
        The rest of a step: backward pass, optimizer, log of the gradients, moving average.

        Args:
            loss (`torch.Tensor`, scalar): Of [`~ReferenceStep.loss`].
            momentum (`float`): Share of the old target encoder that is kept.

        Returns:
            `float`: The loss.
        """
        loss.backward()
        self.optimizer.step()
        self.gradient_norms()
        self.optimizer.zero_grad()
        self.update_target_encoder(momentum)
        return float(loss.detach())

    def gradient_norms(self) -> list[float]:
        """The norm of the gradient of each matrix, of which the authors log first, last, and the extremes."""
        return [float(tensor.grad.norm()) for tensor in _weights(self.encoder) if tensor.ndim > 1]

    @torch.no_grad()
    def update_target_encoder(self, momentum: float):
        """Moves the target encoder towards the encoder, weight by weight."""
        for target, context in zip(_weights(self.target_encoder), _weights(self.encoder), strict=True):
            target.mul_(momentum).add_((1 - momentum) * context)


def _copied(table: NameTable, module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in table.to_theirs(module.state_dict()).items()}


def _weights(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All but the fixed tables of positions."""
    return [tensor for name, tensor in tensors.items() if not name.endswith("pos_embed")]
