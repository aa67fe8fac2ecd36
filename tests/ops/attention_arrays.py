"""Inputs of attention_jvp, and what its results are compared with."""

import torch

from pyattr.ops import attention_jvp


def make(batch, heads, queries, keys, width, value_width, tangents, dtype=torch.float32, device="cpu", views=False):
    """query, key, value and their tangents; as views, they lie in memory as [B, length, H, width]."""

    def random(length, last, *lead):
        shape = (batch, length, heads, last) if views else (batch, heads, length, last)
        values = torch.randn(*lead, *shape).to(dtype).to(device)
        return values.transpose(-3, -2) if views else values

    sizes = ((queries, width), (keys, width), (keys, value_width))
    return [random(*size) for size in sizes] + [random(*size, tangents) for size in sizes]


def check(attend, arrays, tolerance=1e-5, **options):
    """The results of a function with the signature of attention_jvp, after a comparison with the reference in float64."""
    found = attend(*arrays, **options)
    wide = (None if a is None else a.double() for a in arrays)
    exact = attention_jvp(*wide, backend="reference", **options)
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == arrays[0].dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    return found
