"""A Space's page: what it draws against the model's own outputs, and a browser that clicks through it."""

import configparser
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from pictures import MEAN, STD, read_by
from PIL import Image
from sklearn.decomposition import PCA
from test_attention_maps import UPPER, expected_map
from test_datasets import picture
from tiny import TRANSFORMER, sjea_level, tiny_model, tiny_sjea
from transformers import AutoModel

from trainers.attention_maps import overlay
from trainers.errors import InputError
from trainers.publishing import save_model
from trainers.scenes import KIND_NAMES, render_scenes
from trainers.space import Explorer, read_upload
from trainers.transforms import eval_transform, image_processor

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "scripts/space/app.py"
# of the stack: width and height of its images, rows and columns of the grids of its levels
SIZE, GRIDS = (24, 32), ((8, 6), (4, 3))
OUTLINE = (0x2E, 0xE6, 0xD6)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def save_models(folder: Path) -> Path:
    """A stack of C-JEPA, an encoder of one level, and a stack of S-JEA whose upper level is a transformer."""
    upper = sjea_level(stem="standard", input="tokens", backbone=dict(TRANSFORMER))
    for name, size, model in (
        ("stack", SIZE[::-1], tiny_model(image_size=list(SIZE[::-1]), **UPPER)),
        ("one", (32, 32), tiny_model()),
        ("sjea", (32, 32), tiny_sjea(sjea_level(), upper, image_size=32)),
    ):
        (folder / name).mkdir()
        save_model(model, image_processor(size, MEAN.tolist(), STD.tolist()), folder / name)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def explorer(models) -> Explorer:
    return Explorer(models / "stack")


def shown(image: Image.Image) -> np.ndarray:
    """An image of the stack's size as it is shown: 27 times as large."""
    return np.kron(np.array(image), np.ones((27, 27, 1), np.uint8))


@pytest.mark.parametrize(("level", "layer", "query"), [(0, 1, None), (0, 0, (2, 5)), (1, 0, (3, 1))])
def test_attention_is_laid_over_what_the_model_sees(explorer, level, layer, query):
    seen, laid_over = explorer.attention(picture(0, SIZE), level, layer, query)
    rows, columns = GRIDS[level]
    flat = None if query is None else query[0] * columns + query[1]
    expected = expected_map(tiny_model(image_size=[32, 24], **UPPER).cjepa, 0, layer, flat, level, SIZE)
    inside = np.ones((864, 648), bool)
    if query is not None:
        side = 864 // rows
        patch = np.s_[side * query[0] : side * (query[0] + 1), side * query[1] : side * (query[1] + 1)]
        for drawn in (seen, laid_over):
            edges = [edge for turned in (drawn[patch], drawn[patch].swapaxes(0, 1)) for edge in turned[[0, -1]]]
            assert (np.array(edges) == OUTLINE).all()
        inside[patch] = False
    view = shown(picture(0, SIZE))
    assert (seen == view)[inside].all()
    # a step of the colour map, where rounding falls to the other side of it
    difference = np.abs(laid_over.astype(int) - overlay(view, expected.astype(np.float32)))[inside]
    assert difference.max() <= 3 and difference.mean() < 0.01 and np.ptp(laid_over.astype(int)) > 100


def test_a_click_is_on_the_patch_below_it(explorer):
    for level, (rows, columns) in enumerate(GRIDS):
        for row in range(rows):
            for column in range(columns):
                side = 864 // rows
                for x, y in ((0, 0), (side - 1, side - 1)):
                    assert explorer.patch_at(level, column * side + x, row * side + y) == (row, column)


@torch.no_grad()
def test_components_are_those_of_all_images_together(explorer, models):
    encoder = AutoModel.from_pretrained(models / "stack")
    pairs, shares = explorer.components([picture(number, SIZE) for number in range(3)], 0)
    tokens = [encoder(read_by(number, SIZE), level=0).last_hidden_state[0] for number in range(3)]
    pca = PCA(3, svd_solver="full").fit(torch.cat(tokens).double().numpy())
    np.testing.assert_allclose(shares, pca.explained_variance_ratio_, rtol=1e-3)
    for number, pair in enumerate(pairs):
        assert pair.shape == (864, 2 * 648 + 16, 3)
        assert (pair[:, :648] == shown(picture(number, SIZE))).all() and (pair[:, 648:664] == 255).all()
        colors = pair[54::108, 664 + 54 :: 108].reshape(48, 3) / 255
        expected = pca.transform(tokens[number].double().numpy())
        for channel in range(3):
            assert abs(np.corrcoef(colors[:, channel], expected[:, channel])[0, 1]) > 0.95


@torch.no_grad()
def test_the_nearest_are_those_of_the_greatest_cosine(explorer, models):
    scenes = render_scenes(264, seed=1, image_size=32)
    assert len(explorer.examples) == 8 and len(explorer.gallery) == 256
    examples = {image.tobytes() for image in explorer.examples}
    kept = [index for index in range(264) if scenes["image"][index].tobytes() not in examples]
    assert len(kept) == 256
    encoder = AutoModel.from_pretrained(models / "stack")
    transform = eval_transform((32, 24))
    images = [Image.fromarray(scenes["image"][index]) for index in kept]
    pixels = torch.stack([transform(image) for image in [explorer.examples[3], *images]]).permute(0, 2, 3, 1)
    embeddings = encoder(((pixels / 255 - MEAN) / STD).permute(0, 3, 1, 2)).level_embeddings
    for found, each in zip(explorer.nearest(explorer.examples[3]), embeddings, strict=True):
        cosines = torch.nn.functional.cosine_similarity(each[:1].double(), each[1:].double())
        best = cosines.argsort(descending=True)[:8].tolist()
        assert [float(text.split()[0]) for _, text in found] == pytest.approx(cosines[best].tolist(), abs=6e-4)
        assert [text.split()[1] for _, text in found] == [KIND_NAMES[scenes["kind"][kept[index]]] for index in best]
        for (thumbnail, _), index in zip(found, best, strict=True):
            assert (np.array(thumbnail)[2::4, 2::4] == scenes["image"][kept[index]]).all()


def test_a_gallery_of_ones_own(models, tmp_path):
    (tmp_path / "mine").mkdir()
    for number in range(5):
        picture(number, (40, 30)).save(tmp_path / f"mine/{number}.png")
    explorer = Explorer(models / "one", tmp_path / "mine")
    assert (len(explorer.examples), len(explorer.gallery), explorer.num_levels) == (2, 3, 1)
    ((*_, last),) = explorer.nearest(explorer.examples[0])
    assert -1 <= float(last[1]) <= 1 and last[0].size == (120, 90)


def test_mistakes_are_told(models, explorer, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(InputError, match="^a.png cannot be read .not an image.; give an image"):
        read_upload(tmp_path / "a.png")
    with pytest.raises(InputError, match="17 images are too many to compare; give up to 16"):
        explorer.components([picture(0)] * 17, 0)
    (tmp_path / "a.png").unlink()
    picture(0).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="has 1 image; give at least 2"):
        Explorer(models / "one", tmp_path)
    main = runpy.run_path(str(APP))["main"]
    for name in ("CJEPA_MODEL", "CJEPA_GALLERY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("sys.argv", ["app.py", str(tmp_path)])
    assert main() == 2 and "is neither a folder with a C-JEPA or S-JEA model" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main() == 2 and capsys.readouterr().err.endswith('pip install "cjepa[space]".\n')
    monkeypatch.setattr("sys.argv", ["app.py"])
    with pytest.raises(SystemExit):
        main()
    assert "no model is named; give a folder" in capsys.readouterr().err


def test_the_spaces_files_agree_with_the_metadata():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = (ROOT / "scripts/space/requirements.txt").read_text().splitlines()
    assert [line for line in lines if line[0] not in "#-"] == setup["options"]["install_requires"].split()
    front = yaml.safe_load((ROOT / "scripts/space/README.md").read_text().split("---\n")[1])
    assert (front["sdk"], front["app_file"]) == ("gradio", APP.name)
    assert f"gradio>={front['sdk_version'].rpartition('.')[0]}" == setup["options.extras_require"]["space"].strip()
