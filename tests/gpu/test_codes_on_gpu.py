"""code_topk on a real GPU, CUDA and Triton: what the emulator and the interpreter cannot show."""

import on_gpu
import pytest
import torch

from pyattr.ops import code_topk

both = on_gpu.both("code_topk")


def problem(n, count, weights=None):
    """A Gram matrix of a spectrum that falls, and codes on the GPU, of n // 2 bits or of these weights in turn."""
    jacobian = torch.randn(200, n, dtype=torch.float64) / torch.arange(1, n + 1).sqrt()
    generator = torch.Generator("cuda").manual_seed(n)
    pieces = []
    for size in torch.arange(count, device="cuda").split(1 << 20):
        heights = torch.tensor(weights or [n // 2], device="cuda")[size % len(weights or [0])]
        bits = torch.rand(len(size), n, device="cuda", generator=generator).argsort(1) < heights[:, None]
        pieces.append((bits.long() << torch.arange(n, device="cuda")).sum(1))
    return jacobian.T @ jacobian, torch.cat(pieces)


@both
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("n", [2, 7, 16, 24, 32, 33, 40, 48, 64])
def test_codes_as_on_the_cpu(backend, n, largest):
    gram, codes = problem(n, 300_001, [n // 2, n // 2, max(n // 2 - 1, 0)])
    for k in (1, 10, 1000):
        found = code_topk(gram, codes, k, largest=largest, backend=backend)
        expected = code_topk(gram, codes.cpu(), k, largest=largest, backend="reference")
        assert found.values.is_cuda and found.indices.is_cuda
        assert torch.equal(found.indices.cpu(), expected.indices)
        assert torch.equal(found.values.cpu(), expected.values)


@both
def test_codes_by_default_and_of_any_stride(backend):
    gram, codes = problem(40, 100_000)
    found = code_topk(gram.cuda(), torch.stack([codes, codes], 1)[:, 1], 20, backend=backend)
    other = code_topk(gram, codes.view(torch.uint64), 20)
    assert torch.equal(found.indices, other.indices) and torch.equal(found.values, other.values)


@both
@pytest.mark.parametrize("place", [3, 40_000, 199_999])
def test_bad_codes_are_named(backend, place):
    gram, codes = problem(24, 200_000)
    codes[place:] = -1
    with pytest.raises(ValueError, match=rf"got 18446744073709551615 at \[{place}\]$"):
        code_topk(gram, codes, 5, backend=backend)


@both
def test_codes_in_bounded_memory(backend):
    gram, codes = problem(64, 1 << 22)
    codes = codes.repeat(16)
    code_topk(gram, codes[:1000], 10, backend=backend)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = code_topk(gram, codes, 32, backend=backend)
    assert torch.cuda.max_memory_allocated() - before < 50 << 20
    assert (found.indices[:16].diff() == 1 << 22).all()  # every code is there sixteen times


@both
def test_codes_past_2_to_the_31_bytes(backend):
    """The best code of all, last of 2.5 GB; the second best comes first, so that few of the rest may count."""
    gram, codes = problem(24, 1 << 20, [11])
    best, second = code_topk(gram, codes.unique(), 2, backend=backend).indices
    worst = code_topk(gram, codes.unique(), 1, largest=False, backend=backend).indices
    many = codes.unique()[worst].repeat(310_000_000)
    many[0], many[-1] = codes.unique()[second], codes.unique()[best]
    assert code_topk(gram, many, 1, backend=backend).indices.item() == len(many) - 1
