"""attention_jvp on a real GPU, CUDA and Triton: what the emulator and the interpreter cannot show."""

import on_gpu
import pytest
import torch
from attention_arrays import make

from pyattr.ops import attention_jvp

both = on_gpu.both("attention_jvp")
needs_cuda = on_gpu.needs("attention_jvp", "cuda")


def check(arrays, tolerance, **options):
    found = attention_jvp(*arrays, **options)
    exact = attention_jvp(*(a.double() for a in arrays), **(options | {"backend": "reference"}))
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
    return found


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(1, 1, 256, 256, 256, 256, 4), (2, 8, 1024, 77, 40, 40, 2), (1, 3, 65, 1000, 160, 300, 2)]
)
def test_attention_values(backend, dtype, shape):
    tolerance = {torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}[dtype]
    arrays = make(*shape, dtype, device="cuda", views=True)
    whole = check(arrays, tolerance, backend=backend)
    check(arrays, tolerance, backend=backend, mask=torch.rand(shape[2], shape[3], device="cuda") > 0.3, causal=True)
    for k in range(shape[6]):
        alone = attention_jvp(*arrays[:3], *(a[k : k + 1] for a in arrays[3:]), backend=backend)
        assert torch.equal(alone.y, whole.y) and torch.equal(alone.y_dot[0], whole.y_dot[k])


@both
def test_attention_beyond_a_wave_in_bounded_memory(backend):
    """P of one head takes 144 MB; of 30 heads together, 75 MB."""
    for shape in ((1, 2, 6000, 6000, 16, 16, 1), (5, 6, 790, 790, 16, 16, 2)):
        arrays = make(*shape, device="cuda", views=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = attention_jvp(*arrays, backend=backend)
        own = found.y.nbytes + found.y_dot.nbytes
        assert torch.cuda.max_memory_allocated() - before - own < 80 << 20
        check(arrays, 1e-5, backend=backend)


@both
def test_attention_runs_on_the_callers_stream_and_in_a_graph(backend):
    ready = make(1, 2, 300, 200, 64, 64, 3, device="cuda", views=True)
    expected = attention_jvp(*ready, backend=backend).y_dot
    arrays = [torch.zeros_like(a) for a in ready]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for array, value in zip(arrays, ready, strict=True):
            array.copy_(value)
        out = attention_jvp(*arrays, backend=backend).y_dot
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention_jvp(*arrays, backend=backend).y_dot
    for array in arrays:
        array.neg_()
    graph.replay()
    assert torch.equal(captured, attention_jvp(*arrays, backend=backend).y_dot)


@pytest.mark.gpu
@needs_cuda
def test_attention_backends_agree():
    arrays = make(1, 4, 256, 256, 64, 64, 3, device="cuda", views=True)
    found = [attention_jvp(*arrays, backend=name) for name in ("cuda", "triton")]
    torch.testing.assert_close(found[0].y_dot, found[1].y_dot, rtol=1e-4, atol=1e-4)
    host = attention_jvp(*(a.cpu() for a in arrays), backend="cpu")
    torch.testing.assert_close(found[0].y_dot.cpu(), host.y_dot, rtol=1e-4, atol=1e-4)
