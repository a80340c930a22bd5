"""Sources that are made to hang, to run over or to reach elsewhere, and places that cannot be written to."""

import json
from pathlib import Path

import pytest
import torch
from formats import same_weights, save_native
from test_refused_sources import HEADS, refused
from transformers import IJepaConfig, IJepaModel

from trainers.conversion.converting import convert
from trainers.conversion.formats import ReadOptions
from trainers.errors import InputError
from trainers.loading import load_model

SIZES = [
    ("num_hidden_layers", 10**9), ("hidden_size", 10**7), ("image_size", 10**7), ("patch_size", 0),
    ("patch_size", [4, 0]), ("num_attention_heads", 0),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), SIZES)
@pytest.mark.parametrize("kind", ["ours", "ijepa"])
def test_sizes_that_no_encoder_has_are_refused_before_it_is_begun(kind, field, value, folder, tmp_path):
    if kind == "ijepa":
        save_native(IJepaModel, IJepaConfig, tmp_path / "ijepa")
        folder = tmp_path / "ijepa"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    refused(f"{field}=.*no size of an encoder", str(folder), output=tmp_path / "out")


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpoint_path": "/etc/passwd"},
        {"pretrained_cfg": {"file": "/etc/passwd"}},
        {"depth": 10**6},
        {"scriptable": True},
    ],
)
def test_timm_s_arguments_that_name_files_are_refused(changes, ours, folder, tmp_path):
    convert(str(folder), tmp_path / "timm", to="timm")
    config = json.loads((tmp_path / "timm/config.json").read_text())
    config["model_args"] |= changes
    (tmp_path / "timm/config.json").write_text(json.dumps(config))
    refused(
        "none of timm's vision transformers|no size of an encoder", str(tmp_path / "timm"), output=tmp_path / "out"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "__import__"}, {"quantization_config": 7}, {"quantization_config": {"quant_method": "gptq"}},
        {"dtype": "evil"}, {"architectures": 7}, {"transformers_weights": "../x"},
    ],
)  # fmt: skip
def test_whatever_is_wrong_with_a_configuration_is_one_sentence(changes, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused("ours", str(folder), output=tmp_path / "out")


def test_dictionaries_without_end_are_refused(tmp_path):
    laughs = {"a": torch.zeros(1)}
    for _ in range(28):
        laughs = {"a": laughs, "b": laughs}
    torch.save(laughs, tmp_path / "laughs.pth")
    refused("without end", str(tmp_path / "laughs.pth"), output=tmp_path / "out")
    torch.save({"encoder": {"a": torch.zeros(2, 2).to_sparse()}}, tmp_path / "sparse.pth")
    refused("without plain numbers", str(tmp_path / "sparse.pth"), output=tmp_path / "out")


def test_places_that_cannot_be_are_refused_first(folder, tmp_path):
    (tmp_path / "file.txt").write_text("")
    for output, message in (
        (tmp_path / "file.txt" / "x", "which is a file"), (tmp_path / "m.onnx", "is to be a folder"),
        (Path("a\0b"), "is no name of a file"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            convert(str(folder), output, to="onnx")
    refused("leave it out", str(folder), output=tmp_path / "out", options=ReadOptions(image_size=64))
    refused("SOURCE is empty", "", output=tmp_path / "out")


def test_the_encoder_that_is_asked_for_comes_in_and_goes_out_alone(folder, ours, tmp_path):
    convert(str(folder), tmp_path / "alone", encoder="target")
    assert same_weights(load_model(tmp_path / "alone"), ours.cjepa)
    convert(str(folder), tmp_path / "both.pth.tar", to="authors")
    both = torch.load(tmp_path / "both.pth.tar", weights_only=True)
    torch.save({name: both[name] for name in ("encoder", "target_encoder")}, tmp_path / "two.pth.tar")
    for encoder, expected in (("context", ours.context_encoder), ("target", ours.cjepa), (None, ours.cjepa)):
        convert(str(tmp_path / "two.pth.tar"), tmp_path / f"{encoder}", encoder=encoder, options=HEADS)
        assert same_weights(load_model(tmp_path / f"{encoder}"), expected)


def test_a_folder_of_8_bits_is_no_source(folder, tmp_path):
    pytest.importorskip("torchao")
    convert(str(folder), tmp_path / "int8", to="int8")
    refused("has 8-bit weights", str(tmp_path / "int8"), output=tmp_path / "out")
