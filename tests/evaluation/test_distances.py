"""Distances under the right names, of networks that are not the standard ones or not to be had."""

import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from pyattr import evaluation
from pyattr.evaluation import (
    Classifier,
    Extractor,
    change_sizes,
    feature_distances,
    fid,
    frechet_distance,
    inception,
    l2,
    lpips,
)


class Channels(nn.Module):
    """The mean of each channel."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.mean((2, 3))


TINY = Extractor("tiny", Channels())


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


def test_without_the_networks_a_classifier_serves_under_its_name(offline):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (12, 1, 9, 9), np.uint8), rng.integers(0, 3, 12)
    judge = Classifier(epochs=1, width=4, num_features=5).fit(images, labels).extractor
    features = judge(images).double()
    quality = fid(images[:6], images[6:], judge)
    assert quality.name == "Fréchet distance of classifier features"
    assert quality.value == frechet_distance(features[:6], features[6:]) > 0
    for measure in (lpips, feature_distances):
        found = measure(images[:6], images[6:], judge)
        assert found.name == "classifier-feature distance"
        np.testing.assert_array_equal(found.values, (features[:6] - features[6:]).norm(dim=1).numpy())
    assert offline.asked == []


@pytest.fixture
def stand_ins(monkeypatch):
    """Modules in the place of torchvision's and torchmetrics', with nothing in them."""
    for name in ("torchvision", "torchvision.models", "torchmetrics", "torchmetrics.image", "torchmetrics.image.lpip"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))


@pytest.mark.parametrize(
    ("op", "name"), [("inception", "torchvision"), ("lpips", "torchvision"), ("lpips", "torchmetrics")]
)
def test_missing_packages_name_the_extra(op, name, stand_ins, monkeypatch):
    for module in [*sys.modules]:
        if module.split(".")[0] == name:
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"^{op} needs the package {name}: install pyattr\[evaluation\]$"):
        network(op)


def network(op):
    image = torch.zeros(1, 3, 16, 16)
    return inception() if op == "inception" else lpips(image, image)


@pytest.mark.parametrize("op", ["inception", "lpips"])
@pytest.mark.parametrize(
    "error", ["RuntimeError('operator torchvision::nms does not exist')", "OSError('libcudart.so')"]
)
def test_a_torchvision_for_another_torch(op, error, monkeypatch, tmp_path):
    for module in [*sys.modules]:
        if module.split(".")[0] == "torchvision":
            monkeypatch.delitem(sys.modules, module)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    told = f"{op} needs the package torchvision, and the one installed does not load ({eval(error)}): "
    told += f"install the build of it that is made for torch {torch.__version__}"
    with pytest.raises(ImportError, match=f"^{re.escape(told)}$"):
        network(op)


def test_change_sizes():
    images = torch.zeros(2, 1, 2, 2)
    changed = torch.zeros(2, 3, 1, 2, 2)
    changed[0, 1] = 1.0  # four pixels by a half
    changed[1, 2, 0, 0] = torch.tensor([6.0, 8.0])  # a guess may leave [-1, 1]
    found = change_sizes(images, changed)
    assert found.dtype == np.float64 and found.tolist() == [[0, 1, 0], [0, 0, 5]]
    grey, white = np.full((1, 1, 1, 1), 0, np.uint8), np.full((1, 2, 1, 1, 1), 255, np.uint8)
    assert change_sizes(grey, white).tolist() == [[1, 1]]
    assert change_sizes(images[:0], changed[:0]).shape == (0, 3)
    assert change_sizes(images, changed[:, :0]).shape == (2, 0)
    assert np.isnan(change_sizes(images * np.nan, changed)).all()


def test_change_sizes_are_l2_of_the_pairs(images):
    changed = images[:, None] * torch.linspace(-1, 1, 4)[:, None, None, None]
    pairs = l2(images[:, None].expand_as(changed).flatten(0, 1), changed.flatten(0, 1))
    np.testing.assert_array_equal(change_sizes(images, changed), pairs.values.reshape(6, 4))


@pytest.mark.parametrize(
    ("call", "error", "told"),
    [
        (lambda x: TINY(x[:0]), ValueError,
         "Extractor: images must hold at least one image of one pixel, got [0, 3, 10, 8]"),
        (lambda x: TINY(x[:, :, :0]), ValueError,
         "Extractor: images must hold at least one image of one pixel, got [6, 3, 0, 8]"),
        (lambda x: TINY(x * np.nan), ValueError, "Extractor: images must lie in [-1, 1] when floating point, got nan..nan"),
        (lambda x: TINY(x.long()), TypeError, "Extractor: images must be uint8 or floating point, got torch.int64"),
        (lambda x: TINY(x, batch_size=0), ValueError, f"Extractor: batch_size must lie in [1, {2**62}], got 0"),
        (lambda x: Extractor("mean", torch.mean), TypeError,
         "Extractor: module must be a torch.nn.Module, got builtin_function_or_method"),
        (lambda x: Extractor("pooled", nn.Flatten(0))(x), ValueError,
         "Extractor: module must return [B, D, ...] for 6 images, got [1440]"),
        (lambda x: Extractor("two", nn.MaxPool2d(2, return_indices=True))(x), TypeError,
         "Extractor: module must return a tensor, got tuple"),
        (lambda x: fid(x, x[:1], TINY), ValueError, "fid: second must hold at least 2 images, got 1"),
        (lambda x: fid(x[0], x, TINY), ValueError, "fid: first must have shape [N, C, H, W], got [3, 10, 8]"),
        (lambda x: fid(x, x, Channels()), TypeError,
         "fid: extractor must be an Extractor, got Channels: a network is wrapped by Extractor(name, module), and a Classifier "
         "has one in its attribute extractor"),
        (lambda x: lpips(x, x, Classifier()), TypeError,
         "lpips: extractor must be an Extractor, got Classifier: a network is wrapped by Extractor(name, module), and a "
         "Classifier has one in its attribute extractor"),
        (lambda x: feature_distances(x, x[:2], TINY), ValueError,
         "feature_distances: second must have the shape of first, [6, 3, 10, 8], got [2, 3, 10, 8]"),
        (lambda x: l2(x, x[:2]), ValueError, "l2: second must have the shape of first, [6, 3, 10, 8], got [2, 3, 10, 8]"),
        (lambda x: l2(x[:0], x[:0]), ValueError, "l2: first must hold at least one image of one pixel, got [0, 3, 10, 8]"),
        (lambda x: lpips(x, x), ValueError,
         "lpips: images must have 1 or 3 channels of at least 16 x 16 pixels, got [3, 10, 8]"),
        (lambda x: lpips(x.repeat(1, 2, 4, 4), x.repeat(1, 2, 4, 4)), ValueError,
         "lpips: images must have 1 or 3 channels of at least 16 x 16 pixels, got [6, 40, 32]"),
        (lambda x: lpips(x, x, batch_size=0), ValueError, f"lpips: batch_size must lie in [1, {2**62}], got 0"),
        (lambda x: change_sizes(x, x), ValueError,
         "change_sizes: changed must have shape [Q, M, C, H, W] for images of shape [6, 3, 10, 8], got [6, 3, 10, 8]"),
        (lambda x: change_sizes(x[0], x), ValueError, "change_sizes: images must have shape [Q, C, H, W], got [3, 10, 8]"),
        (lambda x: change_sizes(x, x[:, None].int()), TypeError,
         "change_sizes: changed must be uint8 or floating point, got torch.int32"),
        (lambda x: change_sizes([0], x), TypeError,
         "change_sizes: images must be a torch tensor, NumPy array or CuPy array, got list"),
    ],
)  # fmt: skip
def test_refusals(call, error, told, images):
    with pytest.raises(error, match=f"^{re.escape(told)}$"):
        call(images)


def test_all_names_are_there():
    assert all(hasattr(evaluation, name) for name in evaluation.__all__)
