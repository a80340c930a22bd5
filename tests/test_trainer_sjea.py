"""Training a stack on two views: exact resume, several processes with the global batch's statistics, the log."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import WORKER, without_varying
from tiny import TRANSFORMER, seeded, sjea_level, tiny_sjea
from torch import nn
from training_worker import build_trainer, train

from trainers.batch_norm import GlobalBatchNorm, synchronize_batch_norms

LEVELS = {"levels": [sjea_level(), sjea_level(covariance_weight=0.1)]}
WITH_TOKENS = {"levels": [sjea_level(), sjea_level(stem="standard", input="tokens", backbone=TRANSFORMER)]}
# a backbone with a mask token, which has no part in the features
DINO = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8}
WITH_MASK_TOKEN = {"levels": [sjea_level(stem="standard", backbone=DINO), sjea_level()]}


def test_log_tells_of_every_level(tmp_path):
    trainer = build_trainer(str(tmp_path), {"max_steps": 3, "per_device_train_batch_size": 16}, LEVELS)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        first = 25 * (entry["loss_invariance"] + entry["loss_variance"]) + entry["loss_covariance"]
        second = 25 * (entry["loss_level1_invariance"] + entry["loss_level1_variance"])
        second += 0.1 * entry["loss_level1_covariance"]
        assert entry["loss"] == pytest.approx(first + second, rel=1e-4)
        for name in ("rankme", "level1_rankme", "feature_std", "level1_feature_std"):
            assert entry[name] > 0
    assert entries[0]["level1_rankme"] != entries[0]["rankme"]


def test_training_lowers_the_loss(tmp_path):
    training = {"max_steps": 20, "per_device_train_batch_size": 48, "learning_rate": 1e-2, "warmup_steps": 0}
    trainer = build_trainer(str(tmp_path), training, LEVELS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize("data", [{}, {"color_augmentation": "device"}], ids=["workers", "device"])
def test_resumed_run_is_bit_identical(tmp_path, data):
    # 3 batches an epoch, two a step: step 2 is in the middle of the second epoch
    training = {
        "max_steps": 4, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2, "model": LEVELS,
        "data": data, "save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 2 if data else 0,
    }  # fmt: skip
    whole, whole_log = train(str(tmp_path), training)
    shutil.rmtree(tmp_path / "checkpoint-4")
    torch.manual_seed(99)
    resumed, resumed_log = train(str(tmp_path), training, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert without_varying(resumed_log)[:4] == without_varying(whole_log)[:4]


def test_colors_on_the_device_are_a_function_of_the_step(tmp_path):
    trainer = build_trainer(
        str(tmp_path), {"per_device_train_batch_size": 8}, LEVELS, {"color_augmentation": "device"}
    )
    trainer.model.train()
    views = torch.stack([trainer.train_dataset[index]["pixel_values"] for index in range(8)])
    seen = []
    trainer.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))

    def colored(step=0, micro_step=0):
        trainer.state.global_step, trainer._micro_step = step, micro_step
        with torch.no_grad():
            trainer.forward_batch(trainer.model, {"pixel_values": views})
        return seen[-1]

    first = colored()
    torch.rand(5)
    assert torch.equal(colored(), first)
    assert not torch.equal(colored(step=1), first) and not torch.equal(colored(micro_step=1), first)
    trainer.args.distributed_state = SimpleNamespace(process_index=1)
    assert trainer.args.process_index == 1 and not torch.equal(colored(), first)  # images of its own, colours, too
    assert first.shape == views.shape and first.dtype == torch.float32


def test_two_processes_train_like_one(tmp_path):
    # plain gradient descent: Adam turns the rounding of a vanishing gradient into a step of full length
    descent = {"optim": "sgd", "start_learning_rate": 1e-3, "learning_rate": 1e-3, "num_train_epochs": 1}
    gentle = descent | {"start_learning_rate": 1e-5, "learning_rate": 1e-5}
    runs = {
        "one step": descent | {"model": LEVELS, "max_steps": 1},
        "one step of tokens": descent | {"model": WITH_TOKENS, "max_steps": 1},
        "three steps": descent | {"model": LEVELS, "start_learning_rate": 1e-4, "learning_rate": 1e-4},
        "three steps with a mask token": gentle | {"model": WITH_MASK_TOKEN},
    }
    # each process draws colours of its own on the device
    runs = {name: run | {"data": {"color_augmentation": "workers"}} for name, run in runs.items()}
    halves = {name: run | {"per_device_train_batch_size": 8} for name, run in runs.items()}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(WORKER), str(tmp_path), json.dumps(halves)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for name, run in runs.items():
        one, one_log = train(str(tmp_path / "one"), run | {"per_device_train_batch_size": 16})
        two = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        two_log = json.loads((tmp_path / f"{name}-0.json").read_text())
        num_steps = run.get("max_steps", 3)
        # gradients of so small batches are right to 0.4 % in float32, and each step multiplies that
        allowed = 1e-4 if num_steps == 1 else 1e-3
        assert len([entry for entry in one_log if "loss" in entry]) == num_steps
        for key, tensor in one.items():
            assert torch.equal(two[0][key], two[1][key]), f"{name}: {key} differs between the ranks"
            torch.testing.assert_close(two[0][key], tensor, atol=allowed, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")
        for entry, expected in zip(two_log[:num_steps], one_log[:num_steps], strict=True):
            for term in ("loss", "loss_invariance", "loss_level1_variance", "grad_norm", "rankme", "level1_rankme"):
                assert entry[term] == pytest.approx(expected[term], rel=10 * allowed), (name, term)


def test_replaced_batch_norms_keep_names_and_weights():
    model = tiny_sjea()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(torch.randn(4, 2, 3, 32, 32, generator=seeded())).loss
    model.load_state_dict(before)
    replaced = synchronize_batch_norms(model, torch.device("cpu"))
    norms = [module for module in replaced.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 10 and all(isinstance(norm, GlobalBatchNorm) and norm.training for norm in norms)
    assert before.keys() == replaced.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in replaced.state_dict().items())
    # in one process it is the batch norm it was
    loss = replaced(torch.randn(4, 2, 3, 32, 32, generator=seeded())).loss
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
