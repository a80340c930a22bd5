"""Poolings of an encoder's features, against its hidden states; the attentive pooling against torch's attention."""

import pytest
import torch
from tiny import images, seeded, sjea_level, tiny_model, tiny_sjea
from torch import nn

from modeling_cjepa.heads_cjepa import CJepaAttentivePooling
from trainers.errors import InputError
from trainers.pooling import pooled_encoder

UPPER = {"upper_levels": [{"hidden_size": 16, "num_hidden_layers": 1}], "min_context_patches": 8}


@torch.no_grad()
def embedded(model, *args, pixels=None):
    pixels = images() if pixels is None else pixels
    return pooled_encoder(model.base_model.eval(), *args)(pixels).pooler_output


@torch.no_grad()
def test_last_layers_are_normed_means_side_by_side():
    model = tiny_model(num_hidden_layers=6)
    outputs = model.cjepa.eval()(images(), output_hidden_states=True)
    expected = [model.cjepa.layernorm(tokens).mean(1) for tokens in outputs.hidden_states[3:]]
    layers = model.cjepa.last_layers(outputs.hidden_states)
    assert len(layers) == 4 and torch.equal(layers[-1], outputs.last_hidden_state)
    found = embedded(model, "last4")
    assert found.shape == (4, 4 * 32) and torch.equal(found, torch.cat([tokens.mean(1) for tokens in layers], 1))
    torch.testing.assert_close(found, torch.cat(expected, 1))
    torch.testing.assert_close(found[:, -32:], outputs.pooler_output)
    # fewer layers than four: all of them, without what the first one reads
    assert embedded(tiny_model(), "last4").shape == (4, 2 * 32)


@torch.no_grad()
def test_levels_of_a_stack():
    model = tiny_model(**UPPER)
    level_0, level_1 = model.cjepa.eval()(images()).level_embeddings
    assert torch.equal(embedded(model), level_1) and torch.equal(embedded(model, "mean", 0), level_0)
    assert torch.equal(embedded(model, "levels"), torch.cat([level_0, level_1], 1))
    torch.testing.assert_close(embedded(model, "last4", 1), level_1)
    assert torch.equal(embedded(model, "last4", 0)[:, -32:], level_0)
    assert not torch.equal(embedded(model, "last4", 0)[:, :32], level_0)


@torch.no_grad()
@pytest.mark.parametrize(("level", "shape"), [(0, (2, 12, 8, 32)), (1, (2, 6, 4, 16))])
def test_patches_lie_on_their_grid(level, shape):
    model = tiny_model(**UPPER)
    pixels = images(2, 48, 32)
    found = embedded(model, "patches", level, pixels=pixels)
    tokens = model.cjepa(pixels, level=level).last_hidden_state
    assert found.shape == shape
    assert torch.equal(found[:, 2, 3], tokens[:, 2 * shape[2] + 3])


@torch.no_grad()
def test_patches_of_a_resnet():
    model = tiny_sjea()
    found = embedded(model, "patches", 0)
    expected = model.sjea(images(), level=0).last_hidden_state
    assert found.shape == (4, 8, 8, 32) and torch.equal(found[:, 5, 2], expected[:, :, 5, 2])


def test_wrong_poolings_are_refused():
    stack = tiny_sjea().sjea
    with pytest.raises(InputError, match="pooling='max' is not known; choose one of mean, last4, levels, patches"):
        pooled_encoder(stack, "max")
    with pytest.raises(InputError, match="'last4' reads the layers of a C-JEPA encoder, and the model is a SJeaModel"):
        pooled_encoder(stack, "last4")
    with pytest.raises(InputError, match="leave level=0 out"):
        pooled_encoder(stack, "levels", 0)
    with pytest.raises(InputError, match="level=2"):
        pooled_encoder(stack, "mean", 2)
    vit = {"model_type": "vit", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
           "intermediate_size": 64, "patch_size": 8}  # fmt: skip
    with pytest.raises(InputError, match="level 0 of this SJeaModel gives tokens.*; choose a level of maps"):
        embedded(tiny_sjea(sjea_level(stem="standard", backbone=vit)), "patches")


@torch.no_grad()
def test_attentive_pooling_is_torchs_attention_and_an_mlp():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pooling = CJepaAttentivePooling(32, 4, token_width=48)
        for parameter in pooling.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
    tokens = torch.randn(3, 10, 48, generator=seeded())
    theirs = nn.MultiheadAttention(32, 4, kdim=48, vdim=48, batch_first=True)
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(theirs, f"{name}_weight").copy_(getattr(pooling, name).weight)
    theirs.in_proj_bias.copy_(torch.cat([pooling.q_proj.bias, torch.zeros(32), pooling.v_proj.bias]))
    theirs.out_proj.load_state_dict(pooling.o_proj.state_dict())
    keys = pooling.layernorm_tokens(tokens)
    query = pooling.query.expand(3, 1, 32)
    attended = query + theirs(query, keys, keys)[0]
    mlp = nn.Sequential(pooling.layernorm_mlp, pooling.fc1, nn.GELU(), pooling.fc2)
    torch.testing.assert_close(pooling(tokens), (attended + mlp(attended)).squeeze(1))
