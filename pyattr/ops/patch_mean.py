"""The mean of a bank's pixels under the softmax over its patches: the analytic local denoiser."""

from typing import NamedTuple

import torch

from .. import backends, threads
from ..backends import Backend
from ..reference import patch_mean as reference
from ._patches import Part, Problem, address_and_sizes, check_problem, parts, unsupported

WAVE = 1024  # images whose statistics are kept at a time


class PatchMean(NamedTuple):
    """What :func:`patch_mean` returns."""

    mean: torch.Tensor  # [Q, C, H', W']
    log_normaliser: torch.Tensor  # [Q, H', W'] float64


def patch_mean(queries, bank, *, patch_size, sigma, scale=1.0, border="class", backend=None) -> PatchMean:
    """Average the centre pixels of the bank's patches, each weighted by how near it is to the query's patch.

    ``mean[q, :, u] = sum over n and v of w(u, n, v) * y_n[centre of v]``, with the weights w of
    :func:`pyattr.ops.patch_topk` and the pixels themselves, not times ``scale``. The centre of a window of side p is at
    offset (p - 1) // 2 from its first row and column. With x_t = sqrt(alpha-bar) x_0 + sigma noise as the query and
    ``scale = sqrt(alpha-bar)`` this is the best estimate of x_0 from each pixel's surroundings alone, for the bank as
    the distribution of images.

    Args:
        queries: [Q, C, H, W] float16, bfloat16, float32 or float64 (reference only); a torch tensor, NumPy array or
            CuPy array, any strides.
        bank: [N, C, H, W] uint8 or floating point, or a re-iterable of such chunks, as in
            :func:`pyattr.ops.patch_topk`. Of the queries' size, but with ``border="inside"`` of any.
        patch_size: p, 1 to 511; with a border it may exceed the image.
        sigma: a positive number, or one for each query [Q]; 1e-15 to 1e15.
        scale: multiplies the bank's pixels in the distance; 0, or of a magnitude that float32 holds at full precision.
        border: "class" and "zero" as in :func:`pyattr.ops.patch_topk`; "inside": only windows wholly inside their
            image, all of which match, H' = H - p + 1 (a query padded circularly by (p - 1) / 2 beforehand gives the
            equivariant denoiser).
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        PatchMean: ``mean`` [Q, C, H', W'] float32 (float64 for float64 queries) and ``log_normaliser`` [Q, H', W']
        float64, of the kind and on the device of ``queries``; not differentiable. On the CPU the bits do not depend on
        the thread count, on how the bank is chunked, on the other queries or on the SIMD level. NaN in a query or in
        the bank makes both NaN wherever its patches may match; an infinite pixel matches nothing, but another of its
        sign, which gives NaN. Distances are float32 (float64 in the reference): beyond 3.4e38, which takes pixels some
        1e19 apart, they are infinite and match nothing. The mean of nothing, as of an empty bank, is NaN.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.
        RuntimeError: the bank changed between two walks.

    Extra memory: 8 + 4 C bytes per position and image for 1024 images at a time (20 MB at 32 x 32 and C = 3), at most
    96 MiB or 64 positions. CPU, per thread 7 MB and 32 (2 C + 3) bytes for each pixel of an image with p - 1 more
    rows and columns (twice that with AVX-512): 8 MB at 32 x 32; CUDA and Triton, 0.1 GB at 32 x 32, at most 0.3 GB.
    Reference, 0.2 GB and the patches of 64 images in float64.

    Source: Kamb and Ganguli, "An analytic theory of creativity in convolutional diffusion models", 2024.
    """
    op = "patch_mean"
    problem, restore = check_problem(
        op, queries, bank, patch_size, sigma, scale, border, False, borders=("class", "zero", "inside")
    )
    chosen = backends.choose(op, backend, problem)
    if len(problem.queries) == 0 or problem.bank.num_images == 0:
        rows, channels, grid = *problem.queries.shape[:2], problem.geometry.query_grid
        mean = problem.queries.new_empty(rows, channels, grid[0] * grid[1]).fill_(torch.nan)
        log_normaliser = mean.new_empty(rows, grid[0] * grid[1]).fill_(-torch.inf)
    else:
        mean, log_normaliser = chosen.run(problem)
    dtype = torch.float64 if problem.queries.dtype == torch.float64 else torch.float32
    grid = problem.geometry.query_grid
    return PatchMean(*(restore(a.unflatten(-1, grid)) for a in (mean.to(dtype), log_normaliser.double())))


# Backends. All take the problem and give mean [Q, C, U] and log_normaliser [Q, U].


def _run_reference(problem: Problem):
    queries, bank, geometry, sigmas, scale = problem
    return reference.patch_mean(queries, bank, geometry.patch_size, sigmas, scale, geometry.border)


def _run_compiled(statistics, join):
    """A backend made of a kernel that reduces some images and a running sum.

    Args:
        statistics: ``(problem, query [C, H, W] float32, images [n, C, H, W], sigma, part, out)`` writes into out =
            (minima [U, n], sums [U, n], pixels [C, U, n]); csrc/patch_mean.h says what.
        join: ``(minima, sums, pixels, sigma, totals)`` adds to totals = (least [U], total [U], mean [C, U]), float64.
    """

    def run(problem: Problem):
        results = [
            _one_query(statistics, join, problem, query, sigma)
            for query, sigma in zip(problem.queries, problem.sigmas, strict=True)
        ]
        return [torch.stack(columns) for columns in zip(*results, strict=True)]

    return run


def _one_query(statistics, join, problem: Problem, query, sigma: float):
    query = query.to(torch.float32).contiguous()
    grid, channels, device = problem.geometry.query_grid, len(query), query.device
    mean = torch.empty(channels, *grid, dtype=torch.float64, device=device)
    log_normaliser = torch.empty(grid, dtype=torch.float64, device=device)
    wave = min(WAVE, problem.bank.num_images)
    for part in parts(grid, wave * (8 + 4 * channels)):
        positions = part.positions
        totals = [torch.full((positions,), torch.inf, dtype=torch.float64, device=device)]
        totals += [torch.zeros(*s, positions, dtype=torch.float64, device=device) for s in ((), (channels,))]
        for chunk in problem.bank:
            for images in chunk.split(wave) if len(chunk) else ():
                shape = (positions, len(images))
                out = [torch.empty(*s, *shape, dtype=torch.float32, device=device) for s in ((), (), (channels,))]
                statistics(problem, query, images, sigma, part, out)
                join(*out, sigma, totals)
        least, total, sums = totals
        box = (slice(part.row_begin, part.row_end), slice(part.column_begin, part.column_end))
        shape = (part.row_end - part.row_begin, part.column_end - part.column_begin)
        mean[(slice(None), *box)] = (sums / total).unflatten(1, shape)
        log_normaliser[box] = (total.log() - least / (2 * sigma**2)).view(shape)
    return mean.flatten(1), log_normaliser.flatten()


def _addresses(problem: Problem, query, images, sigma: float, part: Part, out):
    """The arguments of the compiled kernels but the last."""
    addresses = (array.data_ptr() for array in out)
    return (*address_and_sizes(query, images, problem, sigma, part), len(images), *addresses)


def _statistics_cpu(problem, query, images, sigma, part, out):
    arguments = _addresses(problem, query, images, sigma, part, out)
    backends.extension().patch_mean_cpu(*arguments, threads.usable(torch.get_num_threads()))


def _join_cpu(minima, sums, pixels, sigma, totals):
    addresses = (array.data_ptr() for array in (minima, sums, pixels))
    backends.extension().patch_mean_join_cpu(
        *addresses, *minima.shape, len(pixels), 1 / (2 * sigma**2), *(total.data_ptr() for total in totals),
        threads.usable(torch.get_num_threads()),
    )  # fmt: skip


def _statistics_cuda(problem, query, images, sigma, part, out):
    module, device = backends.extension(), query.device
    arguments = _addresses(problem, query, images, sigma, part, out)
    size = module.patch_mean_cuda_workspace(*arguments)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    module.patch_mean_cuda(*arguments, workspace.data_ptr(), size, stream, device.index)


def _statistics_triton(problem, query, images, sigma, part, out):
    from ..triton_kernels.patch_mean import patch_mean as launch

    launch(query, images, problem.geometry, problem.scale, sigma, part, *out)


def _join(minima, sums, pixels, sigma, totals):
    """The same in torch."""
    least, total, mean = totals
    nearest = torch.minimum(least, minima.min(1).values.double())
    before = torch.where(
        total == 0, total, torch.exp((nearest - least) / (2 * sigma**2))
    )  # of what there is; at first nothing
    factors = torch.exp((nearest[:, None] - minima.double()) / (2 * sigma**2))  # [U, n]
    total.mul_(before).add_((sums.double() * factors).sum(1))
    mean.mul_(before).add_((pixels.double() * factors).sum(2))
    least.copy_(nearest)


backends.register(
    "patch_mean",
    [
        Backend("reference", _run_reference, backends.always, lambda *_: []),
        Backend(
            "cpu",
            _run_compiled(_statistics_cpu, _join_cpu),
            backends.cpu_unavailable("patch_mean_cpu"),
            unsupported("cpu"),
        ),
        Backend(
            "cuda",
            _run_compiled(_statistics_cuda, _join),
            backends.cuda_unavailable("patch_mean_cuda"),
            unsupported("cuda"),
        ),
        Backend("triton", _run_compiled(_statistics_triton, _join), backends.triton_unavailable, unsupported("triton")),
    ],
)
