"""`cjepa convert` to graphs and 8 bits, and from ResNets' files, by the command."""

import json

import pytest
import torch
import torchvision
from test_sjea_authors import make
from tiny import images, sjea_level, tiny_config, tiny_model, tiny_sjea
from transformers import AutoModelForPreTraining

from modeling_cjepa import CJepaForImageClassification
from trainers.cli import main
from trainers.loading import load_model
from trainers.publishing import save_model
from trainers.transforms import image_processor


@pytest.fixture
def saved(tmp_path):
    """Saves a model as a run does."""

    def save(model):
        (tmp_path / "start").mkdir()
        save_model(model, image_processor((32, 32), [0.5] * 3, [0.5] * 3), tmp_path / "start")
        return str(tmp_path / "start")

    return save


def test_an_encoder_and_a_classifier_are_graphs_for_onnx_runtime(saved, tmp_path, capsys):
    runtime = pytest.importorskip("onnxruntime")
    model = CJepaForImageClassification(tiny_config(num_labels=3)).eval()
    assert main(["convert", saved(model), str(tmp_path / "graph"), "--to", "onnx"]) == 0
    told = capsys.readouterr().out
    assert "opset 20" in told and "checked against ONNX Runtime" in told
    assert (tmp_path / "graph/preprocessor_config.json").is_file()
    # where the code lay on this machine is nobody else's business
    assert not any(b"modeling_cjepa/" in path.read_bytes() for path in (tmp_path / "graph").iterdir())
    assert "auto_map" not in json.loads((tmp_path / "graph/config.json").read_text())
    session = runtime.InferenceSession(tmp_path / "graph/model.onnx", providers=["CPUExecutionProvider"])
    for batch in (images(2), images(3, height=48, width=32)):
        (logits,) = session.run(None, {"pixel_values": batch.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(batch).logits, rtol=1e-4, atol=1e-5)


def test_the_context_encoder_is_a_program(saved, tmp_path, capsys):
    model = tiny_model().eval()
    command = ["convert", saved(model), str(tmp_path / "program"), "--to", "program", "--encoder", "context"]
    assert main(command) == 0
    assert "Only the context encoder is written" in capsys.readouterr().out
    assert b"modeling_cjepa/" not in (tmp_path / "program/model.pt2").read_bytes()
    program = torch.export.load(tmp_path / "program/model.pt2").module()
    with torch.no_grad():
        expected = model.context_encoder(images(3)).last_hidden_state
        torch.testing.assert_close(program(images(3))[0], expected, rtol=1e-5, atol=1e-5)


def test_eight_bits_are_told_in_the_configuration(saved, tmp_path, capsys):
    pytest.importorskip("torchao")
    start = saved(tiny_model())
    assert main(["convert", start, str(tmp_path / "int8"), "--to", "int8"]) == 0
    assert "8-bit" in capsys.readouterr().out
    config = json.loads((tmp_path / "int8/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "torchao"


def test_what_cannot_be_eight_bits_leaves_nothing_behind(saved, tmp_path, capsys):
    pytest.importorskip("torchao")
    start = saved(tiny_sjea())
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["convert", start, str(tmp_path / "int8"), "--to", "int8"]) == 2
    assert "no linear layers" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_resnet_s_file_is_level_0(tmp_path, capsys):
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    # as VICReg's own training saves it
    trained = {f"module.backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 1, "model": trained | {"module.projector.0.weight": torch.zeros(2)}}, tmp_path / "resnet.pth")
    assert main(["convert", str(tmp_path / "resnet.pth"), str(tmp_path / "ours"), "--image_size", "64"]) == 0
    told = capsys.readouterr().out
    assert "expander starts anew" in told and "projector, which is left out" in told
    theirs.fc = torch.nn.Identity()
    model = load_model(tmp_path / "ours").eval()
    with torch.no_grad():
        batch = images(2, height=64, width=64)
        torch.testing.assert_close(model.sjea(batch).pooler_output, theirs(batch), rtol=1e-4, atol=1e-5)


def test_the_s_jea_authors_file_is_a_stack(tmp_path, capsys):
    torch.save(make("both")[-1], tmp_path / "latest_checkpoint.ckpt")
    assert main(["convert", str(tmp_path / "latest_checkpoint.ckpt"), str(tmp_path / "ours")]) == 0
    assert "authors' S-JEA code" in capsys.readouterr().out
    assert AutoModelForPreTraining.from_pretrained(tmp_path / "ours").config.num_levels == 2


def test_a_stack_goes_on_from_an_s_jea_stack(saved, tmp_path):
    assert main(["convert", saved(tiny_sjea(sjea_level())), str(tmp_path / "again")]) == 0
    again = load_model(tmp_path / "again").state_dict()
    assert all(
        torch.equal(tensor, again[name]) for name, tensor in load_model(tmp_path / "start").state_dict().items()
    )
