"""Training at a position in images: what is read, where a pass ends, going on with other batches and processes."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import WORKER, without_varying
from tiny import tiny_model
from training_worker import TRAINING, build_trainer, seen, train
from transformers import TrainerCallback

from trainers.errors import InputError
from trainers.run_order import RunOrder
from trainers.trainer_cjepa import CJepaTrainer
from trainers.training_args import CJepaTrainingArguments

BATCH = {"per_device_train_batch_size": 16}


def losses(log: list[dict]) -> list[tuple[int, float]]:
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


def test_batches_are_full_and_passes_follow_each_other(tmp_path):
    sizes = []
    training = {"num_train_epochs": 5, "per_device_train_batch_size": 20, "gradient_accumulation_steps": 3}
    trainer = build_trainer(str(tmp_path), training)
    trainer.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    ids = []

    class Ids(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ids.extend(sample_id["index"] for sample_id in trainer.sample_ids(state.global_step - 1))

    trainer.add_callback(Ids())
    trainer.train()
    assert sizes == [20] * 12 and trainer.state.global_step == 4 and trainer.state.epoch == 5
    assert Counter(ids) == dict.fromkeys(range(48), 5)
    assert ids == [RunOrder(48, 42).place(position)[1] for position in range(240)]
    assert [entry["images_seen"] for entry in trainer.state.log_history if "loss" in entry] == [60, 120, 180, 240]


def test_workers_read_what_one_process_reads(tmp_path):
    def batches(workers):
        trainer = build_trainer(str(tmp_path), BATCH | {"max_steps": 4, "dataloader_num_workers": workers})
        trainer.train_data = trainer.make_train_data()
        iterator = iter(trainer.get_train_dataloader())
        return [next(iterator) for _ in range(4)]

    for alone, shared in zip(batches(0), batches(2), strict=True):
        assert torch.equal(alone["pixel_values"], shared["pixel_values"])
        assert alone["sample_ids"] == shared["sample_ids"]


def test_crops_are_those_of_the_pass(tmp_path):
    """In the second pass an image is cropped as a data set that was told epoch 1 crops it."""
    trainer = build_trainer(str(tmp_path), BATCH | {"max_steps": 4})
    trainer.train_data = trainer.make_train_data()
    iterator = iter(trainer.get_train_dataloader())
    batches = [next(iterator) for _ in range(4)]
    for epoch, batch in ((0, batches[0]), (1, batches[3])):
        trainer.train_dataset.set_epoch(epoch)
        indices = [sample_id["index"] for sample_id in batch["sample_ids"]]
        expected = torch.stack([trainer.train_dataset[index]["pixel_values"] for index in indices])
        assert torch.equal(batch["pixel_values"], expected)


class Noise(torch.utils.data.Dataset):
    """Any data set: random items by index."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"pixel_values": torch.rand(3, 32, 32) + index}


def test_plain_data_sets_train_and_repeat_their_randomness(tmp_path):
    def pixels(position):
        args = CJepaTrainingArguments(str(tmp_path), max_steps=2, **TRAINING | BATCH)
        trainer = CJepaTrainer(tiny_model(), args, train_dataset=Noise())
        trainer.train()
        trainer.clock.first_sample = position
        batch = next(iter(trainer.get_train_dataloader()))
        assert [int(image.min()) for image in batch["pixel_values"]] == [i["index"] for i in batch["sample_ids"]]
        return batch["pixel_values"]

    first = pixels(0)
    torch.rand(3)
    assert torch.equal(pixels(0), first) and torch.equal(pixels(8)[:8], first[8:])


def test_epochs_end_where_a_pass_does(tmp_path):
    """32 images a step: the passes over 48 images end within step 2, with step 3, and within step 5."""
    training = {"num_train_epochs": 3.5, "per_device_train_batch_size": 32, "save_strategy": "epoch",
                "logging_strategy": "epoch", "logging_first_step": False}  # fmt: skip
    trainer = build_trainer(str(tmp_path), training)
    saves = []

    class Saves(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            saves.append((state.global_step, state.epoch))

    trainer.add_callback(Saves())
    trainer.train()
    # the last one is the end of the run
    assert saves == [(2, 64 / 48), (3, 2.0), (5, 160 / 48), (6, 4.0)]
    assert [step for step, _ in losses(trainer.state.log_history)] == [2, 3, 5, 6]


def test_a_checkpoint_ends_the_window_of_a_log(tmp_path):
    training = BATCH | {"max_steps": 6, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
    whole, whole_log = train(str(tmp_path), training)
    assert [step for step, _ in losses(whole_log)] == [1, 3, 4, 6]
    shutil.rmtree(tmp_path / "checkpoint-6")
    read = seen(tmp_path)
    (tmp_path / "seen-0.jsonl").unlink()
    resumed, resumed_log = train(str(tmp_path), training, resume=True)
    assert without_varying(resumed_log)[:4] == without_varying(whole_log)[:4]
    assert len(read) == 96 and seen(tmp_path) == read[48:]


def test_schedules_do_not_jump_where_a_run_by_epochs_goes_on_with_other_batches(tmp_path):
    training = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "final_regularizer_weight": 0.0}
    names = ("learning_rate", "weight_decay", "ema_momentum", "regularizer_weight")

    def schedule(log):
        return {entry["images_seen"]: [entry[name] for name in names] for entry in log if "loss" in entry}

    _, log = train(str(tmp_path), training | BATCH)
    whole = schedule(log)
    shutil.rmtree(tmp_path / "checkpoint-6")
    _, log = train(str(tmp_path), training | {"per_device_train_batch_size": 8}, resume=True)
    halved = schedule(log)
    assert list(whole) == [16, 32, 48, 64, 80, 96] and list(halved) == [16, 32, 48, 56, 64, 72, 80, 88, 96]
    # the values of a step are those at its start
    for before, images in ((48, 64), (64, 80)):
        assert halved[before + 8] == pytest.approx(whole[images])
    assert all(a > b for a, b in zip(list(halved.values())[3:], list(halved.values())[4:], strict=False))


def test_steps_are_made_with_the_values_of_the_schedules_that_are_logged(tmp_path):
    training = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "final_regularizer_weight": 0.0}
    train(str(tmp_path), training | BATCH)
    shutil.rmtree(tmp_path / "checkpoint-6")
    trainer = build_trainer(str(tmp_path), training | {"per_device_train_batch_size": 8})
    used = {name: [] for name in ("ema_momentum", "regularizer_weight", "weight_decay", "learning_rate")}
    update = trainer.model.update_target_encoder

    def recorded(momentum):
        used["ema_momentum"].append(momentum)
        update(momentum)

    class Groups(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            used["weight_decay"].append(optimizer.param_groups[0]["weight_decay"])
            used["learning_rate"].append(optimizer.param_groups[0]["lr"])

    def weight(module, arguments, keywords):
        used["regularizer_weight"].append(keywords["regularizer_weight"])

    trainer.model.update_target_encoder = recorded
    trainer.model.register_forward_pre_hook(weight, with_kwargs=True)
    trainer.add_callback(Groups())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry and entry["step"] > 3]
    for name, values in used.items():
        assert values == pytest.approx([entry[name] for entry in logged]) and len(values) == 6, name


def test_other_train_images_are_refused(tmp_path):
    training = BATCH | {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    train(str(tmp_path), training)
    with pytest.raises(InputError, match=r"other train images \(48 images, .*now \(47 images"):
        train(str(tmp_path), training | {"max_steps": 2, "num_images": 47}, resume=True)


def launch(num_processes: int, folder, runs: dict):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command = [*launcher, str(WORKER), str(folder), json.dumps(runs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


def test_another_number_of_processes_goes_on_as_if_there_had_been_no_stop(tmp_path):
    # plain gradient descent: Adam turns the rounding of a vanishing gradient into a step of full length
    training = {"optim": "sgd", "start_learning_rate": 0.1, "learning_rate": 0.1, "num_train_epochs": 2,
                "save_strategy": "steps", "save_steps": 4, "model": {"regularizer_weight": 0.1}}  # fmt: skip
    one, log = train(str(tmp_path / "one"), training | BATCH)
    shutil.rmtree(tmp_path / "one" / "checkpoint-6")
    read = seen(tmp_path / "one")
    (tmp_path / "one" / "seen-0.jsonl").unlink()
    for name in ("to two", "to four"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
    halves, quarters = (training | {"per_device_train_batch_size": size} for size in (8, 4))
    launch(2, tmp_path, {"to two": halves | {"resume": True}, "from two": halves | {"max_steps": 6}})
    launch(4, tmp_path, {"to four": quarters | {"resume": True}})
    shutil.rmtree(tmp_path / "from two" / "checkpoint-6")
    resumed = {"from two": train(str(tmp_path / "from two"), training | BATCH, resume=True)[0]}
    for name, count in (("to two", 2), ("to four", 4)):
        resumed[name] = load_file(tmp_path / f"{name}-0.safetensors")
        # together the processes have read what one has, each its own
        assert len(list((tmp_path / name).glob("seen-*"))) == count and seen(tmp_path / name) == read[64:]
        theirs = json.loads((tmp_path / f"{name}-0.json").read_text())
        for (step, loss), (expected_step, expected) in zip(losses(theirs), losses(log), strict=True):
            assert step == expected_step and loss == pytest.approx(expected, rel=1e-5)
    for name, weights in resumed.items():
        for key, tensor in one.items():
            torch.testing.assert_close(
                weights[key], tensor, atol=1e-6, rtol=1e-5, msg=lambda m, k=f"{name}: {key}": f"{k}: {m}"
            )
