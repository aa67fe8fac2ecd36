"""patch_topk: the same bits whatever the chunks, threads and SIMD level; not-a-number, arrays, errors."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patch_images import noisy, pixels

from pyattr import backends, testing
from pyattr.backends import BackendError
from pyattr.ops import _patches, patch_topk

BACKENDS = testing.usable_backends("patch_topk")
FAST = [name for name in BACKENDS if name != "reference"]
CPU = pytest.mark.skipif("cpu" not in BACKENDS, reason="the cpu backend is not built")
LEVELS = [] if isinstance(backends.extension(), str) else backends.extension().simd_levels()


# Same bits


def run(queries, bank, backend, **options):
    """Everything it returns, as one list of tensors."""
    case = {"patch_size": 5, "k": 6, "sigma": 0.4, "scale": 0.9, "return_winners": True, "backend": backend} | options
    found = patch_topk(queries, bank, **case)
    return [found.weights, found.log_normaliser, *found.winners]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("border", ["class", "zero"])
def test_bits_do_not_depend_on_chunks_queries_or_run(backend, border):
    device = testing.device_of(backend)
    bank = pixels(37, 2, 9, 10).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4, 3).to(device)
    whole = run(queries, bank, backend, border=border)
    assert same(run(queries, bank, backend, border=border), whole)
    for sizes in ((1, 36), (8, 8, 8, 13), (5, 0, 32), (20, 17)):
        assert same(run(queries, list(bank.split(sizes)), backend, border=border), whole)
    for q in range(3):
        assert same(run(queries[q : q + 1], bank, backend, border=border), [part[q : q + 1] for part in whole])


@CPU
def test_bits_do_not_depend_on_threads():
    bank = pixels(70, 1, 9, 9)
    queries = noisy(bank, 0.9, 0.4, 2)
    torch.set_num_threads(1)
    one = run(queries, bank, "cpu")
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        assert same(run(queries, bank, "cpu"), one)


@pytest.mark.parametrize("backend", FAST)
def test_uint8_is_the_float_it_stands_for(backend):
    device = testing.device_of(backend)
    bank = pixels(9, 2, 8, 8).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4).to(device)
    wide = ((2 * bank.double() - 255) / 255).float()
    if backend == "cpu":
        assert same(run(queries, bank, backend), run(queries, wide, backend))
    else:
        for found, expected in zip(run(queries, bank, backend), run(queries, wide, backend), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_positions_in_parts(backend, monkeypatch):
    """A bank too large for all positions at once: parts of the positions, each a walk over the bank."""
    device = testing.device_of(backend)
    bank = pixels(20, 1, 12, 11).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4).to(device)
    for border in ("class", "zero"):
        whole = run(queries, bank, backend, border=border)
        for positions in (1, 7, 12, 50, 100):
            monkeypatch.setattr(_patches, "STATISTICS_BYTES", positions * 20 * 16)
            monkeypatch.setattr(_patches, "FEWEST_POSITIONS", 1)
            found = run(queries, bank, backend, border=border)
            monkeypatch.undo()
            torch.testing.assert_close(found[0], whole[0], rtol=1e-6, atol=0)  # parts join in another order
            assert same(found[1:], whole[1:])


@given(height=st.integers(1, 70), width=st.integers(1, 70), budget=st.integers(1, 2**24), each=st.integers(1, 2**20))
def test_parts_cover_every_position_once_and_stay_within_bounds(height, width, budget, each):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_patches, "STATISTICS_BYTES", budget)
        parts = _patches.parts((height, width), each)
    seen = np.zeros((height, width), dtype=int)
    for part in parts:
        seen[part.row_begin : part.row_end, part.column_begin : part.column_end] += 1
        assert part.positions * each <= max(budget, _patches.FEWEST_POSITIONS * each)
    assert (seen == 1).all()


PROGRAM = """
import hashlib, sys, torch
from pyattr import backends, ops
assert backends.extension().simd_level() == sys.argv[1]
digest = hashlib.sha256()
generator = torch.Generator().manual_seed(5)
cases = ((21, 3, 9, 10), 5, "class", False), ((9, 1, 8, 8), 6, "zero", True), ((5, 2, 6, 9), 7, "zero", False)
for shape, patch_size, border, lowres in cases:
    options = dict(patch_size=patch_size, border=border, backend="cpu")
    bank = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    queries = torch.randn(2, *shape[1:], generator=generator)
    for sigma in (0.1, 1.0):
        for k in (2, 9):
            found = ops.patch_topk(queries, bank, k=k, sigma=sigma, lowres=lowres, return_winners=True, **options)
            for array in (found.weights, found.log_normaliser, *found.winners):
                digest.update(array.numpy().tobytes())
        if not lowres:
            for array in ops.patch_mean(queries, bank, sigma=sigma, **options):
                digest.update(array.numpy().tobytes())
print(digest.hexdigest())
"""


@CPU
def test_every_simd_level_gives_the_same_bits():
    digests = set()
    for level in LEVELS:
        command = [sys.executable, "-W", "error", "-c", PROGRAM, level]
        done = subprocess.run(command, env=os.environ | {"PYATTR_SIMD": level}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1 and len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


# Not-a-number and infinity


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_reaches_every_position_that_may_match_it(backend):
    device = testing.device_of(backend)
    bank = torch.randn(9, 1, 8, 8, device=device)
    query = torch.randn(2, 1, 8, 8, device=device)
    query[1, 0, 0, 0] = float("nan")
    found = patch_topk(query, bank, patch_size=3, k=2, sigma=1.0, backend=backend)
    assert found.weights[1].isnan().all() and found.weights[0].isfinite().all()
    bad = found.log_normaliser[1].isnan()
    assert bad[:2, :2].all() and bad.sum() == 4
    bank[4, 0, 0, 7] = float("nan")  # in interior patches, and in those of the upper and the right border
    found = patch_topk(query[:1], bank, patch_size=3, k=2, sigma=1.0, backend=backend)
    bad = found.log_normaliser[0].isnan()
    expected = torch.zeros(8, 8, dtype=torch.bool, device=device)
    expected[0, 1:], expected[:7, 7], expected[1:7, 1:7] = True, True, True
    assert torch.equal(bad, expected) and found.weights.isnan().all()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00155, 0x7FFFFFFF, -0x3FFF00])  # the last has its sign set
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_nan_is_one(backend, bits):
    device = testing.device_of(backend)
    strange = torch.tensor([bits], dtype=torch.int32).view(torch.float32).to(device)
    assert strange.isnan().all()
    bank, query = torch.randn(9, 1, 6, 6, device=device), torch.randn(1, 1, 6, 6, device=device)
    for k in (2, 14):
        for array in (bank, query):
            bad = array.clone()
            bad[0, 0, 2, 2:3] = strange
            arguments = (query, bad) if array is bank else (bad, bank)
            found = patch_topk(*arguments, patch_size=3, k=k, sigma=0.5, scale=0.5, backend=backend)
            assert found.weights.isnan().all() and found.log_normaliser[0, 2, 2].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_pixel_matches_nothing(backend):
    device = testing.device_of(backend)
    bank = torch.randn(9, 1, 6, 6, device=device)
    query = torch.randn(1, 1, 6, 6, device=device)
    bank[4] = float("inf")
    found = patch_topk(query, bank, patch_size=3, k=2, sigma=1.0, backend=backend)
    without = patch_topk(query, bank[[0, 1, 2, 3, 5, 6, 7, 8]], patch_size=3, k=2, sigma=1.0, backend=backend)
    assert found.weights[0, 4] == 0
    torch.testing.assert_close(found.weights[0, [0, 1, 2, 3, 5, 6, 7, 8]], without.weights[0])
    torch.testing.assert_close(found.log_normaliser, without.log_normaliser)
    nothing = patch_topk(query, bank[4:5], patch_size=3, k=2, sigma=1.0, return_winners=True, backend=backend)
    assert nothing.weights.isnan().all() and (nothing.log_normaliser == -float("inf")).all()
    assert nothing.winners.weights.isnan().all()  # 0 of 0


# Arrays


def test_numpy_in_numpy_out():
    bank = pixels(5, 1, 6, 6)
    query = noisy(bank, 0.9, 0.3)
    found = patch_topk(query.numpy(), bank.numpy(), patch_size=3, k=2, sigma=0.3, scale=0.9, return_winners=True)
    expected = patch_topk(query, bank, patch_size=3, k=2, sigma=0.3, scale=0.9, return_winners=True)
    for a, b in zip((*found[:2], *found.winners), (*expected[:2], *expected.winners), strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_array_equal(a, b.numpy())


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_channels_last(backend):
    device = testing.device_of(backend)
    bank = pixels(14, 3, 12, 9).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4, 4).to(device)
    options = {"patch_size": 3, "backend": backend}
    for q, b in (
        (queries[:, :, ::2], bank[:, :, ::2]),
        (queries[:, ::2], bank[:, ::2]),
        (queries.to(memory_format=torch.channels_last), bank.to(memory_format=torch.channels_last)),
        (queries[::2], bank[::3]),
        (queries.flip(0), bank[:1].expand(5, -1, -1, -1)),
    ):
        assert same(run(q, b, **options), run(q.contiguous(), b.contiguous(), **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_negated_or_zero_in_name_only(backend):
    device = testing.device_of(backend)
    bank, queries = torch.randn(5, 1, 6, 6, device=device), torch.randn(2, 1, 6, 6, device=device)
    negated, zero = (
        (torch._neg_view(a) for a in (bank, queries)),
        torch._efficientzerotensor((5, 1, 6, 6), device=device),
    )
    for b, q in zip(negated, (queries, bank), strict=True):
        assert b.is_neg()
        assert same(run(q, b, backend), run(q, b.resolve_neg(), backend))
        assert same(run(b, q, backend), run(b.resolve_neg(), q, backend))
    assert same(run(queries, zero, backend), run(queries, torch.zeros_like(bank), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    device = testing.device_of(backend)
    options = dict(patch_size=3, k=2, sigma=1.0, backend=backend)
    queries, bank = torch.zeros(2, 1, 4, 5, device=device), torch.zeros(3, 1, 4, 5, device=device)
    found = patch_topk(queries[:0], bank, return_winners=True, **options)
    assert found.weights.shape == (0, 3) and found.log_normaliser.shape == (0, 4, 5)
    assert found.winners.positions.shape == (0, 4, 5, 2)
    for none in (bank[:0], [], [bank[:0]]):
        found = patch_topk(queries, none, **options)
        assert found.weights.shape == (2, 0) and (found.log_normaliser == -float("inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sigma_for_each_query(backend):
    device = testing.device_of(backend)
    bank = pixels(5, 1, 6, 6).to(device)
    queries = noisy(bank.cpu(), 0.9, 0.4, 2).to(device)
    both = run(queries, bank, backend, sigma=torch.tensor([0.3, 0.7]))
    for q, sigma in enumerate((torch.tensor(0.3).item(), torch.tensor(0.7).item())):
        assert same(run(queries[q : q + 1], bank, backend, sigma=sigma), [part[q : q + 1] for part in both])


def test_a_bank_is_walked_again_and_must_not_change():
    class Stream:
        """Chunks made anew at every walk, as from a file."""

        def __init__(self, *sizes):
            self.sizes = list(sizes)

        def __iter__(self):
            size = self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]
            yield from bank[:size].split(4)

    bank = pixels(9, 1, 6, 6)
    query = noisy(bank, 0.9, 0.4)
    assert same(run(query, Stream(9), None), run(query, bank, None))
    with pytest.raises(RuntimeError, match="patch_topk: bank changed between two walks: 9 images, then 5"):
        run(query, Stream(9, 5), None)


def test_float64_is_for_the_reference():
    bank, query = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    found = patch_topk(query, bank, patch_size=3, k=1, sigma=1.0)
    assert found.weights.dtype == found.log_normaliser.dtype == torch.float64
    with pytest.raises(BackendError, match=r"queries is torch.float64, this backend takes"):
        patch_topk(query, bank, patch_size=3, k=1, sigma=1.0, backend="cpu")
    with pytest.raises(BackendError, match=r"bank is torch.float64, this backend takes uint8"):
        patch_topk(query.float(), bank, patch_size=3, k=1, sigma=1.0, backend="cpu")


# Errors

QUERY, BANK = torch.zeros(2, 1, 6, 5), torch.zeros(3, 1, 6, 5)
ERRORS = [
    ({"queries": [1.0]}, TypeError, "queries must be a torch tensor, NumPy array or CuPy array, got list"),
    ({"queries": QUERY[0]}, ValueError, "queries must have shape [Q, C, H, W], got [1, 6, 5]"),
    ({"queries": QUERY[:, :0]}, ValueError, "queries must have at least one channel, got [2, 0, 6, 5]"),
    ({"queries": QUERY.int()}, TypeError, "queries must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"queries": QUERY.to_sparse()}, TypeError, "queries must be a dense (strided) tensor"),
    ({"bank": 3}, TypeError, "bank must be an array [N, C, H, W] or a re-iterable of such chunks, got int"),
    ({"bank": (b for b in [BANK])}, TypeError, "bank is walked more than once and must be re-iterable"),
    ({"bank": BANK[0]}, ValueError, "bank must have shape [N, C, H, W], got [1, 6, 5]"),
    ({"bank": BANK.int()}, TypeError, "bank must be uint8, float16, bfloat16, float32 or float64, got torch.int32"),
    ({"bank": BANK[..., 1:]}, ValueError, "bank must have shape [N, 1, 6, 5], got [N, 1, 6, 4]"),
    ({"bank": [BANK, BANK[..., 1:]]}, ValueError, "bank chunks must have one shape, got [1, 6, 5] and [1, 6, 4]"),
    ({"bank": [BANK, 3]}, TypeError, "a chunk of bank must be a torch tensor, NumPy array or CuPy array, got int"),
    ({"patch_size": 0}, ValueError, "patch_size must lie in [1, 511], got 0"),
    ({"patch_size": 3.0}, TypeError, "patch_size must be an integer, got float"),
    ({"k": 0}, ValueError, "k must lie in [1, 4611686018427387904], got 0"),
    ({"k": True}, TypeError, "k must be an integer, got bool"),
    ({"sigma": 0.0}, ValueError, "sigma must lie in [1e-15, 1000000000000000.0], got 0.0"),
    ({"sigma": float("nan")}, ValueError, "sigma must lie in [1e-15, 1000000000000000.0], got nan"),
    ({"sigma": "1"}, TypeError, "sigma must be a real number or one for each query, got str"),
    ({"sigma": [1.0, 1.0, 1.0]}, ValueError, "sigma must be a number or have shape [2], got [3]"),
    ({"scale": float("inf")}, ValueError, "scale must be 0 or of magnitude 2^-126 to 2^128 (float32), got inf"),
    ({"border": "inside"}, ValueError, "border must be one of class, zero, got 'inside'"),
    ({"lowres": 1}, TypeError, "lowres must be a bool, got int"),
    ({"lowres": True}, ValueError, "lowres=True needs an even patch_size, got 3"),
    ({"return_winners": None}, TypeError, "return_winners must be a bool, got NoneType"),
    ({"return_winners": True, "bank": []}, ValueError, "return_winners=True needs a bank of at least one image, got none"),
    ({"backend": "gpu"}, ValueError, "backend must be one of cuda, triton, cpu, reference, got 'gpu'"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "kind", "message"), ERRORS, ids=[message[:40] for _, _, message in ERRORS])
def test_errors_name_the_argument(change, kind, message):
    arguments = {"queries": QUERY, "bank": BANK, "patch_size": 3, "k": 2, "sigma": 1.0} | change
    with pytest.raises(kind) as caught:
        patch_topk(arguments.pop("queries"), arguments.pop("bank"), **arguments)
    assert str(caught.value).startswith(f"patch_topk: {message}")


def test_an_even_patch_needs_two_pixels():
    thin = torch.zeros(1, 1, 1, 5)
    with pytest.raises(ValueError) as caught:
        patch_topk(thin, thin, patch_size=2, k=1, sigma=1.0)
    assert str(caught.value) == (
        "patch_topk: queries must be at least 2 x 2 pixels for patch_size=2 and border='class', got 1 x 5"
    )
