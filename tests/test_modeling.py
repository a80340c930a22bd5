"""The encoder: equal to transformers' I-JEPA, masked or not, at any size, with every attention, compiled or not."""

import pytest
import reference
import torch
from tiny import SIZES, gradients, images, seeded, tiny_config, tiny_model
from transformers import IJepaConfig, IJepaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_cjepa import CJepaForPreTraining, CJepaModel
from modeling_cjepa.encoders_cjepa import CJepaAttention, eager_attention, positions_for, sincos_positions


@pytest.fixture
def encoder():
    return tiny_model().cjepa


def test_state_dict_and_outputs_of_ijepa():
    encoder_sizes = {name: value for name, value in SIZES.items() if not name.startswith("predictor")}
    torch.manual_seed(0)
    theirs = IJepaModel(IJepaConfig(**encoder_sizes, layer_norm_eps=1e-6)).eval()
    for parameter in theirs.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter)
    ours = CJepaModel(tiny_config()).eval()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images()).last_hidden_state, theirs(images()).last_hidden_state, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("grid_size", [(8, 8), (3, 5), (6, 2)])
def test_positions_are_the_literal_sines_and_cosines(grid_size, encoder):
    expected = reference.sincos(*grid_size, 32)
    torch.testing.assert_close(sincos_positions(grid_size, 32), expected, rtol=0, atol=1e-6)
    table = positions_for(grid_size, encoder.config.grid_size, encoder.embeddings.position_embeddings)
    torch.testing.assert_close(table[0], expected, rtol=0, atol=1e-6)


def test_embeddings_are_a_convolution_plus_positions(encoder):
    pixel_values = images(height=24, width=40)
    tokens = reference.patch_tokens(pixel_values, encoder.embeddings.patch_embeddings.projection)
    expected = tokens + reference.sincos(6, 10, 32)
    torch.testing.assert_close(encoder.embeddings(pixel_values), expected, rtol=1e-5, atol=1e-5)


def test_pooled_output_is_the_mean_token(encoder):
    outputs = encoder(images())
    assert outputs.last_hidden_state.shape == (4, 64, 32)
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(dim=1))


def test_all_patches_in_another_order_are_the_same_tokens(encoder):
    order = torch.stack([torch.randperm(64, generator=seeded(seed)) for seed in range(4)])
    whole = encoder(images()).last_hidden_state
    shuffled = encoder(images(), patch_ids=order).last_hidden_state
    for image in range(4):
        torch.testing.assert_close(shuffled[image], whole[image, order[image]], rtol=1e-4, atol=1e-5)


def test_patches_left_out_have_no_influence(encoder):
    kept = torch.tensor([[0, 9, 63], [7, 8, 20]])
    pixel_values, changed = images(2), images(2, seed=1)
    for image, ids in enumerate(kept.tolist()):
        for row, column in ((4 * (i // 8), 4 * (i % 8)) for i in ids):
            block = (image, slice(None), slice(row, row + 4), slice(column, column + 4))
            changed[block] = pixel_values[block]
    tokens = encoder(pixel_values, patch_ids=kept).last_hidden_state
    assert tokens.shape == (2, 3, 32)
    assert torch.equal(encoder(changed, patch_ids=kept).last_hidden_state, tokens)
    assert not torch.allclose(encoder(changed).last_hidden_state[0, 0], encoder(pixel_values).last_hidden_state[0, 0])


@pytest.mark.parametrize("size", [(16, 16), (20, 44), (64, 32)])
def test_any_resolution_is_as_if_configured(size, encoder):
    native = CJepaModel(tiny_config(image_size=size)).eval()
    native.load_state_dict(
        {name: value for name, value in encoder.state_dict().items() if "position" not in name}, strict=False
    )
    pixel_values = images(2, *size)
    tokens = encoder(pixel_values).last_hidden_state
    assert tokens.shape == (2, size[0] * size[1] // 16, 32)
    assert torch.equal(tokens, native(pixel_values).last_hidden_state)


def test_a_rest_that_fills_no_patch_is_left_out(encoder):
    pixel_values = images(2, 35, 33)
    whole = encoder(pixel_values[..., :32, :32]).last_hidden_state
    assert torch.equal(encoder(pixel_values).last_hidden_state, whole)


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_any_number_of_channels(channels):
    model = CJepaForPreTraining(tiny_config(num_channels=channels))
    output = model(images(channels=channels))
    output.loss.backward()
    assert model.context_encoder.embeddings.patch_embeddings.projection.weight.grad.shape[1] == channels


def test_patches_that_are_not_square():
    encoder = CJepaModel(tiny_config(image_size=[32, 48], patch_size=[4, 8]))
    tokens = reference.patch_tokens(images(2, 32, 48), encoder.embeddings.patch_embeddings.projection)
    expected = tokens + reference.sincos(8, 6, 32)
    torch.testing.assert_close(encoder.embeddings(images(2, 32, 48)), expected, rtol=1e-5, atol=1e-5)


def test_unfit_images_are_refused(encoder):
    with pytest.raises(ValueError, match="3x32 pixels is smaller than a patch of 4x4"):
        encoder(images(2, 3, 32))
    with pytest.raises(ValueError, match="1 channels.*num_channels=3"):
        encoder(images(channels=1))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_attention_implementations_agree():
    model = tiny_model().eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        outputs = []
        for implementation in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(implementation)
            outputs.append(model(images(), generator=seeded()))
    for output in outputs[1:]:
        torch.testing.assert_close(output.predictions, outputs[0].predictions, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.targets, outputs[0].targets, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reloaded", [False, True])
def test_attention_implementation_reaches_every_layer(monkeypatch, reloaded, tmp_path):
    called = set()

    def recording(module, *args, **kwargs):
        called.add(module)
        return eager_attention(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "recording", recording)
    model = tiny_model()
    if reloaded:
        model.save_pretrained(tmp_path)
        model = CJepaForPreTraining.from_pretrained(tmp_path)
    model.set_attn_implementation("recording")
    model(images())
    assert called == {module for module in model.modules() if isinstance(module, CJepaAttention)}
    assert len(called) == 6


def test_hidden_states_and_attentions(encoder):
    encoder.set_attn_implementation("eager")
    patch_ids = torch.arange(20).expand(4, -1)
    outputs = encoder(images(), patch_ids=patch_ids, output_hidden_states=True, output_attentions=True)
    assert [state.shape for state in outputs.hidden_states] == [(4, 20, 32)] * 3
    assert torch.equal(outputs.hidden_states[0], encoder.embeddings(images(), patch_ids))
    assert torch.equal(encoder.layernorm(outputs.hidden_states[-1]), outputs.last_hidden_state)
    assert [weights.shape for weights in outputs.attentions] == [(4, 2, 20, 20)] * 2
    torch.testing.assert_close(outputs.attentions[0].sum(dim=-1), torch.ones(4, 2, 20))
    plain = encoder(images(), patch_ids=patch_ids)
    assert plain.hidden_states is None and plain.attentions is None


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_activation_checkpointing_changes_nothing_but_memory():
    found = []
    for checkpointing in (False, True):
        model = tiny_model()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        passes = dict.fromkeys(("cjepa", "context_encoder", "predictor"), 0)
        for part in passes:

            def count(*_, part=part, passes=passes):
                passes[part] += 1

            getattr(model, part).layers[0].mlp.register_forward_pre_hook(count)
        loss = model(images(), generator=seeded()).loss
        loss.backward()
        found.append((loss, gradients(model), passes))
    (loss, plain, once), (same_loss, checkpointed, twice) = found
    assert once == {"cjepa": 1, "context_encoder": 1, "predictor": 1}
    # computed anew in the backward pass, but for the target encoder, which has none
    assert twice == {"cjepa": 1, "context_encoder": 2, "predictor": 2}
    assert torch.equal(loss, same_loss)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_as_one_graph(masked, encoder):
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    arguments = {"patch_ids": torch.arange(10, 30).expand(4, -1)} if masked else {}
    expected = encoder(images(), **arguments).last_hidden_state
    torch.testing.assert_close(compiled(images(), **arguments).last_hidden_state, expected, rtol=1e-5, atol=1e-6)
