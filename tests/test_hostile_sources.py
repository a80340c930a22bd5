"""Sources that are made to hang, to run over or to reach elsewhere, and places that cannot be written to."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torchvision
from command_worker import ended_process
from formats import same_weights, save_native
from test_refused_sources import HEADS, refused
from transformers import IJepaConfig, IJepaModel

from trainers.backbones import _read_weights, describe_backbones
from trainers.conversion.converting import convert, load_start
from trainers.conversion.formats import ReadOptions
from trainers.errors import InputError
from trainers.files import full_disk_named
from trainers.loading import load_image_statistics, load_model
from trainers.publication import Publication

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


DEEP = [
    {"upper_levels": [{"num_hidden_layers": 100_000}]}, {"upper_levels": [{"hidden_size": 10**9}]},
    {"upper_levels": [[{"hidden_size": 1e9}]]}, {"upper_levels": [{}] * 101},
    {"upper_levels": [{"num_hidden_layers": 1_000}] * 2}, {"image_size": 10_000}, {"image_size": [4_000, 4_000]},
    {"num_register_tokens": 10**8}, {"pooler_output_size": 10**8}, {"levels": [{"backbone": {"depths": [10**6] * 3}}]},
    {"levels": [{"backbone": {"hidden_sizes": [10**6] * 3}}]}, {"levels": [{"backbone": {"embedding_size": 10**6}}]},
    {"levels": [{"expander_sizes": [10**6, 10**6]}]}, {"hidden_size": float("nan")},
]  # fmt: skip


@pytest.mark.parametrize("changes", DEEP, ids=str)
def test_sizes_are_looked_for_in_every_part_of_a_configuration(changes, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    refused("no size of an encoder", str(folder), output=tmp_path / "out")
    for load in (load_model, describe):
        with pytest.raises(InputError, match="no size of an encoder"):
            load(str(folder))


def describe(folder):
    return describe_backbones([{"backbone": folder}])


def test_an_attention_of_transformers_own_may_be_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"_attn_implementation": "sdpa"}))
    convert(str(folder), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("kind", ["ours", "ijepa"])
@pytest.mark.parametrize("field", ["configuration_files", "transformers_weights", "attn_implementation"])
def test_configurations_that_lead_elsewhere_are_refused_and_nothing_is_asked(
    kind, field, folder, tmp_path, monkeypatch
):
    trace = tmp_path / "trace"
    monkeypatch.setattr("builtins.input", lambda _: "y")
    if kind == "ijepa":
        save_native(IJepaModel, IJepaConfig, tmp_path / "ijepa")
        folder = tmp_path / "ijepa"
    (folder / "evil.py").write_text(
        f"open({str(trace)!r}, 'w')\nfrom transformers import PreTrainedConfig as C\nC.model_type = 'evil'\n"
    )
    (folder / "config.4.0.0.json").write_text('{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}')
    config = json.loads((folder / "config.json").read_text())
    config[field] = ["config.4.0.0.json"] if field == "configuration_files" else "other/kernel"
    (folder / "config.json").write_text(json.dumps(config))
    refused(f"has {field}", str(folder), output=tmp_path / "out")
    for load in (load_model, describe):
        with pytest.raises(InputError, match=f"has {field}"):
            load(str(folder))
    assert not trace.exists()


@pytest.mark.parametrize("load", [load_model, load_image_statistics, lambda folder: describe(folder)])
def test_whoever_loads_a_folder_is_not_asked_to_run_its_code(load, folder, tmp_path, monkeypatch):
    trace = tmp_path / "trace"
    monkeypatch.setattr("builtins.input", lambda _: "y")
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\n")
    wanted = {"model_type": "evil", "image_processor_type": "Evil"}
    wanted["auto_map"] = {"AutoConfig": "evil.C", "AutoImageProcessor": "evil.C"}
    for name in ("config.json", "preprocessor_config.json"):
        (folder / name).write_text(json.dumps(wanted))
    with pytest.raises(InputError):
        load(str(folder))
    assert not trace.exists()


def test_a_backbone_of_a_recipe_is_read_as_carefully(tmp_path):
    model = save_native(IJepaModel, IJepaConfig, tmp_path / "ijepa")
    tensors = model.state_dict()
    (tmp_path / "ijepa/model.safetensors").unlink()
    for added, message in (
        ({"a": torch.ones(1).expand(10**12)}, "claims"),
        ({"a": torch.tensor([0, float("nan")])}, "finite"),
    ):
        torch.save(tensors | added, tmp_path / "ijepa/pytorch_model.bin")
        with pytest.raises(InputError, match=message):
            _read_weights(str(tmp_path / "ijepa"))


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
    refused_everywhere("has 8-bit weights|of 8 bits", tmp_path / "int8", tmp_path / "out")


def refused_everywhere(message, folder, output):
    """By the command that converts, by the one that publishes, and where a training starts from it."""
    refused(message, str(folder), output=output)
    for call in (lambda: Publication(str(folder), "me/x").write(output), lambda: load_start(str(folder))):
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": None}, "image_mean=None"), ({"image_std": [0.1, 0.0, 0.1]}, "image_std="),
        ({"image_mean": [0.5]}, "the model has 3 channels"), ({"image_mean": [0.5, float("nan"), 0.5]}, "image_mean="),
        ({"auto_map": {"AutoImageProcessor": "evil.P"}}, "code of its own"), (None, "cannot be loaded"),
    ],
    ids=str,
)  # fmt: skip
def test_image_processors_that_no_image_can_go_through_are_refused(changes, message, folder, tmp_path):
    path = folder / "preprocessor_config.json"
    path.write_text("[1]" if changes is None else json.dumps(json.loads(path.read_text()) | changes))
    refused_everywhere(message, folder, tmp_path / "out")


@pytest.mark.parametrize("text", ["{", "{}", "[]", "[" * 200_000, '{"weight_map": {"a": "../../x.safetensors"}}'])
def test_lists_of_shards_that_are_none_are_refused(text, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    refused_everywhere("model.safetensors.index.json of", folder, tmp_path / "out")


@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_a_shard_that_is_not_there_is_named(suffix, ours, folder, tmp_path):
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    index = {"metadata": {}, "weight_map": dict.fromkeys(ours.state_dict(), f"{stem}-00001-of-00001.{suffix}")}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    refused_everywhere(f"has no {stem}-00001-of-00001.{suffix}", folder, tmp_path / "out")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, '{"model_type": "cjepa", "architectures": 3}'])
def test_configurations_that_cannot_be_read_are_refused(text, folder, tmp_path):
    (folder / "config.json").write_text(text)
    refused_everywhere("is no file, no folder|is neither a folder|architectures=3", folder, tmp_path / "out")


@pytest.mark.parametrize("place", ["local-dir:{}", "hf-hub:me/x", "local_dir:{}"])
def test_timm_s_own_ways_to_a_folder_are_refused(place, folder, tmp_path):
    convert(str(folder), tmp_path / "timm", to="timm")
    name = place.format(tmp_path / "timm")
    refused("itself: " + name.partition(":")[2], f"timm:{name}", output=tmp_path / "out")


@pytest.mark.parametrize("arguments", ["abc", 5, ["x"]])
def test_arguments_of_timm_that_are_no_mapping_are_refused(arguments, folder, tmp_path):
    convert(str(folder), tmp_path / "timm", to="timm")
    config = json.loads((tmp_path / "timm/config.json").read_text()) | {"model_args": arguments}
    (tmp_path / "timm/config.json").write_text(json.dumps(config))
    refused("model_args=.*no mapping", str(tmp_path / "timm"), output=tmp_path / "out")


def test_names_that_are_too_long_are_one_sentence(folder, tmp_path):
    refused("is no file, no folder", "a" * 5000, output=tmp_path / "out")
    with pytest.raises(InputError, match="is no file, no folder"):
        load_start("a" * 5000)
    for output, to in (
        (tmp_path / ("a" * 300) / "x", "cjepa"), (tmp_path / f"{'a' * 245}.pth.tar", "authors"),
        (Path("/proc/x/y.pth.tar"), "authors"), (Path("/proc/y.pth.tar"), "authors"),
    ):  # fmt: skip
        with pytest.raises(InputError, match="cannot be (made|written)") as caught:
            convert(str(folder), output, to=to)
        assert "disk" not in str(caught.value) and "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path != folder]


def test_a_full_disk_is_told_from_a_place_that_cannot_be():
    for path, error in (("/dev/full", InputError), ("/proc/x", RuntimeError)):
        with pytest.raises(error) as caught, full_disk_named(Path("out")):
            torch.save({"weight": torch.zeros(300_000)}, path)
        assert type(caught.value) is error


def test_what_a_killed_convert_left_is_removed_and_another_s_file_is_not(folder, tmp_path):
    begun = f".a.pth.tar.{socket.gethostname()}"
    (tmp_path / f"{begun}.{ended_process()}.tmp").touch()
    other = tmp_path / f"{begun}.{os.getppid()}.tmp"
    other.touch()
    convert(str(folder), tmp_path / "a.pth.tar", to="authors")
    assert {path.name for path in tmp_path.iterdir()} == {"ours", "a.pth.tar", other.name}


def test_an_encoder_that_a_file_has_not_is_refused(folder, tmp_path):
    convert(str(folder), tmp_path / "a.pth.tar", to="authors")
    alone = torch.load(tmp_path / "a.pth.tar", weights_only=True)["target_encoder"]
    torch.save(alone, tmp_path / "alone.pth.tar")
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    options = {"output": tmp_path / "out", "encoder": "context"}
    refused("one encoder.*leave it out", str(tmp_path / "alone.pth.tar"), options=HEADS, **options)
    refused("one encoder.*leave it out", str(tmp_path / "resnet18.pth"), **options)


def test_an_adapter_to_another_model_is_refused(folder, tmp_path):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/elsewhere"}))
    refused_everywhere("adapter_config.json", folder, tmp_path / "out")
