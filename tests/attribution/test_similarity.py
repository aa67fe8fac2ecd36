import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr.attribution import CLIPSimilarity, RawPixel, products
from pyattr.attribution.products import divided, inner_products, row_norms
from pyattr.diffusion import sample
from pyattr.diffusion.features import Features
from pyattr.evaluation import Classifier, Extractor


def unit(images):
    return (images.double() / 127.5 - 1).flatten(1) if images.dtype == torch.uint8 else images.double().flatten(1)


def rows(tensor, starts=None):
    """Features in memory, or in blocks that begin at ``starts``."""
    if starts is None:
        return Features.from_tensor(tensor, torch.arange(len(tensor)))
    ends = dict(zip(starts, [*starts[1:], len(tensor)], strict=True))
    return Features(
        torch.arange(len(tensor)), tensor.shape[1], tensor.dtype, lambda s: tensor[s : ends[s]], list(starts)
    )


def test_pixel_dot_and_cosine_by_hand():
    images = np.array([[255, 255], [0, 255]], np.uint8).reshape(2, 1, 1, 2)  # (1, 1), (-1, 1)
    queries = torch.tensor([[0.5, 0.0], [0.0, 0.0]]).view(2, 1, 1, 2)
    dots = RawPixel("dot").fit(images).scores(queries)
    assert dots.dtype == torch.float32 and dots.tolist() == [[0.5, -0.5], [0, 0]]
    half = 0.5**0.5
    cosines = RawPixel("cosine").fit(images).scores(queries)
    torch.testing.assert_close(cosines, torch.tensor([[half, -half], [0, 0]]))


def test_cosine_from_the_mean_by_hand():
    images = np.array([[0, 0], [4, 0], [0, 4], [4, 4]], np.uint8).reshape(4, 1, 1, 2)  # mean (2, 2)
    queries = np.array([[2, 5], [2, 2]], np.uint8).reshape(2, 1, 1, 2)  # (0, 3) and (0, 0) from the mean
    half = 0.5**0.5
    found = RawPixel("cosine", centre=True).fit(images).scores(queries)
    np.testing.assert_allclose(found.numpy(), [[-half, -half, half, half], [0, 0, 0, 0]], atol=1e-7)


@given(st.integers(1, 9), st.integers(0, 5), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_pixels_are_the_definition(count, num_queries, cosine, centre, integers, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 2, 2), generator=generator).to(torch.uint8)
    queries = torch.rand(num_queries, 3, 2, 2, generator=generator) * 2 - 1
    if integers:
        queries = (queries * 100 + 120).to(torch.uint8)
    x, y = unit(queries), unit(images)
    if centre:
        x, y = x - y.mean(0), y - y.mean(0)
    expected = x @ y.T
    if cosine:
        norms = x.norm(dim=1)[:, None] * y.norm(dim=1)
        # A single image is its own mean, and its cosine with anything 0.
        expected = torch.where(norms < 1e-9, 0.0, expected / norms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pyattr.attribution.similarity._IMAGES", 2)
        found = RawPixel("cosine" if cosine else "dot", centre=centre).fit(images).scores(queries)
    assert found.shape == (num_queries, count)
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_samples_are_queries(linear_net, schedule, images):
    samples = sample(linear_net(4), schedule, num_images=2, shape=(1, 2, 2), steps=3)
    fitted = RawPixel().fit(images)
    assert torch.equal(fitted.scores(samples), fitted.scores(samples.images))
    assert RawPixel.signed is False and fitted.name == "pixel cosine" and RawPixel("dot").name == "pixel inner product"


def test_refusals(images):
    with pytest.raises(ValueError, match="RawPixel: similarity must be one of dot, cosine, got 'euclid'"):
        RawPixel("euclid")
    with pytest.raises(RuntimeError, match="RawPixel: fit must be called before scores"):
        RawPixel().scores(images)
    with pytest.raises(ValueError, match="RawPixel: train must hold at least one image, got none"):
        RawPixel().fit(images[:0])
    with pytest.raises(
        ValueError, match=r"RawPixel: queries must have the shape of the training images, \[1, 2, 2\], got \[1, 1, 2\]"
    ):
        RawPixel().fit(images).scores(images[:, :, :1])


# Encoders


def halves(batch):
    """Sums over the upper and the lower row, [B, 2]."""
    return batch.sum((1, 3))


@pytest.mark.parametrize("batch_size", [1, 64])
def test_features_of_any_encoder(images, batch_size):
    queries = torch.rand(3, 1, 2, 2) * 2 - 1
    ours, theirs = queries.double().sum((1, 3)), unit(images).view(-1, 2, 2).sum(2)
    for similarity in ("dot", "cosine"):
        expected = ours @ theirs.T
        if similarity == "cosine":
            expected = expected / (ours.norm(dim=1)[:, None] * theirs.norm(dim=1))
        method = CLIPSimilarity(halves, similarity, batch_size=batch_size)
        assert method.fit(images) is method
        found = method.scores(queries)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)
    assert method.name == "halves-feature similarity" and CLIPSimilarity.signed is False
    assert method.scores(queries[:0]).shape == (0, 9)


def test_modules_and_extractors_bear_their_names(images):
    flat = torch.nn.Flatten()
    prepared = Extractor("brightness", flat, prepare=lambda x: x.mean((1, 2, 3), keepdim=True))
    assert CLIPSimilarity(flat).name == "Flatten-feature similarity"
    method = CLIPSimilarity(prepared, "dot").fit(images)
    assert method.name == "brightness-feature similarity"
    means = unit(images).mean(1)
    torch.testing.assert_close(method.scores(images).double(), torch.outer(means, means), atol=1e-5, rtol=1e-5)


def test_a_classifier_where_clip_cannot_be_had(images):
    classifier = Classifier(epochs=1, width=2, num_features=5).fit(images, torch.arange(9) % 2)
    method = CLIPSimilarity(classifier.extractor, "dot").fit(images)
    assert method.name == "classifier-feature similarity"
    found = classifier.extractor(images).double()
    torch.testing.assert_close(method.scores(images[:2]).double(), found[:2] @ found.T, atol=1e-6, rtol=1e-5)


def test_encoders_that_are_refused(images):
    with pytest.raises(ValueError, match="CLIPSimilarity: similarity must be one of dot, cosine, got 'l2'"):
        CLIPSimilarity(halves, "l2")
    with pytest.raises(
        TypeError, match="CLIPSimilarity: extractor must be an Extractor, a module or a function, got int"
    ):
        CLIPSimilarity(3)
    with pytest.raises(RuntimeError, match="CLIPSimilarity: fit must be called before scores"):
        CLIPSimilarity(halves).scores(images)
    with pytest.raises(ValueError, match="queries must have 2 features like the training images, got 1"):
        CLIPSimilarity(halves).fit(images).scores(images[:, :, :1])


# Products in blocks


@pytest.mark.parametrize("cosine", [False, True])
def test_products_in_blocks(monkeypatch, cosine):
    monkeypatch.setattr(products, "_ROWS", 3)
    queries, train = torch.randn(11, 6), torch.randn(10, 6)
    queries[4] = 0
    expected = queries.double() @ train.double().T
    if cosine:
        expected = torch.nn.functional.cosine_similarity(queries.double()[:, None], train.double()[None], dim=2)
    found = inner_products(rows(queries, [0, 5]), rows(train, [0, 4, 8]), cosine=cosine)
    torch.testing.assert_close(found, expected.float())
    assert found[4].tolist() == [0] * 10
    torch.testing.assert_close(row_norms(rows(train, [0, 4, 8])), train.double().norm(dim=1))


def test_not_a_number_is_not_hidden():
    queries = torch.tensor([[float("nan"), 1.0], [1.0, 0.0]])
    found = inner_products(rows(queries), rows(torch.eye(2)), cosine=True)
    assert found.isnan().tolist() == [[True, True], [False, False]]
    assert divided(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 4.0, float("nan")]))[:2].tolist() == [0, 0.5]


def test_no_rows():
    assert inner_products(rows(torch.empty(0, 3)), rows(torch.ones(2, 3))).shape == (0, 2)
    assert row_norms(rows(torch.empty(0, 3))).shape == (0,)
