"""One batch against the same images in micro-batches, in one process and in two: equal losses and gradients."""

import os
from types import MethodType

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import TRANSFORMER, seeded, sjea_level
from training_worker import build_trainer
from transformers import TrainerCallback

from trainers.errors import InputError

NUM_IMAGES = 16
EXPANDED = {"expander_hidden_size": 8}
VIEWS = {"levels": [sjea_level(stem="standard", backbone=TRANSFORMER | {"patch_size": 8}),
                    sjea_level(stem="standard", input="tokens", backbone=TRANSFORMER)]}  # fmt: skip
MODELS = {
    "context": {"regularizer": "context"},
    "blocks": {"regularizer": "blocks"},
    "pair": {"regularizer": "pair"},
    "context, expanded": {"regularizer": "context"} | EXPANDED,
    "blocks, expanded": {"regularizer": "blocks"} | EXPANDED,
    "pair, expanded": {"regularizer": "pair"} | EXPANDED,
    "stack": {"upper_levels": [{"hidden_size": 48, "regularizer": "pair"}], "min_context_patches": 8},
    "views": VIEWS,
    "prediction": {"regularizer_weight": 0.0},
}


def masks_of_images(self, pixel_values):
    """Each image's own masks, whichever micro-batch or process it is in."""
    model = self.accelerator.unwrap_model(self.model)
    context_ids, target_ids = model.sample_masks(64, generator=seeded())
    keys = (pixel_values[:, :, 16, 16].double().sum(dim=1) * 1e6).long() % 64
    return context_ids[keys], target_ids[keys]


class GradientRecorder(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(folder, name, micro_batch: int, num_processes: int = 1, **training):
    """The loss and the gradients of one optimizer step of all images, in micro-batches of so many."""
    fields = MODELS[name] if "levels" in MODELS[name] else {"regularizer_weight": 0.1} | MODELS[name]
    arguments = {
        "max_steps": 1, "optim": "sgd", "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": NUM_IMAGES // micro_batch // num_processes, "exact_accumulation": True,
    }  # fmt: skip
    # on the device each micro-batch and process draws colours of its own
    data = {"color_augmentation": "workers"}
    trainer = build_trainer(str(folder), arguments | training, fields, data, num_images=NUM_IMAGES)
    if "levels" not in fields:
        trainer._masks = MethodType(masks_of_images, trainer)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert trainer.state.global_step == 1
    return trainer.state.log_history[0], recorder.gradients


def work(rank, folder, store_port):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store_port),
    }  # fmt: skip
    torch.set_num_threads(1)
    found = {name: step(folder, name, 4, num_processes=2) for name in MODELS}
    assert dist.get_world_size() == 2
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """What each of two processes found, each in two micro-batches of four images."""
    folder = tmp_path_factory.mktemp("processes")
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # to find a free port
    port = store.port
    del store
    mp.spawn(work, (str(folder), port), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_alike(found, expected, terms):
    (log, gradients), (expected_log, expected_gradients) = found, expected
    for term in terms:
        assert log[term] == pytest.approx(expected_log[term], rel=1e-5), term
    assert gradients.keys() == expected_gradients.keys()
    largest = max(gradient.abs().max().item() for gradient in expected_gradients.values())
    assert largest > 0.01
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-5, atol=1e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_micro_batches_are_one_batch(name, tmp_path, of_two_processes):
    expected = step(tmp_path, name, NUM_IMAGES)
    terms = ["loss", "loss_variance", "loss_covariance", "loss_invariance"]
    assert_alike(step(tmp_path, name, 4), expected, terms)
    for found in of_two_processes:
        assert_alike(found[name], expected, terms)


def test_statistics_of_micro_batches_differ_without(tmp_path):
    whole, _ = step(tmp_path, "context", NUM_IMAGES)
    apart, _ = step(tmp_path, "context", 4, exact_accumulation=False)
    assert apart["loss_prediction"] == pytest.approx(whole["loss_prediction"], rel=1e-5)
    assert apart["loss_covariance"] > 1.2 * whole["loss_covariance"]


def test_accumulation_is_exact_for_the_prediction_loss(tmp_path):
    whole, halves = (
        step(tmp_path, "prediction", number, exact_accumulation=False) for number in (NUM_IMAGES, NUM_IMAGES // 2)
    )
    assert_alike(halves, whole, ["loss", "loss_prediction"])


def test_both_passes_drop_the_same(tmp_path):
    fields = {"hidden_dropout_prob": 0.3, "regularizer": "context"}
    training = {
        "max_steps": 2, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "exact_accumulation": True,
    }  # fmt: skip
    trainer = build_trainer(str(tmp_path), training, fields)
    seen = []
    norm = trainer.model.context_encoder.layernorm
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    trainer.train()
    for of_step in (seen[:4], seen[4:]):
        first, second = of_step[:2], of_step[2:]
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert not torch.equal(first[0], first[1])
    assert not torch.equal(seen[0], seen[4])


def test_batch_norms_in_the_encoder_are_refused(tmp_path):
    with pytest.raises(InputError, match="exact_accumulation.*batch norms.*vit"):
        build_trainer(str(tmp_path), {"exact_accumulation": True}, {"levels": [sjea_level()]})
