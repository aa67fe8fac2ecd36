"""What the calls of an encoded ensemble have in common: what they refuse, what they hash, and whom they leave out."""

import importlib

import numpy as np
import pytest
import torch
from small_ensembles import IMAGES, SCHEDULE, Net, Scaled, ensemble
from torch import nn

from pyattr.attribution import EncodedEnsemble
from pyattr.attribution.encoded_members import Mixture

CALLS = {
    "jacobian": lambda made, samples: made.jacobian(samples),
    "gram": lambda made, samples: made.gram(samples),
    "scores": lambda made, samples: made.scores(samples),
    "search": lambda made, samples: made.search(samples, 1),
    "distinct_top": lambda made, samples: made.distinct_top(samples, 1),
    "counterfactual": lambda made, samples: made.counterfactual(samples, [1, 2]),
    "approximate": lambda made, samples: made.approximate(samples, [1]),
    "approximate by members": lambda made, samples: made.approximate(samples, [1], "members"),
    "approximate by the last step": lambda made, samples: made.approximate(samples, [1], "last_step"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_hashes_each_member_once_and_sees_that_one_changed(name, monkeypatch):
    made = ensemble(members=4, items=6)
    samples, hashed = made.sample(1), []
    for module, function in (("diffusion.checkpoint", "model_hash"), ("attribution.encoded_samples", "tensors_hash")):
        path = f"pyattr.{module}.{function}"
        true = getattr(importlib.import_module(f"pyattr.{module}"), function)
        monkeypatch.setattr(path, lambda value, true=true: hashed.append(value) or true(value))
    for _ in range(2):  # the second of them with a Jacobian at hand
        hashed.clear()
        CALLS[name](made, samples)
        assert [value for value in hashed if isinstance(value, nn.Module)] == made.members
        assert sum(isinstance(value, dict) and "noise" in value for value in hashed) == 1
    with torch.no_grad():
        made.members[2].last.bias += 1e-6
    with pytest.raises(ValueError, match=r"^EncodedEnsemble: queries must be samples of this ensemble: model was"):
        CALLS[name](made, samples)


def spoilt(member, value=torch.nan):
    with torch.no_grad():
        member.last.bias.fill_(value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampler", [{}, {"method": "ddim", "steps": 3}], ids=str)
def test_a_member_of_no_weight_has_no_part_in_samples_and_guesses(sampler, value):
    """Whatever it predicts; the guess for an item that it did not see is as its own images."""
    made = ensemble(members=4)
    weights, saw, did_not = [0.5, 0.25, 0.25, 0.0], 0b1001, 0b0011
    sound = made.sample(2, weights=weights, **sampler)
    J = made.jacobian(sound)
    guesses = {method: made.approximate(sound, [saw], method) for method in ("jacobian", "members", "last_step")}
    true = made.counterfactual(sound, [saw])
    made.codes[:2] = saw, did_not
    scores = made.scores(sound)
    spoilt(made.members[3], value)
    samples = made.sample(2, weights=weights, **sampler)
    assert torch.equal(samples.images, sound.images)
    found = made.jacobian(samples)
    assert torch.equal(found[:, :, :3], J[:, :, :3])
    assert not found[:, :, 3].isfinite().all(1).any()
    assert torch.equal(made.counterfactual(samples, [saw, did_not])[:, :1], true)
    for method, guess in guesses.items():
        again = made.approximate(samples, [saw, did_not], method)
        torch.testing.assert_close(again[:, :1], guess, atol=1e-6, rtol=1e-6)
        if method != "last_step" or value != value:
            assert not torch.equal(again[:, 1:], guess) and (method == "members" or not again[:, 1].isfinite().all())
    again = made.scores(samples)
    torch.testing.assert_close(again[:, 0], scores[:, 0])
    assert not again[:, 1].isfinite().any()


def test_a_spoilt_member_spoils_the_ensemble_but_not_the_ablation_that_leaves_it_out():
    made = ensemble(members=4)
    sound = made.sample(2)
    expected = made.counterfactual(sound, [0b1000])
    last = made.approximate(made.sample(2, weights=[1 / 3, 1 / 3, 1 / 3, 0]), [0b1000], "last_step")
    spoilt(made.members[3])
    samples = made.sample(2)
    assert samples.images.isnan().all()
    assert torch.equal(made.counterfactual(samples, [0b1000]), expected)
    assert made.counterfactual(samples, [0b0001]).isnan().all()
    assert made.scores(samples).isnan().all() and made.approximate(samples, [0b1000, 0]).isnan().all()
    # A member that is at work before the last step, but not in it: nothing of its last prediction is in the image.
    again = made.sample(2, weights=[1 / 3, 1 / 3, 1 / 3, 0])
    assert torch.equal(made.approximate(again, [0b1000], "last_step"), last)
    assert made.approximate(again, [0b0100], "last_step").isnan().all()


def test_what_can_be_refused_is_refused_before_the_jacobian(tmp_path, monkeypatch):
    made = ensemble()
    samples = made.sample(1)
    monkeypatch.setattr("pyattr.attribution.encoded.jacobian", lambda *_: pytest.fail("the Jacobian was made"))
    (tmp_path / "codes.npy").write_bytes(b"none")
    np.save(tmp_path / "two.npy", np.array([1, 2], np.uint64))
    for call, error, message in (
        (lambda: made.search(samples, 1, codes=tmp_path / "codes.npy"), ValueError, "must be a .npy file of uint64"),
        (lambda: made.search(samples, 3, codes=tmp_path / "two.npy"), ValueError, r"k must lie in \[0, 2\], got 3"),
        (lambda: made.search(samples, 1, codes=torch.tensor([1.0])), TypeError, "codes must be uint64"),
        (lambda: made.distinct_top(samples, 0), ValueError, r"m must lie in \[1, 6\], got 0"),
        (lambda: made.distinct_top(samples, 7), ValueError, r"m must lie in \[1, 6\], got 7"),
    ):
        with pytest.raises(error, match=f"^EncodedEnsemble: .*{message}"):
            call()
    with pytest.raises(
        ValueError, match=r"^EncodedEnsemble: queries must be samples of this ensemble: members was 4, now 3"
    ):
        ensemble(members=3, items=3).scores(samples)
    unfit = EncodedEnsemble(Net, num_members=4, steps=1, schedule=SCHEDULE)
    for call in (
        unfit.scores,
        lambda samples: unfit.search(samples, 1),
        lambda samples: unfit.distinct_top(samples, 1),
    ):
        with pytest.raises(RuntimeError, match="EncodedEnsemble: fit or open must be called first"):
            call(samples)


def test_one_face():
    made = EncodedEnsemble(Net, num_members=4, steps=1, schedule=SCHEDULE)
    assert made.fit(IMAGES[:6]) is made and made.signed is False and EncodedEnsemble.signed is False
    samples = made.sample(2)
    scores = made.scores(samples)
    assert isinstance(scores, torch.Tensor) and scores.shape == (2, 6) and scores.dtype == torch.float32
    assert (scores >= 0).all()
    for images in (samples.images, samples.images.numpy(), IMAGES):
        with pytest.raises(
            TypeError, match=r"^EncodedEnsemble: queries must be Samples of this ensemble, which hold the noise"
        ):
            made.scores(images)


def test_sums_over_members_in_half_precision_are_made_in_float32():
    """Of 48 bfloat16 members that predict one number, the mean is that number; a bfloat16 sum of them stalls."""
    made = ensemble(lambda: Scaled().to(torch.bfloat16), members=48)
    for member in made.members:
        member.a.data.zero_()
        member.b.data.fill_(1.0)
    mixture = Mixture(made.members, torch.full((48,), 1 / 48))
    x = torch.zeros(2, 1, 4, 4, dtype=torch.bfloat16)
    found = mixture(x, torch.tensor([0, 0]))
    assert found.dtype == torch.bfloat16 and torch.equal(found, torch.ones_like(x))
