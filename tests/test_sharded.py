"""A model in shards (FSDP2) on two and four processes against a whole one: target update and training."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import images, seeded, tiny_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from modeling_cjepa.encoders_cjepa import CJepaLayer
from trainers.sharding import match_deepspeed

WORLD_SIZES, NUM_IMAGES = (2, 4), 32
READINGS = {
    "context": {"regularizer": "context"},
    "pair": {"regularizer": "pair", "expander_hidden_size": 8},
    "shared": {"predictor_attention": "shared_context"},
}


def sharded(model):
    """The model as Accelerate shards it: each transformer layer, of all parts, then what is left."""
    layers = [module for module in model.modules() if isinstance(module, CJepaLayer)]
    assert len(layers) == 6  # two each of both encoders and of the predictor
    for layer in layers:
        fully_shard(layer)
    return fully_shard(model)


def whole_weights(model) -> dict[str, torch.Tensor]:
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in model.state_dict().items()
    }


def updated() -> dict[str, torch.Tensor]:
    """Weights in shards after an update of the target encoder alone, made whole."""
    model = sharded(tiny_model())
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    model.update_target_encoder(0.9)
    return whole_weights(model)


def trained(fields, rank=0, world_size=1) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of three steps of AdamW and the target encoder's update, and the weights after them."""
    model = tiny_model(regularizer_weight=0.01, **fields)
    model = sharded(model) if world_size > 1 else model
    # above a vanishing gradient's rounding, which Adam would turn into a step of full length
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
    losses = []
    for number in range(3):
        masks = model.sample_masks(NUM_IMAGES, generator=seeded(number))
        output = model(*(x.chunk(world_size)[rank] for x in (images(NUM_IMAGES, seed=number), *masks)))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update_target_encoder(0.9)
        losses.append(output.loss.item())
    return losses, whole_weights(model)


def work(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    assert dist.get_world_size() == world_size
    found = {"update": updated()}
    found |= {name: trained(fields, rank, world_size) for name, fields in READINGS.items()}
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=WORLD_SIZES)
def found(request, tmp_path_factory):
    """What each of several processes found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


def test_update_of_shards_is_a_share_of_the_context_encoder(found):
    start = tiny_model().state_dict()
    for name, tensor in start.items():
        expected = tensor
        if name.startswith("cjepa."):
            expected = 0.9 * tensor + 0.1 * start[f"context_encoder.{name.removeprefix('cjepa.')}"]
        for of_rank in found:
            torch.testing.assert_close(of_rank["update"][name], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", READINGS)
def test_training_in_shards_is_that_of_the_whole(name, found):
    losses, weights = trained(READINGS[name])
    start = tiny_model(**READINGS[name]).state_dict()
    assert (weights["cjepa.layers.0.mlp.fc1.weight"] - start["cjepa.layers.0.mlp.fc1.weight"]).abs().max() > 1e-4
    means = torch.tensor([of_rank[name][0] for of_rank in found]).mean(dim=0)
    assert means.tolist() == pytest.approx(losses, rel=1e-5)
    for _, theirs in (of_rank[name] for of_rank in found):
        assert theirs.keys() == weights.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_update_moves_the_shards_of_zero_3():
    # as DeepSpeed leaves parameters between steps: their shards beside them, the large ones themselves empty
    model = tiny_model()
    expected = {}
    for name, target in model.cjepa.named_parameters():
        context = model.context_encoder.get_parameter(name)
        for parameter in (target, context):
            parameter.ds_tensor = parameter.data.flatten()[:5].clone()
        expected[name] = 0.9 * target.ds_tensor + 0.1 * context.ds_tensor
        if target.numel() > 100:
            target.data, context.data = torch.empty(0), torch.empty(0)
    model.update_target_encoder(0.9)
    for name, target in model.cjepa.named_parameters():
        torch.testing.assert_close(target.ds_tensor, expected[name], rtol=1e-6, atol=1e-6)
        if target.numel() > 0:
            assert torch.equal(target.data.flatten()[:5], target.ds_tensor)


@pytest.mark.parametrize("is_bf16", [False, True])
def test_deepspeed_does_what_the_arguments_say(is_bf16):
    # what Accelerate makes of a configuration that says nothing
    config = {"gradient_clipping": "auto", "bf16": {"enabled": is_bf16}, "zero_optimization": {"stage": 3}}
    plugin = SimpleNamespace(deepspeed_config=config)
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    args = SimpleNamespace(max_grad_norm=0.5, bf16=is_bf16)
    match_deepspeed(SimpleNamespace(accelerator=accelerator, args=args))
    assert config == {
        "gradient_clipping": 0.5, "bf16": {"enabled": False}, "zero_optimization": {"stage": 3},
        "torch_autocast": {"enabled": is_bf16, "dtype": "bfloat16"},
    }  # fmt: skip
