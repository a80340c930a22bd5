"""Encoders and classifiers with 8-bit weights, by torchao, as a folder that `from_pretrained` loads.

Quantised are the linear layers of transformer blocks (queries, keys, values, outputs and MLPs), with a scale for each
row of a weight; their biases are not, nor are patch projections, positions, norms, convolutions, expanders, and a
classifier's pooling and last layer. A ResNet has no such layers.
"""

import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from modeling_cjepa import CJepaForPreTraining, SJeaForPreTraining
from trainers.conversion.checks import Check, Written, random_images
from trainers.conversion.outputs import output_names, require
from trainers.errors import InputError
from trainers.publishing import save_model

# of the largest output, and of 1 - the mean cosine similarity of images' embeddings or logits
DIFFERENCE_LIMIT = 0.1
COSINE_LIMIT = 0.01
_IN_FULL = ("expander", "expanders", "pooling", "classifier")


def export_int8(model: PreTrainedModel, processor, folder: Path, activations: bool = False) -> Written:
    """
    Writes a model with 8-bit weights: safetensors, a `config.json` that says so, and the code, as a published folder.

    `AutoModel.from_pretrained(folder, trust_remote_code=True)` loads it where torchao is installed.

    Args:
        model (`PreTrainedModel`): An encoder or a classifier; of a pre-training model the encoder is taken.
        processor: The image processor whose settings are written; None leaves them out.
        folder (`Path`): An existing folder.
        activations (`bool`, defaults to `False`): Whether what the layers read is quantised, too, image by image, so
            that they multiply whole numbers; otherwise they multiply in the precision of what they read.

    Returns:
        [`Written`]: The check is of the folder, loaded again: the largest difference as a share of the largest output;
        the notes tell the cosine similarity and the sizes.

    Raises:
        InputError: torchao is not installed, there is no layer to quantise, or the outputs differ
            by more than the limits.
    """
    torchao = require("int8", "torchao.quantization")[0]
    scheme = torchao.Int8DynamicActivationInt8WeightConfig if activations else torchao.Int8WeightOnlyConfig
    if isinstance(model, CJepaForPreTraining | SJeaForPreTraining):
        model = model.base_model
    # of their own: the caller's model shall stay on its device, in its precision and mode
    original = copy.deepcopy(model).cpu().float().eval()
    quantised = copy.deepcopy(original)
    names = [name for name, module in quantised.named_modules() if _is_quantised(module, name)]
    if not names:
        raise InputError("The model has no linear layers in transformer blocks, so that 8 bits save nothing.")
    torchao.quantize_(quantised, scheme(), filter_fn=_is_quantised)
    _mark(quantised, scheme())
    save_model(quantised, processor, folder)
    check, notes = _compare(original, type(model).from_pretrained(folder).eval())
    after = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    before = sum(tensor.numel() * tensor.element_size() for tensor in original.state_dict().values())
    notes.append(f"The weights take {after / 2**20:.1f} MiB, in float32 {before / 2**20:.1f} MiB.")
    return Written(check, [f"{len(names)} linear layers have 8-bit weights.", *notes])


def _is_quantised(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not any(part in _IN_FULL for part in name.split("."))


def _mark(model: PreTrainedModel, scheme):
    """Says in the configuration how the model is quantised, and to `save_pretrained` how its tensors are written."""
    from transformers import TorchAoConfig
    from transformers.quantizers import AutoHfQuantizer

    model.config.quantization_config = TorchAoConfig(scheme, modules_to_not_convert=list(_IN_FULL))
    model.hf_quantizer = AutoHfQuantizer.from_config(model.config.quantization_config, pre_quantized=True)


def _compare(original: PreTrainedModel, loaded: PreTrainedModel) -> tuple[Check, list[str]]:
    """Both models' outputs for the same random images, and a sentence on cosines."""
    images, names = random_images(original.config, count=8), output_names(original)
    with torch.no_grad():
        theirs, ours = original(images, return_dict=True), loaded(images, return_dict=True)
    difference = max(((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()).item() for n in names)
    check = Check(f"float32 on {len(images)} random images, as a share of the largest", difference, DIFFERENCE_LIMIT)
    check.raise_if_too_large()
    cosine = cosine_similarity(ours[names[-1]], theirs[names[-1]]).mean().item()
    Check(
        f"float32 by 1 - cosine similarity on {len(images)} random images", 1 - cosine, COSINE_LIMIT
    ).raise_if_too_large()
    return check, [f"The mean cosine similarity to float32 is {cosine:.5f} (allowed {1 - COSINE_LIMIT})."]


def export_int8_activations(model: PreTrainedModel, processor, folder: Path) -> Written:
    """As [`export_int8`], with activations."""
    return export_int8(model, processor, folder, activations=True)
