import gc

import diffusers
import pytest
import torch

from pyattr.diffusion import DamagedFileError, Samples, Schedule, noise, sample, sampling
from pyattr.diffusion.noise import SAMPLES

SHAPE = (1, 8, 8)


def run(model, **arguments):
    if "ids" not in arguments:
        arguments = {"num_images": 3, **arguments}
    arguments = {"shape": SHAPE, "steps": 20, "seed": 4, **arguments}
    return sample(model, Schedule(), **arguments)


def assert_same(a, b):
    assert torch.equal(a.images, b.images) and torch.equal(a.ids, b.ids) and torch.equal(a.noise, b.noise)
    assert torch.equal(a.timesteps, b.timesteps) and a.settings == b.settings
    assert (a.trajectory is None) == (b.trajectory is None)
    assert a.trajectory is None or torch.equal(a.trajectory, b.trajectory)


def walk(scheduler, model, samples, step):
    """Run a scheduler of diffusers over the recorded noise; its x after each step."""
    x = samples.noise[:, 0]
    for i, t in enumerate(scheduler.timesteps.tolist()):
        with torch.no_grad():
            e = model(x, torch.full((len(x),), t))
        last = i + 1 == len(scheduler.timesteps)
        z = samples.noise[:, i + 1] if samples.noise.shape[1] > 1 and not last else torch.zeros_like(x)
        x = step(e, t, x, z)
        yield x


def test_samples_are_float32_whatever_torch_defaults_to(tiny_net):
    expected = run(tiny_net(), record="trajectory", eta=0.5)
    torch.set_default_dtype(torch.float64)
    try:
        samples = run(tiny_net().float(), record="trajectory", eta=0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    for tensor in (samples.images, samples.noise, samples.trajectory):
        assert tensor.dtype == torch.float32
    assert torch.equal(samples.noise, expected.noise)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_ddim_is_that_of_diffusers_at_every_step(tiny_net, eta, clip):
    model = tiny_net().eval()
    ours = run(model, eta=eta, clip=clip, record="trajectory")
    theirs = diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=clip, timestep_spacing="leading")
    theirs.set_timesteps(20)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.noise.shape == (3, 20 if eta else 1, *SHAPE)
    steps = walk(theirs, model, ours, lambda e, t, x, z: theirs.step(e, t, x, eta=eta, variance_noise=z).prev_sample)
    for i, x in enumerate(steps):
        # Theirs rounds abar to float32, which the division by sqrt(abar) = 0.006 at the first steps magnifies.
        torch.testing.assert_close(ours.trajectory[:, i + 1], x, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(ours.images, x, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("steps", [20, 1000])
def test_ddpm_is_that_of_diffusers_at_every_step(tiny_net, monkeypatch, steps):
    model = tiny_net().eval()
    ours = run(model, method="ddpm", steps=steps, num_images=2, record="trajectory")
    theirs = diffusers.DDPMScheduler(beta_schedule="linear", clip_sample=True, timestep_spacing="leading")
    theirs.set_timesteps(steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert ours.noise.shape == (2, steps, *SHAPE)

    def step(e, t, x, z):
        monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", lambda *_, **__: z)
        return theirs.step(e, t, x).prev_sample

    for i, x in enumerate(walk(theirs, model, ours, step)):
        torch.testing.assert_close(ours.trajectory[:, i + 1], x, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(ours.images, x, atol=2e-3, rtol=2e-3)


def test_one_ddim_step_by_hand():
    """T = 2, betas 0.1 and 0.2, abar 0.9 and 0.72; a network that always predicts 0.5 from x_T = z."""
    schedule = Schedule(2, 0.1, 0.2)
    samples = sample(
        lambda_net(0.5), schedule, num_images=1, shape=(1, 1, 1), steps=2, clip=False, record="trajectory", seed=1
    )
    start = float(samples.noise)
    x0 = (start - 0.28**0.5 * 0.5) / 0.72**0.5
    between = 0.9**0.5 * x0 + 0.1**0.5 * 0.5
    final = (between - 0.1**0.5 * 0.5) / 0.9**0.5
    expected = torch.tensor([start, between, final]).reshape(1, 3, 1, 1, 1)
    torch.testing.assert_close(samples.trajectory, expected, atol=1e-6, rtol=1e-5)
    assert samples.timesteps.tolist() == [1, 0]


def test_two_published_steps_by_hand():
    """T = 2, betas 0.1 and 0.2: alpha 0.8 then 0.9, abar 0.72 then 0.9; a network that always predicts 0.5."""
    samples = sample(
        lambda_net(0.5),
        Schedule(2, 0.1, 0.2),
        num_images=40,
        shape=(1, 1, 1),
        method="published",
        steps=2,
        record="trajectory",
    )
    assert samples.noise.shape == (40, 2, 1, 1, 1)
    start, z = samples.noise.unbind(1)
    between = 0.8**-0.5 * (start - 0.2 / 0.28**0.5 * 0.5) + (0.8 * 0.2) ** 0.5 * z
    final = 0.9**-0.5 * (between - 0.1 / 0.1**0.5 * 0.5)
    torch.testing.assert_close(samples.trajectory, torch.stack([start, between, final.clamp(-1, 1)], 1))
    assert 0 < int((final.abs() > 1).sum()) < 40


def test_the_published_sampler_on_fewer_steps_takes_alpha_between_them(tiny_net):
    model = tiny_net().eval()
    samples = run(model, method="published", steps=4, clip=False, record="trajectory")
    assert samples.timesteps.tolist() == [750, 500, 250, 0]
    abar = Schedule().alphas_cumprod
    x = samples.noise[:, 0]
    for i, (t, s) in enumerate(((750, 500), (500, 250), (250, 0), (0, None))):
        a = float(abar[t] / (1 if s is None else abar[s]))
        with torch.no_grad():
            e = model(x, torch.full((3,), t))
        x = a**-0.5 * (x - (1 - a) / float(1 - abar[t]) ** 0.5 * e)
        x = x if s is None else x + (a * (1 - a)) ** 0.5 * samples.noise[:, i + 1]
        torch.testing.assert_close(samples.trajectory[:, i + 1], x)


def lambda_net(value):
    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def forward(self, images, timesteps):
            return self.value.expand_as(images)

    return Constant()


def test_clipping_acts_on_x0_and_leaves_the_predicted_noise():
    """A prediction of 0 makes x0 = x_t / sqrt(abar_t), far outside; the next x is then sqrt(abar) times +-1."""
    samples = run(lambda_net(0.0), steps=50, record="trajectory")
    second = samples.trajectory[:, 1]
    abar = float(Schedule().alphas_cumprod[960])
    certain = samples.noise[:, 0].abs() > 0.1  # x0 is at least 15 there
    assert certain.float().mean() > 0.8
    torch.testing.assert_close(second[certain], samples.noise[:, 0][certain].sign() * abar**0.5)


def test_timesteps_of_fifty_steps():
    assert run(lambda_net(0.0), steps=50, num_images=1).timesteps.tolist() == list(range(980, -1, -20))


@pytest.mark.parametrize("arguments", [{}, {"method": "ddpm"}, {"method": "published"}, {"eta": 0.5}])
def test_an_image_depends_on_its_id_alone(tiny_unet, arguments):
    model = tiny_unet().double()  # an untrained network magnifies rounding a hundredfold on the way to x_0
    whole = run(model, num_images=5, batch_size=5, **arguments)
    for other in (
        run(model, num_images=5, batch_size=2, **arguments),
        run(model, ids=[3, 0, 4, 1, 2], batch_size=3, **arguments),
    ):
        order = other.ids
        assert torch.equal(whole.noise[order], other.noise)
        torch.testing.assert_close(whole.images[order], other.images, atol=1e-5, rtol=1e-5)
    assert not torch.isclose(whole.images[0], whole.images[1]).all()


def test_recorded_noise_is_the_seeded_noise(tiny_net):
    samples = run(tiny_net(), method="ddpm", steps=4, ids=[7, 2])
    labels = torch.tensor([1000, 750, 500, 250])  # of x_T, then of the noise added at each timestep but the last
    expected = noise(SHAPE, seed=4, ids=torch.tensor([7, 2])[:, None], timesteps=labels, purpose=SAMPLES)
    assert torch.equal(samples.noise, expected)


def test_images_end_the_trajectory_in_range(tiny_unet):
    samples = run(tiny_unet(), record="trajectory")
    assert torch.equal(samples.trajectory[:, -1], samples.images)
    assert torch.equal(samples.trajectory[:, 0], samples.noise[:, 0])
    assert float(samples.images.abs().max()) <= 1
    assert run(tiny_unet()).trajectory is None


def test_modes_of_the_model_are_left_alone(tiny_net):
    model = tiny_net().train()
    model.first.eval()
    before = run(model)
    assert model.training and model.drop.training and not model.first.training
    assert_same(before, run(model))  # and dropout was off


def test_uint8_rounds_to_the_nearest_level():
    images = torch.tensor([-1.0, -0.999, 0.0, 0.999, 1.0, 1.5]).reshape(1, 1, 1, 6)
    samples = Samples(images, torch.tensor([0]), images[:, None], None, torch.tensor([0]), {})
    assert samples.uint8().flatten().tolist() == [0, 0, 128, 255, 255, 255]


@pytest.mark.parametrize("record", ["noise", "trajectory"])
def test_save_and_load(tmp_path, tiny_net, record):
    samples = run(tiny_net(), record=record)
    samples.save(tmp_path / "samples.safetensors")
    assert_same(samples, Samples.load(tmp_path / "samples.safetensors"))
    part = samples[1:]
    part.save(tmp_path / "part.safetensors")
    assert_same(part, Samples.load(tmp_path / "part.safetensors"))
    assert len(part) == 2 and part.ids.tolist() == [1, 2]


def test_damaged_files_are_refused(tmp_path, tiny_net):
    path = tmp_path / "samples.safetensors"
    run(tiny_net()).save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedFileError, match="checksum does not match"):
        Samples.load(path)
    path.write_bytes(content[:-5])
    with pytest.raises(DamagedFileError, match="delete it and make it again"):
        Samples.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Samples.load(tmp_path / "none")


def test_interrupted_sampling_goes_on(tmp_path, tiny_net):
    class Stop(Exception):
        pass

    def progress(done, total, stage):
        if done == 4 * 20:
            raise Stop

    model = tiny_net()
    whole = run(model, num_images=7, batch_size=2)
    with pytest.raises(Stop):
        run(model, num_images=7, batch_size=2, directory=tmp_path, progress=progress)
    assert len(list(tmp_path.iterdir())) == 2
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert_same(whole, run(model, num_images=7, batch_size=2, directory=tmp_path))
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    with pytest.raises(ValueError, match="made otherwise: seed was 4, now 5"):
        run(model, num_images=7, batch_size=2, directory=tmp_path, seed=5)
    with pytest.raises(ValueError, match="made otherwise: model was"):
        run(tiny_net(seed=1), num_images=7, batch_size=2, directory=tmp_path)
    with pytest.raises(ValueError, match="the ids or the batch size differ"):
        run(model, num_images=7, batch_size=3, directory=tmp_path)


@pytest.mark.parametrize("arguments", [{"eta": 0.5}, {"method": "ddpm", "record": "trajectory"}])
def test_a_batch_goes_on_from_the_step_it_was_kept_at(tmp_path, tiny_unet, monkeypatch, arguments):
    """Every step is kept. Stopped in the second batch after 7 of 20 steps, 13 are left to do, and the bits are the same."""

    def stop(done, total, stage):
        assert total == 5 * 20
        if done == 3 * 20 + 2 * 7:
            raise KeyboardInterrupt

    model, calls, steps = tiny_unet(), [], []
    model.register_forward_pre_hook(lambda module, inputs: steps.append(int(inputs[1][0])))
    whole = run(model, num_images=5, batch_size=3, **arguments)
    monkeypatch.setattr(sampling.Pace, "due", lambda pace: True)
    with pytest.raises(KeyboardInterrupt):
        run(model, num_images=5, batch_size=3, directory=tmp_path, progress=stop, **arguments)
    kept = ["samples-00000000.safetensors", "unfinished-00000003.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept
    del steps[:]
    arguments["progress"] = lambda done, total, stage: calls.append(done)
    assert_same(whole, run(model, num_images=5, batch_size=3, directory=tmp_path, **arguments))
    assert steps == whole.timesteps[7:].tolist()
    assert calls == list(range(3 * 20 + 2 * 7, 101, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "samples-00000000.safetensors",
        "samples-00000003.safetensors",
    ]


def test_a_damaged_or_foreign_unfinished_batch(tmp_path, tiny_net, monkeypatch):
    def stop(done, total, stage):
        if done == 2 * 9:
            raise KeyboardInterrupt

    monkeypatch.setattr(sampling.Pace, "due", lambda pace: True)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_net(), num_images=2, directory=tmp_path, progress=stop)
    (path,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match="made otherwise: seed was 4, now 5"):
        run(tiny_net(), num_images=2, directory=tmp_path, seed=5)
    path.write_bytes(path.read_bytes()[:-1])
    assert_same(run(tiny_net(), num_images=2), run(tiny_net(), num_images=2, directory=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["samples-00000000.safetensors"]


def test_one_directory_holds_one_shape_and_one_network(tmp_path, tiny_net):
    run(tiny_net(), num_images=2, directory=tmp_path)
    with pytest.raises(ValueError, match=r"made otherwise: shape was \[1, 8, 8\], now \[1, 12, 12\]"):
        run(tiny_net(), num_images=2, shape=(1, 12, 12), directory=tmp_path)
    with pytest.raises(ValueError, match=r"made otherwise: network.drop was"):
        run(tiny_net(dropout=0.5), num_images=2, directory=tmp_path)


def test_each_number_is_held_once(tiny_net):
    """Beside the result there is one batch, not a second copy of all of them."""
    held = []

    def progress(done, total, stage):
        if done % 50 == 0:
            tensors = (thing for thing in gc.get_objects() if type(thing) is torch.Tensor)
            held.append(sum(tensor.numel() for tensor in tensors if tensor.shape[1:] == (50, 1, 8, 8)))

    run(tiny_net(), num_images=8, batch_size=2, steps=50, method="ddpm", progress=progress)
    assert max(held) == (8 + 2) * 50 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "euler"}, "method must be one of ddim, ddpm"),
        ({"record": "all"}, "record must be one of"),
        ({"eta": 2.0}, "eta must lie"),
        ({"eta": 0.5, "method": "ddpm"}, "be 0 for ddpm"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_images": None}, "either num_images or ids"),
        ({"ids": [1], "num_images": 2}, "either num_images or ids"),
        ({"num_images": -1}, r"^sample: num_images must lie in \[1, 4611686018427387904\], got -1$"),
        ({"num_images": 0}, r"^sample: num_images must lie in \[1, 4611686018427387904\], got 0$"),
        ({"ids": []}, "at least one image"),
        ({"ids": [1, 1]}, "ids must be distinct"),
        ({"steps": 0}, r"steps must lie in \[1, 1000\]"),
        ({"steps": 1001}, r"steps must lie in \[1, 1000\]"),
        ({"shape": None}, "shape must be given"),
        ({"seed": -1}, "seed must lie"),
    ],
)
def test_errors(tiny_net, change, message):
    with pytest.raises(ValueError, match=message):
        run(tiny_net(), **change)
