"""The analytic denoisers against their definition in nested loops, their limits, and what they are as models."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from pyattr import testing
from pyattr.diffusion import Schedule, analytic, sample
from pyattr.diffusion.analytic import MACHINES, ScoreMachine, calibrate, default_patch_sizes


@pytest.fixture
def images():
    return torch.randint(0, 256, (5, 2, 6, 5), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.fixture
def noisy():
    return torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(2))


def by_definition(machine, x, images, size, scale, sigma):
    """The mean of what could be under the noise, [C, H, W] float64, pixel by pixel and patch by patch."""
    bank = 2 * images.double().numpy() / 255 - 1  # [N, C, H, W]
    x = x.double().numpy()
    channels, height, width = x.shape
    half = size // 2
    spread = range(-half, half + 1)
    out = np.zeros_like(x)
    for r, c in np.ndindex(height, width):
        total, mean = 0.0, np.zeros(channels)
        for n, r2, c2 in np.ndindex(len(bank), height, width):
            if machine in ("ls", "is") and (r2, c2) != (r, c):
                continue
            if machine == "is":
                distance = ((x - scale * bank[n]) ** 2).sum()
            else:
                distance, fits = 0.0, True
                for i in spread:
                    for j in spread:
                        there = 0 <= r2 + i < height and 0 <= c2 + j < width
                        here = 0 <= r + i < height and 0 <= c + j < width
                        if machine == "els":
                            fits &= there
                            here = True
                        else:
                            fits &= there == here
                        if fits and there and here:
                            mine = x[:, (r + i) % height, (c + j) % width]
                            distance += ((mine - scale * bank[n, :, r2 + i, c2 + j]) ** 2).sum()
                if not fits:
                    continue
            weight = math.exp(-distance / (2 * sigma**2))
            total += weight
            mean += weight * bank[n, :, r2, c2]
        out[:, r, c] = mean / total
    return out


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("machine", MACHINES)
def test_denoise_is_the_definition(machine, size, images, noisy):
    schedule = Schedule()
    got = ScoreMachine(images, schedule, machine, patch_sizes=size).denoise(noisy, 500)
    assert got.dtype == torch.float32
    abar = float(schedule.alphas_cumprod[500])
    for row, x in zip(got, noisy, strict=True):
        expected = by_definition(machine, x, images, size, math.sqrt(abar), math.sqrt(1 - abar))
        np.testing.assert_allclose(row, expected, atol=2e-5)


@pytest.mark.parametrize("backend", testing.usable_backends("patch_mean"))
def test_images_in_float64_go_to_any_backend(images, noisy, backend):
    device = testing.device_of(backend)
    unit = images.double().div(127.5).sub(1).to(device)
    found = ScoreMachine(unit, Schedule(), patch_sizes=3, backend=backend).denoise(noisy.double().to(device), 500)
    expected = ScoreMachine(images, Schedule(), patch_sizes=3).denoise(noisy, 500)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("backend", testing.usable_backends("patch_mean"))
def test_a_machine_cast_as_a_module(images, noisy, backend):
    """Casting reaches the images too, and no compiled backend takes float64."""
    device = testing.device_of(backend)
    unit = images.float().div(127.5).sub(1).to(device)
    built = ScoreMachine(unit, Schedule(), patch_sizes=3, backend=backend)
    expected = built.denoise(noisy.to(device), 500)
    found = built.double().denoise(noisy.double().to(device), 500)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_patches_larger_than_the_image(images, noisy):
    """Where every patch holds the whole image, all but the equivariant machine are the ideal one."""
    ideal = ScoreMachine(images, Schedule(), "is").denoise(noisy, 700)
    for machine in ("ls", "bbels"):
        torch.testing.assert_close(
            ScoreMachine(images, Schedule(), machine, patch_sizes=11).denoise(noisy, 700), ideal, rtol=0, atol=1e-5
        )
        # Half as much is cut off differently at every place, so that these two agree.
    half = [ScoreMachine(images, Schedule(), m, patch_sizes=7).denoise(noisy, 700) for m in ("ls", "bbels")]
    torch.testing.assert_close(*half, rtol=0, atol=1e-5)


def test_blocks_of_training_images_change_nothing(images, noisy, monkeypatch):
    for machine in ("ls", "is"):
        built = ScoreMachine(images, Schedule(), machine, patch_sizes=3)
        whole = built.denoise(noisy, 20)
        monkeypatch.setattr(analytic, "_BLOCK", 1)
        torch.testing.assert_close(built.denoise(noisy, 20), whole, rtol=0, atol=1e-6)
        monkeypatch.undo()


@pytest.mark.parametrize("machine", MACHINES)
def test_no_images_to_denoise(machine, images, noisy):
    built = ScoreMachine(images, Schedule(), machine, patch_sizes=3)
    assert built.denoise(noisy[:0], 500).shape == built(noisy[:0], torch.tensor([]).long()).shape == (0, 2, 6, 5)


@pytest.mark.parametrize("machine", MACHINES)
def test_it_predicts_noise_as_a_model_does(machine, images, noisy):
    schedule = Schedule()
    built = ScoreMachine(images, schedule, machine, patch_sizes=3)
    times = torch.tensor([400, 100])
    eps = built(noisy, times)
    for row, x, t in zip(eps, noisy, times.tolist(), strict=True):
        abar = float(schedule.alphas_cumprod[t])
        x0 = (x - math.sqrt(1 - abar) * row) / math.sqrt(abar)
        np.testing.assert_allclose(x0, built.denoise(x[None], t)[0], atol=1e-5)
    assert built(noisy.double(), times).dtype == torch.float64


def test_the_ideal_machine_gives_training_images_back(images):
    samples = sample(ScoreMachine(images, Schedule(), "is"), Schedule(), shape=(2, 6, 5), num_images=4, steps=20)
    for image in samples.uint8():
        assert any(torch.equal(image, known) for known in images)


def test_a_patch_machine_makes_images_that_no_training_image_is(images):
    samples = sample(
        ScoreMachine(images, Schedule(), "ls", patch_sizes=1), Schedule(), shape=(2, 6, 5), num_images=2, steps=20
    )
    for image in samples.uint8():
        # Every pixel is one of a training image at that place; the whole is none of them.
        assert bool((image == images).all(1).any(0).all()) and not any(torch.equal(image, known) for known in images)


@pytest.mark.parametrize("machine", MACHINES)
def test_no_machine_is_differentiable(machine, images, noisy):
    """All alike: a gradient of some of them, or of a part of eps, would be taken for the whole."""
    built = ScoreMachine(images, Schedule(), machine, patch_sizes=3)
    noisy = noisy.requires_grad_()
    assert not built.denoise(noisy, 500).requires_grad
    assert not built(noisy, torch.tensor([500, 3])).requires_grad


def test_large_patches_where_no_kernel_compares_them(images, noisy):
    built = ScoreMachine(images, Schedule(), "ls", patch_sizes=513)
    whole = ScoreMachine(images, Schedule(), "is").denoise(noisy, 700)
    torch.testing.assert_close(built.denoise(noisy, 700), whole, rtol=0, atol=1e-5)


def test_a_schedule_that_is_not_the_machines_is_refused(images):
    built = ScoreMachine(images, Schedule(100), patch_sizes=3)
    message = f"sample: schedule must be the model's own, {Schedule(100)}, got {Schedule()}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sample(built, Schedule(), shape=(2, 6, 5), num_images=1, steps=2)
    sample(built, Schedule(100), shape=(2, 6, 5), num_images=1, steps=2)  # an equal one need not be the same


def test_samples_know_their_machine(images):
    first, second = (
        sample(
            ScoreMachine(images, Schedule(), "ls", patch_sizes=p), Schedule(), shape=(2, 6, 5), num_images=1, steps=1
        )
        for p in (1, 3)
    )
    assert first.settings != second.settings


# Patch sizes


def test_sizes_hold_from_their_timestep_on(images):
    built = ScoreMachine(images, Schedule(), patch_sizes={500: 5, 100: 3})
    assert [built.patch_size(t) for t in (0, 99, 100, 499, 500, 999)] == [3, 3, 3, 3, 5, 5]


def test_default_sizes_grow_with_the_noise():
    sizes = default_patch_sizes(Schedule(), 28)
    assert list(sizes) == sorted(sizes) and list(sizes.values()) == sorted(sizes.values())
    assert (
        sizes[0] == 3 and max(sizes.values()) == 13 and all(p % 2 for p in sizes.values())
    )  # 14 lies between 13 and 15
    assert max(default_patch_sizes(Schedule(), 2000).values()) == 511  # the largest that the kernels take
    assert default_patch_sizes(Schedule(), 4) == {0: 3} and default_patch_sizes(Schedule(), 2) == {0: 1}


@pytest.mark.parametrize("machine", ["bbels", "ls"])
def test_calibration_finds_the_sizes_of_a_machine(machine, images):
    """A machine in the place of the network: at its own sizes the agreement is perfect."""
    network = ScoreMachine(images, Schedule(), machine, patch_sizes={0: 3, 400: 5})
    found = calibrate(ScoreMachine(images, Schedule(), machine), network, [300, 600], sizes=(1, 3, 5), num_images=3)
    assert found == {300: 3, 600: 5}


def test_calibration_leaves_the_network_in_its_mode(images):
    class Silent(nn.Module):
        def forward(self, x, t):
            assert not self.training
            return x

    network = Silent().train()
    calibrate(ScoreMachine(images, Schedule(), "ls"), network, [10], sizes=(1,), num_images=99)
    assert network.training


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"machine": "esm"}, "ScoreMachine: machine must be one of els, bbels, ls, is, got 'esm'"),
        ({"patch_sizes": 4}, "ScoreMachine: patch_sizes must be odd and positive, got 4"),
        ({"patch_sizes": {1000: 3}}, "ScoreMachine: patch_sizes must be of timesteps in [0, 1000), got 1000"),
        ({"patch_sizes": {}}, "ScoreMachine: patch_sizes must name at least one timestep, got none"),
        ({"machine": "els", "patch_sizes": {3: 7}},
         "ScoreMachine: patch_sizes of els must not exceed the images' 5 pixels, got 7"),
        ({"patch_sizes": {0: 3, 9: 513}}, "ScoreMachine: patch_sizes of bbels must be at most 511, got 513"),
        ({"machine": "els", "patch_sizes": 513}, "ScoreMachine: patch_sizes of els must be at most 511, got 513"),
        ({"backend": "foo"}, "ScoreMachine: backend must be one of cuda, triton, cpu, reference, got 'foo'"),
        ({"machine": "is", "backend": "foo"},
         "ScoreMachine: backend must be one of cuda, triton, cpu, reference, got 'foo'"),
    ],
)  # fmt: skip
def test_refusals(options, message, images):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ScoreMachine(images, Schedule(), **options)


@pytest.mark.parametrize("sizes", [3.5, "3", {0: 3.0}])
def test_sizes_that_are_no_integers(sizes, images):
    message = re.escape(f"ScoreMachine: patch_sizes must be integers, got {sizes!r}")
    with pytest.raises(TypeError, match=f"^{message}$"):
        ScoreMachine(images, Schedule(), patch_sizes=sizes)


def test_inputs_that_do_not_fit(images, noisy):
    with pytest.raises(ValueError, match=r"^ScoreMachine: images must not be empty, got shape \[0, 2, 6, 5\]$"):
        ScoreMachine(images[:0], Schedule())
    built = ScoreMachine(images, Schedule(), patch_sizes=3)
    with pytest.raises(ValueError, match=r"^ScoreMachine: noisy must have shape \[B, 2, 6, 5\], got \[2, 1, 6, 5\]$"):
        built.denoise(noisy[:, :1], 3)
    with pytest.raises(ValueError, match=r"^ScoreMachine: timestep must lie in \[0, 1000\), got 1000$"):
        built.denoise(noisy, 1000)
    for times in (torch.tensor([3, 1000]), torch.tensor([-1, 3])):
        with pytest.raises(ValueError, match=r"^ScoreMachine: timestep must lie in \[0, 1000\), got (1000|-1)$"):
            built(noisy, times)
    for times, shape in ((torch.tensor(3), r"\[\]"), (torch.tensor([3]), r"\[1\]"), (3, "3")):
        with pytest.raises(ValueError, match=rf"^ScoreMachine: timesteps must have shape \[2\], got {shape}$"):
            built(noisy, times)
    with pytest.raises(ValueError, match=r"^ScoreMachine: timestep must lie in \[0, 1000\), got 1000$"):
        calibrate(built, built, [1000], sizes=[3])
    with pytest.raises(ValueError, match=r"^calibrate: machine must see patches, got is$"):
        calibrate(ScoreMachine(images, Schedule(), "is"), built, [1])
    with pytest.raises(ValueError, match=r"^calibrate: num_images and sizes must not be empty, got 0 and \[3\]$"):
        calibrate(built, built, [1], sizes=[3], num_images=0)


def test_inputs_of_another_kind(images, noisy):
    built = ScoreMachine(images, Schedule(), patch_sizes=3)
    for use, message in (
        (lambda: ScoreMachine(images, 1000), "ScoreMachine: schedule must be a Schedule, got int"),
        (lambda: built.denoise(noisy, 400.5), "ScoreMachine: timestep must be an integer, got 400.5"),
        (lambda: built.denoise(noisy.numpy(), 400), "ScoreMachine: noisy must be a tensor, got ndarray"),
        (lambda: built(noisy, torch.tensor([4.0, 5.0])), "ScoreMachine: timesteps must be integers, got torch.float32"),
        (lambda: calibrate(built, built, [3.7]), "calibrate: each of timesteps must be an integer, got 3.7"),
        (lambda: calibrate(built, built, 3), "calibrate: timesteps must be a sequence, got 3"),
        (lambda: calibrate(built, built, [3], sizes=5), "calibrate: sizes must be a sequence, got 5"),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            use()
