"""The CUDA source of group_norm_silu_jvp on an emulated thread block: no GPU needed.

See ``test_emulated_projection.py`` for the emulator. Few blocks are launched here, so that each takes several groups and, of
several tangents, more than one. The rest of the op is its own.
"""

import ctypes
import importlib

import pytest
import torch
from emulation import extent, library

from pyattr.ops import group_norm_silu_jvp

op = importlib.import_module("pyattr.ops.group_norm_silu_jvp")
EPS = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


class TangentArray(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4)]


class Args(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32), ("shape", ctypes.c_int64 * 5), ("arrays", TangentArray * 8),
        ("weight", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("eps", ctypes.c_double), ("silu", ctypes.c_bool),
    ]  # fmt: skip


class Request(ctypes.Structure):
    _fields_ = [("args", Args), ("readable", ctypes.c_size_t * 2 * 4), ("reverse", ctypes.c_int)]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    function = library("group_norm", tmp_path_factory.mktemp("emulator")).group_norm_silu_jvp
    function.restype = ctypes.c_char_p
    return function


@pytest.fixture
def emulated(kernel, monkeypatch):
    """The op with the emulator in the place of the compiled CPU kernel: ``emulated(given, num_groups, reverse=False)``."""
    order = {"reverse": False}

    def call(*problem):
        (dtype, shape, spans, weight, bias, eps, silu), _alive = op._compiled_arguments(*problem)
        args = Args(dtype, (ctypes.c_int64 * 5)(*shape), weight=weight, bias=bias, eps=eps, silu=silu)
        for array, (address, strides) in zip(args.arrays, spans, strict=True):
            array.data, array.strides = address, (ctypes.c_int64 * 4)(*strides)
        request = Request(args, reverse=order["reverse"])
        for span, array in zip(request.readable, problem[:4], strict=True):
            if array is not None:
                span[:] = array.data_ptr(), array.data_ptr() + extent(array)
        assert kernel(ctypes.byref(request)) == b""

    def run(given, num_groups, reverse=False, **options):
        order["reverse"] = reverse
        chosen = op.Backend("cpu", call, op.backends.always, lambda *_: [])
        monkeypatch.setattr(op.backends, "choose", lambda *_: chosen)
        try:
            return apply(given, num_groups, **options)
        finally:
            monkeypatch.undo()

    return run


def apply(given, num_groups, **options):
    given = dict(given)
    return group_norm_silu_jvp(given.pop("x"), given.pop("x_dot"), num_groups, **given, **options)


def problem(shape, tangents, dtype=torch.float32, residual=True):
    given = {"x": torch.randn(shape) + 2, "x_dot": torch.randn(tangents, *shape) + 1}
    if residual:
        given |= {"residual": torch.randn(shape), "residual_dot": torch.randn(tangents, *shape)}
    given = {name: array.to(dtype) for name, array in given.items()}
    return given | {"weight": 1 + torch.randn(shape[1]) / 4, "bias": torch.randn(shape[1]) / 4}


# Groups of one element, of 4 and of 16 elements to a thread, of 512 threads, of more than registers hold.
SHAPES = [((2, 3, 1), 3), ((2, 6, 3, 5), 3), ((1, 2, 600), 1), ((1, 3, 2000), 1), ((1, 1, 9001), 1)]


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize(("shape", "num_groups"), SHAPES, ids=str)
def test_values(emulated, dtype, residual, shape, num_groups):
    given = problem(shape, 2, dtype, residual)
    wide = {name: array.double() for name, array in given.items()}
    for silu in (True, False):
        out = emulated(given, num_groups, silu=silu, eps=0.01)
        wanted = apply(wide, num_groups, silu=silu, eps=0.01, backend="reference")
        for found, expected in zip(out, wanted, strict=True):
            if found is not None:
                assert found.dtype == dtype
                assert (found.double() - expected).norm() <= (EPS[dtype] + 2e-6) * expected.norm()


def channels_last(array):
    return array.movedim(-3, -1).contiguous().movedim(-1, -3)


def test_layouts_and_the_order_of_threads(emulated):
    given = problem((2, 12, 5, 7), 3)
    expected = emulated(given, 3)
    names = ("x", "x_dot", "residual", "residual_dot")
    last = {name: channels_last(given[name]) for name in names}
    mixed = last | {"x": given["x"], "residual_dot": given["residual_dot"]}
    cut = {name: torch.cat([given[name]] * 2, -3)[..., :12, :, :] for name in names}
    for kind in (last, mixed, cut):
        for found, wanted in zip(emulated(given | kind, 3), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)
    assert all(torch.equal(a, b) for a, b in zip(emulated(given, 3, reverse=True), expected, strict=True))


@pytest.mark.parametrize("shape", [(2, 4, 9), (1, 2, 9000)], ids=str)
def test_bits_do_not_depend_on_the_tangents_beside(emulated, shape):
    given = problem(shape, 9)
    out = emulated(given, 2)
    one = emulated(given | {name: given[name][3:4] for name in ("x_dot", "residual_dot")}, 2)
    assert torch.equal(one.y, out.y) and torch.equal(one.y_dot[0], out.y_dot[3])


@pytest.mark.parametrize("size", [6, 9000])
def test_zeros_constants_and_what_is_not_finite(emulated, size):
    given = problem((2, 2, size), 3, residual=False)
    given["x_dot"][1] = 0
    given["x"][1, 0] = 1234.5
    clean = emulated(given, 2)
    assert torch.equal(clean.y_dot[1], torch.zeros(2, 2, size))
    bias = given["bias"][0].expand(size)
    torch.testing.assert_close(clean.y[1, 0], torch.nn.functional.silu(bias), rtol=1e-3, atol=1e-3)
    given["x"][0, 1, -1] = torch.nan
    out = emulated(given, 2)
    assert out.y[0, 1].isnan().all() and out.y_dot[:, 0, 1].isnan().all()
    assert torch.equal(out.y[0, 0], clean.y[0, 0]) and torch.equal(out.y_dot[:, 1], clean.y_dot[:, 1])


def test_sums_are_rounded_as_torch_rounds(emulated):
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, 7, dtype=torch.int16).view(dtype).view(1, 1, -1)
        for other in (2.0**-24, 30000.0):
            residual = torch.full_like(x, other)
            s = emulated({"x": x, "x_dot": x.new_empty(0, *x.shape), "residual": residual}, 1).sum
            wanted = (x.float() + residual.float()).to(dtype)
            assert torch.equal(s.isnan(), wanted.isnan())
            assert torch.equal(s.nan_to_num(7.0), wanted.nan_to_num(7.0))
