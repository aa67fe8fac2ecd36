"""A classifier of toy images: what it learns, that it resumes, what it refuses."""

import re

import numpy as np
import pytest
import torch

from pyattr.evaluation import Classifier


@pytest.fixture(scope="module")
def data():
    """Bars of four directions and places, with noise: [240, 1, 9, 9] uint8 and labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 240)
    images = rng.integers(0, 60, (240, 1, 9, 9))
    for image, label in zip(images[:, 0], labels, strict=True):
        (image if label % 2 else image.T)[2 + 4 * (label // 2)] += 190
    return images.astype(np.uint8), labels


def small(**options):
    return Classifier(**{"epochs": 4, "batch_size": 16, "width": 8, "num_features": 12, **options})


def test_it_learns(data):
    images, labels = data
    classifier = small(epochs=12, learning_rate=5e-3).fit(images[:200], labels[:200])
    assert (classifier.predict(images[200:]) == labels[200:]).mean() >= 0.95
    features = classifier.extractor(images[:7], batch_size=3)
    assert features.shape == (7, 12) and classifier.extractor.name == "classifier"
    # The features are what the classes are read from.
    logits = features @ classifier.network.classes.weight.T + classifier.network.classes.bias
    np.testing.assert_array_equal(logits.argmax(1).numpy(), classifier.predict(images[:7]))
    assert len(classifier.predict(images[:0])) == 0


class Stop(Exception):
    pass


def test_an_interrupted_training_ends_at_the_same_bits(data, tmp_path):
    whole = small().fit(*data)

    def stop(done, total, stage):
        assert (total, stage) == (4, "classifier")
        if done == 2:
            raise Stop

    path = tmp_path / "classifier.safetensors"
    with pytest.raises(Stop):
        small().fit(*data, path=path, progress=stop)
    calls = []
    resumed = small().fit(*data, path=path, progress=lambda *call: calls.append(call[0]))
    assert calls == [2, 3, 4]
    found = small().fit(*data, path=path, progress=lambda *call: calls.append(call[0]))
    assert calls[3:] == [4]
    for other in (resumed, found):
        for name, wanted in whole.network.state_dict().items():
            assert torch.equal(other.network.state_dict()[name], wanted), name


def test_a_damaged_file_is_made_again(data, tmp_path):
    path = tmp_path / "classifier.safetensors"
    whole = small(epochs=1).fit(*data, path=path)
    path.write_bytes(path.read_bytes()[:-9])
    again = small(epochs=1).fit(*data, path=path)
    assert torch.equal(again.network.hidden.weight, whole.network.hidden.weight)


def test_torchs_random_state_stays(data):
    state = torch.get_rng_state()
    small(epochs=1).fit(*data)
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals(data, tmp_path):
    images, labels = data

    def refuses(told, call):
        with pytest.raises((TypeError, ValueError), match=f"^{re.escape(told)}$"):
            call()

    def fits(images, labels):
        return lambda: small().fit(images, labels)

    refuses("Classifier: epochs must lie in [1, 2147483648], got 0", lambda: Classifier(epochs=0))
    refuses("Classifier: width must be an integer, got float", lambda: Classifier(width=1.5))
    refuses("Classifier: learning_rate must be positive and finite, got nan", lambda: Classifier(learning_rate=np.nan))
    refuses("Classifier: learning_rate must be a real number, got str", lambda: Classifier(learning_rate="1"))
    refuses("Classifier: seed must lie in [0, 4294967295], got -1", lambda: Classifier(seed=-1))
    refuses("Classifier: labels must have shape [240], got [3]", fits(images, labels[:3]))
    refuses("Classifier: labels must be integers, got torch.float64", fits(images, labels.astype(float)))
    refuses("Classifier: labels must not be negative, got -1", fits(images, labels - 1))
    refuses(
        "Classifier: images must hold at least one image of one pixel, got [0, 1, 9, 9]", fits(images[:0], labels[:0])
    )
    fitted = small(epochs=1).fit(images, labels)
    refuses(f"Classifier: batch_size must lie in [1, {2**62}], got 0", lambda: fitted.predict(images, batch_size=0))
    three = np.repeat(images[:4], 3, 1)
    for call in (fitted.predict, fitted.extractor):
        told = "Classifier: images must have pixels and 1 channels, as in fit, got [3, 9, 9]"
        refuses(told, lambda call=call: call(three))
    refuses(
        "Classifier: images must have pixels and 1 channels, as in fit, got [1, 0, 9]",
        lambda: fitted.predict(images[:, :, :0]),
    )
    path = tmp_path / "classifier.safetensors"
    small(epochs=1).fit(images, labels, path=path)
    refuses(
        f"Classifier: {path} holds something made otherwise: epochs was 1, now 4; use another file or delete it",
        lambda: small().fit(images, labels, path=path),
    )
    with pytest.raises(RuntimeError, match=r"^Classifier: call fit first$"):
        small().predict(images)
