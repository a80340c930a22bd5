"""Attention maps against softmax(Q K^T / sqrt(d)) written out with the layer's own weights."""

import json

import matplotlib
import numpy as np
import pytest
import torch
from pictures import image_files, read_by, refused
from PIL import Image
from tiny import tiny_model, tiny_sjea

from trainers.attention_maps import overlay, visualize_attention
from trainers.cli import main

UPPER = {"upper_levels": [{"hidden_size": 16, "num_hidden_layers": 1}], "min_context_patches": 8}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """C-JEPA and a stack on images of 32 x 24 pixels, I-JEPA on smaller ones, an encoder alone, and S-JEA."""
    folder = tmp_path_factory.mktemp("models")
    tiny_model(image_size=[32, 24]).save_pretrained(folder / "cjepa")
    tiny_model(image_size=[32, 24], **UPPER).save_pretrained(folder / "stack")
    tiny_model(image_size=16, regularizer_weight=0).save_pretrained(folder / "ijepa")
    tiny_model().cjepa.save_pretrained(folder / "encoder")
    tiny_sjea().save_pretrained(folder / "sjea")
    diverged = tiny_model()
    diverged.cjepa.embeddings.patch_embeddings.projection.bias.data[0] = torch.nan
    diverged.save_pretrained(folder / "diverged")
    return folder


@torch.no_grad()
def weights_by_hand(encoder, tokens, layer: int) -> np.ndarray:
    """The attention (N, N) of tokens (N, D) in a layer of an encoder, the mean of its heads."""
    block = encoder.layers[layer]
    x = block.layernorm_before(tokens).double().numpy()
    linear = {name: getattr(block.attention, name) for name in ("q_proj", "k_proj")}
    q, k = (x @ each.weight.double().numpy().T + each.bias.double().numpy() for each in linear.values())
    width = q.shape[1] // 2
    heads = []
    for head in range(2):
        part = slice(head * width, (head + 1) * width)
        scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(width))
        heads.append(scores / scores.sum(axis=1, keepdims=True))
    return np.mean(heads, axis=0)


@torch.no_grad()
def expected_map(encoder, number, layer, query, level=0, size=(24, 32)) -> np.ndarray:
    encoder.eval()
    outputs = encoder.encode(read_by(number, size), output_hidden_states=True)
    of_level = [encoder, *encoder.upper_levels][level]
    weights = weights_by_hand(of_level, outputs[level].hidden_states[layer][0], layer)
    received = weights.mean(axis=0) if query is None else weights[query]
    return received.reshape((8, 6) if level == 0 else (4, 3))


@pytest.mark.parametrize(("layer", "query"), [(-1, None), (0, None), (1, (2, 5))])
def test_maps_are_the_attention_that_patches_receive(models, tmp_path, layer, query):
    files = image_files(tmp_path, size=(24, 32))
    results = visualize_attention(models / "cjepa", files, tmp_path / "out", layer=layer, query=query)
    assert json.loads((tmp_path / "out/attention.json").read_text()) == json.loads(json.dumps(results))
    model = tiny_model(image_size=[32, 24])
    entries = results["encoders"]
    assert [entry["encoder"] for entry in entries] == ["C-JEPA target encoder", "C-JEPA context encoder"]
    flat = None if query is None else query[0] * 6 + query[1]
    for entry, encoder in zip(entries, (model.cjepa, model.context_encoder), strict=True):
        assert entry["grid"] == [8, 6]
        for number in range(2):
            expected = expected_map(encoder, number, layer % 2, flat)
            np.testing.assert_allclose(entry["maps"][number], expected, rtol=1e-3)
            assert np.ptp(expected) > 1e-3 and np.sum(entry["maps"][number]) == pytest.approx(1, abs=1e-4)


def test_a_level_of_a_stack(models, tmp_path):
    files = image_files(tmp_path, 1, size=(24, 32))
    results = visualize_attention(models / "stack", files, tmp_path, level=1)
    entry = results["encoders"][0]
    assert entry["encoder"] == "C-JEPA target encoder, level 1" and entry["level"] == 1
    encoder = tiny_model(image_size=[32, 24], **UPPER).cjepa
    np.testing.assert_allclose(entry["maps"][0], expected_map(encoder, 0, 0, None, level=1), rtol=1e-3)


def test_maps_are_laid_over_images():
    view = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    found = overlay(view, np.array([[0.1, 0.2], [0.5, 0.3]], np.float32))
    colors = matplotlib.colormaps["inferno"]
    # corners have the values of their patches, and between two patches is their mean
    for place, value in {(0, 0): 0, (0, 11): 0.25, (7, 0): 1, (7, 11): 0.5}.items():
        expected = 0.4 * view[place] + 0.6 * 255 * np.array(colors(float(value))[:3])
        assert np.abs(found[place] - expected).max() <= 1.5
    between = [overlay(np.zeros((9, 9, 3), np.uint8), np.array([[0.0, 1.0]], np.float32))[4, 4]]
    assert np.abs(between[0] - 0.6 * 255 * np.array(colors(0.5)[:3])).max() <= 1.5
    flat = overlay(view, np.full((2, 2), 0.25, np.float32))
    assert np.abs(flat - (0.4 * view + 0.6 * 255 * np.array(colors(0.0)[:3]))).max() <= 1


def test_the_papers_columns(models, tmp_path, capsys):
    files = image_files(tmp_path)
    command = ["visualize", "attention", str(models / "cjepa"), *files, "--beside", f"I-JEPA={models / 'ijepa'}"]
    assert main([*command, "--output", str(tmp_path / "new/out")]) == 0
    assert capsys.readouterr().out == f"Written to {tmp_path / 'new/out'}: attention.png, attention.json.\n"
    results = json.loads((tmp_path / "new/out/attention.json").read_text())
    assert [(entry["encoder"], entry["grid"]) for entry in results["encoders"]] == [
        ("I-JEPA target encoder", [4, 4]), ("C-JEPA target encoder", [8, 6]), ("C-JEPA context encoder", [8, 6]),
    ]  # fmt: skip
    assert "softmax(Q K^T / sqrt(d))" in results["recipe"]
    with Image.open(tmp_path / "new/out/attention.png") as drawn:
        # four columns and two rows of images that are higher than wide, and titles
        assert drawn.width == 4 * 280 and drawn.height > 2 * 280 * 32 / 24


def test_an_encoder_alone_has_one_column_in_its_own_folder(models, tmp_path):
    assert main(["visualize", "attention", str(models / "encoder"), *image_files(tmp_path, 1)]) == 0
    results = json.loads((models / "encoder/attention/attention.json").read_text())
    assert [entry["encoder"] for entry in results["encoders"]] == ["encoder"]


def test_mistakes_are_told(models, tmp_path, capsys):
    (file,) = image_files(tmp_path, 1)
    cjepa, output = models / "cjepa", ["--output", tmp_path / "out"]
    for arguments, words in (
        ([cjepa, "no.png"], "Image no.png cannot be read"),
        ([cjepa, __file__], "cannot be read (not an image); give a file with an image"),
        ([tmp_path, file], "is neither a folder with a C-JEPA or S-JEA model"),
        ([models / "sjea", file], "SJeaModel, which gives no attention maps; give a C-JEPA model"),
        (
            [cjepa, file, "--layer", 2],
            "layer=2 is not in the C-JEPA target encoder, which has 2 layers; choose 0 to 1",
        ),
        ([cjepa, file, "--layer", -3], "layer=-3 is not in"),
        ([models / "diverged", file], "embeddings of the C-JEPA target encoder are not finite"),
        ([cjepa, file, "--query", "2,6"], "query=2,6 is not on the 8x6 grid"),
        ([cjepa, file, "--level", 1], "level=1 is not in this model"),
        ([cjepa, file, "--beside", "a=", cjepa], "--beside a=: give a name and a model"),
    ):
        assert words in refused(capsys, "attention", *arguments, *output)
    assert not (tmp_path / "out").exists()
    assert "is a file; name a folder" in refused(capsys, "attention", cjepa, file, "--output", __file__)
    with pytest.raises(SystemExit):
        main(["visualize", "attention", str(cjepa), file, "--query", "2"])
    assert "give row and column, as in 3,4" in capsys.readouterr().err
