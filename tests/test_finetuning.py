"""Fine-tuning as a user does it: every mode, what it leaves, going on, and mistakes on the way."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tiny import TRANSFORMER, seeded, sjea_level, tiny_config, tiny_model, tiny_sjea
from torchvision.transforms import v2
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.modeling_outputs import ImageClassifierOutput

from modeling_cjepa import CJepaForImageClassification, CJepaModel
from trainers import finetuning
from trainers.checkpoints import load_state
from trainers.classifiers import build_classifier, classifier_config, freeze_encoder
from trainers.cli import main
from trainers.datasets import ImageDataset, ImageSource, sample_seed
from trainers.datasets import seeded as seed_for
from trainers.finetune_args import FinetuneArguments, FinetuneDataArguments, Finetuning
from trainers.finetune_data import (
    ClassificationCollator,
    ClassificationLoss,
    TrainImages,
    finetune_transform,
    hold_out_share,
    share_of_labels,
)
from trainers.publishing import save_model
from trainers.transforms import eval_transform, image_processor

ROOT = Path(__file__).resolve().parent.parent
COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "gray": (128, 128, 128),
          "black": (20, 20, 20), "white": (235, 235, 235)}  # fmt: skip
FLAGS = ["--num_train_epochs", "3", "--per_device_train_batch_size", "16", "--use_cpu", "--disable_tqdm",
         "--precision", "float32", "--logging_steps", "1", "--learning_rate", "0.01"]  # fmt: skip
PLAIN = ["--mixup", "0", "--cutmix", "0", "--drop_path_rate", "0", "--layer_decay", "1"]


def save(model, folder):
    save_model(model, image_processor((32, 32), [0.5] * 3, [0.25] * 3), Path(folder))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    save(tiny_model(initializer_range=0.05), folder)
    return str(folder)


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stack")
    save(tiny_sjea(), folder)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of noisy images, a colour a class: 60 to train on, 30 to test on."""
    folder = tmp_path_factory.mktemp("photos")
    for split, number in (("train", 10), ("test", 5)):
        for seed, (name, color) in enumerate(COLORS.items()):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                noise = np.random.default_rng([seed, index, number]).normal(0, 12, (32, 32, 3))
                pixels = (np.array(color) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return str(folder)


def finetune(model, photos, output, *flags) -> int:
    return main(["finetune", str(model), "--dataset", str(photos), "--output_dir", str(output), *FLAGS, *flags])


@pytest.fixture(scope="module")
def run(encoder, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "full"
    assert finetune(encoder, photos, folder, *PLAIN, "--classifier_pooling", "attentive") == 0
    return folder


def names_in(folder) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def facts_of(folder) -> dict:
    return json.loads(Path(folder, "final", "results.json").read_text())


def predictions(model, processor, photos, split="test"):
    paths = sorted(Path(photos, split).glob("*/*.png"))
    pixel_values = processor([Image.open(path) for path in paths], return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model.eval()(pixel_values).logits
    return logits, [path.parent.name for path in paths]


def test_a_run_learns_and_leaves_a_classifier_that_repeats_its_accuracy(run, photos):
    names = {path.name for path in (run / "final").iterdir()}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "curves.png", "results.json",
            "README.md", "modeling_cjepa.py"} <= names  # fmt: skip
    facts = facts_of(run)
    assert facts["evaluation"]["accuracy"] > 60 and facts["data"]["num_train_images"] == 54
    assert facts["data"]["num_held_out_images"] == 6 and facts["evaluation"]["num_test_images"] == 30
    model = AutoModelForImageClassification.from_pretrained(run / "final")
    assert type(model) is CJepaForImageClassification
    assert sorted(model.config.label2id) == sorted(COLORS) and model.config.classifier_pooling == "attentive"
    logits, labels = predictions(model, AutoImageProcessor.from_pretrained(run / "final"), photos)
    ranked = [[model.config.id2label[int(number)] for number in row.topk(5).indices] for row in logits]
    accuracy = np.mean([label == row[0] for row, label in zip(ranked, labels, strict=True)])
    assert facts["evaluation"]["accuracy"] == pytest.approx(100 * accuracy)
    top5 = np.mean([label in row for row, label in zip(ranked, labels, strict=True)])
    assert facts["evaluation"]["top5_accuracy"] == pytest.approx(100 * top5)
    card = (run / "final" / "README.md").read_text()
    assert f"Accuracy: {100 * accuracy:.1f} %" in card and "red" in card and "54 labelled images" in card
    assert main(["evaluate", str(run / "final"), "--dataset", photos, "--num_random_encoders", "0"]) == 0


def test_the_best_checkpoint_is_what_is_saved(run, photos):
    history = [entry for entry in facts_of(run)["history"] if "eval_accuracy" in entry]
    best = max(history, key=lambda entry: entry["eval_accuracy"])  # the first of several
    assert len(history) == 3 and facts_of(run)["training"]["best_step"] == best["step"]
    saved, checkpoint = (
        AutoModelForImageClassification.from_pretrained(folder)
        for folder in (run / "final", run / f"checkpoint-{best['step']}")
    )
    processor = AutoImageProcessor.from_pretrained(run / "final")
    assert torch.equal(predictions(saved, processor, photos)[0], predictions(checkpoint, processor, photos)[0])


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(encoder, photos, tmp_path):
    """With mixed images, dropped branches and random crops, from the middle of the second of three epochs."""
    flags = ["--validation_share", "0", "--save_total_limit", "5", "--rand_augment", "5",
             "--save_strategy", "steps", "--save_steps", "6", "--logging_steps", "4"]  # fmt: skip
    assert finetune(encoder, photos, tmp_path / "whole", *flags) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "begun", ignore=shutil.ignore_patterns("final", "checkpoint-12"))
    assert names_in(tmp_path / "begun") == ["checkpoint-6", "settings.yaml"]
    assert finetune(encoder, photos, tmp_path / "begun", *flags, "--resume_from_checkpoint", "last") == 0
    whole, begun = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "begun"))
    assert all(torch.equal(begun[name], tensor) for name, tensor in whole.items())
    losses, resumed = (
        [entry["loss"] for entry in facts_of(tmp_path / name)["history"] if "loss" in entry]
        for name in ("whole", "begun")
    )
    assert resumed == losses
    start = load_file(Path(encoder) / "model.safetensors")
    assert not torch.equal(whole["cjepa.layers.0.mlp.fc1.weight"], start["cjepa.layers.0.mlp.fc1.weight"])


def test_the_best_checkpoint_is_found_where_a_run_was_moved(run, tmp_path):
    shutil.copytree(run, tmp_path / "moved")
    last = max((tmp_path / "moved").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state = load_state(str(last))
    assert state.best_model_checkpoint == str(tmp_path / "moved" / f"checkpoint-{state.best_global_step}")
    assert str(run) not in (last / "trainer_state.json").read_text()


def test_a_stopped_run_goes_on_as_if_it_had_not_been(run, encoder, photos, tmp_path, capsys):
    """Stopped after each step of the first epoch, at whose end alone it is evaluated, and after the next."""
    flags = [*PLAIN, "--classifier_pooling", "attentive", "--save_total_limit", "1"]
    assert finetune(encoder, photos, tmp_path, *flags, "--max_hours", "1e-9") == 0
    for step in (1, 2, 3, 4, 5):
        said = f"stopped by --max_hours 1e-09 at step {step} of 12; saved checkpoint-{step}; go on with"
        assert f"{said} --resume_from_checkpoint last\n" in capsys.readouterr().out
        assert (tmp_path / f"checkpoint-{step}").is_dir() and not (tmp_path / "final").exists()
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert sum("eval_accuracy" in entry for entry in state["log_history"]) == step // 4
        hours = ["--max_hours", "1e-9"] if step < 5 else []
        assert finetune(encoder, photos, tmp_path, *flags, "--resume_from_checkpoint", "last", *hours) == 0
    whole, stopped = (load_file(folder / "final" / "model.safetensors") for folder in (run, tmp_path))
    assert all(torch.equal(stopped[name], tensor) for name, tensor in whole.items())
    assert facts_of(tmp_path)["evaluation"] == facts_of(run)["evaluation"]


def test_other_settings_and_finished_runs_are_refused_when_resuming(run, encoder, photos, tmp_path, capsys):
    fails(capsys, finetune(encoder, photos, run), "already holds a finished run")
    begun = tmp_path / "begun"
    shutil.copytree(run, begun, ignore=shutil.ignore_patterns("final"))
    fails(capsys, finetune(encoder, photos, begun), "--resume_from_checkpoint last")
    flags = ["--classifier_pooling", "attentive", "--resume_from_checkpoint", "last"]
    fails(capsys, finetune(encoder, photos, begun, *flags), "was trained with cutmix 0")
    assert finetune(encoder, photos, begun, *PLAIN, *flags) == 0  # at its end: nothing is trained
    first, again = (load_file(folder / "final" / "model.safetensors") for folder in (run, begun))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_other_images_are_refused_when_resuming(encoder, photos, tmp_path, capsys):
    """What is held out is a choice of so many images: with others, some of them would have been trained on."""
    shutil.copytree(photos, tmp_path / "photos")
    flags = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps",
             "--eval_steps", "2"]  # fmt: skip
    run = [tmp_path / "photos", tmp_path / "run", *flags]
    assert finetune(encoder, *run) == 0
    shutil.rmtree(tmp_path / "run" / "final")
    run += ["--resume_from_checkpoint", "last"]
    train, test = (tmp_path / "photos" / split / "red" / "3.png" for split in ("train", "test"))
    whole = train.read_bytes()
    for change, words in (
        (train.unlink, ["other train images (54 images, ", "are now (53 images, "]),
        (lambda: train.write_text("no image"), ["other train images (54 images, ", "are now (53 images, "]),
        (lambda: shutil.move(train, train.with_name("33.png")), ["other train images (54 images, ", "(54 images, "]),
        (lambda: shutil.copy(test, test.with_name("9.png")), ["other test images (30 images, ", "are now (31 images"]),
    ):
        change()
        fails(capsys, finetune(encoder, *run), *words, "checkpoint-2", "another --output_dir")
        train.write_bytes(whole)
        train.with_name("33.png").unlink(missing_ok=True)
    test.with_name("9.png").unlink()
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    (tmp_path / "photos").symlink_to(tmp_path / "elsewhere")
    assert finetune(encoder, *run) == 0  # the images are those it began with


def test_lora_saves_a_merged_model_and_its_adapter(encoder, photos, tmp_path):
    from peft import PeftModel

    assert finetune(encoder, photos, tmp_path / "run", "--mode", "lora", "--classifier_pooling", "attentive") == 0
    facts, final = facts_of(tmp_path / "run"), tmp_path / "run" / "final"
    assert 2 * 2 * 2 * 8 * 32 < facts["model"]["trained_parameters"] < facts["model"]["parameters"]
    merged, processor = (
        AutoModelForImageClassification.from_pretrained(final),
        AutoImageProcessor.from_pretrained(final),
    )
    logits, _ = predictions(merged, processor, photos)
    checkpoint = tmp_path / "run" / f"checkpoint-{facts['training']['best_step']}"
    for adapter in (final / "adapter", checkpoint):
        base = AutoModelForImageClassification.from_pretrained(encoder, config=merged.config)
        adapted = PeftModel.from_pretrained(base, adapter)
        torch.testing.assert_close(predictions(adapted, processor, photos)[0], logits, rtol=1e-4, atol=1e-5)
    before, after = CJepaModel.from_pretrained(encoder).state_dict(), merged.cjepa.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {f"layers.{i}.attention.{part}.weight" for i in (0, 1) for part in ("q_proj", "v_proj")}
    again = tmp_path / "again"
    shutil.copytree(tmp_path / "run", again, ignore=shutil.ignore_patterns("final", "checkpoint-12"))
    flags = ["--mode", "lora", "--classifier_pooling", "attentive", "--resume_from_checkpoint", "last"]
    assert finetune(encoder, photos, again, *flags) == 0
    resumed = load_file(again / "final" / "model.safetensors")
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in resumed.items())


@pytest.mark.parametrize("kind", ["encoder", "stack"])
def test_a_frozen_encoder_stays_as_it_was(kind, request, photos, tmp_path):
    """Its batch statistics, too."""
    path = request.getfixturevalue(kind)
    assert finetune(path, photos, tmp_path / "run", "--mode", "frozen") == 0
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (path, tmp_path / "run" / "final"))
    kept = [name for name in after if name.startswith(("cjepa.", "sjea."))]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    assert facts_of(tmp_path / "run")["model"]["trained_parameters"] == 32 * 6 + 6


def test_a_frozen_encoder_evaluates_while_its_head_trains():
    model = CJepaForImageClassification(tiny_config(drop_path_rate=0.9, hidden_dropout_prob=0.5))
    freeze_encoder(model)
    model.train()
    pixel_values = torch.randn(2, 3, 32, 32, generator=seeded())
    first, second = model(pixel_values), model(pixel_values)
    assert torch.equal(first.logits, second.logits) and first.logits.requires_grad and model.training
    assert not any(parameter.requires_grad for parameter in model.cjepa.parameters())


def test_a_stack_is_fine_tuned_at_a_level(stack, photos, tmp_path):
    assert finetune(stack, photos, tmp_path / "run", "--level", "0", "--classifier_pooling", "attentive") == 0
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "final")
    assert model.config.level == 0 and model.pooling.query.shape == (1, 1, 32)
    logits, labels = predictions(model, AutoImageProcessor.from_pretrained(tmp_path / "run" / "final"), photos)
    found = [model.config.id2label[int(number)] for number in logits.argmax(dim=1)]
    assert np.mean(np.array(found) == labels) == pytest.approx(
        facts_of(tmp_path / "run")["evaluation"]["accuracy"] / 100
    )


@torch.no_grad()
def test_a_classifier_starts_from_the_encoder_at_any_size_or_from_scratch(encoder):
    def built(from_scratch=False, **settings):
        arguments = FinetuneArguments(**settings)
        config = classifier_config(encoder, arguments, ["a", "b"])
        return build_classifier(encoder, config, from_scratch).eval()

    for size in (32, 64):
        pixel_values = torch.randn(2, 3, size, size, generator=seeded())
        expected = CJepaModel.from_pretrained(encoder, image_size=size)(pixel_values).pooler_output
        assert torch.equal(built(image_size=size).cjepa(pixel_values).pooler_output, expected)
        scratch = built(True, image_size=size)
        assert not torch.allclose(scratch.cjepa(pixel_values).pooler_output, expected)
        assert scratch.num_parameters() == built(image_size=size).num_parameters()
    assert FinetuneArguments(from_scratch=True).layer_decay == 1 and FinetuneArguments().layer_decay == 0.75
    assert built().cjepa.layers[1].drop_path_rate == 0.1
    assert built().config.id2label == {0: "a", 1: "b"}


def test_from_scratch_and_a_share_of_labels(encoder, photos, tmp_path):
    flags = ["--from_scratch", "--label_share", "0.2", "--image_size", "16", "--max_steps", "2"]
    assert finetune(encoder, photos, tmp_path / "run", *flags) == 0
    facts = facts_of(tmp_path / "run")
    assert facts["data"]["num_train_images"] + facts["data"]["num_held_out_images"] == 12
    assert "trained from random weights" in (tmp_path / "run" / "final" / "README.md").read_text().replace("\n", " ")
    assert AutoConfig.from_pretrained(tmp_path / "run" / "final").image_size == 16


def test_shares_of_labels_are_nested_and_leave_one_of_each_class():
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    source = ImageSource(np.arange(143).reshape(-1, 1, 1, 1), labels, ["a", "b", "c"])
    shares = {share: share_of_labels(source, share) for share in (0.01, 0.1, 0.5, 1)}
    counts = {share: np.bincount(part.labels).tolist() for share, part in shares.items()}
    assert counts == {0.01: [1, 1, 1], 0.1: [10, 4, 1], 0.5: [50, 20, 2], 1: [100, 40, 3]}
    chosen = [set(part.images.ravel().tolist()) for part in shares.values()]
    assert all(small < large for small, large in zip(chosen, chosen[1:], strict=False))
    kept, held_out = hold_out_share(shares[0.1], 0.9)
    assert np.bincount(kept.labels).tolist() == [1, 1, 1] and len(held_out) == 12
    assert set(kept.images.ravel()) | set(held_out.images.ravel()) == set(shares[0.1].images.ravel())


@pytest.mark.parametrize(("alphas", "mixer"), [((0.8, 0.0), v2.MixUp), ((0.0, 1.0), v2.CutMix)])
def test_only_train_batches_are_mixed_and_alike_at_every_call(alphas, mixer):
    rng = np.random.default_rng(0)
    source = ImageSource(rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), np.arange(6) % 3)
    collate = ClassificationCollator([0.5] * 3, [0.5] * 3, 3, *alphas)
    train, plain = (cls(source, eval_transform((8, 8)), 7) for cls in (TrainImages, ImageDataset))
    train.set_epoch(2)
    first, again = (collate([train[index] for index in range(4)]) for _ in range(2))
    expected = torch.from_numpy(source.images[:4]).permute(0, 3, 1, 2) / 127.5 - 1
    unmixed = collate([plain[index] for index in range(4)])
    torch.testing.assert_close(unmixed["pixel_values"], expected)
    assert unmixed["labels"].tolist() == [0, 1, 2, 0]
    with seed_for(sample_seed(7, 2, 0, 1)):
        mix = v2.RandomChoice([mixer(alpha=max(alphas), num_classes=3)])
        pixel_values, labels = mix(unmixed["pixel_values"], unmixed["labels"])
    assert torch.equal(first["pixel_values"], pixel_values) and torch.equal(first["labels"], labels)
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.allclose(pixel_values, expected)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(4))


def test_loss_is_the_mean_over_the_images_of_a_step():
    logits, labels = torch.randn(6, 4, generator=seeded()), torch.tensor([0, 3, 2, 1, 1, 0])
    soft = F.one_hot(labels, 4).float() * 0.7 + 0.3 * F.one_hot(labels.roll(1), 4)
    log_probabilities = logits.log_softmax(dim=1)
    for given, entries in ((labels, 6), (soft, 24)):
        shares = soft if given is soft else F.one_hot(labels, 4).float()
        smoothed = 0.9 * shares + 0.1 / 4
        expected = -(smoothed * log_probabilities).sum() / 6
        loss = ClassificationLoss(0.1)
        torch.testing.assert_close(loss(ImageClassifierOutput(logits=logits), given), expected)
        # two batches of a step, which together have six images
        parts = [
            loss(ImageClassifierOutput(logits=logits[rows]), given[rows], torch.tensor(entries))
            for rows in (slice(0, 2), slice(2, 6))
        ]
        torch.testing.assert_close(sum(parts), expected)


def test_rates_of_the_layers_reach_the_optimizer(encoder, tmp_path):
    images = np.zeros((8, 32, 32, 3), np.uint8)
    source = ImageSource(images, np.arange(8) % 2, ["a", "b"])
    run = Finetuning(
        encoder, FinetuneArguments(layer_decay=0.5), FinetuneDataArguments(validation_share=0),
        {"output_dir": str(tmp_path), "use_cpu": True, "learning_rate": 0.8, "weight_decay": 0.3,
         "optim": "adamw_torch", "max_steps": 10},
    )  # fmt: skip
    args = finetuning.training_arguments(run)
    model = finetuning.build_model(run, classifier_config(encoder, run.settings, ["a", "b"]), args)
    trainer = finetuning.build_trainer(run, model, args, source, None)
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.AdamW
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.1, 0.2, 0.4, 0.8]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.3}
    trainer.create_scheduler(10)
    assert args.get_warmup_steps(10) == 1 and args.lr_scheduler_type == "cosine"


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    data = FinetuneDataArguments(rand_augment=9)
    images = TrainImages(ImageSource(pixels, np.arange(3)), finetune_transform((32, 32), data), 1)
    first = images[1]["pixel_values"]
    assert torch.equal(images[1]["pixel_values"], first) and first.dtype == torch.uint8
    images.set_epoch(1)
    assert not torch.equal(images[1]["pixel_values"], first)


def fails(capsys, status: int, *words: str):
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("cjepa: ")]
    assert status == 2 and len(sentences) == 1 and "Traceback" not in error, error
    for word in words:
        assert word in sentences[0], sentences[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--mode", "half"], ["mode='half'", "full, frozen, lora"]),
        (["--classifier_pooling", "max"], ["classifier_pooling='max'", "mean, last4, attentive"]),
        (["--image_size", "30"], ["image_size=30", "patch_size=4", "28 or 32"]),
        (["--level", "3"], ["level=3"]),
        (["--from_scratch", "--mode", "lora"], ["from_scratch", "--mode lora"]),
        (["--layer_decay", "0"], ["layer_decay=0"]),
        (["--label_share", "2"], ["label_share=2"]),
        (["--validation_share", "1"], ["validation_share=1"]),
        (["--mixup", "-1"], ["mixup=-1"]),
        (["--drop_path_rate", "1"], ["drop_path_rate=1"]),
        (["--rand_augment", "31"], ["rand_augment=31"]),
        (["--label_smoothing_factor", "1"], ["label_smoothing_factor=1"]),
        (["--learning_rate", "0"], ["learning_rate=0"]),
        (["--label_column", "kind"], ["kind", "--label_column"]),
        (["--lr_scheduler_type", "square"], ["square"]),
        (["--fp16", "true"], ["fp16", "precision"]),
        (["--label_share", "0.01"], ["one image of each class", "--validation_share 0"]),
        (["--metric_for_best_model", "f1"], ["metric_for_best_model='f1'", "loss, accuracy, top5_accuracy"]),
        (
            ["--output_dir", __file__, "--dataset", "none"],
            ["test_finetuning.py is a file", "name a folder"],
        ),
        (["--output_dir", __file__ + "/run", "--dataset", "none"], ["test_finetuning.py/run", "lies in one"]),
        (["--dataloader_drop_last", "--per_device_train_batch_size", "55"], ["all 54 train images", "the 55 of"]),
    ],
)
def test_impossible_flags_are_one_sentence(encoder, photos, tmp_path, capsys, flags, words):
    fails(capsys, finetune(encoder, photos, tmp_path / "run", *flags), *words)
    assert not (tmp_path / "run" / "final").exists()


@pytest.mark.parametrize("metric", ["loss", "eval_top5_accuracy"])
def test_the_best_checkpoint_is_that_of_the_metric(encoder, photos, tmp_path, metric):
    assert finetune(encoder, photos, tmp_path / "run", *PLAIN, "--metric_for_best_model", metric) == 0
    facts = facts_of(tmp_path / "run")
    history = [entry for entry in facts["history"] if "eval_accuracy" in entry]
    name, choose = {"loss": ("eval_loss", min), "eval_top5_accuracy": ("eval_top5_accuracy", max)}[metric]
    best = choose(history, key=lambda entry: entry[name])
    assert facts["training"]["best_step"] == best["step"]
    assert facts["training"]["best_held_out_accuracy"] == pytest.approx(100 * best["eval_accuracy"])
    words = {"loss": "by the loss", "eval_top5_accuracy": "by the top-5 accuracy"}[metric]
    assert words in (tmp_path / "run" / "final" / "README.md").read_text()


@pytest.mark.parametrize("metric", ["top5_accuracy", "eval_top5_accuracy"])
def test_top5_accuracy_of_five_classes_is_no_choice(encoder, photos, tmp_path, capsys, metric):
    shutil.copytree(photos, tmp_path / "photos")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "photos" / split / "red")
    status = finetune(encoder, tmp_path / "photos", tmp_path / "run", "--metric_for_best_model", metric)
    fails(capsys, status, metric, "of 5 classes", "choose by accuracy or loss")
    assert not list(tmp_path.glob("run/checkpoint-*"))


def test_batches_that_are_left_out_are_those_of_training(encoder, photos, tmp_path):
    """6 held-out and 30 test images are all evaluated on, in batches of 8; of 54 train images 48 make 3 batches."""
    flags = [*PLAIN, "--dataloader_drop_last", "--per_device_eval_batch_size", "8"]
    assert finetune(encoder, photos, tmp_path / "run", *flags) == 0
    facts = facts_of(tmp_path / "run")
    assert facts["training"]["steps"] == 9
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run" / "final")
    logits, labels = predictions(model, AutoImageProcessor.from_pretrained(tmp_path / "run" / "final"), photos)
    found = [model.config.id2label[int(number)] for number in logits.argmax(dim=1)]
    assert facts["evaluation"]["num_test_images"] == len(found) == 30
    assert facts["evaluation"]["accuracy"] == pytest.approx(100 * np.mean(np.array(found) == labels))
    held_out = [entry["eval_accuracy"] * 6 for entry in facts["history"] if "eval_accuracy" in entry]
    assert len(held_out) == 3 and held_out == pytest.approx(np.round(held_out))


DIVERGING = [*PLAIN, "--learning_rate", "1e30", "--warmup_steps", "0", "--validation_share", "0"]


def test_a_loss_that_is_not_finite_ends_the_run(encoder, photos, tmp_path, capsys):
    """After a first step, whose loss is that of the encoder as it was."""
    flags = [*DIVERGING, "--save_strategy", "steps", "--save_steps", "1"]
    fails(capsys, finetune(encoder, photos, tmp_path / "run", *flags), "nan at step 2", "nothing is published",
          "lower --learning_rate")  # fmt: skip
    assert names_in(tmp_path / "run") == ["checkpoint-1", "settings.yaml"]


def test_weights_that_are_not_finite_are_not_published(encoder, photos, tmp_path, capsys):
    """Where no loss is logged before the end, or the losses that are not finite are left out of it."""
    not_logged = ["--logging_steps", "500", "--save_strategy", "no"]
    for number, flags in enumerate((not_logged, ["--logging_nan_inf_filter", "--save_strategy", "no"])):
        output = tmp_path / f"run{number}"
        fails(capsys, finetune(encoder, photos, output, *DIVERGING, *flags), "The weights of step 12 are not finite")
        assert names_in(output) == ["settings.yaml"]


def test_models_that_cannot_are_refused(stack, photos, tmp_path, capsys, monkeypatch):
    fails(capsys, finetune(tmp_path, photos, tmp_path / "run"), "neither a folder")
    fails(capsys, finetune(stack, photos, tmp_path / "run", "--mode", "lora"), "adapts attention", "--mode full")
    fails(capsys, finetune(stack, photos, tmp_path / "run", "--drop_path_rate", "0.1"), "S-JEA model has none")
    fails(capsys, finetune(stack, photos, tmp_path / "run", "--classifier_pooling", "last4"), "mean, attentive")
    monkeypatch.setitem(sys.modules, "peft", None)
    backbone = TRANSFORMER | {"patch_size": 4}
    (tmp_path / "vit").mkdir()
    save(tiny_sjea(sjea_level(stem="standard", backbone=backbone)), tmp_path / "vit")
    fails(capsys, finetune(tmp_path / "vit", photos, tmp_path / "run", "--mode", "lora"), "peft", "pip install")


def test_labels_that_are_none_or_no_classes_are_refused(encoder, photos, tmp_path, capsys):
    data = Path(photos, "train", "red", "0.png").read_bytes()
    for number, (label, flags, words) in enumerate([
        (None, [], ["has no labels"]),
        (0.5, [], ["has no labels"]),
        (0.5, ["--label_column", "label"], ["holds numbers such as", "0.5"]),
        (3, [], ["one class only"]),
    ]):  # fmt: skip
        rows = {"image": [{"bytes": data, "path": None}] * 20}
        rows |= {} if label is None else {"label": [label] * 20}
        pq.write_table(pa.table(rows), tmp_path / f"{number}.parquet")
        fails(capsys, finetune(encoder, tmp_path / f"{number}.parquet", tmp_path / "run", *flags), *words)
    shutil.copytree(photos, tmp_path / "photos")
    shutil.move(tmp_path / "photos" / "train" / "red", tmp_path / "photos" / "train" / "pink")
    fails(capsys, finetune(encoder, tmp_path / "photos", tmp_path / "run"), "no image of", "(red)")


def test_a_class_with_one_image_is_trained_on(encoder, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    for path in sorted((tmp_path / "photos" / "train" / "red").iterdir())[1:]:
        path.unlink()
    assert finetune(encoder, tmp_path / "photos", tmp_path / "run", "--max_steps", "1") == 0
    assert facts_of(tmp_path / "run")["model"]["classes"][-1] == "white"
    assert len(facts_of(tmp_path / "run")["model"]["classes"]) == 6


def test_two_processes_make_one_run(run, encoder, photos, tmp_path):
    flags = [*FLAGS, *PLAIN, "--classifier_pooling", "attentive", "--per_device_train_batch_size", "8"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "scripts/finetune.py", encoder, "--dataset", photos, "--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    two, one = facts_of(tmp_path / "run"), facts_of(run)
    assert two["training"]["processes"] == 2 and two["training"]["batch_size"] == 16
    losses = [[entry["loss"] for entry in facts["history"] if "loss" in entry][:3] for facts in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_the_example_trains_a_classifier(encoder, photos, tmp_path):
    source = (ROOT / "scripts" / "finetune_example.py").read_text()
    assert "modeling_cjepa" not in source and "trainers" not in source.replace("Trainer", "")
    _, _, code = source.split('"""')
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    command = [sys.executable, str(ROOT / "scripts" / "finetune_example.py"), encoder, photos + "/train", "output"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"'eval_accuracy': '?[0-9.]+", result.stdout)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "output" / "final")
    assert model.config.num_labels == 6 and model.config.classifier_pooling == "attentive"
