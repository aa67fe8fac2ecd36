import math

import pytest
import torch
from torch import nn

from pyattr.diffusion import Schedule, checkpoints, load_model, train
from pyattr.diffusion.progress import Pace


class Stop(Exception):
    pass


def stop_at(step):
    def progress(done, total, stage):
        if done == step:
            raise Stop

    return progress


def settings(**others):
    return {
        "schedule": Schedule(),
        "steps": 23,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "ema": 0.9,
        "flip": True,
        "seed": 5,
        "checkpoint_every": 5,
        **others,
    }


def assert_same(a, b):
    assert torch.equal(a.losses, b.losses)
    for (name, p), q in zip(a.model.state_dict().items(), b.model.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("stop", [1, 5, 13, 22])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, tiny_net, images, stop):
    whole = train(tiny_net(), images, **settings())
    with pytest.raises(Stop):
        train(tiny_net(), images, checkpoint_directory=tmp_path, progress=stop_at(stop), **settings())
    resumed = train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    assert resumed.resumed_from == stop // 5 * 5
    assert_same(whole, resumed)
    assert not resumed.model.training


def test_many_interruptions(tmp_path, tiny_net, images):
    whole = train(tiny_net(), images, **settings(steps=8))
    for stop in range(1, 8):
        with pytest.raises(Stop):
            train(
                tiny_net(),
                images,
                checkpoint_directory=tmp_path,
                progress=stop_at(stop),
                **settings(steps=8, checkpoint_every=1),
            )
    assert_same(whole, train(tiny_net(), images, checkpoint_directory=tmp_path, **settings(steps=8)))


def test_states_between_checkpoints_are_kept_by_time(tmp_path, tiny_net, images, monkeypatch):
    """A clock that goes 25 seconds a step: a state each third step, until the next checkpoint."""
    now, files = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def progress(done, total, stage):
        now[0] += 25
        files.append([path.name for path in sorted(tmp_path.iterdir())])
        if done == 8:
            raise KeyboardInterrupt

    run = settings(steps=12, checkpoint_every=11)
    whole = train(tiny_net(), images, **run)
    now[0] = 0.0
    with pytest.raises(KeyboardInterrupt):
        train(tiny_net(), images, checkpoint_directory=tmp_path, progress=progress, **run)
    third, sixth = ["resume-00000003.safetensors"], ["resume-00000006.safetensors"]
    assert files == [[], [], [], third, third, third, sixth, sixth, sixth]
    resumed = train(tiny_net(), images, checkpoint_directory=tmp_path, **run)
    assert resumed.resumed_from == 6
    assert_same(whole, resumed)
    assert list(checkpoints(tmp_path)) == [11, 12] and len(list(tmp_path.iterdir())) == 2


def test_a_slow_disk_takes_a_twentieth_of_the_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace(60.0)
    now[0] = 59.0
    assert not pace.due()
    now[0] = 60.0
    assert pace.due()
    with pace.saving():
        now[0] += 9.0
    now[0] = 69.0 + 179.0
    assert not pace.due()
    now[0] += 1.0
    assert pace.due()


def test_global_random_state_neither_matters_nor_changes(tiny_net, images):
    model = tiny_net()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = train(model, images, **settings())
    assert torch.equal(before, torch.get_rng_state())
    model = tiny_net()
    torch.manual_seed(2)
    assert_same(one, train(model, images, **settings()))


def test_finished_run_is_taken_as_it_is(tmp_path, tiny_net, images):
    first = train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    calls = []
    again = train(
        tiny_net(), images, checkpoint_directory=tmp_path, progress=lambda *call: calls.append(call), **settings()
    )
    assert calls == [(23, 23, "train")]
    assert_same(first, again)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, tiny_net, images):
    whole = train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    newest = checkpoints(tmp_path)[23]
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    resumed = train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    assert resumed.resumed_from == 20
    assert_same(whole, resumed)


def test_damaged_checkpoints_of_later_steps_do_not_crowd_out_sound_ones(tmp_path, tiny_net, images):
    whole = train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    for path in checkpoints(tmp_path).values():  # of steps 20 and 23
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(Stop):
        train(tiny_net(), images, checkpoint_directory=tmp_path, progress=stop_at(12), **settings())
    resumed = train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    assert resumed.resumed_from == 10
    assert_same(whole, resumed)


def test_checkpoints_kept(tmp_path, tiny_net, images):
    train(tiny_net(), images, checkpoint_directory=tmp_path / "two", **settings())
    assert list(checkpoints(tmp_path / "two")) == [20, 23]
    train(tiny_net(), images, checkpoint_directory=tmp_path / "all", **settings(keep_checkpoints=None))
    assert list(checkpoints(tmp_path / "all")) == [5, 10, 15, 20, 23]
    assert checkpoints(tmp_path / "none") == {}
    assert {path.suffix for path in (tmp_path / "all").iterdir()} == {".safetensors"}


def test_average_is_what_a_checkpoint_gives(tmp_path, tiny_net, images):
    result = train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    averaged = load_model(tmp_path, into=tiny_net(seed=1))
    raw = load_model(tmp_path, average=False, into=tiny_net(seed=1))
    for ours, p, q in zip(result.model.parameters(), averaged.parameters(), raw.parameters(), strict=True):
        assert torch.equal(ours, p)
        assert not torch.equal(ours, q)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 2e-2}, "learning_rate was 0.01, now 0.02"),
        ({"seed": 6}, "seed was 5, now 6"),
        ({"steps": 30}, "steps was 23, now 30"),
        ({"ema": None}, "ema was 0.9, now null"),
        ({"schedule": Schedule(beta_end=0.03)}, "schedule.beta_end was 0.02, now 0.03"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, tiny_net, images, change, named):
    train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    with pytest.raises(ValueError, match=f"another run: {named}"):
        train(tiny_net(), images, checkpoint_directory=tmp_path, **settings(**change))


def test_other_data_and_other_start_are_refused(tmp_path, tiny_net, images):
    train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    with pytest.raises(ValueError, match="images was"):
        train(tiny_net(), images.flip(0), checkpoint_directory=tmp_path, **settings())
    with pytest.raises(ValueError, match="initial model was"):
        train(tiny_net(seed=1), images, checkpoint_directory=tmp_path, **settings())


def test_another_network_with_the_same_weights_is_refused(tmp_path, tiny_net, images):
    train(tiny_net(), images, checkpoint_directory=tmp_path, **settings())
    with pytest.raises(ValueError, match=r"initial network.drop was \"Dropout\(p=0.2.*now \"Dropout\(p=0.5"):
        train(tiny_net(dropout=0.5), images, checkpoint_directory=tmp_path, **settings())
    frozen = tiny_net()
    frozen.first.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r'initial frozen was \[\], now \["first.bias"\]'):
        train(frozen, images, checkpoint_directory=tmp_path, **settings())


class Spy(nn.Module):
    """Predicts ``weight * x`` and remembers its inputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.3, -0.2]).reshape(1, 2, 1, 1))
        self.seen = []

    def forward(self, images, timesteps):
        self.seen.append((images.detach().clone(), timesteps.clone()))
        return self.weight * images


def test_each_epoch_sees_every_image_once_in_a_new_order():
    images = torch.arange(11).to(torch.uint8)[:, None, None, None].expand(-1, 2, 3, 3)
    spy = Spy()
    # With next to no noise the network sees the images themselves.
    train(spy, images, schedule=Schedule(1, 1e-14, 1e-14), steps=9, batch_size=4)
    pixels = [((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() for x, _ in spy.seen]
    assert [len(batch) for batch in pixels] == [4, 4, 3] * 3
    epochs = [[*pixels[i], *pixels[i + 1], *pixels[i + 2]] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_flip_mirrors_half_of_the_images_and_nothing_else():
    image = torch.tensor([[[0, 50, 200]]], dtype=torch.uint8).expand(2, 1, 3)
    spy = Spy()
    train(spy, image[None], schedule=Schedule(1, 1e-14, 1e-14), steps=200, batch_size=1, flip=True)
    rows = [((x[0, 0, 0] + 1) * 127.5).round().int().tolist() for x, _ in spy.seen]
    mirrored = sum(row == [200, 50, 0] for row in rows)
    assert mirrored + sum(row == [0, 50, 200] for row in rows) == 200
    assert 70 < mirrored < 130


def test_updates_are_those_of_adamw_with_clipping_warmup_cosine_and_average():
    """With one image the noise can be told from what the network saw, and the whole run done again by hand."""
    schedule, steps, peak = Schedule(), 12, 0.05
    image = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
    spy = Spy()
    result = train(
        spy,
        image,
        schedule=schedule,
        steps=steps,
        batch_size=1,
        learning_rate=peak,
        weight_decay=0.1,
        warmup=0.2,
        max_grad_norm=0.05,
        ema=0.5,
    )
    weight = Spy().weight.detach().double()
    average, first, second = weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    clipped = 0
    assert len({int(t) for _, t in spy.seen}) > 6
    for step, (seen, t) in enumerate(spy.seen):
        abar = float(schedule.alphas_cumprod[int(t)])
        noise = (seen.double() - abar**0.5 * image.double()) / (1 - abar) ** 0.5
        error = weight * seen.double() - noise
        assert float(result.losses[step]) == pytest.approx(float((error**2).mean()), rel=1e-3)
        gradient = (2 * error * seen.double()).sum((0, 2, 3), keepdim=True) / 8
        norm = float(gradient.norm())
        clipped += norm > 0.05
        gradient *= min(1, 0.05 / (norm + 1e-6))
        warmup = math.ceil(0.2 * steps)
        rate = peak * (step + 1) / warmup
        if step >= warmup:
            rate = peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        first = 0.95 * first + 0.05 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        weight = weight * (1 - rate * 0.1)
        weight = weight - rate * first / (1 - 0.95 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert clipped > 3
    torch.testing.assert_close(spy.weight.detach().double(), average, atol=1e-4, rtol=1e-3)


def test_weighting_by_velocity_is_the_squared_error_of_the_velocity():
    """One step from known weights: the loss and the update's direction, from v = sqrt(abar) eps - sqrt(1 - abar) x."""
    schedule = Schedule()
    image = torch.linspace(-1, 1, 8).reshape(1, 2, 2, 2)
    spy = Spy()
    weight = spy.weight.detach().double().clone()
    result = train(spy, image.expand(6, 2, 2, 2), schedule=schedule, steps=1, batch_size=6, weighting="velocity")
    (seen, times), total, slope = spy.seen[0], 0.0, torch.zeros_like(weight)
    for x_t, t in zip(seen.double(), times.tolist(), strict=True):
        abar = float(schedule.alphas_cumprod[t])
        x_t, x = x_t[None], image.double()
        eps = (x_t - abar**0.5 * x) / (1 - abar) ** 0.5
        velocity = abar**0.5 * eps - (1 - abar) ** 0.5 * x
        # The network's e is sqrt(1 - abar) x_t + sqrt(abar) v: what v it stands for.
        predicted = (weight * x_t - (1 - abar) ** 0.5 * x_t) / abar**0.5
        total += float((predicted - velocity).square().mean()) / 6
        slope += (2 * (predicted - velocity) * x_t / abar**0.5).sum((0, 2, 3), keepdim=True) / 8 / 6
    assert max(times) > 500
    assert float(result.losses[0]) == pytest.approx(total, rel=1e-3)
    # Adam's first step has the learning rate's length in every entry, against the gradient's sign.
    torch.testing.assert_close(weight - spy.weight.detach().double(), 1e-4 * slope.sign(), atol=2e-6, rtol=0)


def test_training_learns(tiny_net):
    images = torch.full((8, 1, 8, 8), -0.5)
    losses = train(
        tiny_net(dropout=0.0), images, schedule=Schedule(), steps=150, batch_size=8, learning_rate=2e-2
    ).losses
    assert float(losses[-30:].mean()) < 0.6 * float(losses[:10].mean())


def test_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(tmp_path, tiny_net, images):
    model = tiny_net()
    model.last.bias.data.fill_(math.inf)
    with pytest.raises(RuntimeError, match="the loss is inf at step 0"):
        train(model, images, checkpoint_directory=tmp_path, **settings())
    assert checkpoints(tmp_path) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1, got 0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative, got -1.0"),
        ({"warmup": 1.5}, "warmup must lie"),
        ({"ema": 1.0}, "ema must lie"),
        ({"weighting": "snr"}, "weighting must be one of simple, velocity, got 'snr'"),
        ({"seed": -1}, "seed must lie"),
    ],
)
def test_errors_come_before_anything_is_written(tmp_path, tiny_net, images, change, message):
    with pytest.raises(ValueError, match=f"train: {message}"):
        train(tiny_net(), images, checkpoint_directory=tmp_path / "new", **settings(**change))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(0, 1, 8, 8), "at least one image"),
        (torch.zeros(8, 8), r"shape \[N, C, H, W\]"),
        (torch.full((2, 1, 8, 8), 255.0), r"must lie in \[-1, 1\] when floating point, got 255"),
        (torch.full((2, 1, 8, 8), math.nan), r"must lie in \[-1, 1\]"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.int64), "must be uint8 or floating point"),
    ],
)
def test_bad_images(tiny_net, bad, message):
    with pytest.raises((ValueError, TypeError), match=message):
        train(tiny_net(), bad, **settings())
