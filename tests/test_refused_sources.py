"""Sources that are refused, and what no format can say: one sentence, and nothing written."""

import json
import re
import sys

import pytest
import timm
import torch
from formats import save_native, save_ours, shaken
from safetensors.torch import load_file, save_file
from test_weight_files import Shell
from tiny import tiny_model, tiny_sjea
from transformers import IJepaConfig, IJepaModel

from trainers.conversion.checks import Check, compare
from trainers.conversion.converting import convert, load_start
from trainers.conversion.formats import ReadOptions
from trainers.errors import InputError

HEADS = ReadOptions(num_attention_heads=2)
UPPER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TIMM = {
    "img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 0,
}  # fmt: skip


def refused(message, *arguments, output, **options):
    with pytest.raises(InputError, match=message) as caught:
        convert(*arguments, output, **options)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if "unfinished" in path.name or path.name.endswith(".tmp")]


def place(folder, to):
    return folder / ("out.pth.tar" if to == "authors" else "out")


def test_learned_positions_are_refused_where_they_must_hold(tmp_path):
    save_native(IJepaModel, IJepaConfig, tmp_path / "ijepa")
    refused("learned positions", str(tmp_path / "ijepa"), output=tmp_path / "out")
    timm.models.save_for_hf(
        shaken(timm.create_model("vit_base_patch16_gap_224", **TIMM)), tmp_path / "timm", safe_serialization=True
    )
    refused("learned positions", str(tmp_path / "timm"), output=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_token": True}, "other tokens than patches"),
        ({"reg_tokens": 2}, "other tokens than patches"),
        ({"fc_norm": True}, "fc_norm"),
        ({"global_pool": "max"}, "pooling"),
        ({"qk_norm": True}, "not known.*q_norm"),
        ({"init_values": 0.1}, "not known.*ls1.gamma"),
        ({"pre_norm": True}, "not known.*norm_pre"),
        ({"pos_embed": "none"}, "learned positions"),
        ({"depth": 3}, "no whole model of timm"),
    ],
)
def test_other_kinds_of_timm_are_refused(changes, message, ours, folder, tmp_path):
    convert(str(folder), tmp_path / "good", to="timm")
    written = tmp_path / "timm"
    arguments = json.loads((tmp_path / "good/config.json").read_text())["model_args"]
    model = timm.create_model("vit_base_patch16_gap_224", **arguments | changes)
    if model.pos_embed is not None:
        model.pos_embed.data[:, -64:] = ours.cjepa.embeddings.position_embeddings
    timm.models.save_for_hf(model, written, safe_serialization=True, model_args=arguments | changes)
    if "depth" in changes:
        save_file(load_file(tmp_path / "good/model.safetensors"), written / "model.safetensors")
    refused(message, str(written), output=tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "to", "message"),
    [
        ({"layer_norm_eps": 1e-5}, "timm", "layer_norm_eps=1e-05: timm's"),
        ({"hidden_act": "gelu_new"}, "timm", "hidden_act='gelu_new' is not known to timm"),
        ({"layer_norm_eps": 1e-5}, "authors", "layer_norm_eps=1e-05"),
        ({"hidden_act": "relu"}, "authors", "hidden_act='relu'"),
        ({"predictor_num_attention_heads": 4}, "authors", "predictor_num_attention_heads=4"),
        ({"predictor_attention": "shared_context"}, "authors", "predictor_attention=shared_context"),
        ({"image_size": [32, 16]}, "authors", "image_size is 32x16"),
        ({"upper_levels": [UPPER]}, "ijepa", "A stack of 2 levels"),
        ({"upper_levels": [UPPER]}, "timm", "A stack of 2 levels"),
        ({"upper_levels": [UPPER]}, "authors", "A stack of 2 levels"),
    ],
)
def test_what_a_format_cannot_say_is_refused(changes, to, message, tmp_path):
    source = save_ours(tiny_model(**changes), tmp_path / "ours")
    refused(message, str(source), output=place(tmp_path, to), to=to)


def test_an_sjea_model_goes_nowhere_else(tmp_path):
    source = save_ours(tiny_sjea(), tmp_path / "ours")
    for to in ("ijepa", "timm", "authors"):
        refused("An S-JEA model does not fit", str(source), output=place(tmp_path, to), to=to)
    refused("no context encoder", str(source), output=tmp_path / "out", encoder="context")


def test_code_of_a_source_is_never_run(folder, tmp_path):
    trace = tmp_path / "trace"
    (folder / "modeling_evil.py").write_text(f"open({str(trace)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    for model_type in ("evil", "ijepa", "vit"):
        auto_map = {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Model"}
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": auto_map}))
        refused("needs code of its own", str(folder), output=tmp_path / "out")
    # a processor that wants to
    (folder / "config.json").write_text(json.dumps(config))
    wanted = {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "modeling_evil.Processor"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(wanted))
    refused("image processor.*cannot be loaded", str(folder), output=tmp_path / "out")
    assert not trace.exists()


def test_folders_that_are_no_models_are_refused(tmp_path):
    source = tmp_path / "source"
    refused("is no file, no folder|holds neither a model", str(source), output=tmp_path / "out")
    source.mkdir()
    refused("is no file, no folder|holds neither a model", str(source), output=tmp_path / "out")
    for config, message in (
        ("{", "is no file, no folder"),
        ("[]", "holds no mapping"),
        ('{"model_type": "bert"}', "type 'bert'; known are"),
        ('{"architecture": "resnet18"}', "no folder of timm"),
        ('{"model_type": "ijepa", "hidden_size": 32}', "cannot be loaded as a IJepaModel"),
        ('{"model_type": "dinov2", "use_swiglu_ffn": true}', "use_swiglu_ffn"),
    ):
        (source / "config.json").write_text(config)
        refused(message, str(source), output=tmp_path / "out")
    refused("cannot be loaded", "timm:no_such_model", output=tmp_path / "out")


@pytest.mark.parametrize("fault", ["nan", "missing", "shape", "cut off"])
def test_broken_weights_are_refused(fault, folder, tmp_path):
    for to, message in (("ijepa", "norm|lacks|cannot be loaded"), ("timm", "norm|no whole|shape")):
        source = tmp_path / to
        convert(str(folder), source, to=to)
        file = source / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if re.search(r"(layernorm_after|norm2)\.weight", name))
        if fault == "nan":
            tensors[name][0] = float("nan")
        elif fault == "missing":
            del tensors[name]
        elif fault == "shape":
            tensors[name] = torch.ones(31)
        save_file(tensors, file, {"format": "pt"})
        if fault == "cut off":
            file.write_bytes(file.read_bytes()[:-100])
        refused(message, str(source), output=tmp_path / "out")


def test_files_of_torch_in_a_folder_are_read_as_carefully(tmp_path):
    trace = tmp_path / "trace"
    model = save_native(IJepaModel, IJepaConfig, tmp_path / "ijepa", fixed_positions=True)
    ours = tiny_model()
    save_ours(ours, tmp_path / "ours")
    for source, tensors in ((tmp_path / "ijepa", model.state_dict()), (tmp_path / "ours", ours.state_dict())):
        (source / "model.safetensors").unlink()
        for added, message in (
            ({"more": Shell(f"touch {trace}")}, "needs pickled code"),
            ({"more": torch.ones(1).expand(10**12)}, "more claims 1,000,000,000,000 numbers"),
        ):
            torch.save(tensors | added, source / "pytorch_model.bin")
            refused(message, str(source), output=tmp_path / "out")
        torch.save(tensors, source / "pytorch_model.bin")
        same = load_start(str(source)).model
        assert all(torch.equal(same.state_dict()[name], tensor) for name, tensor in tensors.items())
        (source / "pytorch_model.bin").rename(tmp_path / f"{source.name}.bin")
        for file, message in ((f"../{source.name}.bin", "outside of it"), (5, "cannot be read")):
            index = {"weight_map": dict.fromkeys(tensors, file)}
            (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
            refused(message, str(source), output=tmp_path / "out")
    assert not trace.exists()


def test_hostile_sizes_in_a_checkpoint_are_refused_before_a_model_is_made(folder, tmp_path):
    path = tmp_path / "file.pth.tar"
    convert(str(folder), path, to="authors")
    whole = torch.load(path, weights_only=True)

    far, first = "module.blocks.99999999999.norm1.weight", "module.blocks.0.attn.qkv.weight"
    for part, name, tensor, message in (
        ("encoder", far, torch.ones(32), "does not fit"),
        ("target_encoder", far, torch.ones(32), "lacks layers"),
        ("target_encoder", first, torch.ones(95, 32), "no fused query"),
        ("target_encoder", first, torch.ones(3, 1), "has shape"),
        ("target_encoder", "module.patch_embed.proj.weight", torch.ones(10**6, 1, 1, 1), "does not fit|has shape"),
        ("target_encoder", "module.patch_embed.proj.weight", torch.ones(32), "other shapes"),
        ("target_encoder", "module.pos_embed", torch.ones(1, 63, 32), "no table of a square grid"),
        ("predictor", "module.predictor_pos_embed", torch.ones(64), "predictor_pos_embed has shape"),
    ):
        torch.save(whole | {part: whole[part] | {name: tensor}}, path)
        refused(message, str(path), output=tmp_path / "out", options=HEADS)
    torch.save({"weight": torch.ones(2)}, path)
    refused("in no layout that is known", str(path), output=tmp_path / "out")


def test_a_check_that_fails_writes_nothing(folder, tmp_path, monkeypatch):
    """A mistake in the table of names that loads without complaint: two norms changed places."""
    from trainers.conversion import names

    swap = str.maketrans("12", "21")
    rows = tuple((our, their.translate(swap) if "norm" in their else their) for our, their in names.FUSED_ENCODER.rows)
    table = names.NameTable(rows)
    monkeypatch.setattr("trainers.conversion.ijepa_authors.FUSED_ENCODER", table)
    monkeypatch.setattr("trainers.conversion.timm_ijepa.FUSED_ENCODER", table)
    for to in ("authors", "timm"):
        refused("conversion does not hold", str(folder), output=place(tmp_path, to), to=to)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.0])
def test_a_difference_too_large_or_not_finite_is_an_error(value):
    with pytest.raises(InputError, match=r"does not hold.*\(allowed"):
        Check("the truth", value, 0.5).raise_if_too_large()
    with pytest.raises(InputError, match="does not hold"):
        compare("the truth", [torch.tensor([0.0, value])], [torch.zeros(2)])
    with pytest.raises(InputError, match="does not hold"):
        compare("the truth", [torch.tensor([0.0, 3.0])], [torch.tensor([0.0, value])])
    with pytest.raises(InputError, match="shape"):
        compare("the truth", [torch.zeros(2)], [torch.zeros(2, 1)])


def test_the_extra_is_named_where_timm_is_missing(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    refused(r'pip install "cjepa\[timm\]"', str(folder), output=tmp_path / "out", to="timm")
    refused(r'pip install "cjepa\[timm\]"', "timm:vit_huge_patch14_gap_224", output=tmp_path / "out")
