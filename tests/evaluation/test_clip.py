"""CLIP's features, on a network of random weights built from its configuration."""

import sys

import pytest
import torch

from pyattr.attribution import CLIPSimilarity
from pyattr.evaluation import clip

transformers = pytest.importorskip("transformers", reason="comes with pyattr[evaluation] and pyattr[dev]")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A CLIPModel, and the folder that it was saved to."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 20, "max_position_embeddings": 8},
        vision_config={**sizes, "image_size": 12, "patch_size": 4},
        projection_dim=6,
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model, folder


def published(model, images):
    """What CLIPModel gives for images prepared by its own processor, from 8 bits."""
    size = model.config.vision_config.image_size
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    pixels = processor([image.permute(1, 2, 0).numpy() for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = model.get_image_features(pixels)
    return found if isinstance(found, torch.Tensor) else found.pooler_output


@pytest.mark.parametrize("shape", [(3, 12, 12), (3, 8, 8), (3, 30, 30), (3, 14, 21), (3, 21, 14)])
def test_features_are_those_of_the_library(tiny, shape):
    model, folder = tiny
    images = torch.randint(0, 256, (5, *shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found, expected = clip(folder)(images), published(model, images)
    assert found.shape == (5, 6)
    # Rounding to 8 bits after resizing is all that differs; images of the network's own size are not resized.
    tolerance = 1e-5 if shape == (3, 12, 12) else 0.02
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


def test_grey_images_become_coloured(tiny):
    _, folder = tiny
    grey = torch.rand(2, 1, 12, 12) * 2 - 1
    assert torch.equal(clip(folder)(grey), clip(folder)(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_similarity(tiny, similarity):
    model, folder = tiny
    images = torch.randint(0, 256, (4, 3, 12, 12), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    method = CLIPSimilarity(similarity=similarity, weights=folder).fit(images)
    expected = published(model, images).double()
    if similarity == "cosine":
        expected = expected / expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(method.scores(images[:2]).double(), expected[:2] @ expected.T, atol=1e-5, rtol=1e-4)
    assert method.name == "CLIP-feature similarity"


def test_weights_that_are_not_at_hand(tiny, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"clip: the weights .*none cannot be had .* CLIPSimilarity\(classifier\.extractor\)"
    ):
        CLIPSimilarity(weights=tmp_path / "none")
    model, _ = tiny
    state = {name: value for name, value in model.state_dict().items() if name != "visual_projection.weight"}
    model.save_pretrained(tmp_path / "cut", state_dict=state)
    with pytest.raises(RuntimeError, match=r"cannot be had \(there is no visual_projection\.weight\)"):
        clip(tmp_path / "cut")


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"clip needs the package transformers: install pyattr\[evaluation\]"):
        CLIPSimilarity()
