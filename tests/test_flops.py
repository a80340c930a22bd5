"""The formulas of a step's arithmetic, beside what torch counts of the steps themselves."""

import pytest
import torch
from tiny import images, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling_cjepa import CJepaConfig
from trainers.flops import matmul_rate, model_flops
from trainers.reference_step import ReferenceStep
from trainers.step_cost import SIZES

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


def test_ours_saves_the_context_in_the_predictor_s_last_layer_and_patches_that_are_not_seen():
    model = tiny_model(**UNEVEN)
    masks = model.sample_masks(2)
    context, blocks, length = lengths(*masks)
    width, inside = 24, 56
    # of a context token: query and projection, scores and their sums, the MLP; three passes
    rows = 3 * 2 * blocks * context * (2 * width**2 + 2 * width * (context + length) + 2 * width * inside)
    patches = 2 * 2 * (64 - context) * 4 * 4 * 3 * 40
    covariances = 2 * 40**2  # of the regulariser, which is watched without a weight
    found = counted(lambda: model(images(2), *masks).loss.backward())
    expected = sum(model_flops(model.config, *lengths(*masks)).values()) - rows - patches + covariances
    assert found == 2 * expected


@pytest.mark.parametrize("stop_gradient", [False, True])
def test_levels_above(stop_gradient):
    upper = {"hidden_size": 48, "num_hidden_layers": 1, "predictor_num_hidden_layers": 1}
    model = tiny_model(**UNEVEN, min_context_patches=4, upper_levels=[upper | {"stop_gradient": stop_gradient}])
    masks = model.sample_masks(2)
    context, blocks, length = lengths(*masks)
    saved = 0
    for seen, asked in ((4 * context, 4 * length), (context, length)):
        saved += 3 * 2 * blocks * seen * (2 * 24**2 + 2 * 24 * (seen + asked) + 2 * 24 * 56)
    saved += 2 * 2 * (64 - 4 * context) * 4 * 4 * 3 * 40 - 2 * (40**2 + 48**2)
    found = counted(lambda: model(images(2), *masks).loss.backward())
    assert found == 2 * (sum(model_flops(model.config, *lengths(*masks)).values()) - saved)


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
