"""The training loop: target update, schedules, parameter groups, exact resume, two processes against one."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_worker import build_trainer, train
from transformers import Trainer, TrainerCallback, TrainingArguments

from trainers.callbacks import CropEpochCallback, TargetUpdateCallback, weight_decay
from trainers.checkpoint_files import write_manifest
from trainers.diagnostics import feature_std, rankme
from trainers.errors import InputError
from trainers.schedules import linear, warmup_cosine
from trainers.training_args import CJepaTrainingArguments

WORKER = Path(__file__).parent / "training_worker.py"
STACK = {"upper_levels": [{"hidden_size": 48, "regularizer": "pair"}], "min_context_patches": 8}
DROPOUT = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2, "drop_path_rate": 0.2}
# values of the clock, and those of a window of latest images, which a resumed run fills anew
VARYING = {
    "monitored_images",
    "images_per_second", "data_wait_share", "train_runtime", "train_samples_per_second", "train_steps_per_second",
    *(f"{level}{name}" for level in ("", "level1_") for name in ("feature_std", "rankme", "correlation", "lidar")),
}  # fmt: skip


def without_varying(log: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name not in VARYING} for entry in log]


class Recorder(TrainerCallback):
    """Keeps what the optimizer steps with, and the context encoder after each step."""

    def __init__(self):
        self.contexts, self.weight_decays, self.learning_rates = [], [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.weight_decays.append([group["weight_decay"] for group in optimizer.param_groups])
        self.learning_rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.contexts.append([parameter.detach().clone() for parameter in model.context_encoder.parameters()])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Five optimizer steps of two micro-batches each, with all that they used."""
    trainer = build_trainer(
        str(tmp_path_factory.mktemp("trained")),
        {"max_steps": 5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "ema_momentum": 0.9},
    )
    recorder = Recorder()
    trainer.add_callback(recorder)
    start = [parameter.detach().clone() for parameter in trainer.model.cjepa.parameters()]
    trainer.train()
    return trainer, recorder, start


def test_target_is_updated_once_per_optimizer_step(trained):
    trainer, recorder, target = trained
    for step, context in enumerate(recorder.contexts):
        momentum = 0.9 + (1.0 - 0.9) * step / (5 * 1.25)
        target = [momentum * t + (1 - momentum) * c for t, c in zip(target, context, strict=True)]
    for expected, parameter in zip(target, trainer.model.cjepa.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-6, rtol=1e-5)


def test_optimizer_steps_with_the_schedules(trained):
    trainer, recorder, _ = trained
    args = trainer.args
    for step, (decay, no_decay) in enumerate(recorder.weight_decays):
        progress = step / (5 * 1.25)
        assert decay == pytest.approx(0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * progress)) / 2)
        assert no_decay == 0
        expected = warmup_cosine(step, 5 * 1.25, 1, args.start_learning_rate, args.learning_rate, 1e-6)
        assert recorder.learning_rates[step] == pytest.approx(expected)


def test_only_matrices_decay(trained):
    trainer, _, _ = trained
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decaying, others = ([names[id(p)] for p in group["params"]] for group in trainer.optimizer.param_groups)
    assert all(name.endswith(".weight") and "norm" not in name for name in decaying)
    assert "predictor.mask_token" in others and len(others) > 10
    assert not any(name.startswith("cjepa.") for name in decaying + others)
    trainable = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable == set(decaying + others)


def test_log_holds_what_is_promised(trained):
    trainer, _, _ = trained
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 5
    names = {
        "loss", "loss_prediction", "loss_invariance", "loss_variance", "loss_covariance", "learning_rate",
        "weight_decay", "regularizer_weight", "ema_momentum", "grad_norm", "feature_std", "rankme", "correlation",
        "lidar", "context_distance", "prediction_norm", "prediction_std", "images_per_second", "data_wait_share",
    }  # fmt: skip
    config = trainer.model.config
    for step, entry in enumerate(entries):
        assert names <= entry.keys()
        assert all(math.isfinite(entry[name]) for name in names)
        regularizer = 25 * (entry["loss_invariance"] + entry["loss_variance"]) + entry["loss_covariance"]
        expected = entry["loss_prediction"] + config.regularizer_weight * regularizer
        assert entry["loss"] == pytest.approx(expected, rel=1e-4)
        assert entry["ema_momentum"] == pytest.approx(linear(step, 5 * 1.25, 0.9, 1.0))
        assert entry["weight_decay"] == pytest.approx(weight_decay(trainer.args, step, 5))
        assert 0 <= entry["data_wait_share"] <= 1


def test_monitored_statistics_are_those_of_the_target_encoder(trained):
    trainer, _, _ = trained
    embeddings = torch.cat([embeddings for (embeddings,) in trainer.monitor.embeddings])
    assert embeddings.shape == (80, 32)
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    assert last["rankme"] == pytest.approx(rankme(embeddings), rel=1e-4)
    assert last["feature_std"] == pytest.approx(feature_std(embeddings), rel=1e-4)


def test_regularizer_weight_follows_its_schedule(tmp_path):
    training = {"max_steps": 4, "per_device_train_batch_size": 8, "final_regularizer_weight": 0.1}
    trainer = build_trainer(str(tmp_path), training, {"regularizer_weight": 0.9})
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in enumerate(entries):
        weight = 0.1 + 0.8 * (1 + math.cos(math.pi * step / (4 * 1.25))) / 2
        assert entry["regularizer_weight"] == pytest.approx(weight)
        regularizer = 25 * (entry["loss_invariance"] + entry["loss_variance"]) + entry["loss_covariance"]
        assert entry["loss"] == pytest.approx(entry["loss_prediction"] + weight * regularizer, rel=1e-4)
    assert len(entries) == 4 and trainer.model.config.regularizer_weight == 0.9
    with pytest.raises(ValueError, match="cannot follow"):
        build_trainer(str(tmp_path), training, {"regularizer_weight": 0.0})


def test_masks_are_those_of_seed_step_and_micro_step(tmp_path):
    def masks(seed, step, micro_step):
        trainer = build_trainer(str(tmp_path), {"seed": seed})
        trainer.model.train()
        trainer.state.global_step, trainer._micro_step = step, micro_step
        return trainer._masks(torch.zeros(8, 3, 32, 32))[1].tolist()

    others = [masks(1, 3, 2), masks(2, 3, 2), masks(1, 4, 2), masks(1, 3, 1)]
    assert masks(1, 3, 2) == others[0] and all(others[0] != other for other in others[1:])


def test_speed_and_waiting_are_those_of_the_clock(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("trainers.trainer.time", SimpleNamespace(perf_counter=lambda: clock.now))
    trainer = build_trainer(str(tmp_path), {"max_steps": 5})

    def batches():
        for _ in range(2):
            clock.now += 3
            yield {"pixel_values": torch.zeros(8, 3, 32, 32, dtype=torch.uint8)}

    samples, _ = trainer.get_batch_samples(batches(), 2, trainer.args.device)
    for sample in samples:
        trainer.compute_loss(trainer.model.train(), sample)
        clock.now += 1
    trainer.state.max_steps = 5
    summary = trainer._summary()
    assert summary["data_wait_share"] == 6 / 8 and summary["images_per_second"] == 16 / 8


def test_crops_follow_the_epoch_whatever_its_rounding():
    dataset = SimpleNamespace(set_epoch=lambda epoch: epochs.append(epoch))
    epochs = []
    for epoch in (0.0, 1 - 1e-9, 1 + 1e-9, 2.5):
        CropEpochCallback().on_epoch_begin(
            None, SimpleNamespace(epoch=epoch), None, train_dataloader=SimpleNamespace(dataset=dataset)
        )
    assert epochs == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("workers", "model"), [(0, {}), (2, {}), (0, STACK), (0, DROPOUT)], ids=["0", "2", "stack", "dropout"]
)
def test_resumed_run_is_bit_identical(tmp_path, workers, model):
    # 6 batches an epoch, two a step: step 4 is in the middle of the second epoch
    training = {
        "max_steps": 7, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
        "dataloader_num_workers": workers, "save_strategy": "steps", "save_steps": 4, "model": model,
    }  # fmt: skip
    whole, whole_log = train(str(tmp_path), training)
    shutil.rmtree(tmp_path / "checkpoint-7")
    assert (tmp_path / "checkpoint-4").is_dir()
    torch.manual_seed(99)
    resumed, resumed_log = train(str(tmp_path), training, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert without_varying(resumed_log)[:7] == without_varying(whole_log)[:7]


def test_two_processes_train_like_one(tmp_path):
    # plain gradient descent: Adam turns the rounding of a vanishing gradient into a step of full length
    descent = {"optim": "sgd", "start_learning_rate": 0.1, "learning_rate": 0.1, "max_steps": 3}
    runs = {
        regularizer: descent | {"model": {"regularizer": regularizer, "regularizer_weight": 0.1}}
        for regularizer in ("context", "blocks", "pair")
    }
    runs["stack"] = descent | {"model": STACK | {"regularizer_weight": 0.1}}
    runs["sets"] = descent | {"model": {"num_mask_sets": 2, "regularizer_weight": 0.1}}
    halves = {name: run | {"per_device_train_batch_size": 8} for name, run in runs.items()}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(WORKER), str(tmp_path), json.dumps(halves)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    for name, run in runs.items():
        one, one_log = train(str(tmp_path / "one"), run | {"per_device_train_batch_size": 16})
        two = [load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in (0, 1)]
        two_log = json.loads((tmp_path / f"{name}-0.json").read_text())
        for key, tensor in one.items():
            assert torch.equal(two[0][key], two[1][key]), f"{name}: {key} differs between the ranks"
            torch.testing.assert_close(two[0][key], tensor, atol=1e-6, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")
        for entry, expected in zip(two_log[:3], one_log[:3], strict=True):
            for term in ("loss", "loss_prediction", "loss_variance", "loss_covariance", "grad_norm", "feature_std",
                         "rankme", "lidar", "correlation", "context_distance", "prediction_norm"):  # fmt: skip
                assert entry[term] == pytest.approx(expected[term], rel=1e-4), (name, term)


def test_a_compiled_run_learns_the_same_and_resumes(tmp_path):
    descent = {"optim": "sgd", "start_learning_rate": 0.1, "learning_rate": 0.1, "max_steps": 4, "save_steps": 2,
               "per_device_train_batch_size": 8, "save_strategy": "steps"}  # fmt: skip
    compiled = descent | {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    plain, _ = train(str(tmp_path / "plain"), descent)
    whole, _ = train(str(tmp_path / "compiled"), compiled)
    assert plain.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-6, rtol=1e-4, msg=name)
    shutil.rmtree(tmp_path / "compiled" / "checkpoint-4")
    torch._dynamo.reset()  # as in a new process
    resumed, _ = train(str(tmp_path / "compiled"), compiled, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_checkpoint_with_missing_weights_is_refused(tmp_path):
    training = {"max_steps": 1, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
    trainer = build_trainer(str(tmp_path), training)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-1"
    weights = load_file(checkpoint / "model.safetensors")
    del weights["predictor.mask_token"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    write_manifest(checkpoint, 1)
    with pytest.raises(InputError, match="predictor.mask_token"):
        build_trainer(str(tmp_path), training | {"max_steps": 2}).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_precision_is_that_of_the_computation(tmp_path, precision, dtype):
    training = {"max_steps": 1, "per_device_train_batch_size": 8, "precision": precision}
    trainer = build_trainer(str(tmp_path), training)
    seen = set()
    for encoder in (trainer.model.cjepa, trainer.model.context_encoder):
        encoder.layers[0].mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {dtype}
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


def test_diverged_run_stops_with_its_step(tmp_path):
    trainer = build_trainer(str(tmp_path), {"max_steps": 3, "per_device_train_batch_size": 8})
    with torch.no_grad():
        trainer.model.predictor.mask_token.fill_(float("nan"))
    with pytest.raises(InputError, match="step 1 is not finite, nor are the weights.*learning_rate"):
        trainer.train()


def test_any_trainer_can_update_the_target(tmp_path):
    model = build_trainer(str(tmp_path), {"max_steps": 1}).model
    start = model.cjepa.layernorm.bias.clone()
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[]
    )
    images = [{"pixel_values": image} for image in pixels]
    Trainer(model, arguments, train_dataset=images, callbacks=[TargetUpdateCallback(0.5)]).train()
    assert not torch.equal(model.cjepa.layernorm.bias, start)


def test_schedule_values():
    values = [warmup_cosine(step, 10, 2, 0.2, 1.0, 0.1) for step in (0, 1, 2, 6, 10, 99)]
    assert values == pytest.approx([0.2, 0.6, 1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ema_momentum": 1.5}, "ema_momentum"),
        ({"schedule_scale": 0.5}, "schedule_scale"),
        ({"precision": "x"}, "x"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"seed": -1}, "seed"),
        ({"fp16": True}, "fp16"),
        ({"bf16": True, "precision": "float32"}, "bf16=True and precision='float32'"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"adam_beta2": 2.0}, "adam_beta2"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers"),
        ({"num_monitored_images": 0}, "num_monitored_images"),
        ({"max_unreadable_share": 1.5}, "max_unreadable_share"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        CJepaTrainingArguments(output_dir=str(tmp_path), **values)


def test_a_resumed_run_follows_its_own_arguments(tmp_path):
    """Learning rate, betas and intervals are those of the call, and not of the one that wrote the checkpoint."""
    training = {"max_steps": 6, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
    changed = {
        "learning_rate": 3e-4,
        "start_learning_rate": 1e-4,
        "adam_beta2": 0.9,
        "save_steps": 2,
        "logging_steps": 2,
    }
    begun = build_trainer(str(tmp_path / "run"), training | {"max_steps": 6})
    begun.train()
    _, whole = train(str(tmp_path / "whole"), training | changed | {"logging_steps": 1})
    resumed = build_trainer(str(tmp_path / "run"), training | changed | {"save_total_limit": None})
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    expected = {entry["step"]: entry["learning_rate"] for entry in whole if "loss" in entry}
    logged = {entry["step"]: entry["learning_rate"] for entry in resumed.state.log_history if "loss" in entry}
    assert list(logged) == [1, 2, 4, 6]
    assert {step: logged[step] for step in (2, 4, 6)} == {step: expected[step] for step in (2, 4, 6)}
    assert all(group["betas"] == (0.9, 0.9) for group in resumed.optimizer.param_groups)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        "checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-6"
    ]  # fmt: skip
