"""Ground truth made by training: what it is, and that no interruption changes it."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from resumable import Net, Stop

from pyattr.diffusion import PRESETS, Samples, Schedule, load_model, noise, train
from pyattr.diffusion.members import Recipe
from pyattr.diffusion.noise import FEATURES, LOSSES, PATCHES, SAMPLES
from pyattr.diffusion.storage import data_hash
from pyattr.evaluation import GroundTruth, build_ground_truth, subsets
from pyattr.evaluation.ground_truth import image_hashes
from pyattr.evaluation.retrained import QueryLosses

SCHEDULE = Schedule(12, 1e-2, 0.4)
IMAGES = torch.randint(0, 256, (6, 1, 4, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
QUERIES = torch.randint(0, 256, (3, 1, 4, 4), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
MASKS = subsets(6, 2)
TRAINING = {"steps": 4, "batch_size": 2, "learning_rate": 0.01}


def build(directory, model=Net, **changes):
    given = {
        "images": IMAGES,
        "queries": QUERIES,
        "masks": MASKS,
        "schedule": SCHEDULE,
        "seeds": 2,
        "timesteps": 5,
        "num_noises": 2,
        "rows_per_pass": 4,
        **TRAINING,
        **changes,
    }
    return build_ground_truth(directory, model, **given)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("truth")
    return build(directory, keep_models=True), directory


def assert_same(one, other):
    for field in dataclasses.fields(GroundTruth):
        a, b = (getattr(x, field.name) for x in (one, other))
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, field.name


def seeds_of(directory):
    """The weights that the models of each seed began with are told apart by what the record says of them."""
    return [entry["model"] for entry in GroundTruth.open(directory / "ground-truth.safetensors").settings["initial"]]


def test_losses_by_hand(made):
    truth, directory = made
    assert truth.losses.shape == (5, 2, 2, 2, 3) and truth.losses.dtype == np.float64
    assert truth.targets == ("simple", "elbo", "square", "l1", "linf")
    np.testing.assert_array_equal(truth.masks, MASKS)
    np.testing.assert_array_equal(truth.query_ids, [0, 1, 2])
    assert truth.images == data_hash(IMAGES) and list(truth.queries) == image_hashes(QUERIES)
    times = [1, 3, 6, 8, 10]  # of 12: at the middles of five shares, 1.2, 3.6, 6, ..., rounded down
    expected = np.zeros((5, 2, 2, 2, 3))
    for m in range(2):
        for s in range(2):
            model = load_model(directory / "models" / f"model-{m:04d}-{s:02d}.safetensors", into=Net())
            for e in range(2):
                for q in range(3):
                    for t in times:
                        x = QUERIES[q].double() / 127.5 - 1
                        eps = noise((1, 4, 4), seed=0, ids=q, timesteps=t, draws=e, purpose=LOSSES).double()
                        abar = SCHEDULE.alphas_cumprod[t]
                        noisy = abar.sqrt() * x + (1 - abar).sqrt() * eps
                        with torch.no_grad():
                            out = model.double()(noisy[None], torch.tensor([t]))[0]
                        beta = SCHEDULE.betas[t]
                        error = (out - eps).square().mean()
                        values = [
                            error,
                            beta / (2 * (1 - beta) * (1 - abar)) * error,
                            out.square().mean(),
                            out.abs().sum(),
                            out.abs().max(),
                        ]
                        expected[:, m, s, e, q] += np.array([float(v) for v in values]) / len(times)
    # The models are kept in float16.
    np.testing.assert_allclose(truth.losses, expected, rtol=2e-3)
    assert np.abs(truth.losses - expected).max() > 0


def test_models_are_those_of_the_recipe(made):
    truth, directory = made
    initial = seeds_of(directory)
    assert len(set(initial)) == 2
    found = 0
    for m in range(2):
        kept = load_model(directory / "models" / f"model-{m:04d}-00.safetensors", into=Net())
        weights, order = Recipe(Net, SCHEDULE, {}, 0, "op").seeds(0)
        torch.manual_seed(weights)
        alone = train(Net(), IMAGES[torch.from_numpy(MASKS[m])], schedule=SCHEDULE, seed=order, **TRAINING).model
        for name, parameter in alone.named_parameters():
            assert torch.equal(kept.get_parameter(name), parameter.half().float())
            found += 1
    assert found == 8
    assert "keep_checkpoints" not in truth.settings["training"] and truth.settings["training"]["steps"] == 4


def test_noise_is_that_of_nothing_else():
    drawn = [noise((64,), seed=0, ids=3, timesteps=5, purpose=p) for p in (LOSSES, FEATURES, SAMPLES, PATCHES)]
    assert len({tuple(one.tolist()) for one in drawn}) == 4


@pytest.mark.parametrize(
    ("count", "times"), [(1, [5]), (2, [2, 7]), (5, [1, 3, 5, 7, 9]), (4, [1, 3, 6, 8]), (6, [0, 2, 4, 5, 7, 9])]
)
def test_timesteps_are_spread_over_the_whole_schedule(count, times):
    losses = QueryLosses(count, 1, 0, ("simple",), 1)
    assert losses.times(Schedule(10)).tolist() == times


def test_all_timesteps_and_other_noise(tmp_path, made):
    every = build(tmp_path / "all", timesteps=12, seeds=1, num_noises=1)
    assert every.settings["evaluation"]["timesteps"] == 12
    assert not np.allclose(every.losses, made[0].losses[:, :, :1, :1])
    other = build(tmp_path / "other", noise_seed=1)
    assert not np.isclose(other.losses, made[0].losses).any()
    ids = build(tmp_path / "ids", query_ids=[2, 0, 1], queries=QUERIES[[2, 0, 1]])
    np.testing.assert_allclose(ids.losses[..., [1, 2, 0]], made[0].losses, rtol=1e-5)


def test_samples_bring_their_ids(tmp_path):
    images = QUERIES.float() / 127.5 - 1
    samples = Samples(images, torch.tensor([5, 9, 4]), images[:, None], None, torch.arange(1), {})
    found = build(tmp_path / "samples", queries=samples, seeds=1)
    np.testing.assert_array_equal(found.query_ids, [5, 9, 4])
    np.testing.assert_array_equal(found.rows(samples, "op"), [0, 1, 2])
    assert_same(found, build(tmp_path / "images", queries=images, query_ids=[5, 9, 4], seeds=1))


def test_models_are_evaluated_without_dropout_and_torchs_random_numbers_left_alone(tmp_path, made):
    before = torch.get_rng_state()
    assert_same(build(tmp_path), made[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_stopped_anywhere_it_ends_at_the_same_bits(tmp_path, made):
    options = {"seeds": 1, "num_noises": 1, "timesteps": 3, "checkpoint_every": 1, "keep_models": True}
    told = []
    expected = build(tmp_path / "whole", progress=lambda *now: told.append(now), **options)
    passes = 4 * 2 * 3 + 3 * 3
    assert told[0] == (0, 2 * passes, "ground truth") and told[-1] == (2 * passes, 2 * passes, "ground truth")
    assert [now[0] for now in told] == sorted(now[0] for now in told) and len(told) > 14
    for number in range(len(told)):
        directory, count = tmp_path / f"stopped-{number}", 0

        def stop(done, total, stage, number=number):
            nonlocal count
            count += 1
            if count == number + 1:
                raise Stop

        with pytest.raises(Stop):
            build(directory, progress=stop, **options)
        again = []
        assert_same(build(directory, progress=lambda *now, again=again: again.append(now), **options), expected)
        # Nothing that was finished is done again.
        assert again[0][0] == (passes if passes in [now[0] for now in told[:number]] else 0)
        assert sorted(path.name for path in directory.iterdir()) == [
            "ground-truth.safetensors",
            "losses-0000-00.safetensors",
            "losses-0001-00.safetensors",
            "models",
        ]


def test_a_finished_directory_is_read(tmp_path, made, monkeypatch):
    expected = build(tmp_path, seeds=1)
    monkeypatch.setattr(Net, "forward", None)  # no model is asked
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("losses-*")}
    assert_same(build(tmp_path, seeds=1, workers=2), expected)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("losses-*")} == files
    assert_same(GroundTruth.open(tmp_path / "ground-truth.safetensors"), expected)


def test_damaged_losses_and_missing_models_are_made_again(tmp_path):
    expected = build(tmp_path, seeds=1)
    path = tmp_path / "losses-0001-00.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert_same(build(tmp_path, seeds=1), expected)
    assert not (tmp_path / "models").exists()
    assert_same(build(tmp_path, seeds=1, keep_models=True), expected)
    assert len(list((tmp_path / "models").iterdir())) == 2


def test_subsets_and_seeds_may_be_added(tmp_path):
    more = subsets(6, 3)
    first = build(tmp_path, seeds=1)
    told = []
    np.testing.assert_array_equal(build(tmp_path).losses[:, :, :1], first.losses)
    both = build(tmp_path, seeds=1, masks=more, progress=lambda *now: told.append(now[0]))
    np.testing.assert_array_equal(both.losses[:, :2], first.losses)
    assert told[0] == told[-1] * 2 / 3
    with pytest.raises(
        ValueError, match=r"holds losses that were made otherwise: subset was .*; use another directory"
    ):
        build(tmp_path, seeds=1, masks=more[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.02}, "training.learning_rate was 0.01, now 0.02"),
        ({"noise_seed": 3}, "evaluation.noise_seed was 0, now 3"),
        ({"images": IMAGES.flip(0)}, "images was"),
        ({"queries": QUERIES.flip(0)}, "queries was"),
        ({"seed": 1}, "seed was 0, now 1"),
    ],
)
def test_another_run_is_refused(made, changes, message):
    with pytest.raises(ValueError, match=f"holds losses that were made otherwise: .*{message}"):
        build(made[1], **changes)


def test_options_that_change_no_number_are_no_other_run(made):
    assert_same(build(made[1], checkpoint_every=2, keep_checkpoints=3), made[0])


MODEL = """
import os
from pathlib import Path

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.calls = 0

    def forward(self, images, timesteps):
        self.calls += 1
        if self.calls == 3 and Path(__file__).with_name("killed").exists():
            os._exit(9)
        if self.calls == 2 and Path(__file__).with_name("broken").exists():
            raise ArithmeticError("not today")
        if Path(__file__).with_name("endless").exists():
            Path(__file__).with_name(f"{os.getpid()}.at-work").touch()
        return self.layer(images)
"""
RUN = """
import sys

import torch
from subset_model import Model

from pyattr.diffusion import Schedule
from pyattr.evaluation import build_ground_truth

if __name__ == "__main__":
    build_ground_truth(
        sys.argv[1], Model, torch.zeros(6, 1, 4, 4), torch.zeros(3, 1, 4, 4), torch.eye(6), schedule=Schedule(12, 1e-2, 0.4),
        steps=10**6, batch_size=2, timesteps=3, workers=2,
    )
"""


def test_processes_make_the_same_and_may_fail_or_die(tmp_path, monkeypatch):
    (tmp_path / "subset_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(tmp_path)
    from subset_model import Model

    directory, told = tmp_path / "truth", []
    (tmp_path / "killed").touch()
    with pytest.raises(
        RuntimeError,
        match=r"build_ground_truth: the process of subset ., seed . ended with exit code 9; what is trained is kept, and",
    ):
        build(directory, Model, workers=2)
    (tmp_path / "killed").rename(tmp_path / "broken")
    with pytest.raises(
        RuntimeError, match=r"build_ground_truth: training of subset ., seed . failed: ArithmeticError: not today"
    ):
        build(directory, Model, workers=2)
    (tmp_path / "broken").unlink()
    found = build(directory, Model, workers=2, progress=lambda *now: told.append(now[0]))
    assert_same(found, build(tmp_path / "alone", Model))
    assert told[-1] == 4 * (4 * 2 * 3 + 3 * 5 * 2)
    assert not list(directory.glob(".images-*")) and not list(directory.glob("training-*"))

    class Local(Model):
        pass

    with pytest.raises(
        ValueError, match="build_ground_truth: model must be importable by name where workers are several"
    ):
        build(tmp_path / "local", Local, workers=2)


def test_killed_it_leaves_no_process_behind(tmp_path):
    (tmp_path / "subset_model.py").write_text(MODEL)
    (tmp_path / "run.py").write_text(RUN)
    (tmp_path / "endless").touch()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), str(tmp_path)])}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path / "truth"],
        env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 300
        while len(list(tmp_path.glob("*.at-work"))) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        process.kill()
        process.communicate(timeout=300)  # all of them hold this pipe, which ends with the last one
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def test_a_preset(tmp_path):
    images = torch.randint(0, 256, (4, 1, 8, 8), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    found = build_ground_truth(
        tmp_path, "mnist-small", images, images[:1], subsets(4, 1), schedule=Schedule(), steps=1, timesteps=2,
        keep_models=True,
    )  # fmt: skip
    assert found.settings["model"] == "mnist-small" and np.isfinite(found.losses).all()
    model = load_model(tmp_path / "models" / "model-0000-00.safetensors")
    # A table of the network itself, which half precision would spoil.
    assert torch.equal(model.abar, Schedule().alphas_cumprod.float())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"masks": np.ones((0, 6))},
            ValueError,
            r"masks must have shape \[M, N\] with M at least 1 and N = 6, got \[0, 6\]",
        ),
        ({"masks": np.ones((2, 5))}, ValueError, r"masks must have shape .* N = 6, got \[2, 5\]"),
        ({"masks": np.full((2, 6), 2)}, ValueError, "masks must be 0 or 1, got 2"),
        (
            {"masks": np.eye(6)[:3] * [[1], [0], [1]]},
            ValueError,
            "masks must leave each model an image, got none for subset 1",
        ),
        (
            {"queries": QUERIES[:0]},
            ValueError,
            r"queries must be at least one image of shape \[1, 4, 4\], got \[0, 1, 4, 4\]",
        ),
        ({"queries": QUERIES[:, :, :2]}, ValueError, r"queries must be .* of shape \[1, 4, 4\], got \[3, 1, 2, 4\]"),
        ({"query_ids": [1, 1, 2]}, ValueError, r"query_ids must be 3 distinct integers, got shape \[3\]"),
        ({"seeds": 0}, ValueError, r"seeds must lie in \[1, 99\], got 0"),
        ({"timesteps": 13}, ValueError, r"timesteps must lie in \[1, 12\], got 13"),
        ({"num_noises": 0}, ValueError, r"num_noises must lie in \[1, 4096\], got 0"),
        ({"rows_per_pass": 0}, ValueError, r"rows_per_pass must lie in \[1, 2147483648\], got 0"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"workers": 0}, ValueError, r"workers must lie in \[1, 1024\], got 0"),
        ({"noise_seed": -1}, ValueError, r"noise_seed must lie in \[0, 4294967295\], got -1"),
        ({"targets": ()}, ValueError, r"targets must be distinct, and one at least, got \(\)"),
        ({"targets": ("simple", "simple")}, ValueError, "targets must be distinct, and one at least"),
        ({"model": "unknown"}, ValueError, f"model must be a factory or one of {', '.join(PRESETS)}, got 'unknown'"),
        ({"model": Net()}, TypeError, "model must build a member, got Net"),
        ({"epochs": 3}, TypeError, "epochs is no option of training"),
    ],
)
def test_refusals(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        build(tmp_path / "refused", **changes)
    assert not (tmp_path / "refused").exists()
