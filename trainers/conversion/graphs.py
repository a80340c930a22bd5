"""Encoders and classifiers as graphs for other runtimes: ONNX, and programs of `torch.export`.

The batch may have any size, and so may the images where the model allows it: a vision transformer's are multiples of
its patches, whose positions are computed in the graph, a ResNet's are free, and a stack's are fixed if one of its
levels reads only images of the configured size. What was written is read again and compared with the model.
"""

import copy
import io
import json
import math
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export import Dim
from transformers import PreTrainedModel

from modeling_cjepa import (
    CJepaForPreTraining,
    CJepaModel,
    SJeaForPreTraining,
)
from modeling_cjepa.configuration_cjepa import choose_level, pair
from trainers.conversion.checks import Check, Written, compare
from trainers.conversion.outputs import output_names, require
from trainers.errors import InputError
from trainers.files import write_json
from trainers.model_facts import is_classifier

OPSET = 20
# backbones that pool whatever map they make of an image
_CONVOLUTIONAL = ("resnet", "regnet")


def export_onnx(model: PreTrainedModel, processor, folder: Path) -> Written:
    """
    Writes a model as an ONNX graph of opset 20: `model.onnx`, `config.json` and, with a processor,
    `preprocessor_config.json`; weights of 2 GB or more lie beside the graph in `model.onnx.data`.

    The graph reads `pixel_values` (batch, channels, height, width), float32, and gives `last_hidden_state` and
    `pooler_output`, of the level `config.level` of a stack, or a classifier's `logits`.

    Args:
        model (`PreTrainedModel`): An encoder or a classifier; of a pre-training model the encoder is taken.
        processor: The image processor whose settings are written; None leaves them out.
        folder (`Path`): An existing folder.

    Returns:
        [`Written`]: The check is by ONNX Runtime, of the file that was written.

    Raises:
        InputError: ONNX's packages are not installed, the model is quantised, or the graph gives
            other numbers than the model.
    """
    _, _, runtime = require("onnx", "onnx", "onnxscript", "onnxruntime")
    graph = _Graph(model)
    with _quiet():
        program = torch.onnx.export(
            graph.program(),
            dynamo=True,
            opset_version=OPSET,
            input_names=["pixel_values"],
            output_names=list(graph.names),
            dynamic_shapes=({**graph.dynamic, **graph.free_names},),
            verbose=False,
        )
        facts = {"opset": OPSET, "model_type": graph.config.model_type, "image_size": graph.size_sentence()}
        program.model.metadata_props.update({name: str(fact) for name, fact in facts.items()})
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # where the code lay on this machine
        path = folder / "model.onnx"
        program.save(path)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        check = graph.check(
            "ONNX Runtime", lambda images: map(torch.from_numpy, session.run(None, {"pixel_values": images.numpy()}))
        )
        _write_settings(graph, processor, folder)
    return Written(check, [f"The graph is of ONNX opset {OPSET}.", graph.size_sentence()])


def export_program(model: PreTrainedModel, processor, folder: Path) -> Written:
    """
    Writes a model as a program of `torch.export`: `model.pt2`, and the same files beside it as [`export_onnx`].

    `torch.export.load("model.pt2").module()(pixel_values)` gives the outputs that [`export_onnx`] names, in that
    order.

    Args:
        model, processor, folder: As of [`export_onnx`].

    Returns:
        [`Written`]: The check is of the file, loaded again.

    Raises:
        InputError: The model is quantised, or the program gives other numbers than the model.
    """
    graph = _Graph(model)
    with _quiet():
        program = graph.program()
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # where the code lay on this machine
        path, written = folder / "model.pt2", io.BytesIO()
        torch.export.save(program, written)
        path.write_bytes(written.getbuffer())  # torch's own writer ends the process where a disk is full
        check = graph.check("torch.export", torch.export.load(path).module())
        _write_settings(graph, processor, folder)
    return Written(check, [f"The program was made by torch {torch.__version__}.", graph.size_sentence()])


def image_step(model: PreTrainedModel) -> tuple[int, int] | None:
    """
    Of which height and width the images a model reads must be multiples, in pixels.

    Args:
        model (`PreTrainedModel`): An encoder or a classifier.

    Returns:
        `(int, int)`: `(1, 1)` for images of any size; None where the configured size is the only one.
    """
    if is_classifier(model):
        model = model.base_model
    if isinstance(model, CJepaModel):
        level = choose_level(model.config.level, model.config.num_levels)
        sizes = [pair(model.config.patch_size), *model.merges[:level]]
        return math.prod(size[0] for size in sizes), math.prod(size[1] for size in sizes)
    lowest, *above = model.levels[: choose_level(model.config.level, len(model.levels)) + 1]
    may_vary = lowest.backbone_config.model_type in _CONVOLUTIONAL or isinstance(lowest.backbone, CJepaModel)
    for below, level in zip([lowest, *above], above, strict=False):
        # a vector is as wide for images of any size
        if level.config.input == "vector":
            break
        both = {below.backbone_config.model_type, level.backbone_config.model_type}
        may_vary = may_vary and level.config.input == "map" and both <= set(_CONVOLUTIONAL)
    if not may_vary:
        return None
    return image_step(lowest.backbone) if isinstance(lowest.backbone, CJepaModel) else (1, 1)


class _Graph(nn.Module):
    """A model as a function of `pixel_values` alone to a tuple of tensors, on the CPU, in float32, in evaluation."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        if isinstance(model, CJepaForPreTraining | SJeaForPreTraining):
            model = model.base_model
        if getattr(model, "hf_quantizer", None) is not None:
            raise InputError("A quantised model cannot be written as a graph; convert the one it was made from.")
        # of its own: the caller's model shall stay on its device, in its precision and mode
        self.model = copy.deepcopy(model).cpu().float().eval()
        self.model.set_attn_implementation("sdpa")
        self.config = model.config
        self.names = output_names(model)
        self.step = image_step(model)
        height, width = pair(self.config.image_size)
        if self.step is not None:
            # a graph made with a grid of one row would be one of a single row; a rest that fills no patch is cropped
            height, width = (
                max(2, side // step) * step for side, step in zip((height, width), self.step, strict=True)
            )
        self.size = (height, width)
        self.dynamic, self.free_names = {0: Dim("batch")}, {}
        if self.step == (1, 1):
            # the sizes a convolution's arithmetic allows are found by torch, which then gives them no names
            self.dynamic |= {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
            self.free_names = {2: "height", 3: "width"}
        elif self.step is not None:
            self.dynamic |= {2: self.step[0] * Dim("rows", min=2), 3: self.step[1] * Dim("columns", min=2)}

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(pixel_values, return_dict=True)
        return tuple(outputs[name] for name in self.names)

    def _images(self, count: int, size: tuple[int, int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, self.config.num_channels, *size, generator=generator)

    def program(self) -> torch.export.ExportedProgram:
        images = self._images(2, self.size)
        # a ResNet's last map may have one row at the configured size, more at others: torch shall not tell them apart
        alike = self.step == (1, 1)
        with torch.no_grad(), torch.fx.experimental._config.patch(backed_size_oblivious=alike):
            return torch.export.export(self, (images,), dynamic_shapes=(self.dynamic,))

    def check(self, what: str, run) -> Check:
        """Compares with what `run` gives for images; it reads and gives tensors."""
        height, width = self.size
        sizes = [self.size]
        if self.step is not None:
            rows, columns = (17, 16) if self.step == (1, 1) else self.step
            sizes += [(height, width + columns), (height + 2 * rows, width)]
        batches = [self._images(batch, size) for size in sizes for batch in (1, 3)]
        with torch.no_grad():
            ours = [output for images in batches for output in run(images)]
            theirs = [output for images in batches for output in self(images)]
        shown = "3 sizes" if len(sizes) > 1 else "one size"
        return compare(f"{what} on {len(batches)} batches of {shown}", ours, theirs)

    def size_sentence(self) -> str:
        """What images it reads."""
        if self.step is None:
            return f"Images must be {self.size[0]}x{self.size[1]}, as a level reads no others; the batch may vary."
        if self.step == (1, 1):
            return "Images and batches may have any size."
        rows, columns = self.step
        return f"Heights must be multiples of {rows}, widths of {columns}, two of them or more; the batch may vary."


def _write_settings(graph: _Graph, processor, folder: Path):
    graph.config.save_pretrained(folder)
    path = folder / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("auto_map", None)  # the code is in the graph
    write_json(path, fields)
    for code in folder.glob("*.py"):
        code.unlink()
    if processor is not None:
        processor.save_pretrained(folder)


@contextmanager
def _quiet():
    """Without torch's notes to developers of exporters."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*|onnxscript\..*|copyreg")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*|onnxscript\..*|copyreg")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield
