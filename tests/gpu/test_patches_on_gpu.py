"""The patch operations on a real GPU, CUDA and Triton: what the emulator and the interpreter cannot show."""

import on_gpu
import pytest
import torch

from pyattr.ops import patch_mean, patch_topk

both = on_gpu.both("patch_topk")
needs_cuda = on_gpu.needs("patch_topk", "cuda")


def images_of(count, channels, height, width, dtype=torch.uint8, seed=0):
    """Smooth images with some grain, so that a patch has neighbours that are near and many that are not."""
    generator = torch.Generator("cuda").manual_seed(seed)
    coarse = torch.randn(count, channels, 4, 4, device="cuda", generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    grain = torch.randn(count, channels, height, width, device="cuda", generator=generator)
    pixels = ((0.5 * smooth + 0.03 * grain).clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return pixels if dtype == torch.uint8 else (pixels.double() / 127.5 - 1).to(dtype)


def queries_of(bank, count, variance):
    images = bank[:count].double() / 127.5 - 1 if bank.dtype == torch.uint8 else bank[:count].double()
    return ((1 - variance) ** 0.5 * images + variance**0.5 * torch.randn_like(images)).float()


def options_of(variance, **options):
    return {"sigma": variance**0.5, "scale": (1 - variance) ** 0.5, **options}


def compare(backend, queries, bank, tolerance, **options):
    found = patch_topk(queries, bank, return_winners=True, backend=backend, **options)
    expected = patch_topk(queries.double(), bank, return_winners=True, backend="reference", **options)
    assert (found.log_normaliser - expected.log_normaliser).abs().max() <= tolerance
    windows = expected.log_normaliser[0].numel()
    assert (found.weights - expected.weights).abs().sum() / 2 <= 1e-3 * windows * len(queries)  # total variation
    # A patch as near but for rounding may win in its place.
    assert (found.winners.weights - expected.winners.weights).abs().max() <= 10 * tolerance + 1e-6
    same = (found.winners.images == expected.winners.images) & (
        found.winners.positions == expected.winners.positions
    ).all(-1)
    assert same.float().mean() >= 0.99
    return found


# (C, H, W, p, lowres, border)
CASES = [
    (3, 32, 32, 7, False, "class"),
    (3, 32, 32, 7, False, "zero"),
    (3, 32, 32, 15, False, "class"),
    (3, 32, 32, 14, True, "class"),
    (3, 32, 32, 10, True, "zero"),
    (1, 28, 28, 5, False, "class"),
    (3, 64, 64, 8, False, "class"),
    (4, 9, 40, 12, False, "class"),
    (1, 130, 140, 3, False, "class"),
    (5, 3, 4, 9, False, "zero"),
    (1, 1, 1, 1, False, "class"),
]


@both
@pytest.mark.parametrize(("channels", "height", "width", "patch_size", "lowres", "border"), CASES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_values(backend, channels, height, width, patch_size, lowres, border, dtype):
    bank = images_of(3 if height > 100 else 20, channels, height, width, dtype)
    queries = queries_of(bank, 1, 0.05)
    compare(backend, queries, bank, 1e-3, patch_size=patch_size, k=10, lowres=lowres, border=border, **options_of(0.05))


@both
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize(("variance", "bound"), [(2.2e-4, 2e-3), (2.2e-3, 3e-4), (0.105, 1e-4), (0.92, 1e-4)])
def test_exponents_at_every_noise(backend, dtype, variance, bound):
    """The bounds are those of a difference in float32, as far as the result, itself float32 and about 100, can show them."""
    bank = images_of(100, 3, 32, 32, dtype)
    compare(backend, queries_of(bank, 2, variance), bank, bound, patch_size=7, k=10, **options_of(variance))


@both
@pytest.mark.parametrize("k", [1, 2, 100, 675, 676, 10**6])
def test_every_k(backend, k):
    bank = images_of(10, 3, 32, 32)
    queries = queries_of(bank, 1, 0.3)
    found = compare(backend, queries, bank, 1e-4, patch_size=7, k=k, **options_of(0.3))
    if k > 676:
        torch.testing.assert_close(found.weights.sum(), torch.tensor(1024.0, device="cuda"), rtol=1e-5, atol=0)


@both
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_bits_do_not_depend_on_chunks_repetition_or_layout(backend, dtype):
    bank = images_of(300, 3, 32, 32, dtype)
    queries = queries_of(bank, 2, 0.1)
    options = options_of(0.1, patch_size=7, k=10, backend=backend, return_winners=True)
    whole = patch_topk(queries, bank, **options)
    last = bank.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for same in (bank, last, [bank[:1], bank[1:1], bank[1:130], bank[130:]], bank.cpu()):
        found = patch_topk(queries, same, **options)
        assert torch.equal(found.weights, whole.weights)
        assert torch.equal(found.log_normaliser, whole.log_normaliser)
        assert all(map(torch.equal, found.winners, whole.winners))
    alone = patch_topk(queries[1:], bank, **options)
    assert torch.equal(alone.weights[0], whole.weights[1])


@both
def test_ties_and_duplicates(backend):
    bank = torch.full((4, 3, 32, 32), 100, dtype=torch.uint8, device="cuda")
    found = patch_topk(torch.zeros(1, 3, 32, 32, device="cuda"), bank, patch_size=7, k=5, sigma=0.2, backend=backend)
    # 676 interior windows meet 4 * 676; 12 * 26 on edges 4 * 26 each; 36 in corners 4 each.
    expected = torch.full((1, 4), (5 + 12 * 5 + 36) / 4, device="cuda")
    torch.testing.assert_close(found.weights, expected, rtol=1e-5, atol=0)


@both
@pytest.mark.parametrize("border", ["class", "zero", "inside"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16], ids=str)
def test_mean(backend, border, dtype):
    bank = images_of(40, 3, 32, 32, dtype)
    queries = queries_of(bank, 2, 0.2)
    options = options_of(0.2, patch_size=5, border=border)
    found = patch_mean(queries, bank, backend=backend, **options)
    expected = patch_mean(queries.double(), bank, backend="reference", **options)
    assert (found.mean - expected.mean).abs().max() <= 1e-4
    assert (found.log_normaliser - expected.log_normaliser).abs().max() <= 1e-4


@both
def test_runs_on_the_callers_stream(backend):
    bank = images_of(50, 3, 32, 32)
    ready = queries_of(bank, 1, 0.1)
    queries = torch.zeros_like(ready)
    options = options_of(0.1, patch_size=7, k=10, backend=backend)
    expected = patch_topk(ready, bank, **options).weights
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        queries.copy_(ready)
        out = patch_topk(queries, bank, **options).weights
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@both
def test_memory_is_bounded(backend):
    """5000 images: neither all their planes nor all distances at once."""
    bank = images_of(5000, 3, 32, 32)
    queries = queries_of(bank, 1, 0.1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    patch_topk(queries, bank, backend=backend, **options_of(0.1, patch_size=7, k=10))
    assert torch.cuda.max_memory_allocated() - before < 500 << 20


@pytest.mark.gpu
@needs_cuda
def test_backends_agree():
    bank = images_of(500, 3, 32, 32)
    queries = queries_of(bank, 1, 0.1)
    options = options_of(0.1, patch_size=7, k=10)
    found = {name: patch_topk(queries, bank, backend=name, **options) for name in ("cuda", "triton")}
    found["cpu"] = patch_topk(queries.cpu(), bank.cpu(), backend="cpu", **options)
    for name in ("triton", "cpu"):
        torch.testing.assert_close(found["cuda"].weights, found[name].weights.cuda(), rtol=1e-3, atol=1e-3)
