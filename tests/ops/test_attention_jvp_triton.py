"""attention_jvp in Triton without a GPU: compiled for one, and run by Triton's interpreter in a child process."""

from functools import partial
from importlib import import_module

import pytest
import torch
from attention_arrays import check, make
from triton_without_gpu import compile_for_gpu, interpreted, not_interpreted, run_interpreted

from pyattr.ops import attention_jvp

attend = partial(attention_jvp, backend="triton")


@not_interpreted
def test_under_the_interpreter():
    run_interpreted(__file__)


NEVER_SPECIALISED = ("first_item", "items", "first_row", "slab_rows")


@not_interpreted
@pytest.mark.parametrize("kernel", ["primal_kernel", "attention_jvp_kernel"])
@pytest.mark.parametrize(
    ("dtype", "ones"), [("fp32", False), ("bf16", True)], ids=["ordinary", "specialised to sizes of 1"]
)
def test_compiles_for_a_gpu(kernel, dtype, ones):
    import triton.language as tl

    kernels = import_module("pyattr.triton_kernels.attention_jvp")
    jitted = getattr(kernels, kernel)
    own = kernels.blocks_of(256, 64, 200 if ones else 64)
    options = {name: own.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    own |= {"DOT_TYPE": tl.bfloat16 if ones else tl.float32, "PRECISION": "ieee" if ones else "tf32x3"}
    if kernel == "primal_kernel":
        own |= {"MASK": 1 if ones else 2, "CAUSAL": True}
    else:
        own |= {"QUERY_DOT": True, "KEY_DOT": True, "VALUE_DOT": True}
    types = {name: f"*{dtype}" for name in jitted.arg_names if name.endswith("_ptr")}
    types |= {
        "probabilities_ptr": "*fp32",
        "exact_ptr": "*fp32",
        "mask_ptr": "*u8" if ones else "*fp32",
        "scale": "fp32",
    }
    compile_for_gpu(jitted, types, own, NEVER_SPECIALISED if ones else None, **options)


@interpreted
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (2, 1, 66, 17, 5, 6, 2), (1, 1, 20, 40, 40, 300, 1)])
def test_shapes(shape):
    check(attend, make(*shape, views=True))


@interpreted
@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_tangents_that_are_zero(given):
    arrays = make(1, 1, 9, 12, 8, 7, 2, views=True)
    whole = attend(*arrays)
    kept = [a if there else None for a, there in zip(arrays[3:], given, strict=True)]
    assert torch.equal(check(attend, [*arrays[:3], *kept]).y, whole.y)
    zeros = [a if there else torch.zeros_like(a) for a, there in zip(arrays[3:], given, strict=True)]
    torch.testing.assert_close(
        attend(*arrays[:3], *zeros).y_dot,
        attend(*arrays[:3], *kept).y_dot,
        rtol=0, atol=1e-6,
    )  # fmt: skip
    nothing = attend(*arrays[:3], *(0 * a for a in arrays[3:])).y_dot
    assert torch.equal(nothing, torch.zeros_like(nothing))


@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_masks(added, causal):
    arrays = make(1, 2, 20, 40, 4, 5, 1, views=True)
    mask = torch.rand(1, 1, 20, 40) > 0.4
    mask[:, :, 3] = False  # a query that may attend to nothing
    if added:
        mask = torch.randn(20, 40).masked_fill(~mask[0, 0], -torch.inf)
    found = check(attend, arrays, mask=mask, causal=causal)
    assert torch.equal(found.y[:, :, 3], torch.zeros(1, 2, 5))
    assert torch.equal(found.y_dot[:, :, :, 3], torch.zeros(1, 1, 2, 5))
    hidden = torch.ones(40, dtype=torch.bool)
    hidden[7] = False
    expected = attend(*arrays, mask=hidden)
    for index in (1, 4):
        arrays[index][..., 7, :] = torch.nan
    found = attend(*arrays, mask=hidden)
    assert torch.equal(found.y, expected.y) and torch.equal(found.y_dot, expected.y_dot)


@interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_16_bits(dtype, tolerance):
    check(attend, make(1, 1, 20, 33, 5, 40, 1, dtype, views=True), tolerance)


@interpreted
def test_waves_and_launches_change_no_bit(monkeypatch):
    kernels = import_module("pyattr.triton_kernels.attention_jvp")
    arrays = make(1, 3, 66, 9, 6, 5, 2, views=True)
    whole = attend(*arrays)
    for k in range(2):
        alone = attend(*arrays[:3], *(a[k : k + 1] for a in arrays[3:]))
        assert torch.equal(alone.y, whole.y) and torch.equal(alone.y_dot[0], whole.y_dot[k])
    for floats, programs in ((2 * 66 * 9, 7), (1, 1)):  # heads in waves, rows too; a tangent a launch
        monkeypatch.setattr(kernels, "PROBABILITIES", floats)
        monkeypatch.setattr(kernels, "MOST_PROGRAMS", programs)
        again = attend(*arrays)
        assert torch.equal(again.y, whole.y) and torch.equal(again.y_dot, whole.y_dot)


@interpreted
def test_empty():
    for shape in ((0, 2, 3, 4, 5, 6, 2), (1, 2, 3, 4, 5, 0, 2), (1, 2, 3, 4, 5, 6, 0), (1, 2, 3, 0, 5, 6, 2)):
        found = check(attend, make(*shape, views=True))
        assert found.y_dot.shape == (shape[6], *shape[:3], shape[5])
    check(attend, make(1, 2, 3, 4, 0, 6, 2, views=True))
