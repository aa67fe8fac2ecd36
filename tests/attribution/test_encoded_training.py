"""What a failed, interrupted or repeated training of an encoded ensemble leaves behind."""

import numpy as np
import pytest
import torch
from torch import nn

from pyattr.attribution import EncodedEnsemble
from pyattr.attribution.codes import random_codes
from pyattr.attribution.encoded_samples import default_steps
from pyattr.diffusion import Schedule
from pyattr.diffusion.storage import load_tensors, save_tensors

SCHEDULE = Schedule(6, 1e-2, 0.5)
IMAGES = torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
STEPS = 4


class Stop(Exception):
    pass


class Net(nn.Module):
    """With dropout, so that a resumed training has to restore its random numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.drop = nn.Dropout(0.3)

    def forward(self, images, timesteps):
        return self.drop(self.layer(images))


def ensemble(model=Net, codes=None, members=4, **options):
    options = {"steps": STEPS, "batch_size": 2, "schedule": SCHEDULE, "learning_rate": 0.01, **options}
    return EncodedEnsemble(model, codes, num_members=members, **options)


def assert_same_members(a, b):
    for one, other in zip(a.members, b.members, strict=True):
        for (name, tensor), (again, expected) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
            assert name == again and torch.equal(tensor, expected)


def stop_at(count):
    def stop(done, _total, _stage):
        if done >= count:
            raise Stop

    return stop


def state(made):
    weights = {i: {name: t.clone() for name, t in member.state_dict().items()} for i, member in made._members.items()}
    return made.codes, made.shape, weights


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda made: made.fit(IMAGES[:5], members=[7]), ValueError),
        (lambda made: made.fit(IMAGES[:5], workers=0), ValueError),
        (lambda made: made.fit(IMAGES[:5], workers=2), ValueError),
        (lambda made: made.fit(IMAGES[:1]), ValueError),  # two members see nothing
        (lambda made: made.fit(IMAGES.repeat(2, 1, 1, 1)), ValueError),  # more than there are codes
        (lambda made: made.fit(IMAGES[:5], progress=stop_at(STEPS + 1)), Stop),
    ],
)
def test_a_fit_that_fails_leaves_no_trace(call, error):
    made = ensemble()
    with pytest.raises(error):
        call(made)
    assert state(made) == (None, None, {})
    with pytest.raises(RuntimeError, match="fit or open must be called first"):
        made.sample(1)
    np.testing.assert_array_equal(made.fit(IMAGES).codes, random_codes(6, 4))
    assert_same_members(made, ensemble().fit(IMAGES))


def test_a_fit_that_fails_leaves_the_members_of_an_earlier_one():
    made = ensemble().fit(IMAGES)
    samples, (codes, shape, weights) = made.sample(2), state(made)
    for images, options, error in (
        (IMAGES[:5], {}, ValueError),
        (IMAGES.flip(0), {"progress": stop_at(STEPS + 1)}, Stop),
        (IMAGES.flip(0)[:, :, :2], {"progress": stop_at(0)}, Stop),
    ):
        with pytest.raises(error):
            made.fit(images, **options)
        again = state(made)
        assert again[0] is codes and again[1] == shape and again[2].keys() == weights.keys()
        assert torch.equal(made.sample(2).images, samples.images)


def test_members_of_other_images_are_no_part_of_the_ensemble():
    made = ensemble().fit(IMAGES, members=[0, 1])
    made.fit(IMAGES.flip(0), members=[2, 3])
    with pytest.raises(RuntimeError, match="2 of 4 members are not trained, the first is member 0: call fit"):
        _ = made.members
    assert_same_members(made.fit(IMAGES.flip(0), members=[0, 1]), ensemble().fit(IMAGES.flip(0)))


def test_what_happens_to_the_callers_codes_does_not_happen_to_the_ensembles():
    given = np.array([1, 2, 4, 8, 3, 12], np.uint64)
    given_as = given, torch.from_numpy(given)
    made = [ensemble(codes=codes) for codes in given_as]
    given[:] = 7
    assert [one.codes.tolist() for one in made] == [[1, 2, 4, 8, 3, 12]] * 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"checkpoint_every": 1}, {"checkpoint_every": 3}),
        ({}, {"checkpoint_every": 2, "keep_checkpoints": None}),
        ({"checkpoint_every": 1, "keep_checkpoints": 3}, {}),
    ],
)
def test_how_often_files_are_written_does_not_keep_a_training_from_going_on(tmp_path, before, after):
    with pytest.raises(Stop):
        ensemble(directory=tmp_path, **before).fit(IMAGES, progress=stop_at(2 * STEPS + 3))
    made = ensemble(directory=tmp_path, **after).fit(IMAGES)
    expected = ensemble().fit(IMAGES)
    assert_same_members(made, expected)
    again = EncodedEnsemble.open(tmp_path, Net)
    assert_same_members(again, expected)
    assert_same_members(again.fit(IMAGES), expected)


def test_an_option_may_be_said_or_left_to_its_default(tmp_path):
    """Also in a record that names only those that were given."""
    made = ensemble(directory=tmp_path).fit(IMAGES)
    told = ensemble(directory=tmp_path, warmup=0.1, betas=[0.95, 0.999]).fit(IMAGES)
    assert_same_members(told, made)
    tensors, record = load_tensors(tmp_path / "ensemble.safetensors")
    record["training"] = {name: record["training"][name] for name in ("steps", "batch_size", "learning_rate")}
    save_tensors(tmp_path / "ensemble.safetensors", tensors, record)
    assert_same_members(ensemble(directory=tmp_path).fit(IMAGES), made)
    with pytest.raises(ValueError, match=r"holds another ensemble: training\.warmup was 0\.1, now 0\.2; use another"):
        ensemble(directory=tmp_path, warmup=0.2).fit(IMAGES)


MORTAL = """
import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent


class Member(nn.Module):
    def __init__(self):
        super().__init__()
        self.seed = torch.initial_seed()  # which member this is
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.calls = 0

    def forward(self, images, timesteps):
        self.calls += 1
        doomed = HERE / "doomed"
        if self.calls == 3 and doomed.exists() and doomed.read_text() == str(self.seed):
            end = time.monotonic() + 120
            while not list(HERE.glob("ensemble/member-02/checkpoint-*")):  # until the other one has something to keep
                assert time.monotonic() < end, "the other member wrote no checkpoint"
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.layer(images)
"""


def test_the_death_of_a_process_is_noticed_while_others_work(tmp_path, monkeypatch):
    (tmp_path / "encoded_mortal_member.py").write_text(MORTAL)
    monkeypatch.syspath_prepend(tmp_path)
    from encoded_mortal_member import Member

    def made(steps=10**6):
        return ensemble(Member, directory=tmp_path / "ensemble", steps=steps, checkpoint_every=5, seed=1)

    doomed = made()
    (tmp_path / "doomed").write_text(str(doomed.recipe.seeds(1)[0]))
    most = []

    def progress(done, _total, _stage):
        most.append(done)
        assert done < 50_000  # the other process would go on to a million

    message = (
        r"^EncodedEnsemble: the process of member 1 ended with exit code -9 \(killed: the memory may not suffice for so "
        r"many workers\); what is trained is kept, and fit again goes on from there$"
    )
    with pytest.raises(RuntimeError, match=message):
        doomed.fit(IMAGES, workers=2, members=[1, 2], progress=progress)
    assert max(most) >= 5
    assert doomed.codes is None
    assert not list(tmp_path.glob("ensemble/.images-*"))
    # What the other one did is there, and a later call goes on from it.
    kept = sorted(tmp_path.glob("ensemble/member-02/checkpoint-*"))
    assert kept and not list(tmp_path.glob("ensemble/member-01/*.safetensors"))
    seen = []
    with pytest.raises(Stop):
        made().fit(
            IMAGES, members=[2], progress=lambda done, total, stage: (seen.append(done), stop_at(0)(1, 1, stage))
        )
    assert seen == [int(kept[-1].stem.removeprefix("checkpoint-"))]


def test_how_many_steps_a_sampler_takes_by_default():
    assert default_steps("ddim", Schedule(1000)) == 50 and default_steps("ddim", Schedule(20)) == 20
    assert default_steps("published", Schedule(1000)) == default_steps("ddpm", Schedule(1000)) == 1000
    made = ensemble(schedule=Schedule(60, 1e-2, 0.1)).fit(IMAGES)
    assert len(made.sample(1, method="ddim").timesteps) == 50 and len(made.sample(1).timesteps) == 60
