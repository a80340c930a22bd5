"""`cjepa finetune`: a classifier on a saved encoder."""

import dataclasses

from trainers.cli_models import add_data_flags, model_parser

# fields of transformers' TrainingArguments worth a line of `--help`; all others are accepted, too
_COMMON_TRAINING_FIELDS = {
    "output_dir", "max_steps", "gradient_accumulation_steps", "report_to", "seed", "dataloader_num_workers",
    "resume_from_checkpoint", "torch_compile", "use_cpu", "disable_tqdm", "max_grad_norm", "precision",
    "max_hours", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_update",
}  # fmt: skip


def add_finetune(commands):
    """`cjepa finetune MODEL --any_field value`."""
    import inspect

    from trainers.finetune_args import FinetuneArguments, FinetuneDataArguments, FinetuneTrainingArguments
    from trainers.flags import GOES_ON_FROM_CHECKPOINT, add_flags, type_hints

    parser = model_parser(
        commands,
        "finetune",
        usage="cjepa finetune MODEL [--key value ...]",
        help="train a classifier on a saved encoder: whole, its head only, or with LoRA",
        description="Train a classifier on a model's encoder by transformers' Trainer. A tenth of the train images is "
        "held out: the checkpoint that does best on it is saved in OUTPUT/final, and its accuracy on the evaluation "
        "split, which no choice was made on, is reported once, with a 95 % interval. Choose other settings by the "
        "held-out accuracy (eval_accuracy in results.json), too. Without --dataset the images are those of the run "
        "that made the model. Every field of transformers.TrainingArguments is a flag.",
        epilog="examples:  cjepa finetune runs/mine/final --dataset my/photos --output_dir runs/classifier\n"
        "           cjepa finetune runs/mine/final --mode frozen --classifier_pooling attentive\n"
        "           cjepa finetune runs/mine/final --mode lora --lora_rank 8 --image_size 64\n"
        "           cjepa finetune runs/mine/final --label_share 0.01 --from_scratch\n"
        "           torchrun --nproc_per_node 2 scripts/finetune.py runs/mine/final",
    )
    add_flags(parser, "fine-tuning", FinetuneArguments(), type_hints(FinetuneArguments))
    add_data_flags(parser, FinetuneDataArguments(), type_hints(FinetuneDataArguments))
    listed = _COMMON_TRAINING_FIELDS | set(inspect.get_annotations(FinetuneTrainingArguments))
    add_flags(parser, "training", FinetuneTrainingArguments, type_hints(FinetuneTrainingArguments), listed)
    parser.set_defaults(run=run_finetune, parser=parser, after_interruption=GOES_ON_FROM_CHECKPOINT)


def run_finetune(namespace):
    """Fine-tunes by the flags given."""
    from trainers.cli_models import as_in_the_run
    from trainers.finetune_args import (
        FinetuneArguments,
        FinetuneDataArguments,
        FinetuneTrainingArguments,
        Finetuning,
    )
    from trainers.finetuning import finetune
    from trainers.flags import check_value, dataclass_from_flags, given_flags, type_hints
    from trainers.loading import load_encoder_config, load_image_statistics
    from trainers.recipe_files import without_flags

    hints = type_hints(FinetuneTrainingArguments)
    training = given_flags(namespace, hints)
    for name, value in training.items():
        check_value(name, value, hints[name], "the command line")
    settings = dataclass_from_flags(namespace, FinetuneArguments)
    data = dataclass_from_flags(namespace, FinetuneDataArguments)
    load_encoder_config(namespace.model)  # a mistake is told first
    (data,) = as_in_the_run(namespace, namespace.model, data)
    statistics = load_image_statistics(namespace.model)
    if statistics is not None:
        read = dict(zip(("image_mean", "image_std"), statistics, strict=True))
        data = dataclasses.replace(
            data, **{name: value for name, value in read.items() if name not in vars(namespace)}
        )
    finetune(Finetuning(namespace.model, settings, data, training, without_flags(namespace.command)))
