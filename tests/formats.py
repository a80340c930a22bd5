"""Small models of other packages, saved as folders, with weights that matter and positions as ours."""

import torch

from modeling_cjepa.encoders_cjepa import sincos_positions
from trainers.publishing import save_model
from trainers.transforms import image_processor

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 32,
    "patch_size": 4,
}  # fmt: skip
MEAN, STD = [0.4, 0.5, 0.6], [0.1, 0.2, 0.3]


def save_ours(model, folder):
    folder.mkdir()
    save_model(model, image_processor((32, 32), MEAN, STD), folder)
    return folder


def shaken(model):
    """A model whose norms, biases and layer scales matter, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def save_native(model_class, config_class, folder, fixed_positions=False, **changes):
    """A model of transformers; `mlp_ratio` among the changes takes the place of `intermediate_size`."""
    sizes = SIZES | changes
    if "mlp_ratio" in changes:
        del sizes["intermediate_size"]
    model = shaken(model_class(config_class(**sizes)))
    if fixed_positions:
        embeddings = getattr(model, model.base_model_prefix, model).embeddings
        table = sincos_positions((8, 8), 32)
        embeddings.position_embeddings.data[0, -64:] = table
    model.save_pretrained(folder)
    return model


def same_weights(one, other) -> bool:
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
