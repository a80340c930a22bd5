"""The formulas of a step's arithmetic, beside what torch counts of the steps themselves."""

import pytest
import torch
from tiny import images, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_cjepa import CJepaConfig
from trainers.bare_steps import SIZES
from trainers.flops import matmul_rate, model_flops
from trainers.reference_step import ReferenceStep

# uneven sizes: a factor of the wrong one shows
UNEVEN = {"hidden_size": 40, "intermediate_size": 72, "predictor_hidden_size": 24, "predictor_intermediate_size": 56,
          "layer_norm_eps": 1e-6, "regularizer_weight": 0.0}  # fmt: skip


def counted(function) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        function()
    return counter.get_total_flops()


def lengths(context_ids, target_ids) -> tuple[int, int, int]:
    return context_ids.shape[1], *target_ids.shape[1:]


def test_model_flops_are_those_of_the_authors_step():
    model = tiny_model(**UNEVEN)
    reference, masks = ReferenceStep(model), model.sample_masks(2)
    found = model_flops(model.config, *lengths(*masks))
    assert counted(lambda: reference.loss(images(2), *masks).backward()) == 2 * sum(found.values())
    assert counted(lambda: model.cjepa.encode(images(2))) == 2 * found["target encoder"]


def saved_by_the_predictor(num_layers, num_patches, context, blocks, length) -> int:
    """
    What our predictor leaves out of a batch of two images, forward and backward: in its first layer projections of
    contexts for all blocks but one, and of mask tokens but one a position, in its last all of contexts but keys and
    values.
    """
    width, inside = 24, 56
    projected = 2 * blocks * (context + length) - (2 * context + num_patches)
    saved = 3 * 2 * projected * 3 * width**2
    if num_layers > 1:
        saved += 3 * 2 * 2 * blocks * context * (2 * width**2 + 2 * width * (context + length) + 2 * width * inside)
    return saved


def test_ours_saves_repeated_projections_unread_tokens_and_patches_that_are_not_seen():
    model = tiny_model(**UNEVEN)
    masks = model.sample_masks(2)
    context, blocks, length = lengths(*masks)
    saved = saved_by_the_predictor(2, 64, context, blocks, length)
    saved += 2 * 2 * 2 * (64 - context) * 4 * 4 * 3 * 40
    covariances = 2 * 2 * 40**2  # of the regulariser, which is watched without a weight
    found = counted(lambda: model(images(2), *masks).loss.backward())
    assert found == 2 * sum(model_flops(model.config, *lengths(*masks)).values()) - saved + covariances


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_levels_above(stop_gradient):
    upper = {"hidden_size": 48, "num_hidden_layers": 1, "predictor_num_hidden_layers": 1}
    model = tiny_model(**UNEVEN, min_context_patches=4, upper_levels=[upper | {"stop_gradient": stop_gradient}])
    masks = model.sample_masks(2)
    context, blocks, length = lengths(*masks)
    saved = saved_by_the_predictor(2, 64, 4 * context, blocks, 4 * length)
    saved += saved_by_the_predictor(1, 16, context, blocks, length)
    saved += 2 * (2 * 2 * (64 - 4 * context) * 4 * 4 * 3 * 40 - 2 * (40**2 + 48**2))
    found = counted(lambda: model(images(2), *masks).loss.backward())
    assert found == 2 * sum(model_flops(model.config, *lengths(*masks)).values()) - saved


def test_mask_sets_share_the_target_encoder_alone():
    one, three = (model_flops(tiny_config(num_mask_sets=number), 10, 4, 9) for number in (1, 3))
    assert {name: three[name] / one[name] for name in one} == {
        "target encoder": 1, "context encoder": 3, "predictor": 3,
    }  # fmt: skip


def test_the_authors_sizes():
    # 38.2, 83.7 and 259 thousand million an image: counted once of the authors' own modules, with their masks
    for size, expected in (("vit_s16", 38.2e9), ("vit_b16", 83.7e9), ("vit_l16", 259e9), ("vit_h14", 657e9)):
        context, length = (50.2, 33.4) if size != "vit_h14" else (68.8, 44.2)
        found = model_flops(CJepaConfig(**SIZES[size]), context, 4, length)
        assert sum(found.values()) == pytest.approx(expected, rel=0.01), size


def test_a_rate_is_operations_over_seconds(monkeypatch):
    # a clock that a product takes half a second by
    ticks = iter(range(1000))
    monkeypatch.setattr("trainers.flops.time.perf_counter", lambda: next(ticks) / 2)
    monkeypatch.setattr("trainers.flops._SIDES", {"cpu": (8, 16)})
    assert matmul_rate(torch.device("cpu"), "float32") == 2 * 16**3 / 0.5


def test_configurations_are_left_as_they_are():
    config = tiny_config(**UNEVEN)
    before = config.to_dict()
    model_flops(config, 10, 4, 9)
    assert config.to_dict() == before
