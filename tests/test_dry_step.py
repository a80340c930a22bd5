"""A step without memory or arithmetic needs the bytes, and counts the operations, of the real one."""

import pytest
import torch
from tiny import tiny_model, tiny_sjea
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from trainers.dry_step import DryStep, LiveBytes
from trainers.objectives import OBJECTIVES

KINDS = {"cjepa": tiny_model, "sjea": tiny_sjea}


def batches(kind: str, model):
    return lambda size: OBJECTIVES[kind].random_batch(model.config, size)


def dry_step(kind: str, checkpointing=False, **changes) -> DryStep:
    config = KINDS[kind](**changes).config
    with torch.device("meta"):
        model = OBJECTIVES[kind].model_class._from_config(config)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return DryStep(model, batches(kind, model), False, lambda trained: torch.optim.AdamW(trained, fused=True))


def test_live_bytes_are_those_of_tensors_that_there_are():
    there = torch.zeros(250)
    with LiveBytes([there, there.view(10, 25)]) as live:
        assert live.now == 1000
        more = torch.zeros(500)
        kept = more[100:].add_(1)  # a view, and no new memory
        del more
        assert live.now == 3000
        del kept
        assert live.now == 1000
    torch.zeros(10_000)
    assert live.peak == 3000


@pytest.mark.parametrize("kind", KINDS)
def test_it_needs_the_bytes_of_the_real_step(kind):
    dry, model = dry_step(kind), KINDS[kind]()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        inputs = (batches(kind, model)(16),)
        if kind == "cjepa":
            generator = torch.Generator().manual_seed(0)
            draws = [model.sample_masks(16, generator=generator) for _ in range(16)]
            inputs += max(draws, key=lambda masks: masks[0].shape[1] + masks[1].shape[2])
            del draws
        for _ in range(2):
            model(*inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert dry.peak(16) == pytest.approx(live.peak, rel=0.02)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert dry.gradients == 4 * trained and dry.averages == pytest.approx(8 * trained, rel=0.01)
    assert dry.frozen == (4 * sum(p.numel() for p in model.cjepa.parameters()) if kind == "cjepa" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_counts_the_operations_of_the_real_step(kind):
    model, dry = KINDS[kind](), dry_step(kind)
    images, *masks = dry._batch(4, place=8)
    real = torch.randn(images.shape), *(torch.zeros(ids.shape, dtype=ids.dtype) for ids in masks)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*real).loss.backward()
    assert dry.flops(4) == counter.get_total_flops() // 4


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_activations_grow_with_the_batch_and_less_with_checkpointing():
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "predictor_num_hidden_layers": 4}
    plain, checkpointed = dry_step("cjepa", **sizes), dry_step("cjepa", checkpointing=True, **sizes)
    assert plain.peak(64) - plain.peak(32) > 1.5 * (checkpointed.peak(64) - checkpointed.peak(32)) > 0


def test_masks_of_many_images_are_drawn_of_some(monkeypatch):
    dry, rows = dry_step("cjepa", num_mask_sets=2), []
    draw = dry.model.sample_masks

    def sample_masks(num_rows, **kwargs):
        rows.append(num_rows)
        assert num_rows <= 4096
        return draw(num_rows, **kwargs)

    monkeypatch.setattr(dry.model, "sample_masks", sample_masks)
    _, *masks = dry._batch(1_000_000)
    assert [len(ids) for ids in masks] == [2_000_000, 2_000_000] and rows
    each = (dry.peak(2_000_000) - dry.peak(1_000_000)) / 1_000_000
    assert each == pytest.approx((dry.peak(16_384) - dry.peak(8_192)) / 8_192, rel=1e-3)
