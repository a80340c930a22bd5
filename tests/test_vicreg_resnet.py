"""ResNets of torchvision's layout, such as VICReg's resnet50.pth, beside torchvision's own classes."""

import pytest
import torch
import torchvision
from tiny import images, sjea_level
from torch import nn

from modeling_cjepa import SJeaConfig, SJeaForPreTraining
from trainers.backbones import describe_backbones, load_backbones
from trainers.conversion.vicreg_resnet import from_vicreg_checkpoint
from trainers.errors import InputError


def resnet(name, small=False):
    """torchvision's model without classifier, whose batch norms have statistics that matter."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None)
    model.fc = nn.Identity()
    if small:
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    with torch.no_grad():
        model.train()(2 * images(4) + 1)
    return model.eval()


@pytest.fixture
def state():
    return resnet("resnet18").state_dict()


@pytest.mark.parametrize(("name", "small"), [("resnet50", False), ("resnet18", False), ("resnet18", True)])
def test_features_are_torchvisions(name, small):
    theirs = resnet(name, small)
    converted = from_vicreg_checkpoint(theirs.state_dict())
    assert converted.check.difference <= converted.check.limit
    # of odd sizes, where a stride in another convolution would show
    for size in ((2, 64, 64), (1, 75, 51)):
        with torch.no_grad():
            ours = converted.model.sjea(images(*size)).pooler_output
            torch.testing.assert_close(ours, theirs(images(*size)), atol=1e-5, rtol=1e-5)
    assert converted.model.config.image_size == (32 if small else 224)


def test_batch_norms_keep_their_statistics(state):
    norm = from_vicreg_checkpoint(state).model.sjea.levels[0].backbone.embedder.embedder.normalization
    assert torch.equal(norm.running_mean, state["bn1.running_mean"]) and norm.num_batches_tracked == 1


def test_a_classifier_is_left_out_and_the_expander_starts_anew(state):
    state["fc.weight"] = torch.zeros(10, 512)
    converted = from_vicreg_checkpoint(state, image_size=64, expander_sizes=[16, 8])
    assert [note.split(" ")[1] for note in converted.notes] == ["classifier", "expander"]
    assert converted.model.expanders["0"][-1].weight.shape == (8, 16)
    assert converted.model.config.image_size == 64


def test_a_level_of_a_recipe_starts_from_a_file(state, tmp_path):
    file = str(tmp_path / "resnet.pth")
    torch.save(state, file)
    levels, names = describe_backbones([sjea_level(backbone=file, stem="standard"), sjea_level()])
    model = SJeaForPreTraining(SJeaConfig(levels=levels)).eval()
    (sentence,) = load_backbones(model, names)
    assert sentence == f"level 0 starts from {len(state)} of {len(state)} tensors of {file}"
    with torch.no_grad():
        theirs = resnet("resnet18")(images(2))
        torch.testing.assert_close(model.sjea.encode(images(2))[0].embedding, theirs, atol=1e-5, rtol=1e-5)


def test_the_stem_of_another_size_starts_anew(state, tmp_path):
    file = str(tmp_path / "resnet.pth")
    torch.save(state, file)
    levels, names = describe_backbones([sjea_level(backbone=file)])
    (sentence,) = load_backbones(SJeaForPreTraining(SJeaConfig(levels=levels)), names)
    assert sentence.endswith("these start anew: embedder.embedder.convolution.weight")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.clear(), "There is no convolution 'conv1.weight'"),
        (lambda state: state.pop("layer3.1.bn2.running_var"), "missing layer3.1.bn2.running_var"),
        (lambda state: state.pop("layer4.0.conv2.weight"), "no convolution 'layer4.0.conv2.weight'"),
        (
            lambda state: state.update({"layer2.0.conv1.weight": torch.zeros(128, 64, 1, 1)}),
            r"shape \(128, 64, 1, 1\)",
        ),
        (lambda state: state.update({"conv1.weight": torch.zeros(64, 3, 5, 5)}), r"kernel of \[5, 5\]"),
        (lambda state: state.update({"projector.weight": torch.zeros(1)}), "not known projector.weight"),
        (lambda state: state["layer1.0.conv1.weight"][0].fill_(torch.nan), "layer1.0.conv1.weight.*not finite"),
    ],
)
def test_what_is_broken_is_said(state, change, message):
    change(state)
    with pytest.raises(InputError, match=message):
        from_vicreg_checkpoint(state)
