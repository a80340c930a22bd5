"""Checkpoints in the authors' layout that are unusual or broken; the plain one is in test_golden.py."""

import pytest
import torch
from formats import save_ours
from safetensors.torch import load_file
from test_golden import GOLDEN, parts
from tiny import tiny_model

from trainers.conversion import converting, ijepa_authors
from trainers.conversion.converting import load_start
from trainers.conversion.formats import ReadOptions
from trainers.conversion.ijepa_authors import from_ijepa_checkpoint
from trainers.errors import InputError


@pytest.fixture
def state():
    return parts(load_file(GOLDEN / "ijepa_step.safetensors"))


def without_blocks(tensors):
    return {name: tensor for name, tensor in tensors.items() if "blocks." not in name}


def convert(state, **options):
    return from_ijepa_checkpoint(state, **{"image_size": 64, "num_attention_heads": 3} | options)


def test_prefixes_of_ddp_are_taken_off(state):
    prefixed = {
        part: {f"module.{name}": tensor for name, tensor in tensors.items()} for part, tensors in state.items()
    }
    plain, converted = convert(state).state_dict(), convert(prefixed).state_dict()
    assert plain.keys() == converted.keys()
    assert all(torch.equal(plain[name], converted[name]) for name in plain)


def test_sizes_are_read_off_the_tensors(state):
    config = convert(state).config
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (48, 2, 192)
    assert (config.predictor_hidden_size, config.predictor_num_hidden_layers, config.patch_size) == (24, 2, 8)


def test_mlps_of_encoder_and_predictor_have_ratios_of_their_own(state):
    """As in the authors' ViT-g, whose encoder has 48 / 11 and whose predictor has 4."""
    for part in ("encoder", "target_encoder"):
        for name, tensor in state[part].items():
            if ".mlp.fc1." in name or name.endswith(".mlp.fc2.weight"):
                dim = 0 if ".fc1." in name else 1
                state[part][name] = torch.cat([tensor, tensor.narrow(dim, 0, 16)], dim=dim)
    config = convert(state).config
    assert (config.intermediate_size, config.predictor_intermediate_size) == (208, 96)


def read(state, path):
    torch.save(state, path)
    return load_start(str(path), ReadOptions(num_attention_heads=3))


def test_other_parts_and_float64_are_said(state, tmp_path):
    state["encoder"] = {name: tensor.double() + 1e-12 for name, tensor in state["encoder"].items()}
    notes = read(state | {"ema": {"weight": torch.zeros(2)}, "epoch": 1}, tmp_path / "a.pth.tar").notes
    assert "Beside encoders and predictor there was ema, which is left out." in notes
    assert any("float64" in note for note in notes)


def test_a_name_with_the_prefix_and_without_is_refused(state, tmp_path):
    state["encoder"]["module.norm.weight"] = state["encoder"]["norm.weight"] + 1
    with pytest.raises(InputError, match="both module.norm.weight and norm.weight"):
        read(state, tmp_path / "a.pth.tar")


@pytest.mark.parametrize("part", ["encoder", "predictor"])
def test_every_part_is_compared_with_the_file(state, part, tmp_path, monkeypatch):
    """A reader that changes one of them, as the numbers tell."""
    build = ijepa_authors.build

    def broken(*args):
        model = build(*args)
        module = model.context_encoder if part == "encoder" else model.predictor
        module.layernorm.bias.data += 1e-6
        return model

    monkeypatch.setattr(ijepa_authors, "build", broken)
    with pytest.raises(InputError, match="does not hold.*both encoders and predictor"):
        read(state, tmp_path / "a.pth.tar")


def test_what_was_written_is_compared_not_what_is_in_memory(tmp_path, monkeypatch):
    save = torch.save

    def broken(state, path):
        target = state["target_encoder"]
        save(state | {"target_encoder": target | {"module.norm.bias": target["module.norm.bias"] + 1e-6}}, path)

    source = save_ours(tiny_model(), tmp_path / "ours")
    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(InputError, match="does not hold"):
        converting.convert(str(source), tmp_path / "a.pth.tar", to="authors")
    assert not (tmp_path / "a.pth.tar").exists()


def test_what_the_authors_constructors_do_not_build_is_said(tmp_path):
    usual = {"intermediate_size": 128, "predictor_intermediate_size": 64}
    for changes, said in (
        (usual, None),
        (usual | {"qkv_bias": False}, "no place for qkv_bias=False:"),
        ({}, "no place for intermediate_size=64:"),
        (usual | {"predictor_intermediate_size": 40}, "no place for predictor_intermediate_size=40:"),
        ({"intermediate_size": 128, "num_channels": 1}, "no place for num_channels=1:"),
    ):
        notes = ijepa_authors.notes_of_authors(tiny_model(**changes))
        assert [note for note in notes if "constructors" in note] == [note for note in notes if said and said in note]
        assert bool(said) == any("constructors" in note for note in notes)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda state: state.pop("predictor"), {}, "no 'predictor'"),
        (lambda state: state["encoder"].pop("blocks.1.norm2.bias"), {}, "missing.*layernorm_after.bias"),
        (lambda state: state["encoder"].update(cls_token=torch.zeros(1)), {}, "not known.*cls_token"),
        (lambda state: state["target_encoder"].pop("patch_embed.proj.weight"), {}, "no tensor for"),
        (lambda state: state.update(predictor=without_blocks(state["predictor"])), {}, "no tensor for"),
        (lambda state: state["target_encoder"]["pos_embed"].add_(1), {}, "not the fixed 2-D sin-cos"),
        (lambda state: None, {"image_size": 224}, "64, 48.*784 positions"),
        (lambda state: None, {"num_attention_heads": None}, "Width 48.*num_attention_heads"),
    ],
)
def test_what_does_not_fit_is_said(state, change, options, message):
    change(state)
    with pytest.raises(InputError, match=message):
        convert(state, **options)
