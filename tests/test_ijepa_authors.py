"""Checkpoints in the authors' layout that are unusual or broken; the plain one is in test_golden.py."""

import pytest
import torch
from safetensors.torch import load_file
from test_golden import GOLDEN, parts

from trainers.conversion.ijepa_authors import from_ijepa_checkpoint
from trainers.errors import InputError


@pytest.fixture
def state():
    return parts(load_file(GOLDEN / "ijepa_step.safetensors"))


def without_blocks(tensors):
    return {name: tensor for name, tensor in tensors.items() if "blocks." not in name}


def convert(state, **options):
    return from_ijepa_checkpoint(state, **{"image_size": 64, "num_attention_heads": 3} | options)


def test_prefixes_of_ddp_are_taken_off(state):
    prefixed = {
        part: {f"module.{name}": tensor for name, tensor in tensors.items()} for part, tensors in state.items()
    }
    plain, converted = convert(state).state_dict(), convert(prefixed).state_dict()
    assert plain.keys() == converted.keys()
    assert all(torch.equal(plain[name], converted[name]) for name in plain)


def test_sizes_are_read_off_the_tensors(state):
    config = convert(state).config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (48, 2, 192)
    assert (config.predictor_hidden_size, config.predictor_num_hidden_layers, config.patch_size) == (24, 2, 8)


def test_mlps_of_encoder_and_predictor_have_ratios_of_their_own(state):
    """As in the authors' ViT-g, whose encoder has 48 / 11 and whose predictor has 4."""
    for part in ("encoder", "target_encoder"):
        for name, tensor in state[part].items():
            if ".mlp.fc1." in name or name.endswith(".mlp.fc2.weight"):
                dim = 0 if ".fc1." in name else 1
                state[part][name] = torch.cat([tensor, tensor.narrow(dim, 0, 16)], dim=dim)
    config = convert(state).config
    assert (config.intermediate_size, config.predictor_intermediate_size) == (208, 96)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda state: state.pop("predictor"), {}, "no 'predictor'"),
        (lambda state: state["encoder"].pop("blocks.1.norm2.bias"), {}, "missing.*layernorm_after.bias"),
        (lambda state: state["encoder"].update(cls_token=torch.zeros(1)), {}, "not known.*cls_token"),
        (lambda state: state["target_encoder"].pop("patch_embed.proj.weight"), {}, "no tensor for"),
        (lambda state: state.update(predictor=without_blocks(state["predictor"])), {}, "no tensor for"),
        (lambda state: state["target_encoder"]["pos_embed"].add_(1), {}, "not the fixed 2-D sin-cos"),
        (lambda state: None, {"image_size": 224}, "64, 48.*784 positions"),
        (lambda state: None, {"num_attention_heads": None}, "Width 48.*num_attention_heads"),
    ],
)
def test_what_does_not_fit_is_said(state, change, options, message):
    change(state)
    with pytest.raises(InputError, match=message):
        convert(state, **options)
