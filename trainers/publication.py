"""What is published of a run: the exact folder of a repository on the Hub."""

import re
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedModel

from trainers.cards import card_kind, kept_license, write_card
from trainers.checkpoint_push import CheckpointPush
from trainers.conversion.ijepa_transformers import write_ijepa_model
from trainers.conversion.ours import encoder_of, plain_encoder_only
from trainers.conversion.weight_files import check_tensors
from trainers.doctor_runs import newest_model
from trainers.errors import InputError, first_line
from trainers.files import write_json
from trainers.known_facts import known_facts
from trainers.loading import check_processor, load_model, load_processor
from trainers.model_facts import is_classifier, parameters_by_part
from trainers.public_facts import public_facts
from trainers.publication_pictures import draw_pictures
from trainers.publishing import save_model
from trainers.reports import draw_curves


@dataclass(frozen=True)
class Publication:
    """
    A run, and how it is published.

    Args:
        run (`str`): The folder of a run, of its `final`, of a checkpoint or of a model.
        repo (`str`): Where it will be loaded from, which the card names: `user/name`, or a folder.
        encoder_only (`bool`): Whether only the target encoder, or the stack, is published.
        native (`bool`): Whether the target encoder is published as transformers' own `IJepaModel`, without code.
        shard_size (`str`): Bytes of the largest file of weights, such as `1GB`.
        license (`str`, *optional*): Of the weights.
    """

    run: str
    repo: str
    encoder_only: bool = False
    native: bool = False
    shard_size: str = "5GB"
    license: str | None = None

    def __post_init__(self):
        if not self.run:
            raise InputError("RUN is empty; give the folder of a run, of a checkpoint or of a model.")
        if not re.fullmatch(r"[1-9]\d*([KMGT]i?B)?", self.shard_size):
            raise InputError(f"--shard-size {self.shard_size!r} is no size; write a number of bytes, or 500MB or 2GB.")

    def write(self, folder: Path, progress: bool = True):
        """
        Writes the folder of the repository.

        Args:
            folder (`Path`): Where to; it exists and is empty.
            progress (`bool`): Whether to say what is being done.

        Raises:
            InputError: There is no whole model of this package, or it has no image processor, or a file is broken.
        """
        say = print if progress else (lambda *_, **__: None)
        place = Path(newest_model(self.run))
        model, processor = load_model(place, with_classifier=True).eval(), load_processor(str(place))
        self._check(place, model, processor)
        license = self.license or kept_license(place)
        with broken_facts_named(place):
            facts = public_facts(known_facts(place, model))
        if not is_classifier(model):  # of what is published, whatever it came from
            published = model.base_model if self.encoder_only or self.native else model
            facts["model"]["parameters"] = parameters_by_part(published)
        say(f"writing weights and code of {place}", flush=True)
        self._write_model(model, processor, folder)
        say("drawing pictures", flush=True)
        self._draw(place, model, processor, facts, folder)
        if facts.keys() != {"model"}:
            write_json(folder / "results.json", facts)
        with broken_facts_named(place):
            write_card(folder, card_kind(model), facts | ({"license": license} if license else {}), self.repo)

    def _check(self, place: Path, model: PreTrainedModel, processor):
        """Refuses what cannot be published, before anything is written."""
        if processor is None:
            raise InputError(f"{place} has no preprocessor_config.json; save its image processor beside the model.")
        check_processor(processor, model.config.num_channels, place)
        check_tensors(model.state_dict(), str(place))
        if is_classifier(model) and (self.encoder_only or self.native):
            flag = "--native" if self.native else "--encoder-only"
            raise InputError(f"{flag}: {place} is a classifier, which is published whole; leave it out.")
        if self.native:
            plain_encoder_only(model, "transformers' IJepaModel")

    def _draw(self, place: Path, model: PreTrainedModel, processor, facts: dict, folder: Path):
        """The curves of the run, and of an encoder what it makes of scenes."""
        if (place / "curves.png").is_file():
            shutil.copyfile(place / "curves.png", folder / "curves.png")
        elif "history" in facts:
            draw_curves(facts["history"], folder / "curves.png")
        if is_classifier(model):
            return
        settings = facts.get("settings", {}) if "training" in facts else None
        if not self.native:
            draw_pictures(folder, model, processor, settings, folder)
            return
        with tempfile.TemporaryDirectory() as temporary:
            save_model(model.base_model, processor, Path(temporary))  # without the context encoder
            draw_pictures(Path(temporary), model.base_model, processor, settings, folder)

    def _write_model(self, model: PreTrainedModel, processor, folder: Path):
        if self.native:
            written = write_ijepa_model(encoder_of(model, "target"), processor, folder, self.shard_size)
            print(written.check.sentence(), flush=True)
            return
        published = model.base_model if self.encoder_only else model
        save_model(published, processor, folder, shard_size=self.shard_size)


@contextmanager
def broken_facts_named(place: Path):
    """Says which files to look at where the facts of a run are not as this package writes them."""
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, TemplateError) as error:
        raise InputError(
            f"What is recorded in {place} is not as a run writes it ({type(error).__name__}: {first_line(error)}); "
            "mend its results.json or suites.json, or remove them, and the card tells of the model alone."
        ) from error


def push_finished(folder: Path, push: CheckpointPush):
    """
    Publishes a finished model where its checkpoints went; where that fails, it says how to do so later.

    Args:
        folder (`Path`): The model's.
        push ([`CheckpointPush`]): What pushed the checkpoints.
    """
    try:
        push.open()  # once more: it may not have been reached yet
        with tempfile.TemporaryDirectory() as temporary:
            Publication(str(folder), push.repo).write(Path(temporary), progress=False)
            url = push.fill(Path(temporary), "End of training")
    except InputError as error:
        print(f"\n{error} The model is in {folder}; publish it by `{push.command(folder)}`.", flush=True)
    else:
        print(f"\nPublished: {url}", flush=True)
