"""Every rule by itself against torch.func.jvp in float64."""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import jvp

from pyattr.jvp import dual_forward

IMAGE = (2, 4, 5, 6)


@functools.cache
def constant(*shape, seed=1):
    """The same numbers each time, in float32 and float64; made before vmap, which allows no random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def like(x, *shape, seed=1):
    return constant(*shape, seed=seed).to(x.dtype)


# name -> (function, shape of x); torch.func.jvp of the function itself is right.
CASES = {
    # elements
    **{f"{f.__name__}": (f, IMAGE) for f in (F.silu, F.gelu, F.relu, torch.sigmoid, torch.tanh, F.mish, F.elu)},
    **{f"{f.__name__}": (f, IMAGE) for f in (F.softplus, F.leaky_relu, F.hardtanh, F.hardswish, F.selu, F.relu6)},
    "logsigmoid": (F.logsigmoid, IMAGE),
    **{f"{f.__name__}": (f, IMAGE) for f in (torch.exp, torch.expm1, torch.sin, torch.cos, torch.erf, torch.abs, torch.neg)},
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), IMAGE),
    "log_of_square": (lambda x: torch.log(x.square() + 1), IMAGE),
    "sqrt_rsqrt": (lambda x: (x * x + 1).sqrt() + (x * x + 2).rsqrt(), IMAGE),
    "power": (lambda x: x**3 + (x.abs() + 1) ** -0.5, IMAGE),
    "reciprocal": (lambda x: 1 / (2 + x * x) + torch.reciprocal(3 + x.square()), IMAGE),
    "element_of_expanded": (lambda x: x[:, :1].expand(-1, 3, -1, -1).tanh() + x[0, 0].expand(2, 3, 5, 6).cos(),
                            IMAGE),
    "clamp": (lambda x: x.clamp(-0.5, 0.7), IMAGE),
    "quick_gelu": (lambda x: x * torch.sigmoid(1.702 * x), IMAGE),
    # sums and products with constants, numbers and each other
    "add_constant": (lambda x: x + like(x, 4, 1, 1), IMAGE),
    "add_bigger_constant": (lambda x: x + like(x, 3, 2, 4, 5, 6), IMAGE),
    "add_number": (lambda x: x + 2, IMAGE),
    "number_minus": (lambda x: 1 - x, IMAGE),
    "constant_minus": (lambda x: like(x, 6) - x, IMAGE),
    "rsub": (lambda x: torch.rsub(x, 2.0, alpha=3), IMAGE),
    "sub_alpha": (lambda x: torch.sub(like(x, 6), x, alpha=0.5) + torch.sub(x, like(x, 6), alpha=0.5), IMAGE),
    "add_alpha": (lambda x: torch.add(like(x, 6), x, alpha=0.5) + torch.add(x, x.sin(), alpha=-2), IMAGE),
    "multiply_constant": (lambda x: x * like(x, 4, 1, 6), IMAGE),
    "multiply_bigger_constant": (lambda x: like(x, 3, 1, 1, 1, 1) * x, IMAGE),
    "divide_by_one": (lambda x: x / 1.0 + x * 1, IMAGE),
    "divide_constant": (lambda x: x / (2 + like(x, 6).abs()), IMAGE),
    "divide": (lambda x: x / (1 + x * x), IMAGE),
    "constant_divided": (lambda x: like(x, 5, 1) / (1 + x * x), IMAGE),
    "broadcast_product": (lambda x: x.mean(1) * x, (2, 2, 5, 5)),
    "broadcast_sum": (lambda x: x.mean((0, 1)) + x.exp() - x.mean(-1, keepdim=True), IMAGE),
    "affine": (lambda x: torch.addcmul(x, x, like(x, 6), value=0.5) + torch.lerp(x, like(x, 6), 0.3), IMAGE),
    "where": (lambda x: torch.where(x > 0, x * 2, x.exp()) + torch.where(x > 0.5, x, 0.0), IMAGE),
    "masked_fill": (lambda x: x.masked_fill(like(x, 5, 6) > 0, -3.0), IMAGE),
    # moving elements
    "reshape": (lambda x: x.transpose(1, 2).reshape(2, -1, 3).sin(), IMAGE),
    "view_permute": (lambda x: x.view(2, 4, -1).permute(2, 0, 1).contiguous().view(5, 6, -1).exp(), IMAGE),
    "flatten_unflatten": (lambda x: x.flatten(1).t().unflatten(0, (4, 30)).sin(), IMAGE),
    "squeeze": (lambda x: x[:, :1].squeeze(1).unsqueeze(-1).squeeze() + x[:, 0], IMAGE),
    "indices": (lambda x: x[:, 1:3, ..., None, ::2] * x[0, 2, 1, 3], IMAGE),
    "index_tensor": (lambda x: x[:, torch.tensor([3, 0, 0])] * x[torch.tensor([1]), torch.tensor([2])], IMAGE),
    "index_mask": (lambda x: x[:, torch.tensor([True, False, True, False])].exp(), IMAGE),
    "index_select_gather": (
        lambda x: x.index_select(2, torch.tensor([4, 1])).gather(3, torch.ones(2, 4, 2, 3, dtype=torch.long)),
        IMAGE,
    ),
    "expand_repeat": (lambda x: x[:, :1].expand(3, -1, 3, -1, -1).sum(0) * x[:1, :3].repeat(2, 1, 1, 1).cos(), IMAGE),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 1).exp(), IMAGE),
    "chunk_split_unbind": (
        lambda x: x.chunk(2, 1)[0] * x.split([1, 3], 1)[1][:, :2] + x.unbind(1)[3][:, None], IMAGE
    ),
    "cat_stack": (lambda x: torch.cat([x, like(x, 2, 1, 5, 6), x.exp()], 1) + torch.stack([x, -x], 1).sum(1)[:, :1], IMAGE),
    "cat_tensors_alike": (lambda x: torch.cat([x.sin(), x], 1).cos() + torch.cat([x, x], -3), IMAGE),
    "cat_batches": (lambda x: torch.cat([x, x * x]), IMAGE),
    "flip_roll": (lambda x: x.flip(-1, 0) * x.roll((1, 2), (1, -1)), IMAGE),
    "diagonal_unfold": (lambda x: x.diagonal(0, 2, 3).sin().sum(-1) + x.unfold(-1, 3, 2).mean((-1, -2, -3)), IMAGE),
    "triangles": (lambda x: x.tril() * x.triu().exp(), IMAGE),
    "pixel_shuffles": (lambda x: F.pixel_shuffle(x, 2).sin() + F.pixel_shuffle(x.cos(), 2), IMAGE),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x[..., :4, :], 2).sin(), IMAGE),
    "type": (lambda x: x.to(torch.float64).sin().to(x.dtype) * x.clone(), IMAGE),
    # sums
    "mean_sum": (lambda x: x.exp().mean((-1, 2), keepdim=True) * x.sum(1, keepdim=True) + x.mean() + x.sum(), IMAGE),
    "cumsum": (lambda x: x.cumsum(1) * x, IMAGE),
    "softmax": (lambda x: x.softmax(-1) + x.log_softmax(1) + x.softmax(0), IMAGE),
    "rms_norm": (lambda x: F.rms_norm(x, (6,), like(x, 6)), IMAGE),
    # products of matrices
    "linear": (lambda x: F.linear(x, like(x, 7, 6), like(x, 7)), IMAGE),
    "linear_2d": (lambda x: F.linear(x, like(x, 7, 6), like(x, 7)) @ like(x, 7, 2), (3, 6)),
    "linear_1d": (lambda x: F.linear(x, like(x, 7, 6), like(x, 7)), (6,)),
    "linear_1d_without_bias": (lambda x: F.linear(x, like(x, 7, 6)), (6,)),
    "linear_of_transposed": (lambda x: F.linear(x.transpose(-1, -2), like(x, 7, 5), like(x, 7)), IMAGE),
    "matmul_left": (lambda x: like(x, 3, 5) @ x, IMAGE),
    "matmul_both": (lambda x: x @ x.transpose(-1, -2).exp(), IMAGE),
    "matmul_batches": (lambda x: (like(x, 2, 4, 3, 5) @ x) @ like(x, 2, 4, 6, 2), IMAGE),
    "mm_both": (lambda x: (x.t() @ x.sin()) @ x.t(), (3, 6)),
    "addmm": (lambda x: torch.addmm(x[:, :2], x, like(x, 6, 2), beta=0.5, alpha=2), (3, 6)),
    "baddbmm": (lambda x: torch.baddbmm(like(x, 4, 5, 5), x[0], x[1].transpose(1, 2), beta=2, alpha=0.3), IMAGE),
    "einsum": (lambda x: torch.einsum("bchw,cd->bdhw", x, like(x, 4, 3)) + torch.einsum("bchw,bchw->b", x, x).sum(), IMAGE),
    # convolutions and resampling
    "conv2d": (lambda x: F.conv2d(x, like(x, 3, 4, 3, 3), like(x, 3), stride=2, padding=1), IMAGE),
    "conv2d_groups": (lambda x: F.conv2d(x, like(x, 6, 2, 3, 2), None, padding=(2, 0), dilation=(1, 2), groups=2), IMAGE),
    "conv2d_one_image": (lambda x: F.conv2d(x, like(x, 3, 4, 3, 3), like(x, 3)), IMAGE[1:]),
    "conv_transpose2d": (lambda x: F.conv_transpose2d(x, like(x, 4, 3, 3, 3), like(x, 3), stride=2, output_padding=1), IMAGE),
    "conv1d": (lambda x: F.conv1d(x, like(x, 3, 4, 3), like(x, 3), padding="same"), (2, 4, 9)),
    "conv3d": (lambda x: F.conv3d(x, like(x, 3, 4, 2, 2, 2), like(x, 3)), (2, 4, 3, 4, 3)),
    "conv_after_sum": (lambda x: F.conv2d(x.exp() + like(x, 4, 1, 1), like(x, 3, 4, 3, 3)), IMAGE),
    **{
        f"interpolate_{mode}": (lambda x, mode=mode: F.interpolate(x.exp(), scale_factor=2.0, mode=mode), IMAGE)
        for mode in ("nearest", "nearest-exact", "bilinear", "bicubic", "area")
    },
    "interpolate_size": (lambda x: F.interpolate(x, size=(7, 3), mode="bilinear", align_corners=True), IMAGE),
    "interpolate_1d": (lambda x: F.interpolate(x, scale_factor=2.0, mode="linear"), (2, 4, 9)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, (2, 3)).exp(), IMAGE),
    "avg_pool1d": (lambda x: F.avg_pool1d(x, 2), (2, 4, 8)),
    "adaptive_avg_pool_to_one": (lambda x: F.adaptive_avg_pool2d(x.sin(), 1), IMAGE),
    "max_pool2d": (lambda x: F.max_pool2d(x, 3, 2, 1), IMAGE),
    **{
        f"pad_{mode}": (lambda x, mode=mode: F.pad(x.exp(), (1, 2, 0, 1), mode=mode), IMAGE)
        for mode in ("reflect", "replicate", "circular")
    },
    "pad": (lambda x: F.pad(x, (0, 1, 0, 1)) + F.pad(x, (1, 0, 0, 1), value=3.0), IMAGE),
    # normalisation
    "layer_norm": (lambda x: F.layer_norm(x, (6,), like(x, 6), like(x, 6)) + F.layer_norm(x, (5, 6)), IMAGE),
    "batch_norm": (lambda x: F.batch_norm(x, like(x, 4), like(x, 4).abs(), like(x, 4), like(x, 4)), IMAGE),
    "instance_norm": (lambda x: F.instance_norm(x, weight=like(x, 4), bias=like(x, 4, seed=2)), IMAGE),

}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_rule(name, dtype, agrees):
    function, shape = CASES[name]
    agrees(function, torch.randn(shape, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
class TestGroupNorm:
    """Group normalisation is put off until it is known what follows."""

    def both(self, agrees, plain, function, shape, dtype):
        """The function gets a group normalisation with these settings: torch's own, and the plain one."""
        x = torch.randn(shape, dtype=dtype)
        agrees(lambda x: function(x, F.group_norm), x, plain=lambda x: function(x, plain.group_norm))

    @pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 4, 9), (3, 4), (1, 4, 2, 3, 2)], ids=str)
    def test_with_silu(self, dtype, shape, agrees, plain):
        groups = 2 if len(shape) > 2 else 1  # of two values without positions, tangents cancel
        self.both(agrees, plain, lambda x, norm: F.silu(norm(x, groups, like(x, 4), like(x, 4, seed=2))), shape, dtype)

    def test_followed_by_other_things(self, dtype, agrees, plain):
        def function(x, norm):
            y = norm(x, 2, like(x, 4), like(x, 4, seed=2), 1e-3)
            return y.sin() + y.flatten(2).mean(-1)[..., None, None] + F.silu(y)

        self.both(agrees, plain, function, IMAGE, dtype)

    @pytest.mark.parametrize("batch", [1, 2])
    @pytest.mark.parametrize("affine", [False, True])
    def test_scale_and_shift_of_each_image(self, dtype, batch, affine, agrees, plain):
        def function(x, norm):
            weights = (like(x, 4), like(x, 4, seed=2)) if affine else ()
            y = norm(x, 2, *weights)
            scale, shift = like(x, batch, 4, 1, 1), like(x, batch, 4, 1, 1, seed=3)
            return F.silu(y * (1 + scale) + shift) + F.silu(2 * y - 0.5) + F.silu(shift - y / (2 + scale.abs())) + y

        self.both(agrees, plain, function, (batch, 4, 5, 6), dtype)

    def test_scale_of_each_position(self, dtype, agrees, plain):
        self.both(agrees, plain, lambda x, norm: F.silu(norm(x, 2) * like(x, 5, 6) + like(x, 1, 1, 5, 6)), IMAGE, dtype)

    def test_scales_of_more_images_than_there_are(self, dtype, agrees, plain):
        """One image becomes three."""
        for function in (lambda y, a: y * a, lambda y, a: y + a, lambda y, a: a - y):
            self.both(
                agrees,
                plain,
                lambda x, norm, f=function: F.silu(f(norm(x, 2), like(x, 3, 4, 1, 1))),
                (1, 4, 5, 6),
                dtype,
            )

    def test_scales_of_more_channels_than_there_are(self, dtype, agrees, plain):
        """One channel becomes four, by a scale or by a shift."""
        for function in (lambda y, a: y * a, lambda y, a: a + y):
            self.both(
                agrees, plain, lambda x, norm, f=function: F.silu(f(norm(x, 1), like(x, 4, 1, 1))), (2, 1, 5, 6), dtype
            )

    def test_in_torchscript(self, dtype, agrees, plain):
        """Which has overloads of its own for numbers."""

        def function(x: torch.Tensor) -> torch.Tensor:
            return F.silu(F.group_norm(x, 2) * 2.0 - 0.5) / 3.0 + F.group_norm(x, 2) / 4.0 + 1.0

        def plainly(x):
            return F.silu(plain.group_norm(x, 2) * 2 - 0.5) / 3 + plain.group_norm(x, 2) / 4 + 1

        agrees(torch.jit.script(function), torch.randn(IMAGE, dtype=dtype), plain=plainly)

    def test_of_a_shifted_tensor(self, dtype, agrees, plain):
        self.both(agrees, plain, lambda x, norm: F.silu(norm(x + like(x, 2, 4, 1, 1), 2)) + x, IMAGE, dtype)

    def test_of_transposed_positions(self, dtype, agrees, plain):
        self.both(
            agrees, plain, lambda x, norm: norm(x.view(2, 4, 30).transpose(1, 2).transpose(1, 2), 4).exp(), IMAGE, dtype
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
class TestAttention:
    def both(self, agrees, plain, function, shape, dtype):
        x = torch.randn(shape, dtype=dtype)
        agrees(lambda x: function(x, F.scaled_dot_product_attention), x, plain=lambda x: function(x, plain.attention))

    @pytest.mark.parametrize("shape", [(2, 3, 5, 4), (3, 5, 4), (5, 4), (2, 1, 3, 5, 4)], ids=str)
    def test_of_itself(self, dtype, shape, agrees, plain):
        self.both(agrees, plain, lambda x, attend: attend(x.sin(), x.exp(), x), shape, dtype)

    def test_with_constant_keys_and_values(self, dtype, agrees, plain):
        self.both(
            agrees, plain, lambda x, attend: attend(x, like(x, 2, 3, 7, 4), like(x, 2, 3, 7, 2)), (2, 3, 5, 4), dtype
        )

    def test_of_a_constant_query_shared_by_all(self, dtype, agrees, plain):
        self.both(agrees, plain, lambda x, attend: attend(like(x, 1, 3, 6, 4), x, x * 2), (2, 3, 5, 4), dtype)

    def test_masks(self, dtype, agrees, plain):
        def function(x, attend):
            allowed = like(x, 2, 1, 5, 5) > -1
            allowed[..., 0] = True
            added = like(x, 5, 5).masked_fill(~allowed[0, 0], -torch.inf)
            return attend(x, x, x, allowed) + attend(x, x, x, added) + attend(x, x, x, is_causal=True, scale=0.3)

        self.both(agrees, plain, function, (2, 3, 5, 4), dtype)

    def test_a_mask_that_depends_on_x(self, dtype, agrees, plain):
        self.both(agrees, plain, lambda x, attend: attend(x, x, x, (x @ x.mT).tanh()), (2, 3, 5, 4), dtype)

    def test_a_mask_that_depends_on_x_and_leaves_a_query_nothing(self, dtype):
        # As torch has it without tangents: zeros, not NaN.
        nothing = torch.zeros(5, 5, dtype=dtype).index_fill(0, torch.tensor([1]), -torch.inf)
        x = torch.randn(2, 3, 5, 4, dtype=dtype)
        y, y_dot = dual_forward(lambda x: F.scaled_dot_product_attention(x, x, x, x @ x.mT + nothing), x, x[None])
        wanted = F.scaled_dot_product_attention(x, x, x, x @ x.mT + nothing)
        torch.testing.assert_close(y, wanted)
        assert not y[..., 1, :].any() and not y_dot[..., 1, :].any() and y_dot.isfinite().all()

    def test_of_no_width(self, dtype, agrees, plain):
        self.both(agrees, plain, lambda x, attend: attend(x[..., :0], x[..., :0], x, scale=None), (1, 2, 3, 4), dtype)

    def test_fewer_heads_of_keys(self, dtype, agrees, plain):
        def plainly(x):
            return plain.attention(x, x[:, :2].repeat_interleave(2, 1), x[:, 2:].repeat_interleave(2, 1))

        agrees(
            lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, 2:], enable_gqa=True),
            torch.randn(2, 4, 5, 4, dtype=dtype),
            plain=plainly,
        )


def low_frequencies(x):
    """What FreeU does to the skips of a U-Net."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x, dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones(4, 6, dtype=x.dtype)
    mask[1:3, 2:4] = 0.4
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1)).real


def rotated(x):
    """Rotary embeddings, by complex numbers."""
    turns = torch.polar(torch.ones(4, 3), torch.arange(12.0).view(4, 3)).to(torch.complex(x, x).dtype)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (3, 2))) * turns).flatten(-2)


def of_complex_numbers(x):
    z = x.to(torch.complex(x, x).dtype) * (1 + 2j) + x
    return z.abs() + (z * z).real + z.imag + z.exp().angle() + (1 / (3 + z)).real + torch.cat([z, z])[2:].imag


@pytest.mark.filterwarnings("ignore:dual_forward:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("function", [low_frequencies, rotated, of_complex_numbers])
def test_complex_numbers_on_the_way(function, dtype, agrees):
    agrees(function, torch.randn(2, 3, 4, 6, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_quotients_with_a_rounding_mode_of_none(dtype, agrees):
    agrees(lambda x: torch.div(x, 3, rounding_mode=None), torch.randn(2, 3, dtype=dtype))


ELEMENTWISE = {
    **{f.__name__: f for f in (torch.sigmoid, torch.tanh, torch.exp, torch.exp2, torch.expm1, torch.log, torch.log1p)},
    **{f.__name__: f for f in (torch.sqrt, torch.rsqrt, torch.reciprocal, torch.square, torch.abs, torch.sin, torch.atan)},
    **{f.__name__: f for f in (torch.asinh, torch.acosh, torch.atanh, torch.erf, torch.sinc, torch.nan_to_num, torch.neg)},
    **{f.__name__: f for f in (F.silu, F.gelu, F.relu, F.relu6, F.mish, F.elu, F.selu, F.celu, F.softplus, F.logsigmoid)},
    **{f.__name__: f for f in (F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid, F.hardshrink, F.softshrink)},
    "relu_in_place": lambda x: F.relu(x + 0, inplace=True),
    "threshold": lambda x: F.threshold(x, 0.5, 2.0),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp_max(0),
    **{f"power_{n}": lambda x, n=n: x**n for n in (-1, 0, 0.5, 1, 2, 3)},
    "times_zero": lambda x: x * 0,
    "times_itself": lambda x: x * x,
    "quotient": lambda x: x / (x * x + 1),
    "divided_by_zero": lambda x: x / 0,
    "one_minus": lambda x: 1 - x,
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "masked": lambda x: x.masked_fill(x > 0, 3.0),
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
}  # fmt: skip
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 3.0, -3.0, 6.0, 100.0, -100.0]


@pytest.mark.filterwarnings("ignore:dual_forward:UserWarning")  # of maximum
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_not_numbers_infinities_and_edges_as_in_torch(name):
    """At NaN, inf, zeros of both signs and where slopes jump, with tangents of them too, all is what torch.func.jvp gives."""
    function = ELEMENTWISE[name]
    x, tangents = torch.tensor(list(itertools.product(SPECIAL, SPECIAL)), dtype=torch.float64).T.contiguous()
    y, y_dot = dual_forward(function, x, torch.stack([tangents, tangents]))
    with torch.no_grad():
        wanted, wanted_dot = jvp(function, (x,), (tangents,))
    for got, expected in ((y, wanted), (y_dot[0], wanted_dot), (y_dot[1], wanted_dot)):
        torch.testing.assert_close(got, expected, equal_nan=True)


shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(data=st.data())
def test_sums_and_products_broadcast(data, agrees):
    """Operands of any ranks and sizes, constant or not, before or after the differentiated one."""
    full = data.draw(shapes)

    def part(seed):
        shape = [size if data.draw(st.booleans()) else 1 for size in full]
        return shape[data.draw(st.integers(0, len(shape) - 1)) :]

    first, second, operation = part(0), part(1), data.draw(st.sampled_from(["add", "sub", "mul", "div"]))
    kind = data.draw(st.sampled_from(["constant", "constant first", "dual"]))
    offset = 3.0 if operation == "div" else 0.0

    def function(x):
        a, b = x, like(x, *second)
        if kind == "dual":
            b = x.reshape(-1)[0] * b.abs() if operation == "div" else x.sum() * b
        if kind == "constant first":
            a, b = b, a
        return getattr(torch, operation)(a, b.abs() + offset if operation == "div" else b)

    agrees(function, torch.randn(first, dtype=torch.float64))


@given(
    channels=st.sampled_from([(2, 4, 1), (4, 2, 2), (3, 3, 3)]),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    transposed=st.booleans(),
    batch=st.integers(0, 3),
)
def test_convolutions(channels, size, kernel, stride, padding, transposed, batch, agrees):
    inputs, outputs, groups = channels
    padding = min(padding, kernel - 1)

    def function(x):
        if transposed:
            weight = like(x, inputs, outputs // groups, kernel, kernel)
            return F.conv_transpose2d(x, weight, like(x, outputs), stride, padding, 0, groups)
        return F.conv2d(
            x, like(x, outputs, inputs // groups, kernel, kernel), like(x, outputs), stride, padding, 1, groups
        )

    agrees(function, torch.randn(batch, inputs, *size))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Results in the type of x, to its rounding."""

    def function(x):
        y = F.relu(F.silu(F.conv2d(x, like(x, 4, 4, 3, 3), like(x, 4), padding=1)))
        y = F.silu(F.group_norm(y, 2, like(x, 4), like(x, 4)) * like(x, 2, 4, 1, 1) + like(x, 4, 1, 1))
        y = F.layer_norm(y, (6,)) + y.softmax(-1)
        return F.linear(F.gelu(y), like(x, 3, 6), like(x, 3)) * 0.5

    x, x_dot = torch.randn(IMAGE).to(dtype), torch.randn(3, *IMAGE).to(dtype)
    y, y_dot = dual_forward(function, x, x_dot)
    exact, exact_dot = dual_forward(function, x.double(), x_dot.double())
    bound = 8 * torch.finfo(dtype).eps
    assert y.dtype == y_dot.dtype == dtype
    assert (y - exact).norm() <= bound * exact.norm()
    assert (y_dot - exact_dot).norm() <= bound * exact_dot.norm()
