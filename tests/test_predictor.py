"""The predictors are the functions that they are said to be: literal ones, block by block or image by image."""

import pytest
import torch
from tiny import SIZES, images, tiny_model

from modeling_cjepa import CJepaConfig, CJepaForPreTraining
from trainers.conversion.ijepa_forward import predict
from trainers.conversion.names import FUSED_PREDICTOR

KINDS = ("per_block", "shared_context")


@pytest.fixture(params=[1, 2, 3], ids=lambda layers: f"{layers} layers")
def of_depth(request):
    """Builds a model in float64 whose predictor has some layers."""
    return lambda kind: tiny_model(
        predictor_attention=kind, predictor_num_hidden_layers=request.param, layer_norm_eps=1e-6
    ).double()


def inputs(model, batch_size=3):
    """Context tokens, and positions of the context and of targets, the first of which are in two blocks."""
    generator = torch.Generator().manual_seed(0)
    context_ids, target_ids = model.sample_masks(batch_size, generator=generator)
    target_ids[:, 1, 0] = target_ids[:, 0, 0]
    width = model.config.hidden_size
    context = torch.randn(batch_size, context_ids.shape[1], width, generator=generator, dtype=torch.float64)
    return context.requires_grad_(), context_ids, target_ids


def gradients(model, context, loss):
    names, parameters = zip(*model.predictor.named_parameters(), strict=True)
    return dict(zip(("context", *names), torch.autograd.grad(loss, [context, *parameters]), strict=True))


def assert_same(model, context, found, expected):
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    weights = torch.randn_like(expected)
    of_found = gradients(model, context, (found * weights).sum())
    for name, gradient in gradients(model, context, (expected * weights).sum()).items():
        torch.testing.assert_close(of_found[name], gradient, atol=1e-11, rtol=1e-9, msg=name)
        assert gradient.abs().max() > 0 or name.endswith("k_proj.bias"), name


def test_a_block_and_the_context_see_each_other_as_in_the_authors_code(of_depth):
    model = of_depth("per_block")
    context, context_ids, target_ids = inputs(model)
    found = model.predictor(context, context_ids, target_ids, (8, 8))
    theirs = FUSED_PREDICTOR.to_theirs(
        dict(model.predictor.named_parameters()) | dict(model.predictor.named_buffers())
    )
    expected = predict(_Double(theirs), context, model.config.predictor_num_attention_heads, (8, 8), context_ids,
                       target_ids)  # fmt: skip
    assert_same(model, context, found, expected)


class _Double(dict):
    """The tensors of a file, which `predict` reads as float32, in the float64 that they are in."""

    def __init__(self, tensors):
        super().__init__({name: _Kept(tensor) for name, tensor in tensors.items()})


class _Kept:
    def __init__(self, tensor):
        self.tensor, self.shape = tensor, tensor.shape

    def float(self):
        return self.tensor


def test_a_shared_context_sees_itself_and_blocks_see_it_and_themselves(of_depth):
    model = of_depth("shared_context")
    context, context_ids, target_ids = inputs(model)
    found = model.predictor(context, context_ids, target_ids, (8, 8))
    assert_same(model, context, found, literal_shared_context(model.predictor, context, context_ids, target_ids))


def literal_shared_context(predictor, context, context_ids, target_ids):
    """One image at a time: all tokens in one sequence, and a table of who sees whom."""
    positions, rows = predictor.position_embeddings[0], []
    for tokens, seen, blocks in zip(context, context_ids, target_ids, strict=True):
        queries = predictor.mask_token[0] + positions[blocks.flatten()]
        tokens = torch.cat([predictor.input_projection(tokens) + positions[seen], queries])
        number = torch.arange(len(blocks)).repeat_interleave(blocks.shape[1])
        of = torch.cat([torch.full((len(seen),), -1), number])  # of which block a token is; -1: of the context
        sees = (of[None] == -1) | (of[:, None] == of[None])
        for layer in predictor.layers:
            tokens = literal_layer(layer, tokens, sees)
        rows.append(predictor.output_projection(predictor.layernorm(tokens[len(seen) :])).view(*blocks.shape, -1))
    return torch.stack(rows)


def literal_layer(layer, tokens, sees):
    attention, normed = layer.attention, layer.layernorm_before(tokens)
    by_head = [projection(normed).unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
               for projection in (attention.q_proj, attention.k_proj, attention.v_proj)]  # fmt: skip
    logits = (by_head[0] @ by_head[1].mT / attention.head_dim**0.5).masked_fill(~sees, float("-inf"))
    tokens = tokens + attention.o_proj((logits.softmax(dim=2) @ by_head[2]).transpose(0, 1).flatten(1))
    return tokens + layer.mlp(layer.layernorm_after(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_do_not_see_each_other(kind):
    model = tiny_model(predictor_attention=kind, predictor_num_hidden_layers=3).double()
    context, context_ids, target_ids = inputs(model)
    together = model.predictor(context, context_ids, target_ids, (8, 8))
    for number in range(target_ids.shape[1]):
        alone = model.predictor(context, context_ids, target_ids[:, number : number + 1], (8, 8))
        torch.testing.assert_close(alone, together[:, number : number + 1], atol=1e-12, rtol=0)


def test_the_context_is_blind_to_blocks_only_where_it_is_shared():
    """Both have the same weights, so that one is the other with another attention."""
    models = {kind: tiny_model(predictor_attention=kind, predictor_num_hidden_layers=3).double() for kind in KINDS}
    models["shared_context"].load_state_dict(models["per_block"].state_dict())
    inputs_ = inputs(models["per_block"])
    predicted = [model.predictor(*inputs_, (8, 8)) for model in models.values()]
    assert (predicted[0] - predicted[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("setting", ["checkpointing", "eager"])
def test_gradients_are_those_of_a_plain_step(kind, setting):
    changed = []
    for is_set in (False, True):
        model = tiny_model(predictor_attention=kind, predictor_num_hidden_layers=3).double()
        model.set_attn_implementation("eager" if is_set and setting == "eager" else "sdpa")
        if is_set and setting == "checkpointing":
            model.gradient_checkpointing_enable()
        model(images().double(), generator=torch.Generator().manual_seed(0)).loss.backward()
        changed.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    # the softmax that is written out is computed in float32
    atol = 1e-12 if setting == "checkpointing" else 1e-6
    for name, gradient in changed[0].items():
        torch.testing.assert_close(changed[1][name], gradient, atol=atol, rtol=1e-4, msg=name)


def test_a_saved_model_predicts_the_same_way(tmp_path):
    model = tiny_model(predictor_attention="shared_context").eval()
    model.save_pretrained(tmp_path)
    loaded = CJepaForPreTraining.from_pretrained(tmp_path).eval()
    losses = [each(images(), generator=torch.Generator().manual_seed(0)).loss for each in (model, loaded)]
    assert loaded.config.predictor_attention == "shared_context" and torch.equal(*losses)


def test_levels_have_a_predictor_of_their_own_kind():
    upper = [{"predictor_attention": "shared_context"}]
    model = tiny_model(upper_levels=upper, regularizer_weight=0.0)
    kinds = [type(each).__name__ for each in (model.predictor, *model.upper_predictors)]
    assert kinds == ["CJepaPredictor", "CJepaSharedContextPredictor"]
    assert model(images()).loss.isfinite()


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="predictor_attention='union'.*per_block, shared_context"):
        CJepaConfig(**SIZES, predictor_attention="union")
