"""Training, sampling and ablating an encoded ensemble."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pyattr.attribution import EncodedEnsemble
from pyattr.attribution.codes import ablation_weights, membership, random_codes, walsh_codes
from pyattr.attribution.encoded_members import Mixture
from pyattr.diffusion import Samples, Schedule, sample, train

SCHEDULE = Schedule(6, 1e-2, 0.5)
IMAGES = torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
STEPS = 4


class Stop(Exception):
    pass


class Net(nn.Module):
    """With dropout, so that a resumed training has to restore its random numbers."""

    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, images, timesteps):
        return self.last(self.drop(torch.tanh(self.first(images)))) * (1 + timesteps[:, None, None, None] / 10)


def ensemble(model=Net, codes=None, members=4, **options):
    options = {"steps": STEPS, "batch_size": 2, "schedule": SCHEDULE, "learning_rate": 0.01, **options}
    return EncodedEnsemble(model, codes, num_members=members, **options)


def weights_of(made):
    return [dict(member.state_dict()) for member in made.members]


def assert_same_members(a, b):
    for one, other in zip(weights_of(a), weights_of(b), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_each_member_is_trained_on_its_split_from_its_own_seed(tmp_path):
    made = ensemble(seed=5, directory=tmp_path).fit(IMAGES)
    np.testing.assert_array_equal(made.codes, random_codes(6, 4, seed=5))
    bits = membership(made.codes, 4)
    for i in range(4):
        initial, training = made.recipe.seeds(i)
        torch.manual_seed(initial)
        alone = train(
            Net(),
            IMAGES[torch.from_numpy(bits[:, i])],
            schedule=SCHEDULE,
            steps=STEPS,
            batch_size=2,
            learning_rate=0.01,
            seed=training,
        ).model
        for name, tensor in alone.state_dict().items():
            assert torch.equal(tensor, made.members[i].state_dict()[name])
    assert len({seed for i in range(64) for seed in made.recipe.seeds(i)}) == 128
    assert ensemble(seed=6).recipe.seeds(0) != made.recipe.seeds(0)


def test_fit_leaves_torchs_random_numbers_alone():
    before = torch.get_rng_state()
    ensemble().fit(IMAGES)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("average", [None, 0.5])
def test_interrupted_in_the_middle_of_a_member(tmp_path, average):
    expected = ensemble(ema=average).fit(IMAGES)
    told = []

    def stop(done, total, stage):
        if done == 2 * STEPS + 3:
            raise Stop

    with pytest.raises(Stop):
        ensemble(ema=average, directory=tmp_path).fit(IMAGES, progress=stop)
    done = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("member-0[01]/*"))}
    assert len(done) == 2  # one checkpoint each
    with pytest.raises(RuntimeError, match="2 of 4 members are not trained, the first is member 2: call fit"):
        _ = EncodedEnsemble.open(tmp_path, Net).members
    made = ensemble(ema=average, directory=tmp_path).fit(IMAGES, progress=lambda *now: told.append(now))
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("member-0[01]/*"))} == done
    assert_same_members(made, expected)
    # Two members were done, and three of the third one's steps.
    assert [now[0] for now in told] == [4, 8, 11, 12, 12, 13, 14, 15, 16]
    assert {now[1:] for now in told} == {(16, "train")}
    assert_same_members(EncodedEnsemble.open(tmp_path, Net), expected)
    assert_same_members(ensemble(ema=average, directory=tmp_path).fit(IMAGES), expected)


MEMBER = """
import os
from pathlib import Path

import torch
from torch import nn


class Member(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.calls = 0

    def forward(self, images, timesteps):
        self.calls += 1
        if self.calls == 3 and Path(__file__).with_name("killed").exists():
            os._exit(0)
        if self.calls == 2 and Path(__file__).with_name("broken").exists():
            raise ArithmeticError("not today")
        return self.layer(images)
"""


def test_processes_train_the_same_members_and_may_fail_or_die(tmp_path, monkeypatch):
    (tmp_path / "encoded_member.py").write_text(MEMBER)
    monkeypatch.syspath_prepend(tmp_path)
    from encoded_member import Member

    directory, told = tmp_path / "ensemble", []
    (tmp_path / "killed").touch()
    with pytest.raises(
        RuntimeError,
        match=r"^EncodedEnsemble: the process of member [01] ended with exit code 0; what is trained is kept, and fit again",
    ):
        ensemble(Member, directory=directory).fit(IMAGES, workers=2)
    (tmp_path / "killed").rename(tmp_path / "broken")
    with pytest.raises(RuntimeError, match=r"EncodedEnsemble: training of member . failed: ArithmeticError: not today"):
        ensemble(Member, directory=directory).fit(IMAGES, workers=2)
    assert not list(directory.glob(".images-*"))
    (tmp_path / "broken").unlink()
    made = ensemble(Member, directory=directory)
    made.fit(IMAGES, workers=2, progress=lambda *now: told.append(now))
    assert told[-1] == (16, 16, "train") and {now[1:] for now in told} == {(16, "train")}
    # A member that died had done two steps: where it goes on, progress makes up for them at once.
    jumps = [after[0] - before[0] for before, after in zip([(0,), *told], told, strict=False)]
    assert max(jumps) >= 2
    assert_same_members(made, ensemble(Member).fit(IMAGES))


TRAINER = """
import sys

import torch
from encoded_endless_member import Member

from pyattr.attribution import EncodedEnsemble
from pyattr.diffusion import Schedule

if __name__ == "__main__":
    ensemble = EncodedEnsemble(
        Member, num_members=4, schedule=Schedule(6, 1e-2, 0.5), steps=10**6, batch_size=2, directory=sys.argv[1]
    )
    ensemble.fit(torch.zeros(6, 1, 4, 4), workers=2)
"""
ENDLESS = """
import os
from pathlib import Path

from torch import nn


class Member(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, images, timesteps):
        Path(__file__).with_name(f"{os.getpid()}.at-work").touch()
        return self.layer(images)
"""


def test_processes_leave_interruptions_to_the_one_that_started_them_and_end_with_it(tmp_path):
    (tmp_path / "encoded_endless_member.py").write_text(ENDLESS)
    (tmp_path / "trainer.py").write_text(TRAINER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "trainer.py", tmp_path / "ensemble"],
        env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 120
        # Both are at work, and their common file of images has gone from the folder.
        while len(list(tmp_path.glob("*.at-work"))) < 2 or list(tmp_path.glob("ensemble/.images-*/*")):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        for path in tmp_path.glob("*.at-work"):  # Ctrl-C in a terminal reaches all of them
            os.kill(int(path.stem), signal.SIGINT)
        process.kill()
        # All of them hold this pipe, which ends with the last one.
        _, told = process.communicate(timeout=120)
        assert "KeyboardInterrupt" not in told
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_members_may_be_trained_apart(tmp_path):
    expected = ensemble().fit(IMAGES)
    for members in ([2], [3, 0], [1]):
        made = ensemble(directory=tmp_path).fit(IMAGES, members=members)
    assert_same_members(made, expected)
    memory = ensemble().fit(IMAGES, members=[1])
    with pytest.raises(RuntimeError, match="3 of 4 members are not trained, the first is member 0: call fit"):
        _ = memory.members
    assert_same_members(memory.fit(IMAGES, members=[0, 2, 3]), expected)


@pytest.mark.parametrize("sampler", [{}, {"method": "ddim", "eta": 0.5, "steps": 3}, {"method": "ddpm"}], ids=str)
def test_samples_of_equal_members_are_those_of_one(sampler):
    made = ensemble().fit(IMAGES)
    for member in made.members[1:]:
        member.load_state_dict(made.members[0].state_dict())
    ours = made.sample(3, seed=4, **sampler)
    options = {"method": "published", "steps": 6, **sampler}
    theirs = sample(made.members[0], SCHEDULE, num_images=3, shape=(1, 4, 4), seed=4, **options)
    torch.testing.assert_close(ours.images, theirs.images)
    assert torch.equal(ours.noise, theirs.noise) and ours.noise.shape[:2] == (3, options["steps"])


def test_members_are_averaged_and_those_of_no_weight_not_asked():
    made = ensemble().fit(IMAGES)
    x, t = torch.randn(3, 1, 4, 4), torch.tensor([5, 3, 0])
    a, b, c, d = (member(x, t) for member in made.members)
    mean = Mixture(made.members, torch.tensor([0.25] * 4))
    torch.testing.assert_close(mean(x, t), (a + b + c + d) / 4)
    rows = torch.tensor([[1.0, 0, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 2, -1]])
    expected = torch.stack([a[0], (b[1] + c[1]) / 2, 2 * c[2] - d[2]])
    made.members[0].last.bias.data += torch.nan
    torch.testing.assert_close(Mixture(made.members, rows)(x, t)[1:], expected[1:])
    assert Mixture(made.members, rows)(x, t)[0].isnan().all()


@pytest.mark.parametrize("sampler", [{}, {"method": "ddim", "steps": 3}, {"method": "ddpm", "steps": 3}], ids=str)
def test_counterfactuals_are_samples_of_the_other_members(sampler):
    made = ensemble(codes=walsh_codes([0, 1, 2, 0, 1, 2], 3), members=3).fit(IMAGES)
    samples = made.sample(4, seed=9, **sampler)
    items = [1, 0, 4]
    images = made.counterfactual(samples, made.codes[items])
    assert images.shape == (4, 3, 1, 4, 4) and images.dtype == torch.float32
    assert torch.equal(images[:, 0], images[:, 2])  # one class, one code
    for m, code in enumerate(made.codes[items]):
        weights = ablation_weights([code], 3)[0]
        again = made.sample(4, seed=9, weights=weights, **sampler)
        assert torch.equal(again.noise, samples.noise)
        torch.testing.assert_close(images[:, m], again.images)
        assert float((images[:, m] - samples.images).abs().max()) > 1e-3
    assert torch.equal(made.counterfactual(samples, made.codes[items]), images)
    torch.testing.assert_close(made.counterfactual(samples, made.codes[items], batch_size=3), images)
    assert torch.equal(made.counterfactual(samples[1:3], [0]), samples.images[1:3, None])  # an item that no member saw


def test_counterfactuals_follow_the_noise_of_the_record():
    made = ensemble().fit(IMAGES)
    samples = made.sample(2, seed=1)
    other = made.sample(2, seed=2)
    swapped = Samples(samples.images, samples.ids, other.noise, None, samples.timesteps, samples.settings)
    assert torch.equal(made.counterfactual(swapped, made.codes), made.counterfactual(other, made.codes))


def test_interrupted_counterfactuals_go_on(tmp_path, monkeypatch):
    made = ensemble().fit(IMAGES)
    samples = made.sample(3)
    codes = [1, 2, 4]
    expected = made.counterfactual(samples, codes, batch_size=4)
    monkeypatch.setattr("pyattr.diffusion.sampling.SAVE_SECONDS", 0)
    asked = []

    def stop(done, total, stage):
        if done == 2 * 6 * 4 - 2 * 4:
            raise Stop

    with pytest.raises(Stop):
        made.counterfactual(samples, codes, batch_size=4, directory=tmp_path, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "counterfactual-00000000.safetensors",
        "counterfactual-unfinished-00000004.safetensors",
    ]
    again = made.counterfactual(
        samples, codes, batch_size=4, directory=tmp_path, progress=lambda *now: asked.append(now)
    )
    assert torch.equal(again, expected)
    assert 24 < asked[0][0] < 24 + 16 and asked[-1] == (54, 54, "counterfactual")
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(ValueError, match=r"holds results made otherwise: other weights was .*; use another directory"):
        made.counterfactual(samples, [1, 2, 5], batch_size=4, directory=tmp_path)


def test_an_ensemble_from_its_directory(tmp_path):
    made = ensemble(directory=tmp_path, seed=3).fit(IMAGES)
    samples = made.sample(2)
    again = EncodedEnsemble.open(tmp_path, Net)
    assert torch.equal(again.sample(2).images, samples.images)
    assert torch.equal(again.counterfactual(samples, made.codes), made.counterfactual(samples, made.codes))
    np.testing.assert_array_equal(again.codes, made.codes)
    with pytest.raises(ValueError, match="does not say how to build its members: give a model"):
        EncodedEnsemble.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        EncodedEnsemble.open(tmp_path / "none", Net)
    with pytest.raises(ValueError, match=r"holds another ensemble: images was .*; use another directory"):
        ensemble(directory=tmp_path, seed=3).fit(IMAGES.flip(0))
    with pytest.raises(ValueError, match=r"holds another ensemble: training\.learning_rate was 0.01, now 0.02"):
        ensemble(directory=tmp_path, seed=3, learning_rate=0.02).fit(IMAGES)
    with pytest.raises(ValueError, match="holds another ensemble: the codes differ"):
        ensemble(codes=made.codes[::-1], directory=tmp_path, seed=3).fit(IMAGES)


def test_samples_of_others_are_refused():
    made = ensemble().fit(IMAGES)
    samples = made.sample(1)
    with pytest.raises(TypeError, match=r"which hold the noise that they were made from, got Tensor"):
        made.counterfactual(samples.images, [1])
    single = sample(made.members[0], SCHEDULE, num_images=1, shape=(1, 4, 4), steps=6)
    with pytest.raises(ValueError, match="samples of this ensemble, got those of a single model"):
        made.counterfactual(single, [1])
    with pytest.raises(ValueError, match="queries must be samples of this ensemble: model was"):
        ensemble(seed=1).fit(IMAGES).counterfactual(samples, [1])
    with pytest.raises(ValueError, match=r"codes must leave at least one member out, got 0xf for item 1"):
        made.counterfactual(samples, [1, 15])
    with pytest.raises(
        ValueError, match=r"^EncodedEnsemble: batch_size must lie in \[1, 4611686018427387904\], got 0$"
    ):
        made.counterfactual(samples, [1], batch_size=0)
    with pytest.raises(TypeError, match=r"^EncodedEnsemble: batch_size must be an integer, got float$"):
        made.counterfactual(samples, [1], batch_size=2.0)
    with pytest.raises(ValueError, match=r"weights must have shape \[4\], got \[3\]"):
        made.sample(1, weights=[1, 0, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ensemble("resnet"), "model must be a factory or one of .*, got 'resnet'"),
        (lambda: ensemble(Net()), "model must build a member, got Net"),
        (lambda: ensemble(epochs=3), "epochs is no option of training"),
        (lambda: EncodedEnsemble(Net, num_members=4, schedule=SCHEDULE), "steps must be given"),
        (lambda: ensemble(steps=0), "train: steps must be at least 1, got 0"),
        (lambda: ensemble(keep_checkpoints=0), "train: keep_checkpoints must be at least 1 or None, got 0"),
        (lambda: ensemble(weight_decay=-1.0), "train: weight_decay must not be negative, got -1.0"),
        (lambda: ensemble(members=65), r"num_members must lie in \[2, 64\], got 65"),
        (lambda: ensemble(codes=[1, 2], weight=1), "weight must be None where codes are given"),
        (lambda: ensemble(codes=[1, 15]), "codes must leave at least one member out, got 0xf for item 1"),
        (lambda: ensemble(codes=[1, 2]).fit(IMAGES), "images must be as many as codes, 2, got 6"),
        (lambda: ensemble(codes=[1] * 6).fit(IMAGES), "codes must give each member an image, got none for member 1"),
        (lambda: ensemble().fit(IMAGES.repeat(2, 1, 1, 1)), r"num_items must be at most C\(4, 2\) = 6, got 12"),
        (lambda: ensemble().fit(IMAGES, members=[4]), r"^EncodedEnsemble: members must lie in \[0, 3\], got 4$"),
        # As an index, True would be another axis.
        (lambda: ensemble().fit(IMAGES, members=[True]), "^EncodedEnsemble: members must be an integer, got bool$"),
        (lambda: ensemble().fit(IMAGES, members=[1.0]), "^EncodedEnsemble: members must be an integer, got float$"),
        (lambda: ensemble().fit(IMAGES, workers=0), r"^EncodedEnsemble: workers must lie in \[1, 2147483648\], got 0$"),
        (
            lambda: ensemble(directory="unused").fit(IMAGES, workers=1.5),
            "^EncodedEnsemble: workers must be an integer, got float$",
        ),
        (lambda: ensemble(steps=2.0), "^train: steps must be an integer, got float$"),
        (lambda: ensemble(batch_size=True), "^train: batch_size must be an integer, got bool$"),
        (
            lambda: EncodedEnsemble(Net, num_members=4, schedule=None, steps=1),
            "^EncodedEnsemble: schedule must be a Schedule, got NoneType$",
        ),
        (lambda: ensemble().fit(IMAGES, workers=2), "workers must be 1 without a directory"),
        (
            lambda: ensemble(lambda: Net(), directory="unused").fit(IMAGES, workers=2),
            "model must be importable by name where workers are several",
        ),
        (
            lambda: ensemble("mnist-small", directory=".").fit(IMAGES[..., :2]),
            "mnist-small needs square images, got 4 x 2",
        ),
        (lambda: ensemble(lambda: 3, directory=".").fit(IMAGES), "model must build a torch module, got int"),
        (lambda: ensemble().sample(1), "fit or open must be called first"),
    ],
)
def test_errors(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        call()
    assert not list(tmp_path.iterdir())
