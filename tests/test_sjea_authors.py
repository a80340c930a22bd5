"""Checkpoints of S-JEA's authors, beside their forward pass written out with torchvision's ResNet-18."""

from collections import OrderedDict

import pytest
import torch
from tiny import images
from torch import nn
from torchvision.models import resnet18

from modeling_cjepa import SJeaForPreTraining
from trainers.conversion.sjea_authors import from_sjea_checkpoint
from trainers.errors import InputError

# what `fc` of the two encoders is, and the columns that the first one's output is folded to, by their `projection`
HEADS = {"simple": ("expander", "linear", 16), "both": ("expander", "expander", 16), "stacked": (None, "expander", 32)}
HEADS["none"] = (None, "linear", 32)


def expander():
    layers = {"fc1": nn.Linear(512, 24), "bn1": nn.BatchNorm1d(24), "relu1": nn.ReLU(), "fc2": nn.Linear(24, 24)}
    return nn.Sequential(OrderedDict(layers, bn2=nn.BatchNorm1d(24), relu2=nn.ReLU(), fc3=nn.Linear(24, 256)))


def encoder(head, channels, small):
    """The authors' encoder: a ResNet-18 whose stem and `fc` they change."""
    model = resnet18(weights=None)
    if small:
        model.conv1, model.maxpool = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), nn.Identity()
    else:
        model.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
    model.fc = {"expander": expander, "linear": lambda: nn.Linear(512, 1000), None: nn.Identity}[head]()
    return model


def encode(model, x):
    """What their `forward` returns: `fc` of the pooled features, and these."""
    x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    x = model.layer4(model.layer3(model.layer2(model.layer1(x))))
    pooled = torch.flatten(model.avgpool(x), 1)
    return model.fc(pooled), pooled


def make(projection, small=True):
    """Both encoders, with batch norms that have seen something, and their checkpoint."""
    torch.manual_seed(0)
    first, second, columns = HEADS[projection]
    online, stacked = encoder(first, 3, small), encoder(second, 1, small)
    with torch.no_grad():
        expanded, _ = encode(online, images(8))
        encode(stacked, expanded.reshape(8, 1, 16, columns))
        for module in (*online.modules(), *stacked.modules()):
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    tensors = {}
    for part, model in (("encoder_online", online.eval()), ("encoder_stacked", stacked.eval())):
        for name, tensor in model.state_dict().items():
            name = f"stem.conv0{name[5:]}" if name.startswith("conv1.") else name
            name = f"stem.BN1{name[3:]}" if name.startswith("bn1.") else name
            tensors[f"{part}.{name}"] = tensor
    return online, stacked, columns, {"state_dict": tensors}


@pytest.fixture
def checkpoint():
    return make("both")[-1]


@pytest.mark.parametrize(("projection", "small"), [(name, True) for name in HEADS] + [("simple", False)])
def test_levels_are_those_of_the_authors_forward(projection, small):
    online, stacked, columns, checkpoint = make(projection, small)
    converted = from_sjea_checkpoint(checkpoint)
    model, pixels = converted.model, images(3, seed=1)
    with torch.no_grad():
        expanded, first = encode(online, pixels)
        second_expanded, second = encode(stacked, expanded.reshape(3, 1, 16, columns))
        ours = model.sjea.encode(pixels)
        top = model.expanders["1"](ours[1].embedding)
    torch.testing.assert_close(ours[0].embedding, first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[1].embedding, second, atol=1e-5, rtol=1e-5)
    # up to the last layer's bias, which is the same for every image
    torch.testing.assert_close(top - top[0], second_expanded - second_expanded[0], atol=1e-5, rtol=1e-4)
    assert f"projection is '{projection}'" in converted.notes[0]
    assert (converted.model.config.image_size, converted.check.difference <= converted.check.limit) == (
        32 if small else 64,
        True,
    )


def test_the_bias_that_is_read_stays_in_training(checkpoint):
    """The unit that holds it gives 1 with the statistics of any batch."""
    level = from_sjea_checkpoint(checkpoint).model.sjea.levels[0].train()
    head = expander().train()
    head.load_state_dict(
        {n.removeprefix("encoder_online.fc."): t for n, t in checkpoint["state_dict"].items() if "online.fc." in n}
    )
    embeddings = torch.randn(6, 512)
    torch.testing.assert_close(level.expander(embeddings), head(embeddings), atol=1e-5, rtol=1e-4)


def test_the_first_encoder_alone_is_vicreg(checkpoint):
    tensors = {n: t for n, t in checkpoint["state_dict"].items() if n.startswith("encoder_online.")}
    converted = from_sjea_checkpoint(tensors)
    assert converted.model.config.num_levels == 1 and "'VICReg alone'" in converted.notes[0]


def test_it_is_saved_and_loaded_as_any_model(checkpoint, tmp_path):
    model = from_sjea_checkpoint(checkpoint).model
    model.save_pretrained(tmp_path)
    loaded = SJeaForPreTraining.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded.sjea(images(2)).pooler_output, model.sjea(images(2)).pooler_output)


def without(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.clear(), "has nothing where"),
        (lambda tensors: tensors.update({"lin_head.weight": torch.zeros(1)}), "lin_head where"),
        (without("encoder_online.stem.conv0.weight"), "encoder_online: There is no convolution 'conv1.weight'"),
        (without("encoder_stacked.layer2.1.bn2.bias"), "encoder_stacked: .*missing layer2.1.bn2.bias"),
        (without("encoder_online.fc.fc2.weight"), "encoder_online.fc has no matrix 'fc2.weight'"),
        (without("encoder_online.fc.fc2.bias"), "encoder_online.fc does not fit: missing fc2.bias"),
        (
            without(*(f"encoder_online.fc.bn{n}.{p}" for n in (1, 2)
                      for p in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"))),
            "encoder_online.fc has no batch norms",
        ),
        (
            lambda tensors: tensors.update({"encoder_online.fc.fc3.weight": torch.zeros(256, 23)}),
            r"fc3.weight has shape \(256, 23\), not \(256, 24\)",
        ),
        (lambda tensors: tensors["encoder_stacked.layer1.0.bn1.weight"][0].fill_(torch.nan), "layer1.0.bn1.*finite"),
        (
            lambda tensors: tensors.update({"encoder_stacked.stem.conv0.weight": torch.zeros(64, 3, 3, 3)}),
            "reads 3 channels and the first gives 256",
        ),
    ],
)  # fmt: skip
def test_what_is_broken_is_said(checkpoint, change, message):
    change(checkpoint["state_dict"])
    with pytest.raises(InputError, match=message):
        from_sjea_checkpoint(checkpoint)
