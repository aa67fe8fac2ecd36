"""Streamed projection: the projection of the whole flat gradient, in whatever pieces the budget allows."""

import pytest
import torch
from small_models import Images, Network, flat, loss, make_batch, over_time
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from pyattr import ops
from pyattr.gradients import FallbackWarning, least_memory, per_sample_gradients, project, project_gradients
from pyattr.ops._layers import Layer

B, D = 6, 19
PROJECT = {
    "rademacher": ops.rademacher_project,
    "gaussian": ops.gaussian_project,
    "sparse": ops.sparse_project,
    "multisketch": ops.multisketch_project,
}


def smallest(module, loss, batch):
    """The least memory that project_gradients accepts, as its own message says."""
    with pytest.raises(ValueError, match="memory must be at least") as refusal:
        project_gradients(module, loss, batch, D, memory=1)
    return int(str(refusal.value).split("at least ")[1].split()[0])


@pytest.mark.filterwarnings("ignore::pyattr.gradients.FallbackWarning")
@pytest.mark.parametrize("loss", [loss, over_time])
@pytest.mark.parametrize("kind", PROJECT)
def test_equals_the_projection_of_the_flat_gradient(kind, loss, definition):
    module, batch = Network().double(), make_batch()
    expected = PROJECT[kind](flat(definition(module, loss, batch)), D, seed=11)
    got = project_gradients(module, loss, batch, D, kind=kind, seed=11)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    single = project_gradients(module.float(), loss, make_batch(torch.float32) | {"ids": batch["ids"]}, D, kind=kind)
    assert single.dtype == torch.float32


@pytest.mark.parametrize(("kind", "nonzeros"), [("sparse", 1), ("sparse", 3), ("multisketch", 1)])
def test_sketches_of_layers_whose_gradients_are_never_formed(kind, nonzeros, definition, monkeypatch):
    module, images = Images(), torch.randn(B, 3, 10, 9)

    def image_loss(module, x):
        return module(x).square().sum((1, 2))

    double = Images().double()
    double.load_state_dict(module.state_dict())
    exact = flat(definition(double, image_loss, images.double()))
    options = {"nonzeros": nonzeros} if kind == "sparse" else {}
    expected = PROJECT[kind](exact, 64, seed=5, **options)
    formed = []
    original = Layer.put
    monkeypatch.setattr(Layer, "put", lambda self, *a: formed.append(self) or original(self, *a))
    got = project_gradients(module, image_loss, images, 64, kind=kind, seed=5, **options)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert formed == []
    small = project_gradients(
        module,
        image_loss,
        images,
        64,
        kind=kind,
        seed=5,
        memory=least_memory(module, image_loss, images, 64, kind),
        **options,
    )
    torch.testing.assert_close(small, got, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["sparse", "multisketch"])
def test_sketches_of_a_model_of_two_dtypes(kind, definition):
    """A float64 layer makes the result float64, which the float32 kernel must not be handed."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.single, self.double_ = nn.Linear(6, 8), nn.Linear(8, 3).double()

        def forward(self, x):
            return self.double_(self.single(x).double())

    module, x = Mixed(), torch.randn(B, 6)

    def square(module, x):
        return module(x).square().sum(1)

    got = project_gradients(module, square, x, 32, kind=kind, seed=1)
    grads = per_sample_gradients(module, square, x)
    expected = PROJECT[kind](torch.cat([grad.double().flatten(1) for grad in grads.values()], 1), 32, seed=1)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_signs_sit_where_named_parameters_put_them():
    """A linear layer on one-hot inputs: the projection is a sum of named columns of the sign matrix."""
    module = nn.Sequential(nn.Linear(3, 2)).double()
    batch = torch.eye(3, dtype=torch.float64)
    got = project_gradients(module, lambda module, x: module(x) @ torch.tensor([1.0, 10.0]).double(), batch, D, seed=4)
    signs = ops.sign_matrix(range(D), range(8), 4).double()  # weight [2, 3] row by row, then the bias [2]
    expected = [signs[:, i] + 10 * signs[:, 3 + i] + signs[:, 6] + 10 * signs[:, 7] for i in range(3)]
    assert torch.equal(got, torch.stack(expected))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.5, 2.1, 4.0, 7.0, 100.0])
def test_any_budget_gives_the_same(scaled, factor, monkeypatch):
    module, batch = Network(scaled).double(), make_batch()
    calls = []
    original = project.piece
    monkeypatch.setattr(project, "piece", lambda projector, g, *a: calls.append(len(g)) or original(projector, g, *a))
    if scaled:
        with pytest.warns(FallbackWarning):
            expected = project_gradients(module, loss, batch, D, seed=2)
    else:
        expected = project_gradients(module, loss, batch, D, seed=2)
    whole = len(calls)
    calls.clear()
    memory = int(smallest(module, loss, batch) * factor)
    got = project_gradients(module, loss, batch, D, seed=2, memory=memory)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item())
    if factor == 1:
        assert set(calls) == {1} and len(calls) > B * whole  # single samples, and weights in blocks
    if factor == 100:
        assert set(calls) == {B} and len(calls) == whole


class LiveBytes(TorchDispatchMode):
    """The most memory that tensors made under this mode held at one time."""

    def __init__(self, ignore):
        super().__init__()
        self.ignore = {t.untyped_storage().data_ptr() for t in ignore}
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.ignore:
                storage = tensor.untyped_storage()
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def wide():
    """Gradients much larger than activations."""
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)), torch.randn(8, 64)


def deep():
    """Activations much larger than gradients."""
    blocks = [layer for _ in range(6) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU())]
    return nn.Sequential(*blocks), torch.randn(8, 4, 24, 24)


def recurrent():
    """One layer that runs many times, whose errors wait for each other."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x):
            for _ in range(8):
                x = torch.tanh(self.layer(x))
            return x

    return Recurrent(), torch.randn(8, 10, 32)


def tied():
    """Layers that share one weight, whose errors wait for each other."""
    layers = [nn.Linear(32, 32) for _ in range(8)]
    for layer in layers:
        layer.weight = layers[0].weight
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh()))), torch.randn(8, 10, 32)


def checkpointed():
    """Activations that are computed again during the backward pass."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = deep()[0]

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=False)

    return Checkpointed(), deep()[1]


def ragged():
    """Rows that are picked by values, so that every batch is tested by another backward pass."""

    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(16, 16), nn.Tanh())))

        def forward(self, x):
            return self.body(x[x.abs().sum(-1) > 0]).view(len(x), -1, 16)

    return Ragged(), torch.randn(8, 10, 16)


def without_rules():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x):
            return torch.tanh(x @ self.weight)

    return nn.Sequential(Scale(), nn.Linear(64, 64)), torch.randn(8, 8, 64)


@pytest.mark.filterwarnings("ignore::pyattr.gradients.FallbackWarning")
@pytest.mark.parametrize("make", [wide, deep, recurrent, tied, checkpointed, ragged, without_rules])
@pytest.mark.parametrize("factor", [1.0, 3.0, 8.0])
def test_memory_stays_within_the_budget(make, factor):
    module, batch = make()

    def loss(module, batch):
        return module(batch).square().flatten(1).mean(1)

    expected = project_gradients(module, loss, batch, D)
    memory = int(smallest(module, loss, batch) * factor)
    live = LiveBytes([*module.parameters(), batch])
    with live:
        got = project_gradients(module, loss, batch, D, memory=memory)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert live.peak <= memory + 3 * got.nbytes  # results in the making: of a sub-batch, of a block, of the whole


def test_a_smaller_budget_takes_less_memory():
    """The measurement above can tell budgets apart."""
    module, batch = wide()

    def loss(module, batch):
        return module(batch).square().mean(1)

    peaks = []
    for memory in (smallest(module, loss, batch), 1 << 30):
        live = LiveBytes([*module.parameters(), batch])
        with live:
            project_gradients(module, loss, batch, D, memory=memory)
        peaks.append(live.peak)
    assert peaks[1] > 5 * peaks[0]
    assert peaks[0] < per_sample_gradients(module, loss, batch)["0.weight"].nbytes / 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "dense"}, ValueError, "kind must be one of rademacher, gaussian, sparse, multisketch, got 'dense'"),
        (
            {"nonzeros": 2},
            ValueError,
            r"nonzeros must lie in \[1, 8\], and be 1 unless kind is \"sparse\", got 2 for 'rademacher'",
        ),
        ({"kind": "sparse", "nonzeros": 4, "proj_dim": 3}, ValueError, "proj_dim must be at least nonzeros, 4, got 3"),
        ({"proj_dim": 0}, ValueError, "proj_dim must be at least 1, got 0"),
        ({"proj_dim": 1.5}, TypeError, "proj_dim must be an integer, got float"),
        ({"seed": 2**32}, ValueError, r"seed must lie in \[0, 2\^32\), got 4294967296"),
        ({"seed": -1}, ValueError, "seed must lie in"),
        ({"memory": "2G"}, TypeError, "memory must be an integer, got str"),
        ({"memory": 0}, ValueError, "memory must be at least [0-9]+ bytes for one sample, got 0"),
    ],
)
def test_bad_input(arguments, error, message):
    arguments = {"proj_dim": 4, **arguments}
    with pytest.raises(error, match=message):
        project_gradients(nn.Linear(3, 2), lambda module, x: module(x).sum(1), torch.ones(2, 3), **arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((4, "dense"), ValueError, "least_memory: kind must be one of rademacher, .* got 'dense'"),
        ((0,), ValueError, "least_memory: proj_dim must be at least 1, got 0"),
        ((1.5,), TypeError, "least_memory: proj_dim must be an integer, got float"),
    ],
)
def test_bad_input_of_the_least_memory(arguments, error, message):
    with pytest.raises(error, match=message):
        least_memory(nn.Linear(3, 2), lambda module, x: module(x).sum(1), torch.ones(2, 3), *arguments)


def test_a_bad_loss_is_named():
    with pytest.raises(ValueError, match="loss must return"):
        project_gradients(nn.Linear(3, 2), lambda module, x: module(x).sum(), torch.ones(2, 3), 4)


def test_a_loss_without_parameters_of_some_layers():
    module = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(300, 200)})
    batch = torch.randn(2, 3)

    def loss(module, x):
        return module["used"](x).square().sum(1)

    got = project_gradients(module, loss, batch, D)
    torch.testing.assert_close(got, ops.rademacher_project(flat(per_sample_gradients(module, loss, batch)), D))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("shape", [(5, 0), (0, 4)])
def test_layers_without_numbers(shape, definition):
    module = nn.ModuleDict({"empty": nn.Linear(*shape), "other": nn.Linear(5, 2)}).double()

    def loss(module, x):
        return module["other"](x).square().sum(1) + module["empty"](x[:, : shape[0]]).square().sum(1)

    batch = torch.randn(3, 5, dtype=torch.float64)
    expected = definition(module, loss, batch)
    got = per_sample_gradients(module, loss, batch)
    assert [grad.shape for grad in got.values()] == [grad.shape for grad in expected.values()]
    torch.testing.assert_close(flat(got), flat(expected))
    projected = project_gradients(module, loss, batch, D)
    torch.testing.assert_close(projected, ops.rademacher_project(flat(expected), D))
