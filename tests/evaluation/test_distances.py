"""Distances under the right names; the standard networks' path with stand-ins for their packages."""

import re
import sys
import types
import urllib.error

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyattr import evaluation
from pyattr.evaluation import Extractor, feature_distances, fid, frechet_distance, inception, l2, lpips


class Channels(nn.Module):
    """The mean of each channel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.mean((2, 3))


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (6, 3, 10, 8)).astype(np.float32))


def test_only_the_standard_features_are_called_fid(images):
    ours = Extractor("tiny", Channels())
    found = fid(images, images.flip(0) * 0.5, ours, batch_size=4)
    assert found.name == "Fréchet distance of tiny features"
    assert found.value == frechet_distance(images.mean((2, 3)), (images * 0.5).mean((2, 3)).flip(0))
    assert fid(images, images, Extractor("tiny", Channels(), standard=True)).name == "FID"


def test_distances_of_pairs(images):
    found = feature_distances(images, images * 0, Extractor("tiny", Channels()))
    assert found.name == "tiny-feature distance"
    np.testing.assert_allclose(found.values, images.double().mean((2, 3)).norm(dim=1).numpy(), rtol=1e-6)
    black, white = torch.zeros(1, 1, 3, 3, dtype=torch.uint8), torch.full((1, 1, 3, 3), 255, dtype=torch.uint8)
    assert (l2(black, white).name, l2(black, white).values.tolist()) == ("L2", [3.0])


def test_an_extractor_leaves_the_mode_and_no_graph(images):
    module = nn.Sequential(nn.Dropout(), Channels()).train()
    calls = []
    found = Extractor("tiny", module)(images, batch_size=4, progress=lambda *call: calls.append(call))
    assert module.training and not found.requires_grad
    torch.testing.assert_close(found, images.mean((2, 3)))  # without dropout
    assert calls == [(4, 6, "image features"), (6, 6, "image features")]


class TinyInception(nn.Module):
    """Stands in for the network, so that its input can be seen."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 1)
        nn.init.constant_(self.stem.weight, 0.25)
        nn.init.zeros_(self.stem.bias)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.stem(x).mean((2, 3))


@pytest.fixture
def torchvision(monkeypatch):
    """A module of the face of torchvision.models whose networks are tiny."""
    transforms = types.SimpleNamespace(mean=[0.5, 0.25, 0.0], std=[0.5, 1.0, 2.0])
    weights = types.SimpleNamespace(transforms=lambda: transforms)
    models = types.ModuleType("torchvision.models")
    models.Inception_V3_Weights = types.SimpleNamespace(DEFAULT=weights)
    models.network = TinyInception()
    models.inception_v3 = lambda weights: {id(models.Inception_V3_Weights.DEFAULT): models.network}[id(weights)]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    return models


def test_the_standard_path_prepares_images_as_the_weights_ask(torchvision):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (3, 1, 28, 28), np.uint8)
    extractor = inception()
    assert (extractor.name, extractor.standard) == ("Inception-v3", True)
    assert not torchvision.network.training
    features = extractor(grey)
    seen = torchvision.network.seen[0]
    assert seen.shape == (3, 3, 299, 299)
    unit = F.interpolate(torch.from_numpy(grey) / 255, (299, 299), mode="bilinear", antialias=True)
    wanted = torch.cat([(unit - 0.5) / 0.5, unit - 0.25, unit / 2], 1)
    torch.testing.assert_close(seen, wanted, rtol=0, atol=2e-6)
    torch.testing.assert_close(features, (0.25 * wanted.sum(1).mean((1, 2)))[:, None].expand(-1, 2))
    assert fid(grey, grey, extractor).name == "FID"


def test_larger_images_are_antialiased(torchvision):
    stripes = torch.zeros(1, 1, 598, 598, dtype=torch.uint8)
    stripes[..., ::2] = 255  # at half the resolution they are an even grey
    inception()(stripes)
    middle = torchvision.network.seen[0][0, 2, 10:-10, 10:-10]
    torch.testing.assert_close(middle, torch.full_like(middle, 0.25), rtol=0, atol=0.02)


def test_the_real_inception_takes_the_path(monkeypatch):
    """torchvision's own class from a configuration, with random weights."""
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(models, "inception_v3", lambda weights: models.Inception3(num_classes=5, init_weights=False))
    assert inception()(torch.zeros(1, 1, 28, 28)).shape == (1, 5)


def test_weights_that_cannot_be_had(torchvision, monkeypatch):
    def offline(weights):
        raise urllib.error.URLError("no route to host")

    torchvision.inception_v3 = offline
    told = (
        "inception: the network's weights cannot be had (<urlopen error no route to host>): put the file into torch's cache "
        "(torch.hub.get_dir()), or use a Classifier of the data and report its own distance"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(told)}$"):
        inception()


@pytest.mark.parametrize(("name", "call"), [("torchvision", inception), ("torchmetrics", None)])
def test_missing_packages_name_the_extra(name, call, torchvision, monkeypatch):
    for module in [*sys.modules]:
        if module.split(".")[0] == name:
            monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)
    op = "inception" if call else "lpips"
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ImportError, match=rf"^{op} needs the package {name}: install pyattr\[evaluation\]$"):
        (call or (lambda: lpips(image, image)))()


def test_lpips_takes_colour_in_minus_one_to_one(torchvision, monkeypatch):
    class Metric:
        def __init__(self, net_type, reduction):
            assert (net_type, reduction) == ("vgg", "none")

        def __call__(self, first, second):
            assert first.shape[1] == 3 and first.is_contiguous()
            assert first.min() >= -1  # or torchmetrics refuses them
            return (first - second).abs().amax((1, 2, 3)).squeeze()  # as torchmetrics' own squeezes

    lpip = types.ModuleType("torchmetrics.image.lpip")
    lpip.LearnedPerceptualImagePatchSimilarity = Metric
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", lpip)
    first = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    second = first.clone()
    second[1] = 255
    found = lpips(first, second, batch_size=2)
    assert (found.name, found.values.tolist()) == ("LPIPS", [0, 2, 0])
    assert lpips(torch.full((1, 3, 4, 4), -1.0005), torch.ones(1, 3, 4, 4)).values.tolist() == [2]
    with pytest.raises(ValueError, match=r"^lpips: images must have 1 or 3 channels, got 2$"):
        lpips(torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda x: Extractor("tiny", Channels())(x[:0]), "Extractor: needs an image and a batch_size, got 0 and 64"),
        (lambda x: l2(x, x[:2]), "l2: second must have the shape of first, [6, 3, 10, 8], got [2, 3, 10, 8]"),
        (lambda x: l2(x[:0], x[:0]), "l2: first must hold at least one image, got none"),
    ],
)
def test_refusals(call, told, images):
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        call(images)


def test_images_of_two_channels_are_no_colour(torchvision):
    with pytest.raises(ValueError, match=r"^Extractor: images must have 1 or 3 channels, got 2$"):
        inception()(torch.zeros(1, 2, 8, 8))


def test_all_names_are_there():
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
