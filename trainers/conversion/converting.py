"""A model of one format to another, through ours; what is written is whole and was checked, or is not there."""

import dataclasses
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from modeling_cjepa import CJepaForPreTraining
from modeling_cjepa.configuration_cjepa import pair
from trainers.cards import card_kind, write_card
from trainers.conversion.checks import Check, Converted, Written
from trainers.conversion.formats import Format, ReadOptions, Source, format_named, function, open_source
from trainers.conversion.names import ROUNDED_NOTE, rounding_notes
from trainers.conversion.ours import encoder_of, plain_encoder_only
from trainers.doctor_runs import newest_model
from trainers.errors import InputError, first_line
from trainers.files import full_disk_named, leftovers, whole_file, write_json
from trainers.known_facts import CONVERSION, known_facts
from trainers.loading import check_processor, read_json
from trainers.model_facts import is_classifier
from trainers.public_facts import public_facts
from trainers.publishing import whole_folder
from trainers.transforms import image_processor

_ENCODERS = ("target", "context")
_FILE_SUFFIXES = (".pth.tar", ".pth", ".pt", ".pt2", ".onnx", ".safetensors", ".bin")


@dataclass(frozen=True)
class Conversion:
    """
    What was done.

    Args:
        source_format, target_format ([`Format`]): From what to what.
        checks (`list` of [`Check`]): Of what was read and of what was written.
        notes (`list[str]`): What did not map, starts anew or was left out.
    """

    source_format: Format
    target_format: Format
    checks: list[Check]
    notes: list[str]


def load_start(source: str, options: ReadOptions | None = None) -> Converted:
    """
    A model of any format that comes in, to start a training from.

    Args:
        source (`str`): A file, a folder, an id on the Hub, or `timm:` and a name of timm's.
        options ([`ReadOptions`], *optional*): What the source does not say.

    Returns:
        [`Converted`]: [`CJepaForPreTraining`] or [`SJeaForPreTraining`] where the source has all parts of one, else
        [`CJepaModel`] or [`SJeaModel`].

    Raises:
        InputError: It cannot be read, or does not compute as the original does.
    """
    start = _read(source, options or ReadOptions())[1]
    return dataclasses.replace(start, model=start.model.base_model) if is_classifier(start.model) else start


def convert(
    source: str, output: Path, to: str = "cjepa", encoder: str | None = None, options: ReadOptions | None = None
) -> Conversion:
    """
    Writes a model in another format.

    Args:
        source (`str`): As in [`load_start`].
        output (`Path`): The folder or file to write.
        to (`str`, defaults to `"cjepa"`): The name of a format of [`FORMATS`] with a way out.
        encoder (`"target"` or `"context"`, *optional*): The encoder to write of a model of pre-training; when not
            given, all parts where the format has place for them, else the target encoder.
        options ([`ReadOptions`], *optional*): What the source does not say; its `encoder` is the one above.

    Returns:
        [`Conversion`].

    Raises:
        InputError: `output` exists, something does not fit, or what was written differs; nothing is written then.
    """
    if encoder not in (None, *_ENCODERS):
        raise InputError(f"--encoder {encoder} is not known; choose {' or '.join(_ENCODERS)}.")
    target_format = format_named(to)
    _check_output(output, target_format)
    options = dataclasses.replace(options or ReadOptions(), encoder=encoder or "target")
    source_format, converted = _read(source, options)
    if source_format.name == "authors" and not isinstance(converted.model, CJepaForPreTraining):
        encoder = None  # of a file without predictor the reader has taken the one that was asked for
    model, notes = _part_to_write(converted.model, target_format, encoder)
    notes = [*converted.notes, *notes]
    if target_format.notes:
        notes += function(target_format.notes)(model)
    processor = converted.processor
    if processor is None:
        processor = _default_processor(model.config)
        if not target_format.suffix:
            notes.append("The source has no image processor; ImageNet's mean and standard deviation are assumed.")
    checks = [converted.check] if converted.check else []
    named = _mistakes_named(f"{output} cannot be written", "name another OUTPUT, or another --to")
    with named, full_disk_named(output.parent):
        _write(target_format, model, processor, output, source, source_format, checks, notes)
    return Conversion(source_format, target_format, checks, notes)


def _check_output(output: Path, target: Format):
    """Refuses a place that is taken, or cannot be one, before anything is read."""
    if "\0" in str(output):
        raise InputError(f"{str(output)!r} is no name of a file; choose another OUTPUT.")
    if os.path.lexists(output):
        raise InputError(f"{output} exists already; choose another OUTPUT or remove it.")
    suffix = next((suffix for suffix in _FILE_SUFFIXES if output.name.endswith(suffix)), None)
    if suffix and not target.suffix:
        raise InputError(f"{output} is to be a folder, of {target.what}; give a name without {suffix}.")
    above = next(folder for folder in output.absolute().parents if os.path.exists(folder))
    if not above.is_dir():
        raise InputError(f"{output} lies in {above}, which is a file; choose another OUTPUT.")


def _read(source: str, options: ReadOptions) -> tuple[Format, Converted]:
    with _mistakes_named(f"{source} cannot be read", "copy or save it again"):
        source_format, opened = open_source(source)
    for name in ("image_size", "num_attention_heads"):
        value = getattr(options, name)
        if value is not None and name not in source_format.asks:
            raise InputError(f"--{name} {value}: {source} says so itself ({source_format.what}); leave it out.")
        if value is not None and value < 1:
            raise InputError(f"--{name} {value} must be 1 or more.")
    with _mistakes_named(f"{source} cannot be read as {source_format.what}", "copy or save it again"):
        converted = function(source_format.reader)(opened, options)
    converted = dataclasses.replace(converted, notes=converted.notes + _rounding_notes(opened))
    if converted.processor is not None:
        check_processor(converted.processor, converted.model.config.num_channels, source)
    return source_format, converted


@contextmanager
def _mistakes_named(what: str, advice: str):
    """Whatever is raised as one sentence: a file of others can be wrong in any way, and each is the file's mistake."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({type(error).__name__}: {first_line(error)}); {advice}.") from error


def _rounding_notes(opened: Source) -> list[str]:
    is_double = "float64" in ((opened.config or {}).get(name) for name in ("dtype", "torch_dtype"))
    return [ROUNDED_NOTE] if is_double else rounding_notes(opened.tensors or {})


def _part_to_write(model: PreTrainedModel, target: Format, encoder: str | None) -> tuple[PreTrainedModel, list[str]]:
    """The model, or the encoder of it, that goes into a format, and what stays behind."""
    if is_classifier(model):
        part = model if target.writes_any and encoder is None else encoder_of(model, encoder)
        notes = [] if part is model else ["Only the encoder is written; the classifier is left out."]
    elif target.writes_all and encoder is None:
        part, notes = model, []
    else:
        part, notes = encoder_of(model, encoder), []
        if isinstance(model, CJepaForPreTraining):
            other = "target" if encoder == "context" else "context"
            written = f"Only the {encoder or 'target'} encoder is written"
            notes = [f"{written}; {other} encoder and predictor are left out."]
    if not target.writes_any:
        plain_encoder_only(part, target.what)
    return part, notes


def _write(target: Format, model, processor, output: Path, source: str, source_format: Format, checks, notes):
    writer = function(target.writer)
    if target.suffix:
        if not output.name.endswith(target.suffix):
            raise InputError(f"{output} is to be a file of {target.what}; give a name that ends in {target.suffix}.")
        for leftover in leftovers(output):
            leftover.unlink()
        with whole_file(output) as unfinished:
            _tell(writer(model, processor, unfinished), checks, notes)
        return
    with whole_folder(output) as unfinished:
        _tell(writer(model, processor, unfinished), checks, notes)
        if target.name == "cjepa":
            facts = {"source": source, "format": source_format.what, "notes": [], "checks": []}
            facts |= _former_conversion(source) if source_format.name == "cjepa" else {}
            facts["notes"] += notes
            facts["checks"] += [check.sentence() for check in checks]
            write_json(unfinished / CONVERSION, public_facts(facts))
            write_card(unfinished, card_kind(model), known_facts(unfinished, model), str(output))


def _former_conversion(source: str) -> dict:
    """What is known of where a model of ours came from before it was ours."""
    place = newest_model(source)
    return read_json(place, CONVERSION) or read_json(place, "results.json").get("conversion", {})


def _tell(written: Written, checks: list[Check], notes: list[str]):
    checks.append(written.check)
    notes += written.notes


def _default_processor(config):
    colours = config.num_channels == 3
    usual = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if colours else ([0.5] * config.num_channels,) * 2
    mean, std = map(list, usual)
    return image_processor(pair(config.image_size), mean, std)
