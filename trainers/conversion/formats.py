"""The formats a model can come in and go out by, and which of them a source is in."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from trainers.doctor_runs import newest_model
from trainers.errors import InputError
from trainers.source_configs import no_model_named, read_config


@dataclass(frozen=True)
class Format:
    """
    A format, by names of functions in this package, `module.function`, that are imported when they are needed.

    Args:
        name (`str`): What `--to` calls it.
        what (`str`): What it is, for `--help` and sentences.
        reader (`str`): Of `(Source, ReadOptions)` to [`Converted`]; empty where there is no way in.
        writer (`str`): Of `(model, processor, path)` to [`Written`]; writes into an existing folder, or the file of
            that path. Empty where there is no way out.
        notes (`str`): Of the model that is written to a list of sentences on what the format has no place for.
        holds (`str`): Of a file's tensors to whether they are in this format.
        model_types (`tuple` of `str`): `model_type` of the `config.json` of such a folder.
        suffix (`str`): What the name of the file ends in that the writer writes; empty where it writes a folder.
        writes_all (`bool`): Whether a model of pre-training goes out whole; else one of its encoders does.
        asks (`tuple` of `str`): Fields of [`ReadOptions`] that the reader needs, where the source does not say.
        writes_any (`bool`): Whether every model of this package can go out, stacks and S-JEA, too.
    """

    name: str
    what: str
    reader: str = ""
    writer: str = ""
    notes: str = ""
    holds: str = ""
    model_types: tuple[str, ...] = ()
    suffix: str = ""
    asks: tuple[str, ...] = ()
    writes_all: bool = False
    writes_any: bool = False


@dataclass(frozen=True)
class Source:
    """
    What is read.

    Args:
        name (`str`): As the user names it: a file, a folder, an id on the Hub, or `timm:` and a name of timm's.
        tensors (`dict`, *optional*): Those of a file.
        config (`dict`, *optional*): The `config.json` of a folder or an id.
    """

    name: str
    tensors: dict | None = None
    config: dict | None = None


@dataclass(frozen=True)
class ReadOptions:
    """
    What a source does not say of itself.

    Args:
        encoder (`"target"` or `"context"`, defaults to `"target"`): The encoder to take of a file without predictor.
        image_size, num_attention_heads (`int`, *optional*): Where the format has no place for them.
        heads_by_width (`dict[int, int]`, *optional*): Attention heads by the width of encoders, if not published.
    """

    encoder: str = "target"
    image_size: int | None = None
    num_attention_heads: int | None = None
    heads_by_width: dict[int, int] | None = None


_START = "other_vits.read_start"

# fmt: off
FORMATS = (
    Format("cjepa", "a model of this package", "ours.read_ours", "ours.write_ours",
           model_types=("cjepa", "sjea"), writes_all=True, writes_any=True),
    Format("authors", "a checkpoint of the authors' I-JEPA code", "ijepa_authors.read_authors",
           "ijepa_authors.write_authors", notes="ijepa_authors.notes_of_authors", holds="ijepa_authors.holds_authors",
           suffix=".pth.tar", writes_all=True, asks=("image_size", "num_attention_heads")),
    Format("ijepa", "transformers' IJepaModel", "ijepa_transformers.read_ijepa",
           "ijepa_transformers.write_ijepa_model", model_types=("ijepa",)),
    Format("timm", "a vision transformer of timm without class token", "timm_ijepa.read_timm",
           "timm_ijepa.write_timm"),
    Format("sjea-authors", "a checkpoint of the authors' S-JEA code", "sjea_authors.read_sjea",
           holds="sjea_authors.holds_sjea", asks=("image_size",)),
    Format("resnet", "a ResNet by torchvision's names, such as VICReg's resnet50.pth", "vicreg_resnet.read_resnet",
           holds="vicreg_resnet.holds_resnet", asks=("image_size",)),
    Format("dinov2", "transformers' DINOv2, as a start", _START, model_types=("dinov2", "dinov2_with_registers")),
    Format("vit_mae", "transformers' ViT-MAE, as a start", _START, model_types=("vit_mae",)),
    Format("vit", "transformers' ViT, DeiT or ViT-MSN, as a start", _START, model_types=("vit", "deit", "vit_msn")),
    Format("onnx", "an ONNX graph, for any batch and images of multiples of the patch",
           writer="graphs.export_onnx", writes_any=True),
    Format("program", "a program of torch.export, for any batch and images of multiples of the patch",
           writer="graphs.export_program", writes_any=True),
    Format("int8", "8-bit weights by torchao, as a folder of ours", writer="int8.export_int8", writes_any=True),
    Format("int8-activations", "8-bit weights and activations by torchao", writer="int8.export_int8_activations",
           writes_any=True),
)
# fmt: on


def function(name: str) -> Callable:
    """A function of this package by `module.function`."""
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(f"trainers.conversion.{module}"), attribute)


def format_named(name: str) -> Format:
    """
    A format to write.

    Raises:
        InputError: There is no way out to a format of that name.
    """
    writable = {each.name: each for each in FORMATS if each.writer}
    if name not in writable:
        raise InputError(f"--to {name} is not known; choose one of {', '.join(writable)}.")
    return writable[name]


def open_source(name: str) -> tuple[Format, Source]:
    """
    Finds out which format a source is in; nothing of it is run.

    Args:
        name (`str`): A file, a folder, an id on the Hub, or `timm:` and a name of timm's.

    Returns:
        `(Format, Source)`.

    Raises:
        InputError: There is no such source, it is in no format that is known, or it needs code of its own.
    """
    by_name = {each.name: each for each in FORMATS}
    if not name:
        raise InputError("SOURCE is empty; name a file, a folder, an id on the Hub, or a name of timm's.")
    if name.startswith("timm:"):
        return by_name["timm"], Source(name)
    if os.path.isfile(name):  # which has no name too long, as Path has
        return _open_file(name)
    if os.path.isdir(name):
        name = newest_model(name)
    missing = f"{name} is no file, no folder with a config.json and no id of a model on the Hub"
    with no_model_named(missing, "name one of these"):
        config = read_config(name)
    model_type = config.get("model_type")
    found = next((each for each in FORMATS if model_type in each.model_types), None)
    if config.get("auto_map") and not (found and found.name == "cjepa"):
        raise InputError(
            f"{name} needs code of its own (auto_map in its config.json), which is not run; give a model of a type "
            "that transformers has, or its weights in another format."
        )
    if "architecture" in config and model_type is None:
        return by_name["timm"], Source(name, config=config)
    if found is None:
        known = ", ".join(each for formats in FORMATS for each in formats.model_types)
        raise InputError(f"{name} is a model of type {model_type!r}; known are {known}, and models of timm.")
    return found, Source(name, config=config)


def _open_file(name: str) -> tuple[Format, Source]:
    from trainers.conversion.weight_files import read_weight_file

    tensors = read_weight_file(name)
    for each in FORMATS:
        if each.holds and function(each.holds)(tensors):
            return each, Source(name, tensors=tensors)
    known = "; ".join(each.what for each in FORMATS if each.holds)
    raise InputError(f"{name} is in no layout that is known (first: {', '.join(list(tensors)[:3])}); give {known}.")
