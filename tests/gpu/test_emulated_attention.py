"""The CUDA attention kernels' own source on an emulated thread block: no GPU needed.

See ``test_emulated_projection.py`` for the emulator. Limits are small here, so that a few heads or rows take several
waves and thread blocks take several tiles.
"""

import ctypes
import importlib

import pytest
import torch
from attention_arrays import check, make
from emulation import GUARD, extent, library

from pyattr import backends
from pyattr.backends import Backend
from pyattr.ops import attention_jvp

op = importlib.import_module("pyattr.ops.attention_jvp")


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 5)]


class Args(ctypes.Structure):
    _fields_ = [
        ("operands", Operand * 6), ("dtype", ctypes.c_int32),
        ("mask", ctypes.c_void_p), ("mask_kind", ctypes.c_int32), ("mask_strides", ctypes.c_int64 * 4),
        ("sizes", ctypes.c_int64 * 7), ("causal", ctypes.c_bool), ("scale", ctypes.c_float),
        ("y", ctypes.c_void_p), ("y_dot", ctypes.c_void_p),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return library("attention", tmp_path_factory.mktemp("emulator"))


@pytest.fixture
def emulated(compiled, monkeypatch):
    """The op with the emulator as its CUDA backend; ``emulated(*arrays, reverse=..., **options)``."""

    def call(*arrays, reverse=False, **options):
        def run(problem):
            y, y_dot = problem.outputs()
            operands, dtype, mask, kind, mask_strides, sizes, *rest = op._addresses(problem, y, y_dot)
            args = Args(
                (Operand * 6)(*(Operand(address, (ctypes.c_int64 * 5)(*strides)) for address, strides in operands)),
                dtype, mask, kind, (ctypes.c_int64 * 4)(*mask_strides), (ctypes.c_int64 * 7)(*sizes), *rest,
            )  # fmt: skip
            inputs = [t for t in problem[:7] if t is not None]
            ranges = [address for t in inputs for address in (t.data_ptr(), t.data_ptr() + extent(t))]
            compiled.attention_jvp_workspace.restype = ctypes.c_size_t
            size = compiled.attention_jvp_workspace(ctypes.byref(args))
            workspace = torch.full((size + GUARD,), 0xFF, dtype=torch.uint8)
            compiled.attention_jvp.restype = ctypes.c_char_p
            said = compiled.attention_jvp(
                ctypes.byref(args), ctypes.c_void_p(workspace.data_ptr()),
                (ctypes.c_size_t * len(ranges))(*ranges), len(inputs), int(reverse),
            )  # fmt: skip
            assert said == b""
            assert (workspace[size:] == 0xFF).all()
            return y, y_dot

        stand_in = (Backend("cuda", run, backends.always, lambda _: []),)
        with monkeypatch.context() as patch:
            patch.setitem(backends._REGISTRY, "attention_jvp", stand_in)
            return attention_jvp(*arrays, **options)

    return call


# Two row tiles of one head in two waves; heads in waves of three; 1, 2 and 4 groups of columns, the last in two tiles.
SHAPES = [(1, 1, 130, 70, 5, 6, 2), (2, 2, 20, 66, 17, 9, 2), (1, 1, 9, 20, 3, 100, 1), (1, 1, 3, 5, 2, 260, 1)]


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), *SHAPES])
def test_shapes(emulated, shape):
    arrays = make(*shape, views=True)
    found = check(emulated, arrays)
    again = emulated(*arrays, reverse=True)  # threads and thread blocks in the other order
    assert torch.equal(again.y, found.y) and torch.equal(again.y_dot, found.y_dot)


@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_tangents_that_are_zero(emulated, given):
    arrays = make(1, 2, 9, 12, 8, 7, 2, views=True)
    whole = emulated(*arrays)
    kept = [a if there else None for a, there in zip(arrays[3:], given, strict=True)]
    assert torch.equal(check(emulated, [*arrays[:3], *kept]).y, whole.y)
    for k in range(2):
        alone = emulated(*arrays[:3], *(a[k : k + 1] for a in arrays[3:]))
        assert torch.equal(alone.y_dot[0], whole.y_dot[k])
    nothing = emulated(*arrays[:3], *(0 * a for a in arrays[3:])).y_dot
    assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_masks(emulated, added, causal):
    arrays = make(2, 2, 20, 35, 4, 5, 2, views=True)
    mask = torch.rand(2, 1, 20, 35) > 0.4
    mask[:, :, 3] = False  # a query that may attend to nothing
    if added:
        mask = torch.randn(20, 35).masked_fill(~mask[0, 0], -torch.inf)
    found = check(emulated, arrays, mask=mask, causal=causal)
    assert torch.equal(found.y[:, :, 3], torch.zeros(2, 2, 5))
    assert torch.equal(found.y_dot[:, :, :, 3], torch.zeros(2, 2, 2, 5))
    hidden = torch.ones(35, dtype=torch.bool)
    hidden[7] = False
    expected = emulated(*arrays, mask=hidden)
    for index in (1, 4):
        arrays[index][..., 7, :] = torch.nan
    found = emulated(*arrays, mask=hidden)
    assert torch.equal(found.y, expected.y) and torch.equal(found.y_dot, expected.y_dot)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_16_bits(emulated, dtype, tolerance):
    check(emulated, make(1, 2, 20, 33, 5, 40, 2, dtype, views=True), tolerance)


def test_empty_and_not_finite(emulated):
    for shape in ((0, 2, 3, 4, 5, 6, 2), (1, 2, 3, 4, 5, 0, 2), (1, 2, 3, 4, 5, 6, 0), (1, 2, 3, 0, 5, 6, 2)):
        found = check(emulated, make(*shape, views=True))
        assert found.y_dot.shape == (shape[6], *shape[:3], shape[5])
    check(emulated, make(1, 2, 3, 4, 0, 6, 2, views=True))
    arrays = make(1, 1, 5, 7, 4, 3, 2, views=True)
    arrays[0][0, 0, 3, 2] = torch.inf
    found = emulated(*arrays)
    assert found.y[0, 0, 3].isnan().all() and found.y_dot[:, 0, 0, 3].isnan().all()
    assert found.y_dot[..., :3, :].isfinite().all()
