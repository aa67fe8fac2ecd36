"""Search over codes: the items of largest or smallest influence in an encoded ensemble."""

import torch

from .. import backends
from ..backends import Backend
from ..reference import code_topk as reference
from ._arguments import check_integer
from ._codes import Codes, check_codes, check_gram, refuse_bad
from ._topk import TopK


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
        TopK: ``values`` [k] float64, best first, and ``indices`` [k] int64, ties by lowest index; of the kind and on the
        device of ``codes``, torch tensors on the CPU for a file. Exact: HGH (H centres) is formed without rounding and
        then rounded to multiples of a power of two, to 2^-48 of its largest entry or less, and sums of those are exact.
        So value^2 is right to n^2 2^-48 of that entry over (n - h)^2, the rest of the arithmetic to 2^-51 of itself, and
        both arrays have the same bits on every backend and do not depend on threads or chunks. Where the entries of
        2 n^2 HGH have at most 49 bits, as those of small integers do, nothing is rounded before the square root. A code
        and its complement with h = n / 2 tie. A form that rounding makes negative counts as 0.

    Raises:
        TypeError, ValueError: an argument is not as above; a code has all n bits set, so that no member is left, or one
            from n on. The error names its index.
        OSError: the file cannot be read.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: 20 MB, beside pages of the file that the system may drop.

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
    return reference.code_topk(gram, codes.bits, k, largest)


backends.register(
    "code_topk",
    [
        Backend("reference", _run_reference, backends.always, lambda *_: []),
    ],
)
