"""Conditions travel with their images: a model told the same condition each time must give what one that knows it gives."""

import pytest
import torch
from torch import nn

from pyattr.attribution import DAS, DTRAK, EmpiricalInfluence, JourneyTRAK, ProbedDAS, RawPixel, TracInCP
from pyattr.diffusion import Conditioned, Guided, Samples, Schedule, checkpoints, features, sample, train
from pyattr.diffusion.features import FeatureMap
from pyattr.evaluation import build_ground_truth

SHIFTS = torch.tensor([-1.0, 2.0, 0.5])  # what a condition does; the last says nothing


class Told(nn.Module):
    """A small network that a condition shifts."""

    num_conditions, unconditional = 2, 2

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, images, timesteps, conditions):
        shift = SHIFTS.to(images)[conditions] + timesteps / 1000  # [B]
        return self.last(torch.sin(self.first(images) + shift[:, None, None, None]))


class Knowing(Told):
    """The same network under one condition."""

    num_conditions = None

    def __init__(self, condition=1):
        super().__init__()
        self.condition = condition

    def forward(self, images, timesteps):
        return super().forward(images, timesteps, torch.full(timesteps.shape, self.condition))


def build(kind=Told, *arguments):
    torch.manual_seed(0)
    return kind(*arguments)


@pytest.fixture
def images():
    return torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def equal(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


def test_features_are_those_of_each_condition(images):
    conditions, which = torch.tensor([0, 1, 1, 0, 0, 1]), FeatureMap(Schedule(), num_timesteps=3, proj_dim=16)
    mixed = features.compute(build(), Conditioned(images, conditions), which, batch_size=4).tensor()
    for condition in (0, 1):
        alone = features.compute(build(Knowing, condition), images, which, batch_size=4).tensor()
        rows = conditions == condition
        torch.testing.assert_close(mixed[rows], alone[rows])
        assert not torch.isclose(mixed[~rows], alone[~rows]).all(1).any()


@pytest.mark.parametrize(
    ("method", "options"),
    [(DAS, {"residuals": True, "leverage": True}), (ProbedDAS, {"probes": 2}), (DTRAK, {"normalize": True})],
)
def test_scores_are_those_of_the_condition(images, method, options):
    options = {"num_timesteps": 3, "proj_dim": 16, "lambda_": 0.5, **options}
    examples = Conditioned(images, [1] * 6)
    told = method(build(), Schedule(), **options).fit(examples)
    plain = method(build(Knowing), Schedule(), **options).fit(images)
    torch.testing.assert_close(told.scores(examples[:2]), plain.scores(images[:2]))
    other = told.scores(Conditioned(images[:2], [0, 0]))
    assert not torch.isclose(other, plain.scores(images[:2]), rtol=1e-3).all(1).any()


def test_features_on_disk_are_known_by_their_conditions(images, tmp_path):
    which = FeatureMap(Schedule(), num_timesteps=1, proj_dim=4)
    features.compute(build(), Conditioned(images, [0] * 6), which, directory=tmp_path)
    with pytest.raises(ValueError, match="was made otherwise: images and ids was"):
        features.compute(build(), Conditioned(images, [0] * 5 + [1]), which, directory=tmp_path)


@pytest.mark.parametrize("flip", [False, True])
def test_training(images, flip):
    options = {"schedule": Schedule(), "steps": 7, "batch_size": 4, "learning_rate": 1e-2, "flip": flip}
    plain = train(build(Knowing), images, **options)
    examples = Conditioned(images, [1] * 6, images.flip(3) if flip else None)
    told = train(build(), examples, **options)
    equal(told.losses, plain.losses)
    for ours, theirs in zip(told.model.parameters(), plain.model.parameters(), strict=True):
        equal(ours, theirs)
    other = train(build(), Conditioned(images, [1] * 5 + [0], examples.mirrored), **options)
    assert not torch.equal(other.losses, plain.losses)


def test_a_training_is_known_by_its_conditions_and_its_mirrored_side(images, tmp_path):
    options = {"schedule": Schedule(), "steps": 2, "batch_size": 4, "flip": True, "checkpoint_directory": tmp_path}
    train(build(), Conditioned(images, [1] * 6, images.flip(3)), **options)
    with pytest.raises(ValueError, match="another run: images was"):
        train(build(), Conditioned(images, [0] * 6, images.flip(3)), **options)
    with pytest.raises(ValueError, match="another run: mirrored was"):
        train(build(), Conditioned(images, [1] * 6, images), **options)


def test_sampling_and_its_files(images, tmp_path, monkeypatch):
    options = {"shape": (1, 4, 4), "steps": 4, "batch_size": 2, "record": "trajectory", "eta": 1.0}
    conditions = [0, 1, 1, 0, 1]
    told = sample(build(), Schedule(), num_images=5, conditions=conditions, directory=tmp_path, **options)
    assert told.conditions.tolist() == conditions
    for condition in (0, 1):
        ids = [i for i, c in enumerate(conditions) if c == condition]
        alone = sample(build(Knowing, condition), Schedule(), ids=ids, **options)
        torch.testing.assert_close(told.trajectory[ids], alone.trajectory)
    again = sample(build(), Schedule(), num_images=5, conditions=conditions, directory=tmp_path, **options)
    equal(again.trajectory, told.trajectory)
    with pytest.raises(ValueError, match="made otherwise: the conditions differ"):
        sample(build(), Schedule(), num_images=5, conditions=[1] * 5, directory=tmp_path, **options)
    told.save(tmp_path / "all")
    loaded = Samples.load(tmp_path / "all")[1:3]
    equal(loaded.conditions, torch.tensor([1, 1]))
    equal(loaded.images, told.images[1:3])


def test_an_interrupted_batch_goes_on_with_its_conditions(tmp_path, monkeypatch):
    from pyattr.diffusion import sampling

    options = {"num_images": 2, "shape": (1, 4, 4), "steps": 4}
    whole = sample(build(), Schedule(), conditions=[0, 1], **options)
    monkeypatch.setattr(sampling, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(sampling.Pace, "due", lambda self: True)

    def stop(done, total, stage):
        if done == 6:
            raise KeyboardInterrupt

    for conditions in ([0, 1], [1, 0]):
        with pytest.raises(KeyboardInterrupt):
            sample(
                build(),
                Schedule(),
                conditions=conditions,
                directory=tmp_path / str(conditions),
                progress=stop,
                **options,
            )
    with pytest.raises(ValueError, match="the conditions differ"):
        sample(build(), Schedule(), conditions=[0, 1], directory=tmp_path / "[1, 0]", **options)
    resumed = []
    again = sample(
        build(),
        Schedule(),
        conditions=[0, 1],
        directory=tmp_path / "[0, 1]",
        progress=lambda done, total, stage: resumed.append(done),
        **options,
    )
    equal(again.images, whole.images)
    assert resumed[0] == 6


def test_guidance_by_hand():
    model, x, t = build(), torch.randn(2, 1, 4, 4), torch.tensor([5, 900])
    conditions = torch.tensor([0, 1])
    with torch.no_grad():
        told, nothing = model(x, t, conditions), model(x, t, torch.tensor([2, 2]))
        torch.testing.assert_close(Guided(model, 3.0)(x, t, conditions), nothing + 3 * (told - nothing))
        equal(Guided(model, 1.0)(x, t, conditions), told)
        torch.testing.assert_close(Guided(model, 0.0)(x, t, conditions), nothing)
    with pytest.raises(TypeError, match="Guided: model must have a condition that says nothing, got Conv2d"):
        Guided(model.first, 2.0)
    with pytest.raises(ValueError, match="Guided: scale must be finite, got nan"):
        Guided(model, float("nan"))


@pytest.mark.parametrize("guidance", [None, 1.0, 2.5])
def test_a_journey(images, guidance):
    options = {"num_timesteps": 2, "proj_dim": 16, "lambda_": 1.0}
    recorded = {"num_images": 3, "shape": (1, 4, 4), "steps": 3, "record": "trajectory"}
    model, conditions = build(), [1, 1, 0]
    made_by = model if guidance is None else Guided(model, guidance)
    queries = sample(made_by, Schedule(), conditions=conditions, **recorded)
    method = JourneyTRAK(model, Schedule(), **options).fit(Conditioned(images, [1] * 6))
    scores = method.scores(queries)
    # By hand for one query: the mean over steps of the gradient at the clipped prediction, noised anew.
    x0 = []
    for x, t in zip(queries.trajectory[0], queries.timesteps, strict=False):
        abar = Schedule().alphas_cumprod[t].float()
        with torch.no_grad():
            e = made_by(x[None], t[None], torch.tensor([1]))[0]
        x0.append(((x - (1 - abar).sqrt() * e) / abar.sqrt()).clamp(-1, 1))
    total = 0
    for image, t in zip(x0, queries.timesteps.tolist(), strict=True):

        class Here(FeatureMap):
            def timesteps(self, t=t):
                return torch.tensor([t])

        total = total + Here(Schedule(), loss="simple", num_timesteps=1, proj_dim=16).batch(
            model, Conditioned(image[None], [1]), torch.tensor([1 << 40])
        )
    phi = features.compute(
        model, Conditioned(images, [1] * 6), FeatureMap(Schedule(), loss="simple", num_timesteps=2, proj_dim=16)
    ).tensor()
    phi, query = phi.double(), total.double() / 3
    expected = query @ torch.linalg.solve(phi.T @ phi + torch.eye(16, dtype=torch.float64), phi.T)
    torch.testing.assert_close(scores[:1], expected.float(), rtol=1e-3, atol=1e-5)
    # The queries' own conditions count.
    with pytest.raises(TypeError, match="JourneyTRAK: queries must be Conditioned"):
        method.scores(
            Samples(*(getattr(queries, n) for n in ("images", "ids", "noise", "trajectory", "timesteps", "settings")))
        )


def test_methods_take_samples_and_examples_alike(images, tmp_path):
    examples = Conditioned(images, [0, 1, 0, 1, 0, 1])
    model = train(
        build(), examples, schedule=Schedule(), steps=4, checkpoint_directory=tmp_path, checkpoint_every=2
    ).model
    samples = sample(model, Schedule(), num_images=2, conditions=[1, 0], shape=(1, 4, 4), steps=3)
    plain = Conditioned(samples.images, [1, 0])
    swapped = Conditioned(samples.images, [0, 1])
    for method in (
        DTRAK(model, Schedule(), num_timesteps=2, proj_dim=16),
        TracInCP(model, Schedule(), checkpoints=checkpoints(tmp_path).values(), num_timesteps=2, proj_dim=16),
    ):
        scores = method.fit(examples).scores(samples)
        equal(method.scores(plain), scores)
        assert not torch.isclose(method.scores(swapped), scores).any()
    pixels = RawPixel().fit(examples)
    equal(pixels.scores(samples), RawPixel().fit(images).scores(samples.images))
    assert pixels.scores(Conditioned(40 * torch.randn(2, 1, 4, 4), [0, 0])).shape == (2, 6)


def test_ground_truth(images, tmp_path):
    queries = torch.randn(2, 1, 4, 4).clamp(-1, 1)
    masks = torch.tensor([[1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 0, 1]])
    options = {"schedule": Schedule(), "timesteps": 3, "steps": 3, "batch_size": 2, "flip": True}
    plain = build_ground_truth(tmp_path / "plain", Knowing, images, queries, masks, **options)
    examples = Conditioned(images, [1] * 6, images.flip(3))
    asked = Conditioned(queries, [1, 1])
    told = build_ground_truth(tmp_path / "told", Told, examples, asked, masks, **options)
    assert (told.losses == plain.losses).all()
    assert told.images != plain.images and set(told.queries).isdisjoint(plain.queries)
    assert told.rows(asked, "test").tolist() == [0, 1]
    assert EmpiricalInfluence(told).fit(examples).scores(asked).shape == (2, 6)
    with pytest.raises(ValueError, match="number 0 is not"):
        told.rows(Conditioned(queries, [0, 1]), "test")
    with pytest.raises(ValueError, match="train must be the images of the ground truth"):
        EmpiricalInfluence(told).fit(Conditioned(images, [0] * 6))
    with pytest.raises(ValueError, match="losses that were made otherwise: mirrored was"):
        build_ground_truth(tmp_path / "told", Told, Conditioned(images, [1] * 6, images), asked, masks, **options)
    with pytest.raises(TypeError, match="queries must have conditions where images have them, and only there"):
        build_ground_truth(tmp_path / "mixed", Told, examples, queries, masks, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], [0]), TypeError, "Conditioned: images must be a torch tensor, NumPy array or CuPy array, got list"),
        ((torch.zeros(2, 1), [0, 0]), ValueError, r"Conditioned: images must have shape \[N, C, H, W\], got \[2, 1\]"),
        ((torch.zeros(1, 1, 2, 2).long(), [0]), TypeError, "must be uint8 or floating point, got torch.int64"),
        ((torch.zeros(1, 1, 2, 2), [0.5]), TypeError, "Conditioned: conditions must be integers, got torch.float32"),
        ((torch.zeros(1, 1, 2, 2), [True]), TypeError, "Conditioned: conditions must be integers, got torch.bool"),
        ((torch.zeros(2, 1, 2, 2), [0]), ValueError, r"conditions must be 2, one for each image, got shape \[1\]"),
        ((torch.zeros(2, 1, 2, 2), [0, -1]), ValueError, "Conditioned: conditions must not be negative, got -1"),
        (
            (torch.zeros(1, 1, 2, 2), [0], torch.zeros(1, 1, 2, 3)),
            ValueError,
            r"mirrored must have the shape of images, \[1, 1, 2, 2\], got \[1, 1, 2, 3\]",
        ),
    ],
)
def test_bad_examples(arguments, error, message):
    with pytest.raises(error, match=message):
        Conditioned(*arguments)


def test_bad_uses(images):
    which, options = FeatureMap(Schedule(), num_timesteps=1, proj_dim=4), {"schedule": Schedule(), "steps": 1}
    with pytest.raises(TypeError, match="features: images must be Conditioned, for a model that takes conditions"):
        features.compute(build(), images, which)
    with pytest.raises(TypeError, match="features: images must be plain images, for a model that takes no conditions"):
        features.compute(build(Knowing), Conditioned(images, [0] * 6), which)
    with pytest.raises(ValueError, match=r"train: images must have conditions in \[0, 1\], those of the model, got 2"):
        train(build(), Conditioned(images, [2] * 6), **options)
    with pytest.raises(ValueError, match="train: images must have a mirrored side where flip is set"):
        train(build(), Conditioned(images, [0] * 6), flip=True, **options)
    with pytest.raises(TypeError, match="sample: images must be Conditioned, for a model that takes conditions"):
        sample(build(), Schedule(), num_images=1, shape=(1, 4, 4))
    with pytest.raises(ValueError, match=r"conditions must be 2, one for each image, got shape \[1\]"):
        sample(build(), Schedule(), num_images=2, conditions=[0], shape=(1, 4, 4))
    with pytest.raises(TypeError, match="DAS: train must be Conditioned, for a model that takes conditions"):
        DAS(build(), Schedule(), residuals=True).fit(images)
    with pytest.raises(ValueError, match=r"DTRAK: train must have shape \[N, C, H, W\], got \[6, 1, 1, 4, 4\]"):
        DTRAK(build(), Schedule()).fit(Conditioned(images[:, None], [0] * 6))


def test_indexing():
    examples = Conditioned(
        torch.arange(4.0)[:, None, None, None], [3, 2, 1, 0], -torch.arange(4.0)[:, None, None, None]
    )
    for which in (slice(1, 3), torch.tensor([1, 2]), torch.tensor([False, True, True, False])):
        part = examples[which]
        assert len(part) == 2 and part.conditions.tolist() == [2, 1]
        assert part.images.flatten().tolist() == [1, 2] and part.mirrored.flatten().tolist() == [-1, -2]
    assert len(examples[:0]) == 0
