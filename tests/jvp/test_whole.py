"""Modules that torch.func.jvp does as a whole, because an operator in them cannot be followed by itself."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyattr.jvp import dual_forward, fallback


class Filled(nn.Module):
    """Writes what it computes into a new tensor, piece by piece."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        out = torch.zeros(x.shape, dtype=x.dtype)
        for column in range(x.shape[-1]):
            out[..., column] = self.linear(x)[..., column].sin()
        return out


class Around(nn.Module):
    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.blocks:
            x = part(x) + x.cos()
        return x


WRITES = (
    "aten::copy_ in {} (Filled) writes a value that depends on x to a tensor that does not; have the module make a new tensor "
    "instead"
)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


ignored = pytest.mark.filterwarnings("ignore:dual_forward:UserWarning")


def test_only_what_needs_it_is_done_as_a_whole_and_said_once(agrees):
    model, seen = Around(nn.Tanh(), Filled(), nn.Linear(3, 3), Filled()).double(), []
    model.blocks[2].register_forward_hook(lambda module, args, output: seen.append(type(args[0]).__name__))
    with pytest.warns(UserWarning) as said:
        agrees(model, double(2, 3))
        agrees(model, double(2, 3))
    assert sorted(str(one.message) for one in said if one.category is UserWarning) == [
        f"dual_forward: blocks.{i} (Filled) is done by torch.func.jvp, slower: {WRITES.format(f'blocks.{i}')}"
        for i in (1, 3)
    ]
    # Run twice from there before both were found, then known; torch.func.jvp, which the test compares with, sees tensors.
    assert [name for name in seen if name == "Dual"] == ["Dual"] * 3
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert [len(part._forward_hooks) for part in model.blocks] == [0, 0, 1, 0]


@ignored
def test_float32(agrees):
    model = Around(Filled(), nn.SiLU())
    agrees(model, torch.randn(2, 3), plain=copy.deepcopy(model).double())


@ignored
def test_no_tangents():
    model, x = Filled(), torch.randn(2, 3)
    y, y_dot = dual_forward(model, x, torch.empty(0, 2, 3))
    with torch.no_grad():
        assert torch.equal(y, model(x)) and y_dot.shape == (0, 2, 3)


@ignored
def test_random_numbers_are_the_same_for_all_tangents():
    model = nn.Sequential(nn.RReLU(0.1, 0.9), nn.Identity()).train()
    x = -torch.rand(50, dtype=torch.float64) - 1
    y, y_dot = dual_forward(model, x, torch.stack([x, 3 * x]))
    assert len(set((y / x).tolist())) == 50
    assert torch.allclose(y_dot[0], y) and torch.allclose(y_dot[1], 3 * y)
    torch.manual_seed(3)
    again, _ = dual_forward(model, x, x[None])
    after = torch.rand(1)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(model(x), again) and torch.equal(torch.rand(1), after)


@ignored
def test_a_run_that_is_repeated_draws_what_the_first_one_drew():
    model, x = nn.Sequential(nn.Dropout(0.5), Filled(50)).train(), torch.randn(50)
    torch.manual_seed(3)
    y, _ = dual_forward(model, x, x[None])
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.allclose(model(x), y, rtol=1e-6, atol=1e-6)


class Noisy(nn.Module):
    def forward(self, x):
        out = torch.zeros(x.shape)
        out.copy_(x * torch.rand(x.shape, generator=self.generator))
        return out


def test_a_generator_of_its_own_is_an_error():
    model = Noisy()
    model.generator = torch.Generator().manual_seed(0)
    with pytest.raises(NotImplementedError) as error:
        dual_forward(model, torch.randn(3), torch.randn(2, 3))
    assert str(error.value).endswith("; and aten::rand draws from a generator of its own, for each tangent anew")


@ignored
def test_inference_mode():
    x, x_dot = double(2, 3), double(2, 2, 3)
    with torch.inference_mode():
        y, y_dot = dual_forward(Filled().double(), x * 1, x_dot * 1)
    assert y.shape == (2, 3) and y_dot.shape == (2, 2, 3)
    model = Filled().double()
    with torch.inference_mode():
        got = dual_forward(model, x, x_dot)
    assert all(map(torch.equal, got, dual_forward(model, x, x_dot)))


class Into(nn.Module):
    def forward(self, x, out):
        out[:] = x.sin()
        return out * 2


class Creates(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Into()

    def forward(self, x):
        return self.inner(x, torch.zeros(x.shape, dtype=x.dtype))


class InPlace(nn.Module):
    """Writes to its argument too."""

    def forward(self, x):
        x.mul_(2)
        out = torch.zeros(x.shape, dtype=x.dtype)
        out.copy_(x.sin())
        return out


class Changes(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = InPlace()

    def forward(self, x):
        y = x.exp()
        return self.inner(y) * y


class Reads(nn.Module):
    """Computes with what it has been given beside its arguments."""

    def forward(self, x):
        out = torch.zeros(x.shape, dtype=x.dtype)
        out.copy_(x * self.given)
        return out


class Gives(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Reads()

    def forward(self, x):
        self.inner.given = x.exp()
        y = self.inner(x.sin())
        del self.inner.given
        return y


class ReturnsView(nn.Module):
    def forward(self, x):
        out = torch.zeros(x.shape, dtype=x.dtype)
        out.copy_(x.sin())
        return out, x[:, 1:]


class WritesToView(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ReturnsView()

    def forward(self, x):
        y = x.exp()
        out, view = self.inner(y)
        view.mul_(3)
        return out * y


@ignored
@pytest.mark.parametrize("kind", [Creates, Changes, Gives, WritesToView])
def test_where_a_module_cannot_be_done_the_one_around_it_is(kind, agrees):
    model = nn.Sequential(nn.Tanh(), kind())
    with pytest.warns(UserWarning, match=rf"1 \({kind.__name__}\) is done by torch.func.jvp"):
        agrees(model, double(2, 3))


class Pieces(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        out = torch.zeros(x.shape, dtype=x.dtype)
        out.copy_(x.sin())
        return self.wrap(out, x.argmax(), 3)


@ignored
@pytest.mark.parametrize("wrap", [lambda *all: all, lambda *all: list(all), lambda *all: dict(enumerate(all))])
def test_any_form_of_output(wrap, agrees):
    part = Pieces(wrap)

    def function(x):
        y = part(x.exp())
        return y[0] * y[2] + y[1]

    agrees(function, double(2, 3))


class Opaque:
    def __init__(self, *all):
        self.all = all


def test_an_output_in_which_tensors_cannot_be_found_is_an_error():
    model = Pieces(Opaque)
    with pytest.raises(NotImplementedError) as error:
        dual_forward(model, torch.randn(3), torch.randn(1, 3))
    assert str(error.value) == (
        "dual_forward: aten::copy_ in the module (Pieces) writes a value that depends on x to a tensor that does not; have the "
        "module make a new tensor instead; and the module (Pieces) cannot be done as a whole: it returns a Opaque, in which "
        "tensors cannot be found"
    )
    assert not model._forward_pre_hooks and not model._forward_hooks


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("kept", torch.zeros(3))

    def forward(self, x):
        self.kept.add_(x)
        return self.kept * 2


def test_a_write_to_a_buffer_is_an_error():
    with pytest.raises(NotImplementedError) as error:
        dual_forward(Keeps(), torch.randn(3), torch.randn(2, 3))
    assert str(error.value).startswith(
        "dual_forward: aten::add_ in the module (Keeps) writes a value that depends on x to a tensor that does not; have the "
        "module make a new tensor instead; and the module (Keeps) cannot be done as a whole: torch.func.jvp cannot "
        "differentiate it: "
    )


@pytest.fixture
def thrice():
    """An operator that torch takes for a constant."""
    library = torch.library.Library("pyattr_whole", "FRAGMENT")
    library.define("thrice(Tensor x) -> Tensor")
    library.impl("thrice", lambda x: 3 * x, "CPU")
    yield torch.ops.pyattr_whole.thrice
    library._destroy()


def test_an_operator_that_may_have_no_derivative_is_an_error(thrice):
    def function(x):
        out = torch.zeros(x.shape)
        out.copy_(x)
        return thrice(out) + x

    with pytest.raises(NotImplementedError) as error:
        dual_forward(function, torch.randn(3), torch.randn(2, 3))
    assert str(error.value).endswith("; and pyattr_whole::thrice has no rule, and may have no derivative in torch")


class Sine(torch.autograd.Function):
    """Leaves torch, and says what the derivative is."""

    leave = staticmethod(lambda x: torch.from_numpy(x.detach().numpy()).sin())

    @staticmethod
    def forward(x):
        return Sine.leave(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, x_dot):
        return x_dot * ctx.saved_tensors[0].cos()


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@ignored
def test_an_autograd_function_that_leaves_torch_is_asked_for_its_jvp(agrees, monkeypatch, thrice):
    model = nn.Sequential(nn.Tanh(), Apply(Sine.apply))
    agrees(model, double(2, 3), plain=lambda x: x.tanh().sin())
    monkeypatch.setattr(Sine, "leave", staticmethod(lambda x: torch.from_numpy(x.numpy()).sin()))
    agrees(nn.Sequential(nn.Tanh(), Apply(Sine.apply)), double(2, 3), plain=lambda x: x.tanh().sin())
    monkeypatch.setattr(Sine, "leave", staticmethod(lambda x: (thrice(x) / 3).sin()))
    agrees(nn.Sequential(nn.Tanh(), Apply(Sine.apply)), double(2, 3), plain=lambda x: x.tanh().sin())


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.detach().round()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_an_autograd_function_that_detaches_without_a_jvp_is_an_error():
    with pytest.raises(NotImplementedError) as error:
        dual_forward(nn.Sequential(Apply(Round.apply)), torch.randn(3), torch.randn(1, 3))
    assert str(error.value) == (
        "dual_forward: Round in 0 (Apply), a torch.autograd.Function, detaches a value that depends on x in its forward"
    )


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_checkpointing_is_no_obstacle(agrees):
    from torch.utils.checkpoint import checkpoint

    agrees(lambda x: checkpoint(lambda x: x.sin() + x.detach(), x, use_reentrant=True), double(3),
           plain=lambda x: x.sin() + x.detach())  # fmt: skip


def test_values_that_python_reads():
    seen = []

    def function(x):
        seen.append(f"{x[0]:.2f} {x.tolist()}")
        return x * x.tolist()[0]

    y, y_dot = dual_forward(function, torch.tensor([2.0, 3.0]), torch.ones(1, 2))
    assert y.tolist() == [4.0, 6.0] and y_dot.tolist() == [[2.0, 2.0]] and seen == ["2.00 [2.0, 3.0]"]


def slope_by_autograd(x):
    with torch.enable_grad():
        x.requires_grad_()
        return torch.autograd.grad((F.group_norm(x, 1) ** 3).sum(), x)[0]


def slope_by_backward(x):
    with torch.enable_grad():
        x.requires_grad_()
        x.tanh().sum().backward()
    return x.grad


def slope_by_a_function(x):
    with torch.enable_grad():
        x.requires_grad_()
        torch.autograd.backward(x.tanh().sum())
    return x.grad


@pytest.mark.parametrize(
    ("slope", "name"),
    [(slope_by_autograd, "torch.autograd.grad"), (slope_by_backward, "backward"), (slope_by_a_function, "backward")],
)
def test_autograd_on_the_way_is_an_error(slope, name):
    with pytest.raises(NotImplementedError) as error:
        dual_forward(nn.Sequential(Apply(slope)), torch.randn(2, 3), torch.randn(1, 2, 3))
    assert str(error.value).startswith(f"dual_forward: {name} in 0 (Apply) differentiates a value that depends on x; ")


@ignored
@pytest.mark.parametrize(
    "slope",
    [
        lambda x: torch.func.grad(lambda v: (v.tanh() * v).sum())(x),
        lambda x: torch.func.jvp(torch.tanh, (x,), (torch.ones_like(x),))[1],
        lambda x: torch.func.jacrev(lambda v: v.tanh().sum(0))(x),
        lambda x: torch.vmap(lambda v: v.tanh() * v.sum())(x),
        lambda x: torch.func.grad(lambda v: F.layer_norm(v, (3,)).pow(3).sum())(x),
    ],
    ids=["grad", "jvp", "jacrev", "vmap", "layer_norm"],
)
def test_functional_derivatives_on_the_way(slope, agrees):
    agrees(slope, double(2, 3))


def by_group(x, groups):
    grouped = x.reshape(len(x), groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    return (centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)


@ignored
@pytest.mark.parametrize(
    ("norm", "groups"), [(lambda x: F.group_norm(x, 2), 2), (F.instance_norm, 4)], ids=["group_norm", "instance_norm"]
)
def test_functional_derivatives_and_vmap_of_normalisations(norm, groups, agrees):
    def slope(norm):
        return lambda x: torch.func.grad(lambda v: norm(v).pow(3).sum())(x)

    x = double(1, 4, 5)
    agrees(slope(norm), x, plain=slope(lambda x: by_group(x, groups)))
    agrees(lambda x: torch.vmap(norm)(x[:, None]), x, plain=lambda x: by_group(x, groups)[:, None])


def test_batch_norm_of_cudnn_returns_what_torch_wants(agrees):
    # It has a fourth result; its rule for one image runs on any device.
    one = torch.ones(4, dtype=torch.float64)

    def function(x):
        y, mean, inverse, reserve = torch.ops.aten.cudnn_batch_norm(x, one, None, None, None, True, 0.1, 1e-5)
        assert mean.shape == inverse.shape == (4,) and reserve.dtype == torch.uint8
        return torch.cat([y.flatten(), mean, inverse])

    def plainly(x):
        variance, mean = torch.var_mean(x[0], 1, correction=0)
        return torch.cat([by_group(x, 4).flatten(), mean, (variance + 1e-5).rsqrt()])

    agrees(function, double(1, 4, 5), plain=plainly)


@pytest.mark.parametrize("leave", [lambda x: x.numpy(), lambda x: x.__array__()])
def test_leaving_torch_is_an_error(leave):
    with pytest.raises(NotImplementedError) as error:
        dual_forward(nn.Sequential(Apply(lambda x: torch.from_numpy(leave(x)))), torch.randn(3), torch.randn(1, 3))
    assert str(error.value) == (
        "dual_forward: numpy in 0 (Apply) takes a value that depends on x out of torch; detach it if it is a constant"
    )


@ignored
@pytest.mark.parametrize("function", [lambda x: F.glu(x, 0), Filled(4)], ids=["operator", "module"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce fail] can't allocate memory: 1 bytes")],
)
def test_no_memory_is_no_missing_derivative(function, error, monkeypatch):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(fallback, "jvp", failing)
    with pytest.raises(RuntimeError) as caught:
        dual_forward(function, torch.randn(2, 4), torch.randn(1, 2, 4))
    assert caught.value is error


@ignored
def test_an_error_inside_torchs_derivative_is_reported_as_it_is(monkeypatch):
    def failing(*args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(fallback, "jvp", failing)
    with pytest.raises(RuntimeError, match=r"^shapes differ$") as caught:
        dual_forward(lambda x: F.glu(x, 0), torch.randn(2), torch.randn(1, 2))
    assert not isinstance(caught.value, NotImplementedError)
