"""Models with 8-bit weights, loaded again by transformers."""

import subprocess
import sys

import pytest
import torch
from tiny import TRANSFORMER, images, sjea_level, tiny_config, tiny_model, tiny_sjea
from transformers import AutoModel

from modeling_cjepa import CJepaForImageClassification
from trainers.conversion.int8 import export_int8
from trainers.errors import InputError

LOAD = """
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained({folder!r}, trust_remote_code=True).eval()
assert not any(name.split(".")[0] in ("modeling_cjepa", "trainers") for name in sys.modules)
torch.manual_seed(0)
torch.save(model(torch.randn(2, 3, 32, 32)).pooler_output.detach(), {file!r})
"""


def made(folder):
    folder.mkdir(exist_ok=True)
    return folder


def encoder():
    return tiny_model(hidden_size=64, intermediate_size=128).cjepa.eval()


@pytest.mark.parametrize("activations", [False, True])
def test_a_process_without_this_package_loads_it(activations, tmp_path):
    pytest.importorskip("torchao")
    model, folder, file = encoder(), tmp_path / "int8", tmp_path / "features.pt"
    written = export_int8(model, None, made(folder), activations=activations)
    assert 0 < written.check.difference <= written.check.limit
    program = LOAD.format(folder=str(folder), file=str(file))
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True, capture_output=True)
    torch.manual_seed(0)
    with torch.no_grad():
        features = model(torch.randn(2, 3, 32, 32)).pooler_output
    loaded = torch.load(file)
    assert 0 < (loaded - features).abs().max() < 0.1 * features.abs().max()
    assert torch.nn.functional.cosine_similarity(loaded, features).min() > 0.99


def test_weights_are_whole_numbers_in_safetensors(tmp_path):
    pytest.importorskip("torchao")
    model = encoder()
    export_int8(model, None, made(tmp_path / "int8"))
    model.save_pretrained(tmp_path / "float32")
    before, after = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("float32", "int8"))
    assert after < 0.5 * before
    loaded = AutoModel.from_pretrained(tmp_path / "int8")
    weight = loaded.layers[0].mlp.fc1.weight
    assert weight.qdata.dtype == torch.int8
    # each number is the nearest of 255 between the largest of its row and minus that
    original = model.layers[0].mlp.fc1.weight.detach()
    step = original.abs().amax(dim=1, keepdim=True) / 127
    assert ((weight.dequantize() - original).abs() <= 0.52 * step + 1e-6).all()
    assert type(model.layers[0].mlp.fc1.weight) is torch.nn.Parameter, "the caller's model stays as it was"


def test_heads_stay_in_full(tmp_path):
    pytest.importorskip("torchao")
    config = tiny_config(hidden_size=64, num_labels=3, classifier_pooling="attentive")
    export_int8(CJepaForImageClassification(config), None, made(tmp_path / "int8"))
    loaded = CJepaForImageClassification.from_pretrained(tmp_path / "int8")
    assert loaded.classifier.weight.dtype == loaded.pooling.fc1.weight.dtype == torch.float32
    assert hasattr(loaded.cjepa.layers[1].attention.q_proj.weight, "qdata")


def test_a_stack_of_s_jea(tmp_path):
    pytest.importorskip("torchao")
    transformer = sjea_level(backbone=TRANSFORMER | {"patch_size": 4}, stem="standard")
    model = tiny_sjea(transformer, sjea_level(reads="expanded")).eval()
    written = export_int8(model, None, made(tmp_path / "int8"))
    loaded = AutoModel.from_pretrained(tmp_path / "int8").eval()
    assert "6 linear layers" in written.notes[0]
    with torch.no_grad():
        ours, theirs = loaded(images(2)).pooler_output, model.sjea(images(2)).pooler_output
    assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


def test_what_has_nothing_to_quantise_is_refused(tmp_path):
    pytest.importorskip("torchao")
    with pytest.raises(InputError, match="no linear layers in transformer blocks"):
        export_int8(tiny_sjea(), None, made(tmp_path / "int8"))


def test_another_model_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    monkeypatch.setattr("trainers.conversion.int8.DIFFERENCE_LIMIT", 1e-4)
    with pytest.raises(InputError, match="float32 on 8 random images"):
        export_int8(encoder(), None, made(tmp_path / "int8"))
