"""What a module writes in place is seen through all views, and by nobody else."""

import pytest
import torch
import torch.nn.functional as F

from pyattr.jvp import dual_forward


def add_to_itself(x):
    y = x.exp()
    y += x
    y *= 2
    y -= 1
    y **= 3
    return y.transpose_(0, 1)


def write_through_a_view(x):
    y = x.exp()
    view = y[:, 1]
    y *= x
    view += 1
    y[0].mul_(3)
    return y * view[:, None]


def write_to_the_source_of_a_copy(x):
    y = x.exp()
    same, shifted = y / 1.0, y + 1  # these share memory with y until it changes
    row = y[:, 0]
    y.mul_(2)
    row.add_(1)
    return torch.cat([y, same, shifted], 1) * row[:, None]


def write_to_a_copy(x):
    y = x.exp()
    same = y / 1.0
    row = same[:, 0]
    same.mul_(2)
    row.sub_(x[:, 0])
    return torch.cat([y, same], 1)


def write_behind_a_put_off_norm(x):
    y = x.exp()
    normal = F.instance_norm(y)
    y += 5
    y[:, :1] *= x[:, :1]
    return F.silu(normal) * y


def fill_parts(x):
    y = x.exp()
    y[:, 0] = 3.0
    y[:, 1] = x[:, 1].sin()
    y[0, 2].zero_()
    y.clamp_(-1, 2)
    F.relu(y, inplace=True)
    return y.masked_fill_(y > 1.5, 0.25)


def write_to_what_has_been_detached(x):
    y = x.exp()
    value = y.detach()
    y.mul_(2)
    value[:, 0] += 1
    return y * value


def fill_with_what_depends_on_x(x):
    y = x.exp()
    y[:, 0] = x.mean()
    y[0, 1].fill_(y[1, 1, 1, 1])
    return y


def assign_constants(x):
    y = x.exp()
    y.copy_(torch.ones(6))
    return y + x


@pytest.mark.parametrize(
    "function",
    [
        add_to_itself,
        write_through_a_view,
        write_to_the_source_of_a_copy,
        write_to_a_copy,
        fill_parts,
        fill_with_what_depends_on_x,
        write_to_what_has_been_detached,
        assign_constants,
    ],
)
def test_matches_torch(function, agrees):
    agrees(function, torch.randn(2, 4, 5, 6, dtype=torch.float64))


def test_a_norm_that_was_put_off_reads_what_it_was_given(agrees):
    def plainly(x):
        y = x.exp()
        normal = (y - y.mean((2, 3), keepdim=True)) / (y.var((2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
        y = y + 5
        y = torch.cat([y[:, :1] * x[:, :1], y[:, 1:]], 1)
        return F.silu(normal) * y

    agrees(write_behind_a_put_off_norm, torch.randn(1, 4, 5, 6, dtype=torch.float64), plain=plainly)


def test_x_is_never_written():
    x, x_dot = torch.randn(2, 3), torch.randn(4, 2, 3)
    kept, kept_dot = x.clone(), x_dot.clone()

    def function(x):
        x *= 2
        x[:, 0] = 1
        return x

    y, y_dot = dual_forward(function, x, x_dot)
    assert torch.equal(x, kept) and torch.equal(x_dot, kept_dot)
    kept_dot[:, :, 0] = 0
    assert torch.equal(y[:, 1:], 2 * kept[:, 1:]) and torch.equal(y_dot, 2 * kept_dot)


class Collect(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Identity()
        self.inner.forward = self.collect

    def collect(self, x):
        out = torch.zeros(2, 3, dtype=x.dtype)
        out[:, 0] = x[:, 0] ** 2
        return out

    def forward(self, x):
        return self.inner(x.exp()).sin()


def test_a_module_that_writes_to_a_plain_target_is_done_as_a_whole(agrees):
    with pytest.warns(UserWarning) as said:
        agrees(Collect(), torch.randn(2, 3, dtype=torch.float64))
    assert [str(one.message) for one in said if one.category is UserWarning] == [
        "dual_forward: inner (Identity) is done by torch.func.jvp, slower: aten::copy_ in the module (Collect) writes a value "
        "that depends on x to a tensor that does not; have the module make a new tensor instead"
    ]


@pytest.mark.parametrize("first", [True, False])
def test_a_write_that_a_copied_view_would_miss(first, agrees):
    """The tangents lie otherwise than the primal, so that what torch takes for a view is none."""

    def function(x):
        moved = torch.ones(1, 4, 5, 3) + x.exp().transpose(2, 3)
        flat = moved.view(1, 4, 15)
        (flat if first else moved).mul_(2)
        return moved.sum() + flat

    with pytest.warns(UserWarning, match="aten::mul_ writes to a tensor of which a view had to be copied$"):
        agrees(function, torch.randn(1, 4, 3, 5, dtype=torch.float64))


def test_a_write_through_a_view_that_torch_differentiates(agrees):
    def function(x):
        y = x.exp()
        y.as_strided((2,), (1,)).mul_(3)
        return y

    with pytest.warns(UserWarning) as said:
        agrees(function, torch.randn(3, dtype=torch.float64))
    assert [str(one.message) for one in said if one.category is UserWarning] == [
        "dual_forward: aten::as_strided has no rule of its own; torch.func.jvp does it, slower",
        "dual_forward: the function is done by torch.func.jvp, slower: aten::mul_ writes to a tensor of which a view had to be "
        "copied",
    ]


def test_a_write_to_shared_memory_that_has_been_detached(agrees):
    def function(x):
        y = x.exp()
        same, value = y / 1.0, y.detach()
        y.mul_(2)
        return same + value

    with pytest.warns(
        UserWarning, match="writes to a tensor that has been detached, and of which other results are made$"
    ):
        agrees(function, torch.randn(3, dtype=torch.float64))


def move_axes(x):
    y = x.exp()
    row, square = y[0], x[0, 0, :, :5].sin()
    y.transpose_(2, 3)
    y.unsqueeze_(1).squeeze_(1)
    square.t_()
    y.mul_(2)
    return y.sum(1) * square + row.transpose(1, 2).sum(0)


def test_axes_that_are_moved_in_place(agrees):
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    agrees(lambda x: move_axes(x[..., :5]), x)


def test_an_output_argument_is_refused():
    with pytest.raises(NotImplementedError) as error:
        dual_forward(lambda x: torch.sin(x, out=torch.empty(2)), torch.randn(2), torch.randn(1, 2))
    assert str(error.value).startswith(
        "dual_forward: aten::sin writes to its arguments in a way that has no rule; and the function cannot be done as a "
        "whole: torch.func.jvp cannot differentiate it: "
    )
