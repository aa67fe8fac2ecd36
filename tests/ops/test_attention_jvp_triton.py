"""attention_jvp in Triton without a GPU: compiled for one, and run by Triton's interpreter in a child process.

Triton decides at import whether it interprets, so the tests proper run in a pytest of their own.
"""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from pyattr.ops import attention_jvp

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the child of test_under_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="is the parent")
def test_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stdout + child.stderr


NEVER_SPECIALISED = ("first_item", "items", "first_row", "slab_rows")


@pytest.mark.skipif(INTERPRETED, reason="Triton compiles nothing then")
@pytest.mark.parametrize("kernel", ["primal_kernel", "attention_jvp_kernel"])
@pytest.mark.parametrize(
    ("dtype", "ones"), [("fp32", False), ("bf16", True)], ids=["ordinary", "specialised to sizes of 1"]
)
def test_compiles_for_a_gpu(kernel, dtype, ones):
    """ptxas comes with Triton; no device is touched."""
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = import_module("pyattr.triton_kernels.attention_jvp")
    jitted = getattr(kernels, kernel)
    own = kernels.blocks_of(256, 64, 200 if ones else 64)
    options = {name: own.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    own |= {"DOT_TYPE": tl.bfloat16 if ones else tl.float32, "PRECISION": "ieee" if ones else "tf32x3"}
    if kernel == "primal_kernel":
        own |= {"MASK": 1 if ones else 2, "CAUSAL": True}
    else:
        own |= {"QUERY_DOT": True, "KEY_DOT": True, "VALUE_DOT": True}
    wide = {"probabilities_ptr", "exact_ptr"}
    signature = {
        name: ("*fp32" if name in wide else f"*{dtype}") if name.endswith("_ptr") else "i32"
        for name in jitted.arg_names
    }
    signature |= {"scale": "fp32", **({"mask_ptr": "*u8" if ones else "*fp32"} if "mask_ptr" in signature else {})}
    if ones:
        own |= {name: 1 for name in signature if signature[name] == "i32" and name not in (*NEVER_SPECIALISED, *own)}
    signature |= dict.fromkeys(own, "constexpr")
    compiled = triton.compile(ASTSource(jitted, signature, own), target=GPUTarget("cuda", 90, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0


def make(batch, heads, queries, keys, width, value_width, tangents, dtype=torch.float32):
    """As views of [B, length, H, width]."""
    sizes = ((queries, width), (keys, width), (keys, value_width))
    return [
        torch.randn(*lead, batch, length, heads, last).to(dtype).transpose(-3, -2)
        for lead in ((), (tangents,))
        for length, last in sizes
    ]


def check(arrays, tolerance=1e-5, **options):
    found = attention_jvp(*arrays, backend="triton", **options)
    wide = (None if a is None else a.double() for a in arrays)
    exact = attention_jvp(*wide, backend="reference", **options)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == arrays[0].dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    return found


@interpreted
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (2, 1, 66, 17, 5, 6, 2), (1, 1, 20, 40, 40, 300, 1)])
def test_shapes(shape):
    check(make(*shape))


@interpreted
@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_tangents_that_are_zero(given):
    arrays = make(1, 1, 9, 12, 8, 7, 2)
    whole = attention_jvp(*arrays, backend="triton")
    kept = [a if there else None for a, there in zip(arrays[3:], given, strict=True)]
    assert torch.equal(check([*arrays[:3], *kept]).y, whole.y)
    zeros = [a if there else torch.zeros_like(a) for a, there in zip(arrays[3:], given, strict=True)]
    torch.testing.assert_close(
        attention_jvp(*arrays[:3], *zeros, backend="triton").y_dot,
        attention_jvp(*arrays[:3], *kept, backend="triton").y_dot,
        rtol=0, atol=1e-6,
    )  # fmt: skip
    nothing = attention_jvp(*arrays[:3], *(0 * a for a in arrays[3:]), backend="triton").y_dot
    assert torch.equal(nothing, torch.zeros_like(nothing))


@interpreted
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_masks(added, causal):
    arrays = make(1, 2, 20, 40, 4, 5, 1)
    mask = torch.rand(1, 1, 20, 40) > 0.4
    mask[:, :, 3] = False  # a query that may attend to nothing
    if added:
        mask = torch.randn(20, 40).masked_fill(~mask[0, 0], -torch.inf)
    found = check(arrays, mask=mask, causal=causal)
    assert torch.equal(found.y[:, :, 3], torch.zeros(1, 2, 5))
    assert torch.equal(found.y_dot[:, :, :, 3], torch.zeros(1, 1, 2, 5))
    hidden = torch.ones(40, dtype=torch.bool)
    hidden[7] = False
    expected = attention_jvp(*arrays, mask=hidden, backend="triton")
    for index in (1, 4):
        arrays[index][..., 7, :] = torch.nan
    found = attention_jvp(*arrays, mask=hidden, backend="triton")
    assert torch.equal(found.y, expected.y) and torch.equal(found.y_dot, expected.y_dot)


@interpreted
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_16_bits(dtype, tolerance):
    check(make(1, 1, 20, 33, 5, 40, 1, dtype), tolerance)


@interpreted
def test_waves_and_launches_change_no_bit(monkeypatch):
    kernels = import_module("pyattr.triton_kernels.attention_jvp")
    arrays = make(1, 3, 66, 9, 6, 5, 2)
    whole = attention_jvp(*arrays, backend="triton")
    for k in range(2):
        alone = attention_jvp(*arrays[:3], *(a[k : k + 1] for a in arrays[3:]), backend="triton")
        assert torch.equal(alone.y, whole.y) and torch.equal(alone.y_dot[0], whole.y_dot[k])
    for floats, programs in ((2 * 66 * 9, 7), (1, 1)):  # heads in waves, rows too; a tangent a launch
        monkeypatch.setattr(kernels, "PROBABILITIES", floats)
        monkeypatch.setattr(kernels, "MOST_PROGRAMS", programs)
        again = attention_jvp(*arrays, backend="triton")
        assert torch.equal(again.y, whole.y) and torch.equal(again.y_dot, whole.y_dot)


@interpreted
def test_empty():
    for shape in ((0, 2, 3, 4, 5, 6, 2), (1, 2, 3, 4, 5, 0, 2), (1, 2, 3, 4, 5, 6, 0), (1, 2, 3, 0, 5, 6, 2)):
        found = check(make(*shape))
        assert found.y_dot.shape == (shape[6], *shape[:3], shape[5])
    check(make(1, 2, 3, 4, 0, 6, 2))
