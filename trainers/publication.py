"""What is published of a run: the exact folder of a repository on the Hub."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from trainers.cards import kept_license, write_card
from trainers.checkpoint_push import CheckpointPush
from trainers.conversion.ijepa_transformers import write_ijepa_model
from trainers.conversion.ours import encoder_of, load_processor, plain_encoder_only
from trainers.doctor_runs import newest_model, read_json
from trainers.errors import InputError
from trainers.eval_results import SUITES
from trainers.files import write_json
from trainers.hub import Destination, upload
from trainers.loading import load_model
from trainers.model_facts import classifier_facts, is_classifier, model_facts
from trainers.public_facts import public_facts
from trainers.publication_pictures import draw_pictures
from trainers.publishing import save_model


@dataclass(frozen=True)
class Publication:
    """
    A run, and how it is published.

    Args:
        run (`str`): The folder of a run, of its `final`, of a checkpoint or of a model.
        repo (`str`): Where to, `user/name`, which the card names.
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

    def write(self, folder: Path, progress: bool = True):
        """
        Writes the folder of the repository.

        Args:
            folder (`Path`): Where to; it exists and is empty.
            progress (`bool`): Whether to say what is being done.

        Raises:
            InputError: There is no whole model of this package, or it has no image processor, or a file is broken.
        """
        say = print if progress else (lambda *_: None)
        place = Path(newest_model(self.run))
        model, processor = load_model(place, with_classifier=True).eval(), load_processor(str(place))
        if processor is None:
            raise InputError(f"{place} has no preprocessor_config.json; save its image processor beside the model.")
        check_finite(model, place)
        facts = public_facts(known_facts(place, model))
        say(f"writing weights and code of {place}")
        self._write_model(model, processor, folder)
        if (place / "curves.png").is_file():
            shutil.copyfile(place / "curves.png", folder / "curves.png")
        if card_kind(model) != "classifier":
            say("drawing pictures")
            draw_pictures(place, model, processor, facts.get("settings", {}), folder)
        if facts.keys() != {"model"}:
            write_json(folder / "results.json", facts)
        license = self.license or kept_license(place)
        facts["model"]["parameters"] = self._published_parameters(facts["model"]["parameters"])
        write_card(folder, card_kind(model), facts | ({"license": license} if license else {}), self.repo)

    def _write_model(self, model: PreTrainedModel, processor, folder: Path):
        if self.native:
            encoder = encoder_of(model, "target")
            plain_encoder_only(encoder, "transformers' IJepaModel")
            print(write_ijepa_model(encoder, processor, folder).check.sentence())
            return
        published = model.base_model if self.encoder_only else model
        save_model(published, processor, folder, shard_size=self.shard_size)

    def _published_parameters(self, parameters):
        if not (self.native or self.encoder_only) or not isinstance(parameters, dict):
            return parameters
        return {name: number for name, number in parameters.items() if name.startswith("encoder")}


def check_finite(model: PreTrainedModel, place: Path):
    """Raises `InputError` if a weight is NaN or infinite."""
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise InputError(f"The weight {name} of {place} is not finite; publish another checkpoint.")


def card_kind(model: PreTrainedModel) -> str:
    """The kind of a model's card."""
    return "classifier" if is_classifier(model) else model.config.model_type


def known_facts(place: Path, model: PreTrainedModel) -> dict:
    """What is known of a model: of a finished run its results, of a checkpoint its step, of any model its sizes."""
    facts = read_json(str(place), "results.json")
    if not facts:
        facts = {"model": classifier_facts(model)}
        if card_kind(model) != "classifier":
            facts = {"model": model_facts(model)} | _unfinished(place)
    suites = read_json(str(place), SUITES)
    return facts | ({"suites": suites} if suites else {})


def _unfinished(place: Path) -> dict:
    """How far a run was at a checkpoint."""
    state = read_json(str(place), "trainer_state.json")
    if not state:
        return {}
    planned = {"planned_steps": state["max_steps"]} if state["max_steps"] > state["global_step"] else {}
    return {"training": {"steps": state["global_step"], **planned}}


def push_finished(folder: Path, push: CheckpointPush):
    """
    Publishes a finished model where its checkpoints went; where that fails, it says how to do so later.

    Args:
        folder (`Path`): The model's.
        push ([`CheckpointPush`]): What pushed the checkpoints.
    """
    destination = Destination(push.repo, revision=push.args.hub_revision, update=True, token=push.args.hub_token)
    try:
        push.open()
        with tempfile.TemporaryDirectory() as temporary:
            Publication(str(folder), push.repo).write(Path(temporary), progress=False)
            url = upload(Path(temporary), destination, "End of training")
    except InputError as error:
        command = f"cjepa publish {folder} --repo {push.repo} --update"
        print(f"\n{error} The model is in {folder}; publish it by `{command}`.", flush=True)
    else:
        print(f"\nPublished: {url}", flush=True)
