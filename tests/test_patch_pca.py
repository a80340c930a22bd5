"""Colours of patch tokens against numpy's singular value decomposition."""

import json

import numpy as np
import pytest
import torch
from pictures import image_files, read_by, refused
from PIL import Image
from tiny import TRANSFORMER, sjea_level, tiny_model, tiny_sjea

from trainers.cli import main
from trainers.errors import InputError
from trainers.patch_pca import principal_colors


def by_svd(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours (n, 3) in [0, 255] and shares of variance of tokens (n, D)."""
    centred = tokens.astype(np.float64) - tokens.mean(axis=0, dtype=np.float64)
    _, singular, loadings = np.linalg.svd(centred, full_matrices=False)
    components = []
    for loading in loadings[:3]:
        component = centred @ loading * (1 if loading.max() > -loading.min() else -1)
        low, high = np.quantile(component, (0.01, 0.99))
        components.append(np.clip((component - low) / (high - low), 0, 1))
    return 255 * np.stack(components, axis=1), (singular**2 / (singular**2).sum())[:3]


def test_components_are_those_of_all_tokens():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(7, 7)) * np.array([5, 4, 3, 2, 1, 1, 1])[:, None]
    maps = [rng.normal(size=(*shape, 7)) @ mixing + 10 for shape in ((3, 5), (6, 4), (20, 20))]
    pictures, shares = principal_colors(maps)
    colors, expected = by_svd(np.concatenate([each.reshape(-1, 7) for each in maps]))
    assert [picture.shape for picture in pictures] == [(3, 5, 3), (6, 4, 3), (20, 20, 3)]
    found = np.concatenate([picture.reshape(-1, 3) for picture in pictures])
    assert found.dtype == np.uint8 and np.abs(found - colors).max() <= 0.51
    np.testing.assert_allclose(shares, expected, rtol=1e-6)
    # the sign is the components' own, whatever the decomposition gives
    mirrored, _ = principal_colors([-each for each in maps])
    assert np.abs(255.0 - np.concatenate([each.reshape(-1, 3) for each in mirrored]) - found).max() <= 1


def test_features_without_components():
    pictures, shares = principal_colors([np.ones((2, 2, 5))])
    assert (pictures[0] == 127).all() and shares == [0, 0, 0]
    for shape in ((1, 2, 5), (4, 4, 2)):
        with pytest.raises(InputError, match="too few for three components"):
            principal_colors([np.random.default_rng(0).normal(size=shape)])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_model().save_pretrained(folder / "cjepa")
    tiny_sjea().save_pretrained(folder / "sjea")
    upper = {"backbone": TRANSFORMER, "input": "tokens", "expander_sizes": [24, 24, 24]}
    tiny_sjea(sjea_level(), upper).save_pretrained(folder / "tokens")
    return folder


@torch.no_grad()
def test_a_column_for_each_encoder(models, tmp_path, capsys):
    files = image_files(tmp_path)
    command = ["visualize", "pca", str(models / "cjepa"), *files, "--beside", f"resnet={models / 'sjea'}"]
    assert main(command) == 0
    folder = models / "cjepa/pca"
    assert capsys.readouterr().out == f"Written to {folder}: pca.png, pca.json.\n"
    entries = json.loads((folder / "pca.json").read_text())["encoders"]
    model, resnet = tiny_model().eval(), tiny_sjea().eval()
    maps = {
        "resnet encoder, level 1": lambda x: resnet.sjea(x, level=1).last_hidden_state.flatten(2).transpose(1, 2),
        "C-JEPA target encoder": lambda x: model.cjepa(x).last_hidden_state,
        "C-JEPA context encoder": lambda x: model.context_encoder(x).last_hidden_state,
    }
    with Image.open(folder / "pca.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    assert pixels.shape[1] == 4 * 280
    assert [entry["encoder"] for entry in entries] == list(maps)
    for column, (entry, encode) in enumerate(zip(entries, maps.values(), strict=True), start=1):
        tokens = np.concatenate([encode(read_by(number))[0].numpy() for number in range(2)])
        colors, shares = by_svd(tokens)
        np.testing.assert_allclose(entry["explained_variance"], shares, rtol=1e-3)
        assert entry["width"] == 32 and entry["grid"][0] * entry["grid"][1] == len(colors) // 2
        # the last patch of the last image is at the bottom right of its panel
        assert np.abs(pixels[-15, 280 * (column + 1) - 15] - colors[-1]).max() <= 4


def test_mistakes_are_told(models, tmp_path, capsys):
    (file,) = image_files(tmp_path, 1)
    for arguments, words in (
        ([models / "cjepa", "no.png"], "Image no.png cannot be read"),
        ([models / "tokens", file, "--level", 1], "level 1 of this SJeaModel gives tokens without one; choose"),
        ([models / "sjea", file, "--level", 2], "level=2 is not in this model, which has 2 levels"),
    ):
        assert words in refused(capsys, "pca", *arguments, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
