import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pyattr.diffusion import DamagedFileError, Loss, Schedule, features, noise
from pyattr.diffusion.features import FeatureMap
from pyattr.ops import normal_matrix, sign_matrix


def feature_map(**others):
    return FeatureMap(
        **{"schedule": Schedule(), "num_timesteps": 4, "proj_dim": 32, "seed": 3, "noise_seed": 9, **others}
    )


def by_definition(model, images, which, ids):
    """One flat gradient at a time by autograd, averaged, then times the dense matrix, in float64."""
    schedule, rows = which.schedule, []
    parameters = list(model.parameters())
    width = sum(p.numel() for p in parameters)
    entries = sign_matrix if which.kind == "rademacher" else normal_matrix
    matrix = entries(range(which.proj_dim), range(width), which.seed).double()
    for image, i in zip(images, ids, strict=True):
        x = image.double() / 127.5 - 1
        total = torch.zeros(width, dtype=torch.float64)
        count = 0
        for t in which.timesteps().tolist():
            for draw in range(which.num_noises):
                eps = noise(x.shape, seed=which.noise_seed, ids=int(i), timesteps=t, draws=draw).double()
                abar = schedule.alphas_cumprod[t]
                noisy = abar.sqrt() * x + (1 - abar).sqrt() * eps
                out = model(noisy[None], torch.tensor([t]))
                out = out if isinstance(out, torch.Tensor) else out.sample
                value = which.loss(out, eps[None], torch.tensor([t]), schedule)[0]
                gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)])
                total += gradient / gradient.norm() if which.normalize else gradient
                count += 1
        rows.append(matrix @ (total / count))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"loss": "simple", "kind": "gaussian"},
        {"loss": "elbo", "strategy": "cumulative", "num_noises": 2},
        {"loss": Loss("interpolate", 0.3), "num_timesteps": 1},
        {"loss": "l1"},
        {"loss": "l2"},
        {"loss": "linf"},
        {"loss": "avg"},
        {"loss": "avg", "normalize": True},
        {"loss": "l1", "normalize": True, "num_noises": 2, "strategy": "midpoint"},
    ],
    ids=str,
)
def test_features_by_definition(tiny_unet, images, others):
    model, which = tiny_unet().double(), feature_map(**others)
    ids = torch.tensor([4, 1 << 41])
    expected = by_definition(model, images[:2], which, ids)
    ours = features.compute(model, images[:2], which, ids=ids).tensor()
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, expected, atol=1e-9 * float(expected.abs().max()), rtol=1e-9)
    single = features.compute(tiny_unet(), images[:2], which, ids=ids).tensor()
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, atol=2e-4 * float(expected.abs().max()), rtol=0)


def test_timesteps():
    assert feature_map(num_timesteps=10).timesteps().tolist() == list(range(0, 1000, 100))
    assert feature_map(num_timesteps=3).timesteps().tolist() == [0, 333, 666]
    assert feature_map(num_timesteps=5, strategy="cumulative").timesteps().tolist() == [0, 1, 2, 3, 4]
    assert feature_map(num_timesteps=4, strategy="midpoint").timesteps().tolist() == [125, 375, 625, 875]
    assert feature_map(num_timesteps=1000, strategy="midpoint").timesteps().tolist() == list(range(1000))
    assert feature_map(num_timesteps=1000).timesteps().tolist() == list(range(1000))
    # Where they cannot be equally far apart they still reach over the whole schedule.
    short = Schedule(num_timesteps=7)
    assert feature_map(schedule=short, num_timesteps=4).timesteps().tolist() == [0, 1, 3, 5]
    assert feature_map(schedule=short, num_timesteps=4, strategy="midpoint").timesteps().tolist() == [0, 2, 4, 6]


@given(st.integers(1, 300), st.data())
def test_timesteps_reach_over_the_whole_schedule(total, data):
    count = data.draw(st.integers(1, total))
    schedule = Schedule(num_timesteps=total)
    uniform, midpoint = (
        feature_map(schedule=schedule, num_timesteps=count, strategy=name).timesteps()
        for name in ("uniform", "midpoint")
    )
    if total % count == 0:
        assert torch.equal(uniform, torch.arange(0, total, total // count))
        assert torch.equal(midpoint, uniform + total // count // 2)
    for times in (uniform, midpoint):
        gaps = times.diff()
        assert times.min() >= 0 and times.max() < total and (gaps > 0).all()
        assert count == 1 or gaps.max() - gaps.min() <= 1
    assert uniform[0] == 0 and total - uniform[-1] <= -(-total // count)


@pytest.mark.parametrize(
    "chunks",
    [
        {"batch_size": 1},
        {"batch_size": 4},
        {"timesteps_per_pass": 3},
        {"batch_size": 3, "shard_rows": 4},
        {"memory": 2_000_000},
    ],
)
def test_chunking_changes_rounding_only(tiny_unet, images, chunks):
    model, which = tiny_unet(), feature_map(num_noises=2)
    whole = features.compute(model, images, which, batch_size=16).tensor()
    other = features.compute(model, images, which, **chunks).tensor()
    torch.testing.assert_close(whole, other, atol=1e-4 * float(whole.abs().max()), rtol=0)


@pytest.mark.parametrize("chunks", [{"batch_size": 1}, {"timesteps_per_pass": 3}, {"memory": 60_000}], ids=str)
def test_chunking_changes_rounding_of_normalized_gradients_only(tiny_net, images, chunks):
    model, which = tiny_net().double(), feature_map(num_noises=2, normalize=True)
    whole = features.compute(model, images, which).tensor()
    torch.testing.assert_close(features.compute(model, images, which, **chunks).tensor(), whole)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_row_depends_on_image_and_id_alone(tiny_unet, tiny_net, images, normalize):
    model, which = (tiny_net if normalize else tiny_unet)().double(), feature_map(normalize=normalize)
    whole = features.compute(model, images, which).tensor()
    order = torch.tensor([7, 0, 3])
    part = features.compute(model, images[order], which, ids=order).tensor()
    torch.testing.assert_close(whole[order], part, atol=1e-9, rtol=1e-9)
    moved = features.compute(model, images[order], which).tensor()  # other ids, other noise
    assert not torch.isclose(part[0], moved[0]).any()


class Straight(torch.nn.Module):
    """e = w x: the gradient of mean e is the sum of x."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Conv2d(1, 1, 1, bias=False)

    def forward(self, images, timesteps):
        return self.weight(images)


def test_normalized_gradients_by_hand():
    """One parameter: each gradient becomes its sign, and none of them is left of one that is zero."""

    class Clean(Schedule):
        def add_noise(self, images, noise, timesteps):
            factors = torch.tensor([1.0, 0, -1, -1])[timesteps // 250]
            return images * factors[..., None, None, None]

    images = torch.tensor([[[[0.25, 0.25]]], [[[0, 2.0**-100]]], [[[0.5, -0.5]]]])
    which = FeatureMap(Clean(), "avg", num_timesteps=4, proj_dim=1, normalize=True)  # t = 0, 250, 500, 750
    unscaled = FeatureMap(Clean(), "avg", num_timesteps=4, proj_dim=1)
    sign = sign_matrix(range(1), range(1), 0).item()
    got = features.compute(Straight(), images, which).tensor()
    assert (got * sign).tolist() == [[-0.25], [-0.25], [0]]
    plain = features.compute(Straight(), images, unscaled).tensor()
    assert (plain[0] * sign).tolist() == [-0.25 / 4]


def test_a_gradient_that_is_not_finite_is_not_hidden(tiny_net, images):
    model = tiny_net()
    model.first.bias.data[0] = float("nan")
    assert features.compute(model, images[:1], feature_map(normalize=True)).tensor().isnan().all()


def test_directories_from_before_normalization_are_found(tmp_path, tiny_net, images):
    features.compute(tiny_net(), images, feature_map(), directory=tmp_path)
    assert "normalize" not in json.loads((tmp_path / "manifest.json").read_text())["settings"]
    assert feature_map(normalize=True).settings()["normalize"] is True


class RowsPerPass(torch.nn.Module):
    """Notes how many images come together."""

    def __init__(self, model):
        super().__init__()
        self.model, self.rows = model, []

    def forward(self, images, timesteps):
        self.rows.append(len(images))
        return self.model(images, timesteps)


def test_memory_decides_how_much_goes_through_the_model_together(tiny_net, images):
    which = feature_map(num_timesteps=33)
    model = RowsPerPass(tiny_net()).eval()
    with pytest.raises(ValueError, match=r"memory must be at least [0-9]+ bytes for one sample, got 1") as refusal:
        which.batch(model, images[:2], torch.arange(2), memory=1)
    least = int(str(refusal.value).split("at least ")[1].split()[0])
    whole, most = which.batch(model, images[:2], torch.arange(2)), []
    for memory in (least, 8 * least, 1000 * least):
        model.rows.clear()
        got = which.batch(model, images[:2], torch.arange(2), memory=memory)
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-4 * float(whole.abs().max()))
        most.append(max(model.rows))
    assert most[0] == 1 and most[1] <= 8 and most[2] == 2 * 17


class Stop(Exception):
    pass


@pytest.mark.parametrize("stops", [[2], [4], [6, 6, 11], [2, 4, 6, 8, 10]])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, tiny_unet, images, stops):
    model, which = tiny_unet(), feature_map()
    chunks = {"batch_size": 2, "shard_rows": 4}
    # A shard ends a batch, so that batches fall as they do here.
    whole = features.compute(model, images, which, directory=tmp_path / "whole", **chunks)
    for stop in stops:

        def progress(done, total, stage, stop=stop):
            if done >= stop:
                raise Stop

        with pytest.raises(Stop):
            features.compute(model, images, which, directory=tmp_path / "parts", progress=progress, **chunks)
    calls = []
    resumed = features.compute(
        model, images, which, directory=tmp_path / "parts", progress=lambda *call: calls.append(call), **chunks
    )
    assert torch.equal(whole.tensor(), resumed.tensor())
    assert torch.equal(resumed.ids, torch.arange(11))
    assert calls[0] == ((max(stops) - 1) // 4 * 4, 11, "features")  # the shards that were whole when it stopped
    assert calls[-1] == (11, 11, "features") and [c[0] for c in calls] == sorted(c[0] for c in calls)


@pytest.mark.parametrize("batch_size", [3, 4])
def test_memory_and_disk_agree_bit_for_bit(tmp_path, tiny_unet, images, batch_size):
    model, which = tiny_unet(), feature_map()
    on_disk = features.compute(model, images, which, directory=tmp_path, batch_size=batch_size, shard_rows=4)
    in_memory = features.compute(model, images, which, batch_size=batch_size, shard_rows=4)
    assert torch.equal(on_disk.tensor(), in_memory.tensor())
    assert [(start, len(block)) for start, block in on_disk.blocks()] == [(0, 4), (4, 4), (8, 3)]
    assert (len(on_disk), on_disk.dim, on_disk.dtype) == (11, 32, torch.float32)


def test_finished_features_are_opened_without_the_model(tmp_path, tiny_unet, images):
    made = features.compute(tiny_unet(), images, feature_map(), directory=tmp_path, shard_rows=5)
    opened, manifest = features.open_features(tmp_path)
    assert torch.equal(made.tensor(), opened.tensor())
    assert manifest["settings"]["loss"] == {"name": "square", "eta": None}
    assert manifest["settings"]["schedule"] == {"num_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 5, 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"loss": "simple"}, 'loss.name was "square", now "simple"'),
        ({"num_timesteps": 5}, "num_timesteps was 4, now 5"),
        ({"strategy": "cumulative"}, 'strategy was "uniform", now "cumulative"'),
        ({"proj_dim": 33}, "proj_dim was 32, now 33"),
        ({"seed": 4}, "seed was 3, now 4"),
        ({"noise_seed": 8}, "noise_seed was 9, now 8"),
        ({"kind": "gaussian"}, 'kind was "rademacher", now "gaussian"'),
        ({"num_noises": 2}, "num_noises was 1, now 2"),
        ({"normalize": True}, "normalize was null, now true"),
        # The definition of timesteps that are not equally far apart is another.
        ({"num_timesteps": 3}, "definition was 1, now 2; num_timesteps was 4, now 3"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, tiny_net, images, change, named):
    features.compute(tiny_net(), images, feature_map(), directory=tmp_path)
    with pytest.raises(ValueError) as error:
        features.compute(tiny_net(), images, feature_map(**change), directory=tmp_path)
    assert f"was made otherwise: {named}; use another directory" in str(error.value)


def test_other_model_images_ids_and_number_are_refused(tmp_path, tiny_net, images):
    features.compute(tiny_net(), images, feature_map(), directory=tmp_path)
    with pytest.raises(ValueError, match="model was "):
        features.compute(tiny_net(seed=1), images, feature_map(), directory=tmp_path)
    changed = images.clone()
    changed[10, 0, 7, 7] ^= 1
    with pytest.raises(ValueError, match="images and ids was "):
        features.compute(tiny_net(), changed, feature_map(), directory=tmp_path)
    with pytest.raises(ValueError, match="images and ids was "):
        features.compute(tiny_net(), images, feature_map(), ids=torch.arange(1, 12), directory=tmp_path)
    with pytest.raises(ValueError, match="rows was 11, now 10"):
        features.compute(tiny_net(), images[:10], feature_map(), directory=tmp_path)


def test_networks_with_the_same_weights_are_told_apart(tmp_path, tiny_unet, images):
    features.compute(tiny_unet(), images, feature_map(), directory=tmp_path)
    other = tiny_unet()
    other.register_to_config(norm_eps=0.1)
    with pytest.raises(ValueError, match=r"was made otherwise: network\.config\.norm_eps was 1e-05, now 0\.1"):
        features.compute(other, images, feature_map(), directory=tmp_path)
    frozen = tiny_unet()
    frozen.conv_in.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="was made otherwise: frozen was "):
        features.compute(frozen, images, feature_map(), directory=tmp_path)


@pytest.mark.parametrize("damage", ["tail", "header", "length", "cut", "cut in the header", "emptied"])
def test_damaged_shard_is_refused_and_made_again_once_deleted(tmp_path, tiny_unet, images, damage):
    arguments = {"directory": tmp_path, "batch_size": 2, "shard_rows": 4}
    whole = features.compute(tiny_unet(), images, feature_map(), **arguments).tensor()
    shard = tmp_path / "shard-000000000004.safetensors"
    content = shard.read_bytes()
    damaged = {
        "tail": content[:-1] + bytes([content[-1] ^ 1]),
        "header": content.replace(b"features", b"fixtures"),
        "length": b"\xff" + content[1:],
        "cut": content[:-9],
        "cut in the header": content[:20],
        "emptied": b"",
    }
    shard.write_bytes(damaged[damage])
    for use in (
        lambda: features.open_features(tmp_path)[0].tensor(),
        lambda: features.compute(tiny_unet(), images, feature_map(), **arguments),
    ):
        with pytest.raises(DamagedFileError, match=r"shard-000000000004\.safetensors is damaged"):
            use()
    shard.unlink()
    with pytest.raises(ValueError, match="is not complete: 1 shards are missing"):
        features.open_features(tmp_path)
    calls = []
    again = features.compute(
        tiny_unet(), images, feature_map(), progress=lambda *call: calls.append(call[:2]), **arguments
    )
    assert calls == [(7, 11), (9, 11), (11, 11)]
    assert torch.equal(again.tensor(), whole) and shard.read_bytes() == content
    shard.unlink()
    with pytest.raises(DamagedFileError, match="is missing"):
        again.tensor()


SHARDS = (
    '{"format": "pyattr-features", "version": 1, "settings": {}, "data": {}, "rows": 1, "shard_rows": 1, "shards": %s}'
)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("{", DamagedFileError, "is damaged"),
        ("[]", ValueError, "is not a manifest"),
        ('{"format": "other"}', ValueError, "is not a manifest"),
        ('{"format": "pyattr-features", "version": 2}', ValueError, "has version 2, this pyattr reads version 1"),
        ('{"format": "pyattr-features"}', DamagedFileError, r"is damaged \(no valid version\)"),
        ('{"format": "pyattr-features", "version": 1, "settings": 3}', DamagedFileError, "no valid settings"),
        (SHARDS % "[3]", DamagedFileError, "shard 0's entry is not an object"),
        (SHARDS % '[{"file": "x"}]', DamagedFileError, "no valid shard 0's first_row"),
    ],
)
def test_foreign_manifests_are_refused(tmp_path, tiny_net, images, text, error, message):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(error, match=message):
        features.compute(tiny_net(), images, feature_map(), directory=tmp_path)
    assert (tmp_path / "manifest.json").read_text() == text


def test_manifest_lists_checksums_of_the_files(tmp_path, tiny_net, images):
    import hashlib

    features.compute(tiny_net(), images, feature_map(), directory=tmp_path, shard_rows=6, batch_size=3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [s["first_row"] for s in manifest["shards"]] == [0, 6]
    for shard in manifest["shards"]:
        content = (tmp_path / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"] and len(content) == shard["bytes"]
        assert (shard["dtype"], shard["dim"], shard["batch_size"]) == ("float32", 32, 3)


def test_dropout_is_off_and_modes_are_left_alone(tiny_net, images):
    model = tiny_net(dropout=0.5).train()
    one = features.compute(model, images, feature_map()).tensor()
    assert model.training and model.drop.training
    assert torch.equal(one, features.compute(model, images, feature_map()).tensor())


def test_bytes_and_floats_of_the_same_pixels_agree(tiny_net, images):
    as_floats = images.float() / 127.5 - 1
    one, two = (features.compute(tiny_net(), x, feature_map()).tensor() for x in (images, as_floats))
    torch.testing.assert_close(one, two, atol=1e-5 * float(one.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"num_timesteps": 0}, r"num_timesteps must lie in \[1, 1000\], got 0"),
        ({"num_timesteps": 1001}, "num_timesteps must lie"),
        ({"strategy": "random"}, "strategy must be one of uniform, cumulative, midpoint"),
        ({"kind": "dense"}, "kind must be one of rademacher, gaussian, sparse, multisketch, got 'dense'"),
        ({"num_noises": 0}, "num_noises must lie"),
        ({"proj_dim": 0}, "proj_dim must lie"),
        ({"seed": 1 << 32}, "seed must lie"),
        ({"noise_seed": -1}, "noise_seed must lie"),
        ({"loss": "huber"}, "name must be one of"),
    ],
)
def test_errors_of_the_map(others, message):
    with pytest.raises(ValueError, match=message):
        feature_map(**others)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"timesteps_per_pass": 0}, "timesteps_per_pass must be at least 1"),
        ({"shard_rows": 0}, "shard_rows must be at least 1"),
        ({"memory": 0}, "memory must be at least 1"),
        ({"ids": [1, 2]}, "ids must be 11 distinct integers"),
        ({"ids": [1] * 11}, "ids must be 11 distinct integers"),
    ],
)
def test_errors_come_before_anything_is_written(tmp_path, tiny_net, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        features.compute(tiny_net(), images, feature_map(), directory=tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()
