"""torchvision's Inception-v3 and torchmetrics' LPIPS by the code that users run, with weights at random in torch's cache."""

import re
from pathlib import Path

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
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=generator)
            else:  # of a normalisation, or a bias
                parameter.normal_(float(name.endswith("weight")), 0.02, generator=generator)
    return module.eval()


@pytest.fixture(scope="module", autouse=True)
def unfilled():
    """Layers whose weights stay NaN until they are loaded: quicker, and none escapes notice."""
    with pytest.MonkeyPatch.context() as patch:
        for layer in (nn.Linear, nn.Conv2d):
            patch.setattr(layer, "reset_parameters", lambda self: None)
        yield


@pytest.fixture(scope="module")
def networks(vision):
    """Inception-v3 and the convolutions of VGG-16."""
    models = vision.models
    return {
        INCEPTION: at_random(models.Inception3(init_weights=False), 0),
        VGG: at_random(models.vgg.make_layers(models.vgg.cfgs["D"]), 1),
    }


@pytest.fixture(scope="module")
def cached(networks, cache):
    """Torch's cache with the networks in it; nothing may be downloaded."""
    torch.save(networks[INCEPTION].state_dict(), cache.folder / INCEPTION)
    state = {f"features.{name}": value for name, value in networks[VGG].state_dict().items()}
    # LPIPS has no use for VGG's half a gigabyte of linear layers. A file keeps the one number that is all of theirs.
    for name, shape in (("0", (4096, 25088)), ("3", (4096, 4096)), ("6", (1000, 4096))):
        state |= {f"classifier.{name}.weight": torch.zeros(1, 1).expand(shape),
                  f"classifier.{name}.bias": torch.zeros(1).expand(shape[0])}  # fmt: skip
    torch.save(state, cache.folder / VGG)
    yield
    assert cache.asked == []


@pytest.fixture(scope="module")
def extractor(cached):
    return inception()


def bytes_of(shape, seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))


def test_fid_is_that_of_inceptions_last_layer(vision, networks, extractor):
    assert (extractor.name, extractor.standard, extractor.module.training) == ("Inception-v3", True, False)
    grey, seen = bytes_of((3, 1, 28, 28), 0), []
    with extractor.module.register_forward_hook(lambda module, inputs, output: seen.append(output)):
        found = fid(grey[:2], grey[1:], extractor, batch_size=1)
    # The network undoes the normalisation that its weights ask for, so without that it takes [-1, 1].
    network = networks[INCEPTION]
    network.transform_input = False
    images = vision.transforms.functional.resize(grey / 127.5 - 1, [299, 299], antialias=True)
    with torch.no_grad():
        wanted = network(images.expand(-1, 3, -1, -1))
    assert wanted.shape == (3, 1000)
    spread = float(wanted.std(0).mean())
    assert spread > 1e-2 * float(wanted.abs().mean())  # it tells the images apart
    # The second set is looked at first.
    torch.testing.assert_close(torch.cat(seen), wanted[[1, 2, 0, 1]], rtol=0, atol=1e-3 * spread)
    assert found.name == "FID"
    assert found.value == pytest.approx(frechet_distance(wanted[:2], wanted[1:]), rel=1e-2)


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 40), (1, 598)])
def test_images_are_prepared_as_torchvision_does(channels, size, vision, extractor):
    images = bytes_of((2, channels, size, size), 1)
    functional, weights = vision.transforms.functional, vision.models.Inception_V3_Weights.DEFAULT.transforms()
    resized = functional.resize(images / 255, [299, 299], antialias=True).expand(-1, 3, -1, -1)
    wanted = functional.normalize(resized, weights.mean, weights.std)
    torch.testing.assert_close(extractor.prepare(images / 127.5 - 1), wanted, rtol=0, atol=1e-5)


def test_images_of_two_channels_are_no_colour(extractor):
    with pytest.raises(ValueError, match=r"^Extractor: images must have 1 or 3 channels, got 2$"):
        extractor(torch.zeros(1, 2, 8, 8))


def test_lpips_is_the_papers(vision, networks, cached):
    first, second = (bytes_of((3, 1, 33, 24), seed) / 127.5 - 1 for seed in (2, 3))
    second[1] = first[1]
    first[2, 0, 0, 0] = -1.0005  # which rounding may do, and torchmetrics refuses
    found = lpips(first, second, batch_size=2)
    assert found.name == "LPIPS" and found.values.dtype == np.float64
    wanted = by_hand(vision.metrics, networks[VGG], first.clamp(-1, 1), second)
    assert wanted[1] == 0 < wanted[[0, 2]].min()
    np.testing.assert_allclose(found.values, wanted.numpy(), rtol=1e-4, atol=0)


def by_hand(metrics, features, first, second):
    """Zhang et al., equation 1, on the outputs before each pooling, with the heads that torchmetrics brings."""
    file = Path(metrics.__path__[0]) / "functional/image/lpips_models/vgg.pth"
    heads = list(torch.load(file, map_location="cpu").values())
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    pair = [(x.expand(-1, 3, -1, -1) - shift) / scale for x in (first, second)]
    total = torch.zeros(len(first))
    with torch.no_grad():
        for layer in features:
            if isinstance(layer, nn.MaxPool2d):
                unit = [x / x.norm(dim=1, keepdim=True) for x in pair]
                total += (heads.pop(0) * (unit[0] - unit[1]) ** 2).sum(1).mean((1, 2))
            if not heads:  # before the last pooling
                return total
            pair = [layer(x) for x in pair]


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
    metric = vision.metrics.image.fid.FrechetInceptionDistance(feature=Tiny())
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
    assert list(offline.folder.iterdir()) == []


@pytest.mark.parametrize("damage", [b"not weights", b"PK\x03\x04 cut short"])
def test_damaged_weights(damage, vision, offline):
    (offline.folder / INCEPTION).write_bytes(damage)
    with pytest.raises(RuntimeError, match=rf"^inception: the network's weights cannot be had \(.*{re.escape(HELP)}$"):
        inception()
