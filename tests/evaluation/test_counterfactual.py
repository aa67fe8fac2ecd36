"""Retraining without the images that methods name: which these are, what is made again, and what interruptions leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from resumable import Net, Stop
from torch import nn

from pyattr.diffusion import Conditioned, DamagedFileError, Guided, Schedule, sample, train
from pyattr.diffusion.images import evaluating
from pyattr.evaluation import Counterfactuals, Extractor, counterfactual
from pyattr.evaluation.retrained import QueryLosses

SCHEDULE = Schedule(12, 1e-2, 0.4)
ONE = Schedule(1, 0.5, 0.5)
IMAGES = torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
TRAINING = {"steps": 4, "batch_size": 2, "learning_rate": 0.01}
SCORES = {
    "first": np.array([[3, 2, 1, 0, 0, 0], [0, 0, 0, 3, 2, 1], [1, 0, 5, 0, 4, 0.0]]),
    "second": np.array([[3, 2, 1, 0, 0, 0], [3, 2, 1, 0, 0, 0], [0, 0, 0, 0, 0, 9.0]]),
}


class Told(Net):
    """A network that a condition shifts; the last says nothing."""

    num_conditions, unconditional = 2, 2

    def forward(self, images, timesteps, conditions):
        shifts = torch.tensor([-1.0, 2.0, 0.5])[conditions]
        return super().forward(images + shifts[:, None, None, None], timesteps)


class Mean(nn.Module):
    """At its only timestep the loss at an image x is |x - mean|^2, and any sample is the mean."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1, 2, 2))

    def forward(self, images, timesteps):
        return 2**0.5 * images - self.mean


def trained(images=IMAGES, model=Net, seed=3, initial=3, folder=None, **changes):
    torch.manual_seed(initial)
    options = {"schedule": SCHEDULE, **TRAINING, **changes}
    return train(model(), images, seed=seed, checkpoint_directory=folder, **options).model


def samples(model, ids=(0, 1, 2), shape=(1, 4, 4), schedule=SCHEDULE, **changes):
    return sample(model, schedule, ids=list(ids), shape=shape, **{"steps": 4, "seed": 5, **changes})


@pytest.fixture(scope="module")
def queries():
    return samples(trained())


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    trained(folder=folder)
    return folder


def run(directory, queries, scores=SCORES, model=Net, **changes):
    given = {"schedule": SCHEDULE, "remove": 2, "seed": 3, "timesteps": 3, "rows_per_pass": 2, **TRAINING, **changes}
    return counterfactual(directory, model, given.pop("images", IMAGES), queries, scores, **given)


@pytest.fixture(scope="module")
def made(queries, tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    return run(directory, queries, remove=(1, 2)), directory


def assert_same(one, other):
    for name in ("ids", "originals", "images", "original_losses", "losses", "removed"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("methods", "remove", "targets", "retrained", "settings"):
        assert getattr(one, name) == getattr(other, name), name


def removed_by(found, method, remove, query):
    row = found.removed[found.methods.index(method), found.remove.index(remove), query]
    return row.nonzero()[:, 0].tolist()


def test_true_proponents_change_the_sample_as_the_closed_form_says(tmp_path):
    images = torch.full((8, 1, 2, 2), -0.4)
    images[:2] = 0.8
    options = {"schedule": ONE, "steps": 60, "batch_size": 8, "learning_rate": 0.05, "betas": (0.5, 0.9)}
    asked = samples(trained(images, Mean, **options), (4, 7, 9), (1, 2, 2), ONE, steps=1)
    torch.testing.assert_close(asked.images, torch.full((3, 1, 2, 2), -0.1), atol=0.01, rtol=0)
    scores = {"true": np.tile([1.0, 1, 0, 0, 0, 0, 0, 0], (3, 1)), "wrong": np.tile(np.arange(8.0), (3, 1))}
    found = run(tmp_path, asked, scores, Mean, images=images, remove=[2], timesteps=1, control_seed=1, **options)
    assert found.methods == ("true", "wrong", "random")
    for method, kept in (("true", -0.4), ("wrong", 0.0)):
        expected = torch.full((3, 1, 2, 2), kept)
        torch.testing.assert_close(found.images[found.methods.index(method), 0], expected, atol=0.01, rtol=0)
    np.testing.assert_allclose(found.l2.of("true"), 0.6, atol=0.02)  # of four pixels
    np.testing.assert_allclose(found.l2.of("wrong"), 0.2, atol=0.02)
    for q in range(3):
        bright = 2 - sum(n < 2 for n in removed_by(found, "random", 2, q))
        np.testing.assert_allclose(found.images[2, 0, q], 0.2 * bright - 0.4, atol=0.01)
    assert (found.l2.of("true") > found.l2.of("random")).all()
    # The sample is the mean itself, whose loss was 0.
    for method in found.methods:
        np.testing.assert_allclose(found.loss_change().of(method), found.l2.of(method) ** 2 / 4, rtol=1e-4, atol=1e-6)


def test_models_samples_and_losses_are_those_of_the_recipe(made, queries):
    found, _ = made
    assert found.remove == (1, 2) and found.images.shape == (3, 2, 3, 1, 4, 4)
    assert found.losses.shape == (3, 2, 5, 1, 3) and found.original_losses.shape == (5, 1, 3)
    losses = QueryLosses(3, 1, 0, found.targets, 2)
    with evaluating(model := trained()):
        assert torch.equal(losses(model, SCHEDULE, queries.images, queries.ids)[..., 2], found.original_losses[..., 2])
    assert removed_by(found, "first", 2, 2) == [2, 4]
    model = trained(IMAGES[[0, 1, 3, 5]])
    assert torch.equal(samples(model, [2]).images[0], found.images[0, 1, 2])
    assert torch.equal(found.originals, queries.images)
    with evaluating(model):
        assert torch.equal(losses(model, SCHEDULE, queries.images[2:], torch.tensor([2])), found.losses[0, 1, ..., 2:])
    expected = (found.losses[0, 1, 0, 0, 2] - found.original_losses[0, 0, 2]).item()
    assert found.loss_change().of("first", 2)[2] == expected


def test_the_largest_are_removed_and_of_equal_ones_the_first(made):
    found, _ = made
    taken = {(method, m): [removed_by(found, method, m, q) for q in range(3)] for method in SCORES for m in (1, 2)}
    assert taken == {
        ("first", 1): [[0], [3], [2]],
        ("first", 2): [[0, 1], [3, 4], [2, 4]],
        ("second", 1): [[0], [0], [5]],
        ("second", 2): [[0, 1], [0, 1], [0, 5]],
    }


def test_the_control_is_a_function_of_seed_and_query(made, queries, tmp_path):
    found, _ = made
    for q in range(3):
        assert len(removed_by(found, "random", 2, q)) == 2
        assert set(removed_by(found, "random", 1, q)) < set(removed_by(found, "random", 2, q))
    later = run(tmp_path / "later", queries[1:], {"one": SCORES["first"][1:]}, remove=(1, 2))
    assert torch.equal(later.removed[1], found.removed[2, :, 1:])
    other = run(tmp_path / "later", queries[1:], {"one": SCORES["first"][1:]}, remove=(1, 2), control_seed=1)
    assert not torch.equal(other.removed[1], later.removed[1])
    assert torch.equal(other.images[0], later.images[0])


def test_the_same_images_removed_are_one_training(made, queries, tmp_path):
    found, directory = made
    distinct = {
        tuple(removed_by(found, method, m, q)) for method in found.methods for m in found.remove for q in range(3)
    }
    assert found.retrained == len(distinct) < 18
    assert len(list(directory.glob("retrained-*"))) == found.retrained + 1  # and the original
    assert torch.equal(found.images[0, 1, 0], found.images[1, 1, 0])
    # The model has been shared by another query; alone it makes the same.
    alone = run(tmp_path, queries[:1], {"one": SCORES["second"][:1]})
    assert torch.equal(alone.images[0, 0, 0], found.images[1, 1, 0])
    assert torch.equal(alone.losses[0, 0, ..., 0], found.losses[1, 1, ..., 0])


def test_one_set_for_all_queries(queries, tmp_path):
    found = run(tmp_path, queries, together=True)
    assert found.retrained == 3
    for method, images in (("first", [2, 4]), ("second", [0, 5])):  # of sums 4 2 6 3 6 1 and 6 4 2 0 0 9
        assert [removed_by(found, method, 2, q) for q in range(3)] == [images] * 3
    assert (found.removed[2] == found.removed[2, :, :1]).all()
    assert torch.equal(found.images[0, 0], samples(trained(IMAGES[[0, 1, 3, 5]]), batch_size=1).images)


def test_a_reference_is_read_instead_of_trained(made, queries, reference, tmp_path):
    told = []
    found = run(tmp_path, queries, remove=(1, 2), reference=reference, progress=lambda *now: told.append(now))
    assert_same(found, made[0])
    original = [now for now in told if now[2] == "original"]
    assert original[-1] == (9, 9, "original") and original == sorted(original)  # three queries at three timesteps
    assert not list(tmp_path.glob("training-*"))


def test_more_methods_numbers_and_queries_leave_what_is_there(queries, reference, tmp_path):
    run(tmp_path, queries[:2], {"first": SCORES["first"][:2]}, remove=1, reference=reference)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("retrained-*")}
    found = run(tmp_path, queries, remove=(1, 2), reference=reference)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert_same(found, run(tmp_path, queries, remove=(1, 2), reference=reference))
    with pytest.raises(
        ValueError,
        match=r"counterfactual: directory .* holds retrained models' samples that were made otherwise: "
        r"losses.noise_seed was 0, now 1; use another directory",
    ):
        run(tmp_path, queries, reference=reference, noise_seed=1)


def test_samples_of_another_model_are_refused(queries, reference, tmp_path):
    others = samples(trained(initial=4))
    with pytest.raises(
        ValueError,
        match=r"the recipe trains another model on all images than the one that made the queries \(.*\): model was",
    ):
        run(tmp_path / "a", others)
    with pytest.raises(
        ValueError, match=r"reference .* is another model than the one that made the queries: model was"
    ):
        run(tmp_path / "b", others, reference=reference)
    with pytest.raises(ValueError, match="holds a model that was trained by another recipe: seed was 3, now 4"):
        run(tmp_path / "c", queries, reference=reference, seed=4, initial_seed=3)
    with pytest.raises(ValueError, match="trained by another recipe: images was"):
        run(tmp_path / "d", queries, reference=reference, images=IMAGES.flip(0))
    with pytest.raises(ValueError, match=r"reference .* holds no checkpoint of step 5, the last of the recipe"):
        run(tmp_path / "e", queries, reference=reference, steps=5)
    apart = samples(trained(initial=4))
    assert run(tmp_path / "f", apart, initial_seed=4).retrained > 0


def test_stopped_anywhere_it_ends_at_the_same_bits(queries, tmp_path):
    options = {"scores": {"one": SCORES["first"][:1]}, "checkpoint_every": 1}
    told = []
    expected = run(tmp_path / "whole", queries[:1], progress=lambda *now: told.append(now), **options)
    passes = 4 * 2 * 3 + 3
    assert (passes, passes, "original") in told and told[-1] == (2 * (passes + 4), 2 * (passes + 4), "retraining")
    for number in range(0, len(told), 3):
        directory, count = tmp_path / f"stopped-{number}", 0

        def stop(done, total, stage, number=number):
            nonlocal count
            count += 1
            if count == number + 1:
                raise Stop

        with pytest.raises(Stop):
            run(directory, queries[:1], progress=stop, **options)
        kept = {path: path.stat().st_mtime_ns for path in directory.glob("retrained-*")}
        assert_same(run(directory, queries[:1], **options), expected)
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        assert not list(directory.glob("training-*"))


KILLED = """
import os, signal, sys
import torch
from counterfactual_model import Model
from pyattr.diffusion import Samples, Schedule
from pyattr.evaluation import counterfactual

after = int(sys.argv[3])

def progress(done, total, stage):
    if stage == "retraining" and done >= after > 0:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    images, scores = torch.load(sys.argv[2])
    counterfactual(
        sys.argv[1] + "/out", Model, images, Samples.load(sys.argv[1] + "/queries"), {"one": scores}, remove=2, seed=3,
        schedule=Schedule(12, 1e-2, 0.4), timesteps=3, rows_per_pass=2, steps=4, batch_size=2, learning_rate=0.01,
        checkpoint_every=1, progress=progress,
    )
"""
MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.drop = nn.Dropout(0.3)

    def forward(self, images, timesteps):
        return self.drop(self.layer(images))
"""


def test_killed_it_ends_at_the_same_bits_as_several_processes(tmp_path, monkeypatch):
    (tmp_path / "counterfactual_model.py").write_text(MODEL)
    (tmp_path / "run.py").write_text(KILLED)
    monkeypatch.syspath_prepend(tmp_path)
    from counterfactual_model import Model

    torch.set_num_threads(1)
    asked = samples(trained(model=Model))
    asked.save(tmp_path / "queries")
    torch.save((IMAGES, torch.from_numpy(SCORES["first"])), tmp_path / "data")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)]),
    }
    expected = run(tmp_path / "whole", asked, {"one": SCORES["first"]}, Model, checkpoint_every=1, workers=2)
    after = 31 + 6  # in the training of the second model
    done = subprocess.run(
        [sys.executable, tmp_path / "run.py", tmp_path, tmp_path / "data", str(after)],
        env=environment, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("retrained-*")}
    assert len(files) == 2 and len(list((tmp_path / "out").glob("training-*/checkpoint-*"))) == 1
    told = []
    found = run(
        tmp_path / "out", asked, {"one": SCORES["first"]}, Model, checkpoint_every=1,
        progress=lambda *now: told.append(now),
    )  # fmt: skip
    assert {path: path.stat().st_mtime_ns for path in files} == files
    retraining = [now[0] for now in told if now[2] == "retraining"]
    assert retraining[:2] == [31, 31 + 6]  # a step of the second is there
    for name in ("images", "losses", "original_losses"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_a_file_gives_back_the_same(made):
    found, directory = made
    assert_same(Counterfactuals.open(directory / "counterfactuals.safetensors"), found)
    one = next(directory.glob("retrained-*"))
    with pytest.raises(ValueError, match=r"Counterfactuals: .* does not hold counterfactuals"):
        Counterfactuals.open(one)
    with pytest.raises(FileNotFoundError):
        Counterfactuals.open(directory / "none")
    content = bytearray((directory / "counterfactuals.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "damaged").write_bytes(content)
    with pytest.raises(DamagedFileError):
        Counterfactuals.open(directory / "damaged")


def test_cosine_of_features_bears_their_name(made):
    found, _ = made
    cosine = found.cosine(Extractor("pixel", nn.Flatten()))
    assert cosine.name == "pixel cosine"
    before, after = found.originals[1].flatten().numpy(), found.images[2, 0, 1].flatten().numpy()
    expected = before @ after / np.linalg.norm(before) / np.linalg.norm(after)
    np.testing.assert_allclose(cosine.of("random", 1)[1], expected, rtol=1e-5)
    with pytest.raises(TypeError, match="Counterfactuals: extractor must be an Extractor, got Flatten"):
        found.cosine(nn.Flatten())


def test_a_guided_conditional_model(tmp_path):
    examples = Conditioned(IMAGES, [0, 1, 0, 1, 0, 1], IMAGES.flip(3))
    made_by = Guided(trained(examples, Told, folder=tmp_path / "reference", flip=True), 2.0)
    asked = samples(made_by, conditions=[1, 0, 1])
    given = {"model": Told, "images": examples, "flip": True, "reference": tmp_path / "reference"}
    found = run(tmp_path / "made", asked, workers=2, **given)
    kept = torch.tensor([0, 1, 3, 5])
    assert removed_by(found, "first", 2, 2) == [2, 4]
    model = trained(examples[kept], Told, flip=True)
    assert torch.equal(samples(Guided(model, 2.0), [2], conditions=[1]).images[0], found.images[0, 0, 2])
    losses = QueryLosses(3, 1, 0, found.targets, 2)
    with evaluating(model):
        expected = losses(model, SCHEDULE, Conditioned(asked.images[2:], [1]), torch.tensor([2]))
    assert torch.equal(expected, found.losses[0, 0, ..., 2:])
    assert_same(Counterfactuals.open(tmp_path / "made" / "counterfactuals.safetensors"), found)
    # Another condition is another query, beside those that are there.
    others = samples(made_by, conditions=[1, 1, 1])
    again = run(tmp_path / "made", others, **given)
    assert not torch.equal(again.images[:, :, 1], found.images[:, :, 1])
    assert torch.equal(again.images[:2, :, 2], found.images[:2, :, 2])
    with pytest.raises(
        TypeError, match="counterfactual: images must be Conditioned, for a model that takes conditions"
    ):
        run(tmp_path / "plain", asked, model=Told)
    with pytest.raises(TypeError, match="counterfactual: images must be plain images, for a model that takes no"):
        run(tmp_path / "plain", asked, images=examples)


def test_pictures_in_the_place_of_latents(made):
    found, _ = made

    def decode(latents):
        return (latents.mean((2, 3), keepdim=True) * 10 + 128).to(torch.uint8).expand(-1, 3, 2, 2)

    pictures = found.decoded(decode)
    assert pictures.images.shape == (3, 2, 3, 3, 2, 2) and pictures.originals.shape == (3, 3, 2, 2)
    levels = [decode(side[None]).flatten()[0].double() for side in (found.originals[1], found.images[2, 0, 1])]
    expected = abs(float(levels[0] - levels[1])) / 127.5 * 12**0.5
    np.testing.assert_allclose(pictures.l2.of("random", 1)[1], expected, atol=1e-5)
    assert torch.equal(pictures.losses, found.losses)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"queries": IMAGES}, TypeError, "queries must be Samples, which know their noise, got Tensor"),
        ({"scores": {}}, ValueError, "scores must be of at least one method, and none of the name 'random'"),
        ({"scores": {"random": SCORES["first"]}}, ValueError, "scores must be of at least one method, and none of"),
        ({"scores": SCORES["first"]}, TypeError, r"scores must map names of methods to \[Q, N\], got ndarray"),
        (
            {"scores": {"a": SCORES["first"][:, :5]}},
            ValueError,
            r"scores of 'a' must have shape \[Q, N\] = \[3, 6\], got \[3, 5\]",
        ),
        (
            {"scores": {"a": SCORES["first"] * [[1], [np.nan], [1]]}},
            ValueError,
            "scores of 'a' must be numbers, got NaN for query 1",
        ),
        ({"remove": 0}, ValueError, r"remove must lie in \[1, 5\], got 0"),
        ({"remove": [2, 6]}, ValueError, r"remove must lie in \[1, 5\], got 6"),
        ({"remove": [2, 2]}, ValueError, r"remove must be distinct numbers, and one at least, got \(2, 2\)"),
        ({"remove": ()}, ValueError, r"remove must be distinct numbers, and one at least, got \(\)"),
        ({"images": IMAGES[:, :, :2]}, ValueError, r"queries must be .* of shape \[1, 2, 4\], got \[3, 1, 4, 4\]"),
        ({"schedule": Schedule(13)}, ValueError, "schedule must be that of the queries, {'num_timesteps': 12, .*got Schedule"),
        ({"initial_seed": -1}, ValueError, r"initial_seed must lie in \[0, 4294967295\], got -1"),
        ({"control_seed": 2**32}, ValueError, r"control_seed must lie in \[0, 4294967295\], got 4294967296"),
        ({"workers": 0}, ValueError, r"workers must lie in \[1, 1024\], got 0"),
        ({"timesteps": 13}, ValueError, r"timesteps must lie in \[1, 12\], got 13"),
        ({"targets": ()}, ValueError, r"targets must be distinct, and one at least, got \(\)"),
        ({"model": Net()}, TypeError, "model must build a member, got Net"),
        ({"epochs": 3}, TypeError, "epochs is no option of training"),
    ],
)  # fmt: skip
def test_refusals(queries, tmp_path, changes, error, message):
    given = {"queries": queries, **changes}
    with pytest.raises(error, match=f"counterfactual: {message}"):
        run(tmp_path / "refused", **given)
    assert not (tmp_path / "refused").exists()
