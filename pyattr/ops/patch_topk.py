"""Patch attribution: how much of the softmax over all patches of a bank falls on each image."""

from typing import NamedTuple

import torch

from .. import backends, threads
from ..backends import Backend
from ..reference import patch_topk as reference
from ._arguments import check_integer
from ._patches import Part, Problem, address_and_sizes, check_problem, parts, unsupported


class Winners(NamedTuple):
    """For each position of a query, the patch of the whole bank that is nearest.

    Among patches as near, that of the lowest image, then of the lowest row, then of the lowest column.
    """

    images: torch.Tensor  # [Q, H', W'] int64
    positions: torch.Tensor  # [Q, H', W', 2] int64, row and column
    weights: torch.Tensor  # [Q, H', W'], its share of the softmax


class PatchTopK(NamedTuple):
    """What :func:`patch_topk` returns."""

    weights: torch.Tensor  # [Q, N]
    log_normaliser: torch.Tensor  # [Q, H', W'] float64
    winners: Winners | None = None


def patch_topk(
    queries,
    bank,
    *,
    patch_size,
    k,
    sigma,
    scale=1.0,
    border="class",
    lowres=False,
    return_winners=False,
    backend=None,
) -> PatchTopK:
    """Sum, for each image, the softmax weights of its k best patches at every position of a query.

    With x[u] the p x p window of a query at position u and y_n[v] that of image n at v,

        ``w(u, n, v) = exp(-|x[u] - scale * y_n[v]|^2 / (2 sigma^2)) / Z(u)``,
        ``weights[q, n] = sum over u of the sum of the k largest w(u, n, .)``,

    where Z(u) sums over all images n and all positions v that u may match. Windows have stride 1 and (p - 1) // 2 zeros
    around the image: H' = H and W' = W for odd p, H - 1 and W - 1 for even p.

    Args:
        queries: [Q, C, H, W] float16, bfloat16, float32 or float64 (reference only); a torch tensor, NumPy array or
            CuPy array, any strides.
        bank: [N, C, H, W] uint8 or floating point, of the queries' C, H and W; or a re-iterable of such chunks (a list,
            or any object that can be walked more than once), of any sizes. A uint8 value b stands for (2 b - 255) / 255,
            so in [-1, 1]. Chunks on another device than the queries' are copied there one at a time.
        patch_size: p, 1 to 511; it may exceed the image.
        k: 1 or more; more than an image has patches is all of them, and then the weights of a query sum to its number
            of positions.
        sigma: a positive number, or one for each query [Q]; in units of pixel values, 1e-15 to 1e15.
        scale: multiplies the bank's pixels; sqrt(alpha-bar) for a query noised to a timestep of a diffusion. 0, or of a
            magnitude that float32 holds at full precision.
        border: "class": a patch matches only patches that the border cuts off alike, by as many pixels at the top,
            bottom, left and right; interior patches match all interior ones. "zero": every patch matches every patch,
            zeros beyond the border.
        lowres: compare patches after summing their 2 x 2 blocks, times 1/2 (twice the average, so that the map is
            orthonormal); even p only.
        return_winners: also the nearest patch of each position.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        PatchTopK: ``weights`` [Q, N] float32, ``log_normaliser`` [Q, H', W'] float64, log Z(u) (some -1e4 where sigma
        is small, from which a weight is made by subtraction), and ``winners`` or None: images [Q, H', W'] int64,
        positions [Q, H', W', 2] int64 in the same grid, weights [Q, H', W'] float32. All float64 for float64 queries.
        Of the kind and on the device of ``queries``; not differentiable. On the CPU the bits do not depend on the
        thread count, on how the bank is chunked, on the other queries or on the SIMD level. NaN in a query or in the
        bank makes the normaliser NaN wherever its patches may match, and then all weights of the query; an infinite
        pixel matches nothing, but another of its sign, which gives NaN. Distances are float32 (float64 in the
        reference): beyond 3.4e38, which takes pixels some 1e19 apart, they are infinite and match nothing. Where
        nothing at all matches, the normaliser is -inf and the weights are NaN.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.
        RuntimeError: the bank changed between two walks.

    Extra memory: 12 bytes per image and position (16 with winners) of a part of the positions: 96 MiB, or 64 positions
    if that is more; the bank is walked once for each part, and once before. CPU, per thread 7 MB and 32 (C + 4) bytes
    for each pixel of an image with p - 1 more rows and columns (twice that with AVX-512): 8 MB at 32 x 32; CUDA and
    Triton, 0.1 GB at 32 x 32, at most 0.3 GB. Reference, 0.2 GB and the patches of 64 images in float64.

    Source: the weights are those of the optimal score of a local, border-broken model (Kamb and Ganguli, "An analytic
    theory of creativity in convolutional diffusion models", 2024), summed per training image as nonparametric data
    attribution does.
    """
    op = "patch_topk"
    problem, restore = check_problem(
        op, queries, bank, patch_size, sigma, scale, border, lowres, borders=("class", "zero")
    )
    k = check_integer(op, "k", k, 1, 2**62)
    if not isinstance(return_winners, bool):
        raise TypeError(f"{op}: return_winners must be a bool, got {type(return_winners).__name__}")
    if return_winners and problem.bank.num_images == 0:
        raise ValueError(f"{op}: return_winners=True needs a bank of at least one image, got none")
    chosen = backends.choose(op, backend, problem, k, return_winners)
    if len(problem.queries) == 0 or problem.bank.num_images == 0:
        found = _nothing(problem, return_winners)
    else:
        found = chosen.run(problem, k, return_winners)
    dtype = torch.float64 if problem.queries.dtype == torch.float64 else torch.float32
    weights, log_normaliser, *winners = found
    grid = problem.geometry.query_grid
    result = PatchTopK(restore(weights.to(dtype)), restore(log_normaliser.double().unflatten(1, grid)))
    if not return_winners:
        return result
    images, positions, shares = (part.unflatten(1, grid) for part in winners)
    width = problem.geometry.bank_grid[1]
    positions = torch.stack([positions // width, positions % width], dim=-1)
    return result._replace(winners=Winners(restore(images), restore(positions), restore(shares.to(dtype))))


# Backends. All take (problem, k, return_winners) and give weights [Q, N], log_normaliser [Q, U] and, where they are
# wanted, the winners' images, flat positions and weights, each [Q, U].


def _nothing(problem: Problem, return_winners: bool):
    """No query, or no image: an empty sum has the logarithm -inf."""
    rows, height, width = len(problem.queries), *problem.geometry.query_grid
    like = problem.queries.new_empty
    log_normaliser = like((rows, height * width)).fill_(-torch.inf)
    winners = [log_normaliser.long(), log_normaliser.long(), log_normaliser] if return_winners else []
    return [like((rows, problem.bank.num_images)).zero_(), log_normaliser, *winners]


def _run_reference(problem: Problem, k: int, return_winners: bool):
    queries, bank, geometry, sigmas, scale = problem
    return reference.patch_topk(
        queries, bank, geometry.patch_size, k, sigmas, scale, geometry.border, geometry.lowres, return_winners
    )


def _run_compiled(statistics, join):
    """A backend made of a kernel that reduces one chunk and a sum over all images.

    Args:
        statistics: ``(problem, k, query [C, H, W] float32, images [n, C, H, W], sigma, part, out)`` writes into out =
            (minima, sums, tops, nearest or None), each [U, n] of a wider array; csrc/patch_topk.h says what.
        join: ``(minima, sums, tops, sigma, weights, nearest_weights)`` of the whole arrays [U, N] gives log_normaliser
            [U] float64, adds to weights [N] float64 and writes nearest_weights [U] float64, which may be None.
    """

    def run(problem: Problem, k: int, return_winners: bool):
        results = [
            _one_query(statistics, join, problem, k, query, sigma, return_winners)
            for query, sigma in zip(problem.queries, problem.sigmas, strict=True)
        ]
        return [torch.stack(columns) for columns in zip(*results, strict=True)]

    return run


def _one_query(statistics, join, problem: Problem, k: int, query, sigma: float, return_winners: bool):
    query = query.to(torch.float32).contiguous()
    grid, num_images, device = problem.geometry.query_grid, problem.bank.num_images, query.device
    weights = torch.zeros(num_images, dtype=torch.float64, device=device)
    whole = [torch.empty(grid, dtype=torch.float64, device=device) for _ in range(2)]  # log Z, winners' weights
    where = [torch.empty(grid, dtype=torch.int64, device=device) for _ in range(2)]  # winners' images and positions
    for part in parts(grid, num_images * (16 if return_winners else 12)):
        box = (slice(part.row_begin, part.row_end), slice(part.column_begin, part.column_end))
        shape = (part.row_end - part.row_begin, part.column_end - part.column_begin)
        minima, sums, tops = (
            torch.empty(part.positions, num_images, dtype=torch.float32, device=device) for _ in range(3)
        )
        nearest = torch.empty(part.positions, num_images, dtype=torch.int32, device=device) if return_winners else None
        first = 0
        for images in problem.bank:
            out = [a if a is None else a[:, first : first + len(images)] for a in (minima, sums, tops, nearest)]
            if len(images):
                statistics(problem, k, query, images, sigma, part, out)
            first += len(images)
        shares = torch.empty(part.positions, dtype=torch.float64, device=device) if return_winners else None
        whole[0][box] = join(minima, sums, tops, sigma, weights, shares).view(shape)
        if return_winners:
            for target, values in zip((*where, whole[1]), (*_winners(minima, nearest), shares), strict=True):
                target[box] = values.view(shape)
    results = [weights, whole[0].flatten()]
    return [*results, *(w.flatten() for w in (*where, whole[1]))] if return_winners else results


def _winners(minima, nearest):  # [U, N], [U, N] -> 2 x [U]
    """Of each position the nearest image, and where in it, some positions at a time."""
    index = torch.arange(minima.shape[1], device=minima.device)
    rows = max(1, (1 << 20) // len(index))
    images, positions = [], []
    for near, places in zip(minima.split(rows), nearest.split(rows), strict=True):
        # A NaN equals nothing.
        image = (
            index.where(near == near.min(1, keepdim=True).values, len(index)).min(1).values.clamp(max=len(index) - 1)
        )
        images.append(image)
        positions.append(places.gather(1, image[:, None])[:, 0].long())
    return torch.cat(images), torch.cat(positions)


def _addresses(problem: Problem, k: int, query, images, sigma: float, part: Part, out):
    """The arguments of the compiled kernels but the last."""
    addresses = [0 if a is None else a.data_ptr() for a in out]
    return (*address_and_sizes(query, images, problem, sigma, part), out[0].stride(0), k, *addresses)


def _statistics_cpu(problem, k, query, images, sigma, part, out):
    arguments = _addresses(problem, k, query, images, sigma, part, out)
    backends.extension().patch_topk_cpu(*arguments, threads.usable(torch.get_num_threads()))


def _join_cpu(minima, sums, tops, sigma, weights, nearest_weights):
    log_normaliser = torch.empty(len(minima), dtype=torch.float64)
    shares = 0 if nearest_weights is None else nearest_weights.data_ptr()
    addresses = (array.data_ptr() for array in (minima, sums, tops))
    backends.extension().patch_join_cpu(
        *addresses, *minima.shape, 1 / (2 * sigma**2), log_normaliser.data_ptr(), shares, weights.data_ptr(),
        threads.usable(torch.get_num_threads()),
    )  # fmt: skip
    return log_normaliser


def _statistics_cuda(problem, k, query, images, sigma, part, out):
    module, device = backends.extension(), query.device
    arguments = _addresses(problem, k, query, images, sigma, part, out)
    size = module.patch_topk_cuda_workspace(*arguments)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    module.patch_topk_cuda(*arguments, workspace.data_ptr(), size, stream, device.index)


def _statistics_triton(problem, k, query, images, sigma, part, out):
    from ..triton_kernels.patch_topk import patch_topk as launch

    launch(query, images, problem.geometry, problem.scale, sigma, part, k, *out)


def _join(minima, sums, tops, sigma, weights, nearest_weights):
    """The sum over images in torch, some positions at a time."""
    log_normaliser = torch.empty(len(minima), dtype=torch.float64, device=minima.device)
    rows = max(1, (1 << 20) // minima.shape[1])
    for u in range(0, len(minima), rows):
        piece = slice(u, u + rows)
        least = minima[piece].min(1, keepdim=True).values.double()
        factors = torch.exp((least - minima[piece].double()) / (2 * sigma**2))
        total = (sums[piece].double() * factors).sum(1, keepdim=True)
        log_normaliser[piece] = (total.log() - least / (2 * sigma**2))[:, 0]
        weights += (tops[piece].double() * factors / total).sum(0)
        if nearest_weights is not None:
            # The largest float stands for infinity: of nothing in sight 0 / 0.
            nearest_weights[piece] = ((least < torch.finfo(torch.float32).max) / total)[:, 0]
    return log_normaliser


backends.register(
    "patch_topk",
    [
        Backend("reference", _run_reference, backends.always, lambda *_: []),
        Backend(
            "cpu",
            _run_compiled(_statistics_cpu, _join_cpu),
            backends.cpu_unavailable("patch_topk_cpu"),
            unsupported("cpu"),
        ),
        Backend(
            "cuda",
            _run_compiled(_statistics_cuda, _join),
            backends.cuda_unavailable("patch_topk_cuda"),
            unsupported("cuda"),
        ),
        Backend("triton", _run_compiled(_statistics_triton, _join), backends.triton_unavailable, unsupported("triton")),
    ],
)
