import re

import numpy as np
import pytest
import torch
from torch import nn

from pyattr.diffusion import DamagedFileError, Schedule, load_model, save_model, train, unet
from pyattr.diffusion.checkpoint import architecture, identity, trained_with
from pyattr.diffusion.presets import PatchUNet
from pyattr.diffusion.storage import data_hash, differences, load_tensors, model_hash, save_tensors


def assert_same_weights(a, b):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("kind", ["patch", "diffusers"])
def test_networks_are_built_again(tmp_path, tiny_unet, kind):
    model = (
        unet("mnist-small", size=8, channels=2, schedule=Schedule(beta_end=0.03)) if kind == "patch" else tiny_unet()
    )
    save_model(tmp_path / "model.safetensors", model)
    loaded = load_model(tmp_path / "model.safetensors")
    assert type(loaded) is type(model) and not loaded.training
    assert_same_weights(model, loaded)
    x, t = torch.randn(2, 2 if kind == "patch" else 1, 8, 8), torch.tensor([3, 900])
    with torch.no_grad():
        ours, theirs = model.eval()(x, t), loaded(x, t)
    torch.testing.assert_close(*(out if isinstance(out, torch.Tensor) else out.sample for out in (ours, theirs)))


def test_any_module_loads_into_one_like_it(tmp_path, tiny_net):
    save_model(tmp_path / "m.safetensors", tiny_net(seed=3))
    assert_same_weights(load_model(tmp_path / "m.safetensors", into=tiny_net(seed=4)), tiny_net(seed=3))
    with pytest.raises(ValueError, match="does not say how to build its network: give one with into="):
        load_model(tmp_path / "m.safetensors")


def test_folder_gives_its_newest_checkpoint(tmp_path, tiny_unet, images, schedule):
    result = train(
        tiny_unet(), images, schedule=schedule, steps=3, batch_size=4, checkpoint_directory=tmp_path, checkpoint_every=1
    )
    assert_same_weights(load_model(tmp_path), result.model)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint: train a model into it first"):
        load_model(tmp_path.parent / "empty" if (tmp_path.parent / "empty").mkdir() is None else "")


def test_a_file_says_what_its_model_was_trained_with(tmp_path, tiny_net, images):
    schedule = Schedule(50, 1e-3, 0.1)
    train(tiny_net(), images, schedule=schedule, steps=1, checkpoint_directory=tmp_path / "run")
    assert trained_with(tmp_path / "run") == (schedule, data_hash(images))
    save_model(tmp_path / "m.safetensors", tiny_net())
    assert trained_with(tmp_path / "m.safetensors") == (None, None)
    save_model(tmp_path / "m.safetensors", tiny_net(), schedule=schedule)
    assert trained_with(tmp_path / "m.safetensors") == (schedule, None)
    save_model(tmp_path / "m.safetensors", tiny_net(), schedule=schedule, images=data_hash(images))
    assert trained_with(tmp_path / "m.safetensors") == (schedule, data_hash(images))
    save_model(tmp_path / "m.safetensors", unet("mnist-small", size=8, schedule=schedule))
    assert trained_with(tmp_path / "m.safetensors") == (schedule, None)
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"kind": "samples"})
    with pytest.raises(ValueError, match="does not hold a model"):
        trained_with(tmp_path / "other.safetensors")


def test_what_is_not_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "none.safetensors")
    save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {"kind": "samples"})
    with pytest.raises(ValueError, match="does not hold a model"):
        load_model(tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(DamagedFileError, match=r"text\.safetensors is damaged"):
        load_model(tmp_path / "text.safetensors")
    np.savez(tmp_path / "x.npz", x=np.zeros(2))
    told = f"{tmp_path}/x.npz is no safetensors file of pyattr: it is an .npz archive"
    with pytest.raises(DamagedFileError, match=f"^{re.escape(told)}$"):
        load_model(tmp_path / "x.npz")


def test_shared_weights_are_saved(tmp_path):
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    save_model(tmp_path / "m.safetensors", tied)
    assert_same_weights(
        load_model(tmp_path / "m.safetensors", into=nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))), tied
    )


def test_the_average_of_shared_weights_is_loaded(tmp_path, images, schedule):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)
            self.last.weight = self.first.weight

        def forward(self, images, timesteps):
            return self.last(self.first(images).relu())

    torch.manual_seed(0)
    result = train(
        Tied(), images, schedule=schedule, steps=5, learning_rate=0.1, ema=0.9, checkpoint_directory=tmp_path
    )
    assert_same_weights(load_model(tmp_path, into=Tied()), result.model)
    raw = load_model(tmp_path, average=False, into=Tied())
    assert not torch.equal(raw.last.weight, result.model.last.weight)


def test_every_changed_byte_is_noticed(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"b": torch.arange(3), "a": torch.randn(2, 2)}, {"x": 1})
    tensors, record = load_tensors(path)
    assert record == {"x": 1} and tensors["b"].tolist() == [0, 1, 2]
    content = path.read_bytes()
    data = int.from_bytes(content[:8], "little") + 8
    for i in range(data, len(content)):
        path.write_bytes(content[:i] + bytes([content[i] ^ 4]) + content[i + 1 :])
        with pytest.raises(DamagedFileError):
            load_tensors(path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.zeros(2)}, {})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_tensors(path, {"a": torch.ones(2)}, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_model_hash_sees_one_changed_weight_and_the_dtype(tiny_net):
    model, other = tiny_net(), tiny_net()
    assert model_hash(model) == model_hash(other)
    other.last.bias.data[0] = torch.nextafter(other.last.bias.data[0], torch.tensor(9.0))
    assert model_hash(model) != model_hash(other)
    assert model_hash(model) != model_hash(tiny_net().double())


def test_identity_sees_what_the_weights_do_not_say(tiny_unet):
    one = tiny_unet()
    assert differences(identity(one), identity(tiny_unet())) == ""
    other = type(one).from_config(one.config, attention_head_dim=4)
    other.load_state_dict(one.state_dict())
    assert differences(identity(one), identity(other)) == "network.config.attention_head_dim was 8, now 4"
    wrapped = PatchUNet(nn.Conv2d(4, 4, 1), 2, Schedule())  # with an inner network that cannot be built again
    assert architecture(wrapped) is None
    assert identity(wrapped)["network"]["unet"].startswith("Conv2d(4, 4, kernel_size=(1, 1)")


def test_differences():
    assert differences({"a": {"b": 1, "c": {"d": 2}}}, {"a": {"b": 1, "c": {"d": 3}}}) == "a.c.d was 2, now 3"
    assert differences({"a": (1, 2)}, {"a": [1, 2]}) == ""
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == "b was 2, now 3; c was null, now 4"
