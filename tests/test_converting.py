"""Models of other packages in, ours out: against the real classes, there and back."""

import json
import re
import shutil

import pytest
import timm
import torch
from formats import MEAN, STD, same_weights, save_native, save_ours, shaken
from safetensors.torch import load_file, save_file
from test_golden import GOLDEN, parts
from tiny import images, sjea_level, tiny_model, tiny_sjea
from transformers import (
    AutoImageProcessor,
    AutoModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
    ViTMSNConfig,
    ViTMSNModel,
)

from modeling_cjepa import CJepaForPreTraining, CJepaModel, SJeaForPreTraining
from modeling_cjepa.encoders_cjepa import sincos_positions
from trainers.cli import main
from trainers.conversion import other_vits
from trainers.conversion.converting import convert, load_start
from trainers.conversion.formats import ReadOptions
from trainers.errors import InputError
from trainers.loading import load_model
from trainers.transforms import image_processor

HEADS = ReadOptions(num_attention_heads=2)
UPPER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
TIMM = {
    "img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 0,
}  # fmt: skip


@torch.no_grad()
def features(encoder, height=32, width=32):
    return encoder.eval()(images(3, height, width)).last_hidden_state


# out, and back again


def test_an_ijepa_model_is_written_that_transformers_loads_alone(ours, folder, tmp_path):
    done = convert(str(folder), tmp_path / "out", to="ijepa")
    written = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=False).eval()
    assert type(written) is IJepaModel and written.config.layer_norm_eps == 1e-6
    assert not list((tmp_path / "out").glob("*.py")) and not hasattr(written.config, "auto_map")
    torch.testing.assert_close(features(written), features(ours.cjepa), atol=1e-5, rtol=0)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (list(processor.image_mean), list(processor.image_std)) == (MEAN, STD)
    assert len(done.checks) == 1 and done.checks[0].difference <= 1e-9
    back = load_start(str(tmp_path / "out"))
    assert type(back.model) is CJepaModel and same_weights(back.model, ours.cjepa)


def test_timm_is_written_that_timm_loads(ours, folder, tmp_path):
    convert(str(folder), tmp_path / "out", to="timm")
    written = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    with torch.no_grad():
        tokens, pooled = written.forward_features(images(3)), written(images(3))
        expected = ours.cjepa(images(3))
    torch.testing.assert_close(tokens, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-5, rtol=0)
    data = timm.data.resolve_model_data_config(written)
    assert (list(data["mean"]), list(data["std"]), data["input_size"]) == (MEAN, STD, (3, 32, 32))
    back = load_start(str(tmp_path / "out"))
    assert same_weights(back.model, ours.cjepa)
    assert list(back.processor.image_mean) == MEAN and dict(back.processor.size) == {"height": 32, "width": 32}


def test_the_authors_layout_keeps_all_three_parts(ours, folder, tmp_path):
    path = tmp_path / "out.pth.tar"
    done = convert(str(folder), path, to="authors")
    assert any("--num_attention_heads 2" in note for note in done.notes)
    state = torch.load(path, weights_only=True)
    assert state["epoch"] == 0 and all(name.startswith("module.") for name in state["encoder"])
    assert state["predictor"].keys() >= {"module.predictor_pos_embed", "module.mask_token"}
    back = load_start(str(path), HEADS)
    assert type(back.model) is CJepaForPreTraining and same_weights(back.model, ours)
    assert back.model.config.image_size == 32
    assert back.check.difference <= back.check.limit


def test_timm_reads_the_context_encoder_of_what_is_written_for_the_authors(ours, folder, tmp_path):
    """timm's own reader of I-JEPA's checkpoints."""
    convert(str(folder), tmp_path / "out.pth.tar", to="authors")
    overlay = {"file": str(tmp_path / "out.pth.tar"), "custom_load": False}
    read = timm.create_model(
        "vit_huge_patch14_gap_224", pretrained=True, pretrained_cfg_overlay=overlay, **TIMM
    ).eval()
    with torch.no_grad():
        tokens = read.forward_features(images(3))
    torch.testing.assert_close(tokens, features(ours.context_encoder), atol=1e-5, rtol=0)


def test_an_encoder_alone_goes_to_the_authors_and_back(ours, tmp_path):
    source = save_ours(ours.cjepa, tmp_path / "encoder")
    convert(str(source), tmp_path / "out.pth.tar", to="authors")
    for encoder in ("target", "context"):
        back = load_start(str(tmp_path / "out.pth.tar"), ReadOptions(encoder, num_attention_heads=2))
        assert type(back.model) is CJepaModel and same_weights(back.model, ours.cjepa)
        assert "no predictor" in back.notes[0]


def test_foreign_goes_to_foreign_and_no_bit_is_lost_on_the_way(ours, folder, tmp_path):
    convert(str(folder), tmp_path / "1", to="timm")
    convert(str(tmp_path / "1"), tmp_path / "2", to="ijepa")
    convert(str(tmp_path / "2"), tmp_path / "3.pth.tar", to="authors")
    convert(str(tmp_path / "3.pth.tar"), tmp_path / "4", options=HEADS)
    assert same_weights(load_model(tmp_path / "4"), ours.cjepa)


@pytest.mark.parametrize(
    "changes",
    [
        {"qkv_bias": False},
        {"image_size": [24, 40], "patch_size": [4, 8]},
        {"num_channels": 1, "intermediate_size": 57},
        {"hidden_act": "gelu_pytorch_tanh"},
        {"hidden_act": "quick_gelu"},
    ],
)
@pytest.mark.parametrize("to", ["ijepa", "timm"])
def test_what_changes_the_arithmetic_goes_along(changes, to, tmp_path):
    model = tiny_model(**changes).eval()
    source = save_ours(model, tmp_path / "ours")
    if model.config.num_channels == 1:
        image_processor((32, 32), [0.5], [0.2]).save_pretrained(source)
    convert(str(source), tmp_path / "out", to=to)
    back = load_start(str(tmp_path / "out"))
    assert same_weights(back.model, model.cjepa)
    for name in ("hidden_act", "qkv_bias", "image_size", "patch_size", "num_channels", "intermediate_size"):
        assert getattr(back.model.config, name) == getattr(model.config, name), name


def test_the_encoder_is_chosen(ours, folder, tmp_path):
    for to, encoder, expected in (
        ("ijepa", None, ours.cjepa), ("ijepa", "target", ours.cjepa), ("ijepa", "context", ours.context_encoder),
        ("timm", "context", ours.context_encoder), ("cjepa", "context", ours.context_encoder), ("cjepa", None, ours),
    ):  # fmt: skip
        output = tmp_path / f"{to}-{encoder}"
        convert(str(folder), output, to=to, encoder=encoder)
        assert same_weights(load_start(str(output)).model, expected)
    convert(str(folder), tmp_path / "out.pth.tar", to="authors")
    convert(str(tmp_path / "out.pth.tar"), tmp_path / "context", encoder="context", options=HEADS)
    assert same_weights(load_model(tmp_path / "context"), ours.context_encoder)


def test_every_model_of_ours_is_taken_as_it_is(tmp_path):
    for name, model in (("stack", tiny_model(upper_levels=[UPPER])), ("sjea", tiny_sjea(sjea_level(), sjea_level()))):
        source = save_ours(model, tmp_path / name)
        assert same_weights(load_start(str(source)).model, model)
        convert(str(source), tmp_path / f"{name}-copy")
        assert same_weights(load_model(tmp_path / f"{name}-copy"), model)
    assert type(load_start(str(source)).model) is SJeaForPreTraining


# in


def test_the_authors_checkpoint_comes_in_as_they_computed(tmp_path):
    golden = load_file(GOLDEN / "ijepa_step.safetensors")
    torch.save(parts(golden) | {"opt": {"state": {}}, "scaler": None, "epoch": 300}, tmp_path / "authors.pth.tar")
    done = convert(str(tmp_path / "authors.pth.tar"), tmp_path / "out", options=ReadOptions(num_attention_heads=3))
    assert "authors' forward pass" in done.checks[0].what
    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    tokens = model(golden["pixel_values"]).last_hidden_state
    torch.testing.assert_close(tokens, golden["target_encoder_output"], atol=1e-5, rtol=0)
    card = (tmp_path / "out/README.md").read_text()
    assert "authors.pth.tar" in card and done.checks[0].sentence() in card and "ImageNet's mean" in card


def test_what_is_known_of_a_conversion_lies_beside_the_model(tmp_path):
    save_native(ViTModel, ViTConfig, tmp_path / "vit")
    done = convert(str(tmp_path / "vit"), tmp_path / "out")
    facts = json.loads((tmp_path / "out/conversion.json").read_text())
    assert facts == {
        "source": "vit",
        "format": "transformers' ViT, DeiT or ViT-MSN, as a start",
        "notes": done.notes,
        "checks": [check.sentence() for check in done.checks],
    }
    assert f"`{tmp_path}" not in (tmp_path / "out/README.md").read_text()
    again = convert(str(tmp_path / "out"), tmp_path / "again")
    facts["notes"] += again.notes
    facts["checks"] += [check.sentence() for check in again.checks]
    assert json.loads((tmp_path / "again/conversion.json").read_text()) == facts


@pytest.mark.parametrize(("make", "parts"), [(tiny_model, "context encoder, target"), (tiny_sjea, "the expanders")])
def test_the_card_says_how_pre_training_goes_on(make, parts, tmp_path):
    source = save_ours(make(), tmp_path / "ours")
    convert(str(source), tmp_path / "out")
    assert re.search(f"`AutoModelForPreTraining` loads .*{parts}", (tmp_path / "out/README.md").read_text())


def test_the_tensors_of_an_encoder_alone_come_in(ours, folder, tmp_path):
    convert(str(folder), tmp_path / "timm", to="timm")
    back = load_start(str(tmp_path / "timm/model.safetensors"), HEADS)
    assert same_weights(back.model, ours.cjepa)


@pytest.mark.parametrize("model_class", [IJepaModel, IJepaForImageClassification])
def test_an_ijepa_model_comes_in(model_class, tmp_path):
    original = save_native(model_class, IJepaConfig, tmp_path / "source", fixed_positions=True)
    convert(str(tmp_path / "source"), tmp_path / "out")
    model = load_model(tmp_path / "out")
    torch.testing.assert_close(features(model), features(getattr(original, "ijepa", original)), atol=1e-5, rtol=0)
    assert model.config.layer_norm_eps == 1e-12
    # of another size ours computes the fixed positions, theirs stretches its table
    assert features(model, 48, 32).shape == (3, 96, 32)


def test_timms_registry_comes_in(tmp_path, monkeypatch):
    built = shaken(timm.create_model("vit_base_patch16_gap_224", **TIMM))
    built.pos_embed.data[0] = sincos_positions((8, 8), 32)
    asked = []
    create = timm.create_model
    # the registry's weights are on the network; its class is the real one
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.append((name, options)) or built)
    back = load_start("timm:vit_tiny_ijepa")
    monkeypatch.setattr(timm, "create_model", create)
    assert asked == [("vit_tiny_ijepa", {"pretrained": True, "num_classes": 0})]
    with torch.no_grad():
        torch.testing.assert_close(features(back.model), built.forward_features(images(3)), atol=1e-5, rtol=0)
    assert any("context encoder" in note for note in back.notes)


DINO = {"mlp_ratio": 2, "layerscale_value": 0.3}


@pytest.mark.parametrize(
    ("model_class", "config_class", "changes", "said"),
    [
        (Dinov2Model, Dinov2Config, DINO, ["class token", "mask token", "Layer scale", "Learned positions"]),
        (Dinov2Model, Dinov2Config, DINO | {"qkv_bias": False, "hidden_act": "relu"}, ["Layer scale"]),
        (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, DINO, ["register tokens", "Layer scale"]),
        (ViTModel, ViTConfig, {}, ["class token", "pooler", "Learned positions"]),
        (ViTForImageClassification, ViTConfig, {"hidden_act": "gelu_new"}, ["class token", "classifier"]),
        (ViTMAEForPreTraining, ViTMAEConfig, {"fixed_positions": True}, ["decoder", "are the fixed 2-D sin-cos"]),
        (DeiTModel, DeiTConfig, {}, ["distillation token", "pooler"]),
        (ViTMSNModel, ViTMSNConfig, {}, ["class token"]),
    ],
)
def test_other_encoders_are_a_start(model_class, config_class, changes, said, tmp_path):
    original = save_native(model_class, config_class, tmp_path / "source", **changes)
    done = convert(str(tmp_path / "source"), tmp_path / "out")
    for words in said:
        assert any(words in note for note in done.notes), words
    assert ("pooler" in " ".join(done.notes)) == ("pooler" in said)
    model = load_model(tmp_path / "out")
    base = getattr(original, original.base_model_prefix, original)
    with torch.no_grad():  # the embedded patches of ours through their layers
        tokens = model.embeddings(images(2))
        for layer in base.encoder.layer if hasattr(base, "encoder") else base.layers:
            tokens = layer(tokens)
        expected = base.layernorm(tokens)
        torch.testing.assert_close(model(images(2)).last_hidden_state, expected, atol=1e-5, rtol=0)
        patches = base.embeddings.patch_embeddings
        own = model.embeddings.patch_embeddings(images(2))
        torch.testing.assert_close(own, patches.projection(images(2)).flatten(2).transpose(1, 2))


def half(source, folder, dtype):
    """A folder, or a file of the authors, with weights and positions in half precision."""
    if source.is_file():
        state = torch.load(source, weights_only=True)
        lower = {
            name: {key: value.to(dtype) for key, value in part.items()}
            for name, part in state.items()
            if name != "epoch"
        }
        torch.save(lower, folder)
        return
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", ["cjepa", "ijepa", "timm", "authors"])
def test_half_precision_comes_in_as_float32_with_exact_positions(folder, to, dtype, tmp_path):
    suffix = ".pth.tar" if to == "authors" else ""
    convert(str(folder), tmp_path / f"float{suffix}", to=to)
    half(tmp_path / f"float{suffix}", tmp_path / f"half{suffix}", dtype)
    options = HEADS if suffix else None
    start = load_start(str(tmp_path / f"half{suffix}"), options)
    assert {tensor.dtype for tensor in start.model.state_dict().values()} == {torch.float32}
    tables = [tensor[0] for name, tensor in start.model.state_dict().items() if name.endswith("position_embeddings")]
    assert tables and all(torch.equal(table, sincos_positions((8, 8), table.shape[1])) for table in tables)
    assert sum("positions was rounded" in note for note in start.notes) == 1
    convert(str(tmp_path / f"half{suffix}"), tmp_path / "program", to="program", options=options)


@pytest.mark.parametrize(("to", "kind"), [("ijepa", IJepaModel), ("timm", timm.models.VisionTransformer)])
def test_what_was_written_is_compared_not_what_is_in_memory(to, kind, folder, tmp_path, monkeypatch):
    """A writer that gives other numbers to the file, as they tell."""
    kept = kind.state_dict

    def broken(self, *args, **options):
        tensors = kept(self, *args, **options)
        bias = "layernorm.bias" if to == "ijepa" else "norm.bias"
        return {**tensors, bias: tensors[bias] + 1e-6}

    monkeypatch.setattr(kind, "state_dict", broken)
    with pytest.raises(InputError, match="does not hold"):
        convert(str(folder), tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({"layer_norm_eps": 1e-6}, {"layer_norm_eps": 1e-5}),
        ({}, {"hidden_act": "gelu_pytorch_tanh"}),
        ({"hidden_size": 384, "num_hidden_layers": 4}, {"layer_norm_eps": 1e-6}),
    ],
)
def test_another_setting_is_refused(changes, broken, tmp_path, monkeypatch):
    """A reader that takes a setting wrongly, as the numbers tell."""
    save_native(ViTModel, ViTConfig, tmp_path / "source", **changes)
    read = other_vits.encoder_config
    monkeypatch.setattr(other_vits, "encoder_config", lambda *args, **known: read(*args, **known, **broken))
    with pytest.raises(InputError, match="does not hold.* in float64"):
        load_start(str(tmp_path / "source"))


# what is left out, or rounded, is said


@pytest.mark.parametrize("to", ["ijepa", "timm", "authors"])
def test_heads_that_divide_no_usual_predictor_come_back(to, tmp_path):
    model = tiny_model(hidden_size=40, num_attention_heads=5, predictor_num_attention_heads=2).cjepa
    output = tmp_path / ("out.pth.tar" if to == "authors" else "out")
    convert(str(save_ours(model, tmp_path / "ours")), output, to=to)
    back = load_start(str(output), ReadOptions(num_attention_heads=5) if to == "authors" else None)
    assert same_weights(back.model, model) and back.model.config.num_attention_heads == 5


def test_a_classifier_of_timm_s_is_said_to_stay_behind(folder, tmp_path):
    convert(str(folder), tmp_path / "out", to="timm")
    tensors = load_file(tmp_path / "out/model.safetensors")
    tensors |= {"head.weight": torch.zeros(3, 32), "head.bias": torch.zeros(3)}
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "out/model.safetensors", {"format": "pt"})
    notes = load_start(str(tmp_path / "out")).notes
    assert (
        "Its classifier head is left out." in notes and "Its weights are float64 and are rounded to float32." in notes
    )


def test_of_masked_image_modeling_the_parts_are_named(tmp_path):
    save_native(ViTForMaskedImageModeling, ViTConfig, tmp_path / "source")
    notes = load_start(str(tmp_path / "source")).notes
    assert "Without a place in the encoder, and left out: decoder." in notes
    assert any(note.startswith("The mask token does not map") for note in notes)


def test_weights_in_float64_are_said_to_be_rounded(tmp_path):
    model = save_native(ViTModel, ViTConfig, tmp_path / "float")
    model.double()
    for parameter in model.parameters():
        parameter.data += 1e-12
    model.save_pretrained(tmp_path / "source")
    notes = load_start(str(tmp_path / "source")).notes
    assert any("float64" in note for note in notes)
    assert not any("float64" in note for note in load_start(str(tmp_path / "float")).notes)


# the command


def test_the_command_says_what_it_checked(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "out"), "--to", "ijepa"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"checked against transformers' IJepaModel on 2 random images in float64: largest difference of "
                     r"features \d\.\de[+-]\d\d \(allowed \d\.\de-09\)", said)  # fmt: skip
    assert "Only the target encoder is written" in said and f"Written to {tmp_path / 'out'}" in said
    for arguments, message in (
        ([str(folder), str(tmp_path / "out")], "exists already"),
        ([str(folder), str(tmp_path / "new"), "--to", "onyx"], "--to onyx is not known; choose one of cjepa, authors"),
        ([str(folder), str(tmp_path / "new"), "--encoder", "both"], "--encoder both is not known"),
        ([str(folder), str(tmp_path / "new"), "--to", "authors"], "ends in .pth.tar"),
    ):
        assert main(["convert", *arguments]) == 2
        (sentence,) = capsys.readouterr().err.strip().splitlines()
        assert message in sentence
        assert not (tmp_path / "new").exists()


def test_help_says_which_encoder_and_why(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "average over the steps" in said and "transformers' DINOv2, as a start" in said
