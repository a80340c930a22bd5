"""A run of a rival, from a recipe to a folder that experiments evaluate."""

from pathlib import Path

from transformers.trainer_utils import set_seed

from modeling_cjepa.configuration_cjepa import pair
from trainers.doctor import diagnose
from trainers.errors import InputError
from trainers.files import full_disk_named, write_json
from trainers.model_facts import count
from trainers.pretrain_results import run_facts
from trainers.pretraining import (
    announce,
    check_training,
    choose_attention,
    find_own_checkpoint,
    prepare_process,
    read_decoded,
    train,
)
from trainers.publishing import whole_folder
from trainers.recipes import Recipe
from trainers.rivals import RIVALS, RivalTrainer
from trainers.run_lock import only_run_in
from trainers.sources import load_sources


def train_rival(name: str, recipe: Recipe) -> Path | None:
    """
    Trains a rival on the images of a recipe and saves it.

    Args:
        name (`str`): Of [`RIVALS`].
        recipe ([`Recipe`]): Images, crops, colours, sizes and training.

    Returns:
        `Path`: The `final` folder: weights, configuration, image processor and `results.json`. None if a signal has
        stopped the run, with a checkpoint.

    Raises:
        InputError: It cannot be trained.
    """
    args = prepare_process(recipe)
    output = Path(args.output_dir)
    with only_run_in(output):
        config = recipe.objective.build_config(recipe.model)
        image_size = max(pair(config.image_size))
        source, _ = load_sources(recipe.data, image_size, not args.disable_tqdm)
        if recipe.data.decoded_cache is not None:
            source = read_decoded(source, recipe.data, image_size, args)
        set_seed(args.seed)
        try:
            model = RIVALS[name].build(config, source.label_names, choose_attention(recipe, args))
            check_training(recipe, model, args, len(source), source.name)
            checkpoint = find_own_checkpoint(args, model)
            what = f"rival {name}, sizes of recipe {recipe.name}: {count(model) / 1e6:.1f} M parameters"
            announce(what, recipe, args, checkpoint)
            trainer = RIVALS[name].build_trainer(model, args, recipe.data, source)
        except (ValueError, ImportError, OSError, RuntimeError) as error:
            raise InputError(f"The run cannot start: {' '.join(str(error).split())}") from error
        with full_disk_named(output):
            seconds = train(recipe, trainer, checkpoint)
            return None if seconds is None else _save(recipe, trainer, seconds, output / "final")


def _save(recipe: Recipe, trainer: RivalTrainer, seconds: float, folder: Path) -> Path:
    with whole_folder(folder) as unfinished:
        trainer.save_model(str(unfinished))
        facts = run_facts(recipe, trainer, trainer.model, seconds)
        facts["diagnosis"] = diagnose(trainer.state.log_history, trainer.doctor.facts).to_dict()
        write_json(unfinished / "results.json", facts | {"history": trainer.state.log_history})
    return folder
