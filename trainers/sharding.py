"""Models in shards: what DeepSpeed's configuration must say, and the trained model in one piece."""

import torch
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def match_deepspeed(trainer):
    """
    Makes DeepSpeed do what the run's arguments say, before the model is handed over.

    Accelerate sets it to clip gradients to 1 where nothing is said, and to turn parameters to bf16, in which the steps
    of a moving average are lost; with autocast they stay float32.

    Args:
        trainer ([`JepaTrainer`]): Whose arguments and Accelerator it is.
    """
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    config["gradient_clipping"] = trainer.args.max_grad_norm
    config["bf16"] = {"enabled": False}
    config["torch_autocast"] = {"enabled": trainer.args.bf16, "dtype": "bfloat16"}


def whole_model(trainer) -> PreTrainedModel:
    """
    The trained model in one piece, whose shards all processes give; all of them call it.

    Args:
        trainer ([`JepaTrainer`]): After its training.

    Returns:
        `PreTrainedModel`: On the device, or of shards a copy on the CPU, whole in the main process only.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return model
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    unset_hf_deepspeed_config()  # else transformers would cut what the main process loads
    whole = type(model)(model.config)
    if trainer.is_world_process_zero():
        whole.load_state_dict({name: tensor.to("cpu", torch.float32) for name, tensor in weights.items()})
    return whole
