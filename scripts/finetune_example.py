"""A classifier on an encoder by transformers alone: python finetune_example.py runs/mine/final photos output

`photos` is a folder with a sub-folder for each class.
"""

import sys

from datasets import load_dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

encoder, photos, output = sys.argv[1:]
images = load_dataset("imagefolder", data_dir=photos, split="train")
names = images.features["label"].names
images = images.train_test_split(test_size=0.1, stratify_by_column="label", seed=0)
processor = AutoImageProcessor.from_pretrained(encoder)
model = AutoModelForImageClassification.from_pretrained(
    encoder, id2label=dict(enumerate(names)), label2id={name: number for number, name in enumerate(names)},
    classifier_pooling="attentive", trust_remote_code=True,
)  # fmt: skip


def to_inputs(rows):
    pixel_values = processor(rows["image"], return_tensors="pt").pixel_values
    return {"pixel_values": list(pixel_values), "labels": rows["label"]}


def accuracy(predicted):
    return {"accuracy": float((predicted.predictions.argmax(-1) == predicted.label_ids).mean())}


arguments = TrainingArguments(
    output, num_train_epochs=5, learning_rate=5e-4, per_device_train_batch_size=32, lr_scheduler_type="cosine",
    warmup_steps=0.1, weight_decay=0.05, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
    metric_for_best_model="accuracy", remove_unused_columns=False,
)  # fmt: skip
train, held_out = (images[split].with_transform(to_inputs) for split in ("train", "test"))
trainer = Trainer(
    model, arguments, processing_class=processor, train_dataset=train, eval_dataset=held_out, compute_metrics=accuracy
)
trainer.train()
print(trainer.evaluate())
trainer.save_model(f"{output}/final")
