"""What the tests of dual_forward compare with: torch.func.jvp in float64 of the same function in plain operators."""

import copy

import pytest
import torch
from torch import nn
from torch.func import jvp

from pyattr.jvp import dual_forward, fallback


class PlainGroupNorm(nn.Module):
    """Group normalisation of which torch can take forward derivatives whatever the strides."""

    def __init__(self, norm: nn.GroupNorm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return plain_group_norm(x, self.norm.num_groups, self.norm.weight, self.norm.bias, self.norm.eps)


def plain_group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    grouped = x.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normal = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    shape = (1, -1, *[1] * (x.dim() - 2))
    normal = normal if weight is None else normal * weight.reshape(shape)
    return normal if bias is None else normal + bias.reshape(shape)


def plain_attention(query, key, value, mask=None, is_causal=False, scale=None):
    scores = query @ key.transpose(-1, -2) * (max(query.shape[-1], 1) ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1) @ value


def doubled(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def expected(function, x, x_dot, *args, **kwargs):
    """y and y_dot by torch.func.jvp in float64."""
    args, kwargs = map(doubled, args), {name: doubled(value) for name, value in kwargs.items()}
    args = tuple(args)

    def call(x):
        result = function(x, *args, **kwargs)
        return getattr(result, "sample", result) if not isinstance(result, torch.Tensor) else result

    with torch.no_grad():
        results = [jvp(call, (x.double(),), (t,)) for t in x_dot.double()]  # vmap warns of what it does slowly
    return results[0][0], torch.stack([y_dot for _, y_dot in results])


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """Every operator without a rule is news again, and a warning is an error: what a test calls has its rule."""
    monkeypatch.setattr(fallback, "_SAID", set())


@pytest.fixture(scope="session")
def plain():
    """Plain forms of what torch cannot differentiate."""

    class Plain:
        group_norm = staticmethod(plain_group_norm)
        attention = staticmethod(plain_attention)

        @staticmethod
        def copy(model: nn.Module) -> nn.Module:
            """The model in float64 with plain operators."""
            from diffusers.models.attention_processor import AttnProcessor

            model = copy.deepcopy(model).double()
            for part in list(model.modules()):
                for name, child in list(part.named_children()):
                    if isinstance(child, nn.GroupNorm):
                        setattr(part, name, PlainGroupNorm(child))
                if hasattr(part, "set_processor"):
                    part.set_processor(AttnProcessor())
                    part.upcast_attention = part.upcast_softmax = False  # to float32, which here is no way up
            return model

    return Plain


@pytest.fixture(scope="session")
def agrees():
    """``agrees(function, x, *args, plain=None)``: dual_forward's y and y_dot are those of torch.func.jvp in float64 of the
    plain function, within 1e-5 of the norm in float32 and 1e-9 in float64."""

    def check(function, x, *args, plain=None, count=3, x_dot=None, **kwargs):
        x_dot = torch.randn(count, *x.shape, dtype=x.dtype) if x_dot is None else x_dot
        y, y_dot = dual_forward(function, x, x_dot, *args, **kwargs)
        wanted = expected(plain or function, x, x_dot, *args, **kwargs)
        bound = 1e-9 if x.dtype == torch.float64 else 1e-5
        for name, got, want in zip(("y", "y_dot"), (y, y_dot), wanted, strict=True):
            assert got.shape == want.shape and got.dtype == x.dtype, name
            assert not got.requires_grad
            assert (got - want).norm() <= bound * want.norm(), f"{name}: {(got - want).norm() / want.norm():.2e}"
        return y, y_dot

    return check
