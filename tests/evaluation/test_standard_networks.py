"""torchvision's Inception-v3 and torchmetrics' LPIPS by the code that users run, with weights at random in torch's cache."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyattr.evaluation import Extractor, fid, frechet_distance, inception, lpips

INCEPTION, VGG = "inception_v3_google-0cc3c7bd.pth", "vgg16-397923af.pth"
HELP = (
    "put the file into torch's cache (torch.hub.get_dir()), or use a Classifier of the data and report its own distance"
)


def at_random(module, seed):
    """Weights whose activations neither vanish nor grow over many layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
            else:
                parameter.uniform_(0, 1, generator=generator)
    return module.eval()


@pytest.fixture(autouse=True)
def unfilled(monkeypatch):
    """Layers whose weights stay NaN until they are loaded: quicker, and none escapes notice."""
    for layer in (nn.Linear, nn.Conv2d):
        monkeypatch.setattr(layer, "reset_parameters", lambda self: None)


@pytest.fixture(scope="module")
def networks(vision, tmp_path_factory):
    """Inception-v3 and the convolutions of VGG-16, and the files that hold them."""
    folder = tmp_path_factory.mktemp("weights")
    network = at_random(vision.models.Inception3(init_weights=False), 0)
    torch.save(network.state_dict(), folder / INCEPTION)
    features = at_random(vision.models.vgg.make_layers(vision.models.vgg.cfgs["D"]), 1)
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    # LPIPS has no use for VGG's half a gigabyte of linear layers. A file keeps the one number that is all of theirs.
    for name, shape in (("0", (4096, 25088)), ("3", (4096, 4096)), ("6", (1000, 4096))):
        state |= {f"classifier.{name}.weight": torch.zeros(1, 1).expand(shape),
                  f"classifier.{name}.bias": torch.zeros(1).expand(shape[0])}  # fmt: skip
    torch.save(state, folder / VGG)
    return {"inception": network, "vgg": features, "folder": folder}


@pytest.fixture
def cached(networks, offline):
    """Torch's cache with the networks in it; nothing may be downloaded."""
    for name in (INCEPTION, VGG):
        (offline.cache / name).symlink_to(networks["folder"] / name)
    yield networks
    assert offline.asked == []


def bytes_of(shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def test_fid_is_that_of_inceptions_last_layer(vision, cached):
    grey = bytes_of((4, 1, 28, 28), 0)
    extractor = inception()
    assert (extractor.name, extractor.standard, extractor.module.training) == ("Inception-v3", True, False)
    # The network undoes the normalisation that its weights ask for, so without that it takes [-1, 1].
    network = cached["inception"]
    network.transform_input = False
    images = vision.vision.transforms.functional.resize(grey / 127.5 - 1, [299, 299], antialias=True)
    with torch.no_grad():
        wanted = network(images.expand(-1, 3, -1, -1))
    assert wanted.shape == (4, 1000) and wanted.std(0).min() > 1e-3  # it tells the images apart
    torch.testing.assert_close(extractor(grey[:1]), wanted[:1], rtol=1e-3, atol=1e-3 * float(wanted.std()))
    found = fid(grey[:2], grey[2:], extractor, batch_size=2)
    assert found.name == "FID"
    assert found.value == pytest.approx(frechet_distance(wanted[:2], wanted[2:]), rel=1e-3)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 40), (1, 598)])
def test_images_are_prepared_as_torchvision_does(channels, size, vision, cached):
    images = bytes_of((2, channels, size, size), 1)
    functional, weights = vision.vision.transforms.functional, vision.models.Inception_V3_Weights.DEFAULT.transforms()
    resized = functional.resize(images / 255, [299, 299], antialias=True).expand(-1, 3, -1, -1)
    wanted = functional.normalize(resized, weights.mean, weights.std)
    found = inception().prepare(images / 127.5 - 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_images_of_two_channels_are_no_colour(cached):
    with pytest.raises(ValueError, match=r"^Extractor: images must have 1 or 3 channels, got 2$"):
        inception()(torch.zeros(1, 2, 8, 8))


def test_lpips_is_the_papers(vision, cached):
    first, second = bytes_of((3, 1, 33, 24), 2), bytes_of((3, 1, 33, 24), 3)
    second[1] = first[1]
    found = lpips(first, second, batch_size=2)
    assert found.name == "LPIPS" and found.values.dtype == np.float64
    assert found.values[1] == 0 and found.values.min() == 0
    pairs = [(x / 127.5 - 1).expand(-1, 3, -1, -1) for x in (first, second)]
    wanted = by_hand(cached["vgg"], heads(vision), *pairs)
    assert wanted[[0, 2]].min() > 1e-3
    np.testing.assert_allclose(found.values, wanted.numpy(), rtol=1e-4, atol=1e-7)
    metric = vision.metrics.lpip.LearnedPerceptualImagePatchSimilarity(net_type="vgg", reduction="mean")
    assert found.values.mean() == pytest.approx(float(metric(*pairs)), rel=1e-5)
    # Rounding may leave a pixel outside of what torchmetrics takes.
    assert lpips(torch.full((1, 3, 16, 16), -1.0005), torch.ones(1, 3, 16, 16)).values > 0


def heads(vision):
    """The learnt weights of each layer's channels, which torchmetrics brings with it."""
    folder = next(iter(vision.metrics.__path__)).replace("/image", "/functional/image")
    state = torch.load(f"{folder}/lpips_models/vgg.pth")
    return [state[f"lin{layer}.model.1.weight"] for layer in range(5)]


def by_hand(features, heads, first, second):
    """Zhang et al., equation 1, on the outputs before each pooling and the last."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    total = torch.zeros(len(first))
    pair = [(x - shift) / scale for x in (first, second)]
    heads = iter(heads)
    with torch.no_grad():
        for layer in features:
            if isinstance(layer, nn.MaxPool2d):  # the last one too, which ends the network
                unit = [x / x.norm(dim=1, keepdim=True) for x in pair]
                total += (next(heads) * (unit[0] - unit[1]) ** 2).sum(1).mean((1, 2)).flatten()
            pair = [layer(x.clone()) for x in pair]  # cloned, as the rectifiers work in place
    assert next(heads, None) is None
    return total


class Tiny(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.convolution = at_random(nn.Conv2d(3, 6, 3, 2), 2)

    def forward(self, images):
        return F.relu(self.convolution(images)).mean((2, 3))


def test_torchmetrics_finds_the_same_frechet_distance(vision):
    rng = np.random.default_rng(4)
    first, second = (torch.from_numpy(rng.uniform(-1, high, (60, 3, 9, 9))).float() for high in (1, 0.5))
    metric = vision.metrics.fid.FrechetInceptionDistance(feature=Tiny())
    metric.update(first, real=True)
    metric.update(second, real=False)
    found = fid(first, second, Extractor("tiny", Tiny()), batch_size=7)
    assert found.name == "Fréchet distance of tiny features"
    assert found.value == pytest.approx(float(metric.compute()), rel=1e-4)


@pytest.mark.parametrize("op", ["inception", "lpips"])
def test_weights_that_cannot_be_had(op, vision, offline):
    image = torch.zeros(1, 3, 16, 16)
    told = f"{op}: the network's weights cannot be had (<urlopen error no route to host>): {HELP}"
    with pytest.raises(RuntimeError, match=f"^{re.escape(told)}$"):
        inception() if op == "inception" else lpips(image, image)
    [asked] = offline.asked
    assert asked.endswith(INCEPTION if op == "inception" else VGG)
    assert list(offline.cache.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"not weights", b"PK\x03\x04 cut short"])
def test_damaged_weights(damage, vision, offline):
    (offline.cache / INCEPTION).write_bytes(damage)
    with pytest.raises(RuntimeError, match=rf"^inception: the network's weights cannot be had \(.*{re.escape(HELP)}$"):
        inception()
