"""Search over codes: the items of largest or smallest influence in an encoded ensemble."""

import torch

from .. import backends, threads
from ..backends import Backend
from ..reference import code_topk as reference
from ._arguments import check_integer
from ._code_filter import factor, integers, limits, tables
from ._codes import Codes, check_codes, check_gram, first_bad, refuse_bad, refuse_code
from ._topk import TopK

PIECE = 1 << 20  # codes of another stride that are copied at a time
FIRST, MOST = 1 << 14, 1 << 25  # codes of the first launch and of the largest
TOGETHER = 1 << 13  # eights of codes whose exact values are formed together


def code_topk(gram, codes, k, *, largest=True, backend=None) -> TopK:
    """Find the k codes of largest influence norm among N.

    Bit i of a code says whether ensemble member i saw the item. Removing the item leaves the members that did not see it,
    which changes the members' weights by w = (1 - c) / (n - h) - 1 / n, with c the bits and h how many are set, and the
    sample by J w to first order:

        ``value(c) = |J w| = sqrt(w^T G w)``,  ``G = J^T J``.

    Args:
        gram: G, [n, n] float64 with n from 2 to 64, not centred (the entries of w sum to 0, so that what the members have
            in common falls out); symmetric to 1e-6 of its largest entry, of which the symmetric part counts.
        codes: [N] uint64, or int64 of the same bits; a torch tensor, NumPy array or CuPy array, any strides. Or the path
            of a .npy file of little-endian uint64 [N], which is memory-mapped. Repeated codes are allowed; codes may
            differ in h, from 0 to n - 1.
        k: 0 to N.
        largest: False for the k smallest.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        TopK: ``values`` [k] float64, best first, and ``indices`` [k] int64, equal squares by lowest index; of the kind and
        on the device of ``codes``, torch tensors on the CPU for a file. Exact: HGH (H centres) is formed without rounding
        and then rounded to multiples of a power of two, to 2^-48 of its largest entry or less, and sums of those are exact.
        So value^2 is right to n^2 2^-48 of that entry over (n - h)^2, the rest of the arithmetic to 2^-51 of itself, and
        both arrays have the same bits on every backend and do not depend on threads, chunks or the SIMD level. Where the
        entries of 2 n^2 HGH have at most 49 bits, as those of small integers do, nothing is rounded before the last
        division. A code and its complement with h = n / 2 tie. A form that rounding makes negative counts as 0.

    Raises:
        TypeError, ValueError: an argument is not as above; a code has all n bits set, so that no member is left, or one
            from n on. The error names its index.
        OSError: the file cannot be read.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: 20 MB and 64 k bytes for each thread, beside pages of the file that the system may drop; CUDA and Triton,
    50 MB and 50 k bytes. A Gram matrix of which all codes tie costs time: their exact forms are compared one by one.

    Source: Dai and Gifford, "Training data attribution for diffusion models", 2023: ablation of an encoded ensemble and its
    approximation by a Jacobian.
    """
    op = "code_topk"
    gram = check_gram(op, gram)
    codes, restore = check_codes(op, codes)
    k = check_integer(op, "k", k, 0, len(codes.bits))
    if not isinstance(largest, bool):
        raise TypeError(f"{op}: largest must be a bool, got {type(largest).__name__}")
    chosen = backends.choose(op, backend, gram, codes, k, largest)
    values, indices = chosen.run(gram, codes, k, largest)
    return TopK(restore(values), restore(indices))


def _run_reference(gram: torch.Tensor, codes: Codes, k: int, largest: bool):
    refuse_bad("code_topk", codes.bits, len(gram))
    if k == 0:
        return codes.bits.new_empty(0, dtype=torch.float64), codes.bits.new_empty(0)
    return reference.code_topk(gram, codes.bits, k, largest)


def _run_cpu(gram: torch.Tensor, codes: Codes, k: int, largest: bool):
    if k == 0:
        return _run_reference(gram, codes, k, largest)
    matrix, exponent = reference.centred_gram(gram)
    form = factor(matrix)
    rounded = tables(form)
    values, indices = torch.empty(k, dtype=torch.float64), torch.empty(k, dtype=torch.int64)
    found, bits = 0, codes.bits
    step = len(bits) if bits.is_contiguous() else PIECE
    for first in range(0, len(bits), max(step, 1)):
        piece = bits[first : first + step].contiguous()
        found, bad = backends.extension().code_topk_cpu(
            piece.data_ptr(), len(piece), first, len(gram), matrix.data_ptr(), rounded.integers.data_ptr(),
            rounded.scale, rounded.error, form.slack, largest, k, found, values.data_ptr(), indices.data_ptr(),
            threads.usable(torch.get_num_threads()),
        )  # fmt: skip
        if bad >= 0:
            refuse_code("code_topk", int(bits[bad]), bad, len(gram))
    return reference.norms(values, len(gram), exponent), indices


def _run_flagged(flag):
    """A backend made of a kernel that flags the codes that may count.

    Args:
        flag: ``(codes [N] int64, n, rows, limits, largest, flags)`` writes flags; csrc/code_topk.h says what.
    """

    def run(gram: torch.Tensor, codes: Codes, k: int, largest: bool):
        if k == 0:
            return _run_reference(gram, codes, k, largest)
        n, device, bits = len(gram), codes.bits.device, codes.bits
        matrix, exponent = reference.centred_gram(gram)
        form = factor(matrix)
        rounded = integers(form)
        rows, matrix = rounded.integers.to(device), matrix.to(device)
        best = torch.empty(0, dtype=torch.float64, device=device), torch.empty(0, dtype=torch.int64, device=device)
        first, step = 0, FIRST
        while first < len(bits):
            piece = bits[first : first + step].contiguous()
            flags = torch.full((-(-len(piece) // 8),), 255, dtype=torch.uint8, device=device)
            if len(best[0]) == k:
                bounds = limits(form, rounded, best[0][-1].item(), largest).to(device)
                flag(piece, n, rows, bounds, largest, flags)
            for places in _places(flags, len(piece)):
                best = _take(best, matrix, piece, places, first, k, largest)
            first, step = first + step, min(4 * step, MOST)
        return reference.norms(best[0], n, exponent), best[1]

    return run


def _places(flags, num_codes: int):
    """The flagged places, in order, some at a time."""
    eight = torch.arange(8, device=flags.device)
    for bytes_ in flags.nonzero()[:, 0].split(TOGETHER):
        places = (8 * bytes_[:, None] + eight)[((flags[bytes_].int()[:, None] >> eight) & 1).bool()]
        yield places[places < num_codes]


def _take(best, matrix, piece, places, first: int, k: int, largest: bool):
    """The best with the codes at these places, whose exact values are formed."""
    codes = piece[places]
    bad = first_bad(codes, len(matrix))
    if bad is not None:
        refuse_code("code_topk", int(codes[bad]), first + int(places[bad]), len(matrix))
    values = reference.relative_squares(matrix, codes)
    return reference.merge(best, values, first + places, k, largest)


def _flag_cuda(codes, n, rows, bounds, largest, flags):
    stream = torch.cuda.current_stream(codes.device).cuda_stream
    backends.extension().code_topk_cuda(
        codes.data_ptr(), len(codes), n, rows.data_ptr(), bounds.data_ptr(), largest, flags.data_ptr(),
        stream, codes.device.index,
    )  # fmt: skip


def _flag_triton(codes, n, rows, bounds, largest, flags):
    from ..triton_kernels.code_topk import code_topk as launch

    launch(codes, n, rows, bounds, largest, flags)


def _on_the_cpu(gram, codes, k, largest):
    return [] if codes.bits.device.type == "cpu" else [f"codes is on {codes.bits.device}, this backend needs cpu"]


def _on_a_gpu(name):
    def reasons(gram, codes, k, largest):
        wanted = "cpu" if name == "triton" and backends.triton_interpreted() else "cuda"
        if codes.bits.device.type == wanted:
            return backends.capability_unsupported(codes.bits.device)
        return [f"codes is on {codes.bits.device}, this backend needs {wanted}"]

    return reasons


backends.register(
    "code_topk",
    [
        Backend("reference", _run_reference, backends.always, lambda *_: []),
        Backend("cpu", _run_cpu, backends.cpu_unavailable("code_topk_cpu"), _on_the_cpu),
        Backend("cuda", _run_flagged(_flag_cuda), backends.cuda_unavailable("code_topk_cuda"), _on_a_gpu("cuda")),
        Backend("triton", _run_flagged(_flag_triton), backends.triton_unavailable, _on_a_gpu("triton")),
    ],
)
