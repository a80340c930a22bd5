"""Models ready to be looked at, and the embeddings of all their levels."""

import pytest
import torch
from levels import BACKBONE, MEAN, SIZE, STD, TEST, embeddings_written_out, stack
from tiny import tiny_model
from transformers import ResNetConfig, ResNetModel

from modeling_cjepa import SJeaConfig, SJeaForPreTraining
from trainers.errors import InputError
from trainers.level_embeddings import LoadedModel, embed_levels, load_levels
from trainers.transforms import image_processor


def test_all_levels_come_from_one_pass():
    model, calls = stack(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    for is_training in (True, False):
        model.train(is_training)
        levels = embed_levels(LoadedModel(model, (SIZE, SIZE), MEAN, STD), TEST, "test", progress=False)
        assert model.training == model.levels[0].training == is_training
    assert len(calls) == 2
    assert [tuple(level.shape) for level in levels] == [(60, 12), (60, 12)]
    for level, expected in zip(levels, embeddings_written_out(model.eval(), TEST), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*levels)


def test_all_levels_are_shown_whichever_the_model_chooses():
    model = stack()
    model.config.level = 0
    levels = embed_levels(LoadedModel(model, (SIZE, SIZE), MEAN, STD), TEST, "test", progress=False)
    for level, expected in zip(levels, embeddings_written_out(stack(), TEST), strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)


def test_models_are_loaded_with_the_statistics_of_their_processor(tmp_path):
    sjea = SJeaForPreTraining(SJeaConfig(levels=stack().config.levels, image_size=SIZE)).eval()
    sjea.save_pretrained(tmp_path / "sjea")
    image_processor((SIZE, SIZE), MEAN, STD).save_pretrained(tmp_path / "sjea")
    loaded = load_levels(tmp_path / "sjea", [0.0] * 3, [1.0] * 3)
    assert (loaded.image_size, loaded.image_mean, loaded.image_std) == ((SIZE, SIZE), MEAN, STD)
    expected = embeddings_written_out(sjea.base_model, TEST)
    for level, other in zip(embed_levels(loaded, TEST, "test", progress=False), expected, strict=True):
        torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-5)

    cjepa = tiny_model(image_size=SIZE)
    cjepa.save_pretrained(tmp_path / "cjepa")
    loaded = load_levels(tmp_path / "cjepa", MEAN, STD)
    assert loaded.image_mean == MEAN
    (level,) = embed_levels(loaded, TEST, "test", progress=False)
    (same,) = embed_levels(load_levels(cjepa, MEAN, STD), TEST, "test", progress=False)
    torch.testing.assert_close(level, same)


def test_models_that_cannot_be_loaded_are_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere is neither a folder with a"):
        load_levels(tmp_path / "nowhere", MEAN, STD)
    model = stack()
    del model.levels[1].backbone
    model.save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match=r"half lacks \d+ weights of a SJeaModel \(levels\.1"):
        load_levels(tmp_path / "half", MEAN, STD)
    with pytest.raises(InputError, match="A ResNetModel has no levels to look at"):
        load_levels(ResNetModel(ResNetConfig(**BACKBONE)), MEAN, STD)
