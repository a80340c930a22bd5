"""Graphs for other runtimes, beside the models they were made from."""

import json

import numpy as np
import pytest
import torch
from tiny import TRANSFORMER, images, sjea_level, tiny_config, tiny_model, tiny_sjea
from transformers import AutoImageProcessor, ViTImageProcessor

from modeling_cjepa import CJepaForImageClassification, CJepaModel
from trainers.conversion.graphs import OPSET, export_onnx, export_program, image_step
from trainers.errors import InputError

# batches and sizes that the graphs were not made with, of patches of 4 pixels merged by 2 in the stack
SIZES = [(1, 32, 32), (5, 16, 48), (2, 64, 24)]


def made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def stack():
    return CJepaModel(tiny_config(num_hidden_layers=1, upper_levels=[{}])).eval()


def encoder():
    return tiny_model(num_hidden_layers=1).cjepa.eval()


def classifier():
    return CJepaForImageClassification(
        tiny_config(num_labels=3, num_hidden_layers=1, classifier_pooling="last4")
    ).eval()


def tokens():
    return tiny_sjea(sjea_level(), sjea_level(backbone=TRANSFORMER, stem="standard", input="tokens")).sjea.eval()


def folded():
    return tiny_sjea(sjea_level(stem="standard"), sjea_level(reads="expanded")).sjea.eval()


def outputs(model, pixels):
    with torch.no_grad():
        given = model(pixels)
    return [given.logits] if "logits" in given else [given.last_hidden_state, given.pooler_output]


def run_onnx(folder, pixels):
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / "model.onnx")
    return session.run(None, {"pixel_values": pixels.numpy()})


@pytest.mark.parametrize("make", [encoder, classifier, folded])
def test_onnx_runtime_gives_the_models_numbers(make, tmp_path):
    onnx = pytest.importorskip("onnx")
    model = make()
    written = export_onnx(model, None, made(tmp_path / "graph"))
    assert written.check.difference <= written.check.limit
    for size in SIZES:
        for ours, theirs in zip(
            run_onnx(tmp_path / "graph", images(*size)), outputs(model, images(*size)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
    graph = onnx.load(tmp_path / "graph" / "model.onnx")
    facts = {entry.key: entry.value for entry in graph.metadata_props}
    assert (graph.opset_import[0].version, facts["opset"]) == (OPSET, str(OPSET))
    assert f"opset {OPSET}" in written.notes[0]


@pytest.mark.parametrize("make", [stack, classifier, folded])
def test_a_loaded_program_gives_the_models_numbers(make, tmp_path):
    model = make()
    export_program(model, None, made(tmp_path / "graph"))
    program = torch.export.load(tmp_path / "graph" / "model.pt2").module()
    for size in SIZES:
        for ours, theirs in zip(program(images(*size)), outputs(model, images(*size)), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_published_model_itself_is_exported_with_free_sizes():
    model = tiny_model().cjepa.eval()
    rows, columns = torch.export.Dim("rows", min=2), torch.export.Dim("columns", min=2)
    shapes = {"pixel_values": {0: torch.export.Dim("batch"), 2: 4 * rows, 3: 4 * columns}}
    program = torch.export.export(model, (), {"pixel_values": images(2)}, dynamic_shapes=shapes)
    pixels = images(3, 16, 40)
    torch.testing.assert_close(program.module()(pixel_values=pixels).last_hidden_state, outputs(model, pixels)[0])


def test_a_stack_that_reads_one_size_only_has_a_free_batch(tmp_path):
    pytest.importorskip("onnx")
    model = tokens()
    written = export_onnx(model, None, made(tmp_path / "graph"))
    assert "must be 32x32" in written.notes[1]
    for ours, theirs in zip(run_onnx(tmp_path / "graph", images(7)), outputs(model, images(7)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (stack, (8, 8)),
        (lambda: CJepaModel(tiny_config(upper_levels=[{"num_hidden_layers": 1}], level=0)), (4, 4)),
        (lambda: CJepaModel(tiny_config(patch_size=[8, 4])), (8, 4)),
        (folded, (1, 1)),
        (lambda: tiny_sjea(sjea_level(), sjea_level(input="map")).sjea, (1, 1)),
        (lambda: tiny_sjea(sjea_level(backbone=TRANSFORMER | {"patch_size": 4}, stem="standard")).sjea, (4, 4)),
        (tokens, None),
    ],
)
def test_the_sizes_of_images(make, step):
    assert image_step(make()) == step


def test_the_folder_has_what_a_user_needs(tmp_path):
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    model = tiny_model()
    export_program(model, processor, made(tmp_path / "graph"))
    assert list(AutoImageProcessor.from_pretrained(tmp_path / "graph").image_mean) == [0.1, 0.2, 0.3]
    assert json.loads((tmp_path / "graph" / "config.json").read_text())["model_type"] == "cjepa"
    assert model.training, "the caller's model stays as it was"


def test_numbers_that_differ_are_refused(tmp_path, monkeypatch):
    """A graph of another model, as a broken exporter would make it."""
    model, other = tiny_model().cjepa, tiny_model().cjepa
    other.layernorm.weight.data += 0.01
    program = torch.export.export

    def of_the_other(graph, *args, **kwargs):
        graph.model.load_state_dict(other.state_dict())
        made = program(graph, *args, **kwargs)
        graph.model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
        return made

    monkeypatch.setattr(torch.export, "export", of_the_other)
    with pytest.raises(InputError, match="torch.export on 6 batches of 3 sizes"):
        export_program(model, None, made(tmp_path / "graph"))
