"""Attention together with its derivatives along K tangents; the attention itself is computed once."""

from typing import NamedTuple

import torch

from .. import arrays, backends, threads
from ..backends import Backend
from ..reference import attention_jvp as reference
from ._arguments import check_scale

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # pyattr::Dtype
SHAPES = {"query": "[B, H, L, E]", "key": "[B, H, S, E]", "value": "[B, H, S, V]"}


class AttentionJvp(NamedTuple):
    """What :func:`attention_jvp` returns."""

    y: torch.Tensor  # [B, H, L, V]
    y_dot: torch.Tensor  # [K, B, H, L, V]


class Problem(NamedTuple):
    """Checked arguments that every backend takes."""

    query: torch.Tensor  # [B, H, L, E]
    key: torch.Tensor  # [B, H, S, E]
    value: torch.Tensor  # [B, H, S, V]
    query_dot: torch.Tensor | None  # [K, B, H, L, E]
    key_dot: torch.Tensor | None  # [K, B, H, S, E]
    value_dot: torch.Tensor | None  # [K, B, H, S, V]
    mask: torch.Tensor | None  # [B, H, L, S], bool or float
    causal: bool
    scale: float

    @property
    def num_tangents(self) -> int:
        return next(len(t) for t in (self.query_dot, self.key_dot, self.value_dot) if t is not None)

    def outputs(self):
        """y and y_dot, not yet written."""
        shape = (*self.query.shape[:3], self.value.shape[3])
        return self.query.new_empty(shape), self.query.new_empty((self.num_tangents, *shape))


def attention_jvp(
    query, key, value, query_dot, key_dot, value_dot, *, mask=None, causal=False, scale=None, backend=None
) -> AttentionJvp:
    """Attention and its derivatives along K tangents of queries, keys and values.

    With ``S = scale q k^T + mask``, ``P = softmax(S)`` and, for each tangent, ``S_dot = scale (q_dot k^T + q
    k_dot^T)``,

        ``y = P v``,  ``y_dot = (P * (S_dot - rowsum(P * S_dot))) v + P v_dot``.

    P is computed once for all tangents. A pair that the mask forbids has no weight and no tangent, whatever its key; a
    query that may attend to nothing gives zeros, as torch's ``scaled_dot_product_attention`` does.

    Args:
        query: [B, H, L, E] float16, bfloat16, float32 or float64 (reference only); a torch tensor, NumPy array or CuPy
            array, any strides.
        key: [B, H, S, E], of the queries' dtype and device, like all that follow.
        value: [B, H, S, V].
        query_dot: [K, B, H, L, E]; None is a tangent of zeros that costs nothing.
        key_dot: [K, B, H, S, E] or None.
        value_dot: [K, B, H, S, V] or None. At least one of the three is given.
        mask: broadcasts to [B, H, L, S]; bool (True: attend) or floating point, added to the scores (-inf: forbidden),
            float64 only with float64 queries. A constant: it has no tangent.
        causal: query i attends to keys 0 to i only; together with a mask, both hold.
        scale: multiplies q k^T; E^-1/2 by default. 0, or of a magnitude that float32 holds at full precision.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        AttentionJvp: ``y`` [B, H, L, V] and ``y_dot`` [K, B, H, L, V], of the queries' dtype, kind and device; not
        differentiable. Products are summed in float32 whatever the dtype, and P stays float32. On cpu, cuda and triton
        a tangent's bits do not depend on the others, on K, on the other heads or on the run, and on the CPU not on the
        thread count or SIMD level. Zero tangents give exact zeros. NaN and inf propagate; a value's even from keys
        that a mask forbids, as 0 * NaN.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: reference, 40 bytes for each of B H L S pairs and float64 copies of one tangent's inputs.

    Source: forward mode of Vaswani et al., "Attention is all you need", 2017, equation 1.
    """
    op = "attention_jvp"
    arguments = {"query": query, "key": key, "value": value}
    arguments |= {"query_dot": query_dot, "key_dot": key_dot, "value_dot": value_dot}
    restore = arrays.to_torch(query, op, "query")[1]
    tensors = {n: None if a is None else arrays.to_torch(a, op, n)[0] for n, a in arguments.items()}
    _check_tensors(op, tensors)
    rows, keys = tensors["query"].shape[:3], tensors["key"].shape[2]
    mask = None if mask is None else _check_mask(op, arrays.to_torch(mask, op, "mask")[0], tensors["query"], keys)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}")
    scale = max(tensors["query"].shape[3], 1) ** -0.5 if scale is None else check_scale(op, scale)
    mask = None if mask is None else mask.expand(*rows, keys)
    detached = (None if t is None else t.detach() for t in (*tensors.values(), mask))
    y, y_dot = torch.ops.pyattr.attention_jvp.default(*detached, causal, scale, backend)
    return AttentionJvp(restore(y), restore(y_dot))


def _check_tensors(op: str, tensors: dict):
    query = tensors["query"]
    if all(tensors[f"{name}_dot"] is None for name in SHAPES):
        raise ValueError(f"{op}: query_dot, key_dot or value_dot must be given, got None for all three")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"{op}: {name} must be a dense (strided) tensor")
        if name == "query" and tensor.dtype not in (*DTYPES, torch.float64):
            raise TypeError(f"{op}: query must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must be {query.dtype} like query, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{op}: {name} must be on {query.device} like query, got {tensor.device}")
        wanted = SHAPES[name] if name in SHAPES else None
        if wanted and tensor.dim() != 4:
            raise ValueError(f"{op}: {name} must have shape {wanted}, got {list(tensor.shape)}")
    batch, heads, _, size = query.shape
    keys = tensors["key"].shape[2]
    for name, last in (("key", size), ("value", tensors["value"].shape[3])):
        wanted, shape = [batch, heads, keys, last], list(tensors[name].shape)
        if name == "key":
            if [*shape[:2], shape[3]] != [batch, heads, size]:
                raise ValueError(f"{op}: key must have shape [{batch}, {heads}, S, {size}], got {shape}")
        elif shape != wanted:
            raise ValueError(f"{op}: value must have shape [{batch}, {heads}, {keys}, V], got {shape}")
    given = {name: t for name, t in tensors.items() if name.endswith("_dot") and t is not None}
    count = None
    for name, tensor in given.items():
        shape, primal = list(tensor.shape), list(tensors[name.removesuffix("_dot")].shape)
        wanted = ["K" if count is None else count, *primal]
        if len(shape) != 5 or shape[1:] != primal or count not in (None, shape[0]):
            raise ValueError(f"{op}: {name} must have shape [{', '.join(map(str, wanted))}], got {shape}")
        count = shape[0]


def _check_mask(op: str, mask: torch.Tensor, query: torch.Tensor, keys: int) -> torch.Tensor:
    """The mask as bool, or as float32 (float64 with float64 queries)."""
    if mask.layout != torch.strided or mask.is_nested:
        raise TypeError(f"{op}: mask must be a dense (strided) tensor")
    if mask.dtype not in (torch.bool, *DTYPES) and not mask.dtype == query.dtype == torch.float64:
        raise TypeError(
            f"{op}: mask must be bool, float16, bfloat16 or float32, or float64 with float64 queries, got {mask.dtype}"
        )
    if mask.device != query.device:
        raise ValueError(f"{op}: mask must be on {query.device} like query, got {mask.device}")
    wanted = (*query.shape[:3], keys)
    fits = mask.dim() <= 4 and all(
        size in (1, full) for size, full in zip(reversed(mask.shape), reversed(wanted), strict=False)
    )
    if not fits:
        raise ValueError(f"{op}: mask must broadcast to {list(wanted)}, got {list(mask.shape)}")
    return mask if mask.dtype in (torch.bool, torch.float64) else mask.to(torch.float32)


# Through torch's dispatcher: `torch.compile`, `make_fx` and fake tensors see one opaque op, and tensors that are
# negated or zero only in name arrive written out.
_LIBRARY = torch.library.Library("pyattr", "FRAGMENT")


def _dispatched(query, key, value, query_dot, key_dot, value_dot, mask, causal, scale, backend):
    problem = Problem(query, key, value, query_dot, key_dot, value_dot, mask, causal, scale)
    return backends.choose("attention_jvp", backend, problem).run(problem)


_LIBRARY.define(
    "attention_jvp(Tensor query, Tensor key, Tensor value, Tensor? query_dot, Tensor? key_dot, Tensor? value_dot, "
    "Tensor? mask, bool causal, float scale, str? backend) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("attention_jvp", _dispatched, "CompositeExplicitAutograd")
torch.library.register_fake("pyattr::attention_jvp", lambda *arguments: Problem(*arguments[:9]).outputs(), lib=_LIBRARY)


# Backends. All take the problem and give y and y_dot.


def _run_reference(problem: Problem):
    return tuple(part.to(problem.query.dtype) for part in reference.attention_jvp(*problem))


def _addresses(problem: Problem, y, y_dot):
    """The arguments of the compiled kernels but the last; a primal has a K stride of 0."""
    query, key, value, *tangents, mask, causal, scale = problem
    operands = [(t.data_ptr(), (0, *t.stride())) for t in (query, key, value)]
    operands += [(0, (0,) * 5) if t is None else (t.data_ptr(), t.stride()) for t in tangents]
    kind = 0 if mask is None else 1 if mask.dtype == torch.bool else 2  # pyattr::MaskKind
    mask_place = (0, 0, (0,) * 4) if mask is None else (mask.data_ptr(), kind, mask.stride())
    sizes = (problem.num_tangents, *query.shape[:3], key.shape[2], query.shape[3], value.shape[3])
    return operands, DTYPES[query.dtype], *mask_place, sizes, causal, scale, y.data_ptr(), y_dot.data_ptr()


def _run_cpu(problem: Problem):
    y, y_dot = problem.outputs()
    backends.extension().attention_jvp_cpu(*_addresses(problem, y, y_dot), threads.usable(torch.get_num_threads()))
    return y, y_dot


def _run_cuda(problem: Problem):
    y, y_dot = problem.outputs()
    device = y.device
    stream = torch.cuda.current_stream(device).cuda_stream
    backends.extension().attention_jvp_cuda(*_addresses(problem, y, y_dot), stream, device.index)
    return y, y_dot


def _run_triton(problem: Problem):
    from ..triton_kernels.attention_jvp import attention_jvp as launch

    y, y_dot = problem.outputs()
    launch(*problem, y, y_dot)
    return y, y_dot


def _unsupported(name: str):
    return lambda problem: backends.placement_unsupported(name, query=problem.query)


backends.register(
    "attention_jvp",
    [
        Backend("reference", _run_reference, backends.always, lambda *_: []),
        Backend("cpu", _run_cpu, backends.cpu_unavailable("attention_jvp_cpu"), _unsupported("cpu")),
        Backend("cuda", _run_cuda, backends.cuda_unavailable("attention_jvp_cuda"), _unsupported("cuda")),
        Backend("triton", _run_triton, backends.triton_unavailable, _unsupported("triton")),
    ],
)
