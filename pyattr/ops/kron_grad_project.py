"""Two-sided projection of a layer's per-sample gradients, which are never formed."""

from dataclasses import dataclass

import torch

from .. import arrays, backends
from ..backends import Backend
from ..reference import kron_grad_project as reference
from . import _two_sided
from ._arguments import check_integer, check_scale
from ._convolution import Convolution, check_convolution, check_images
from ._precision import full_float32
from ._projection import DTYPES
from .sparse_project import MAX_COLUMNS, MAX_PROJ_DIM, sparse_project

OP = "kron_grad_project"
KINDS = ("rademacher", "gaussian", "mask")


@dataclass(frozen=True)
class Job:
    """What is to be computed of acts [B, T, I] or [B, K, C, H, W] and errs: the op's arguments, checked."""

    factor_dims: tuple[int, int]
    convolution: Convolution | None
    bias: bool
    kind: str
    sketch_dim: int | None
    seed: int
    stream: int
    scale: float


def kron_grad_project(
    acts,
    errs,
    factor_dims,
    *,
    kernel_size=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    bias=False,
    kind="rademacher",
    sketch_dim=None,
    seed=0,
    stream=0,
    scale=1.0,
    backend=None,
):
    """Project the rows and the columns of a layer's per-sample weight gradient, from its inputs and output gradients.

    ``Y_b = scale * P_out G_b P_in^T`` with G_b [O, I] the gradient of sample b: ``sum_t errs[b, t] acts[b, t]^T`` for a linear
    layer, the same over patches for a convolution, whose rows are output channels and whose columns are input channels of a
    group, kernel rows and kernel columns. As one vector, Y_b is the Kronecker product of the factors times the gradient. It is
    computed as ``(errs_b P_out^T)^T (acts_b P_in^T)``: no gradient, and for a convolution no patches either (P_in is itself
    a convolution).

    Kinds:
        "rademacher", "gaussian": the entries of `sign_matrix` or `normal_matrix`, P_out of stream ``2 * stream`` and P_in of
            stream ``2 * stream + 1`` of the seed. ``E <Y, Y'> = scale^2 k_out k_in <g, g'>``: ``scale =
            (k_out * k_in) ** -0.5`` keeps inner products. With it, A = G G^T, C = G^T G and n = |g|^2, signs have

                ``k_out k_in Var |Y|^2 = (k_in - 1) v(A) + (k_out - 1) v(C) + 2 n^2 + 3 v(C) - 2 w``,
                ``v(S) = 2 |S|^2 - 2 sum_i S_ii^2``, ``w = sum_i (3 |G_i|^4 - 2 sum_j G_ij^4)``, i over rows,

            so that ``Var |Y|^2 <= 2 n^2 / r * (1 / k_out + 1 / k_in) + 8 n^2 / (k_out k_in)``, where r = n^2 / |A|^2 is the
            gradient's effective rank, from 1 (a linear layer with a single token) to min(O, I). A dense projection as wide has
            at most ``2 n^2 / (k_out k_in)``: the factors need r above about k_out + k_in to be as good.
        "mask": P_out and P_in keep the rows ``mask_indices(O, k_out)`` and the columns ``mask_indices(I, k_in)`` of the same
            streams: ``E <Y, Y'> = scale^2 k_out k_in / (O I) <g, g'>``. Nothing else of the inputs is read.

    Args:
        acts: the layer's inputs, [B, I] or [B, ..., I] with any positions between; for a convolution [B, C, H, W], or
            [B, K, C, H, W] with K maps (timesteps, views) whose gradients add up. float16, bfloat16, float32 or float64
            (reference only); a torch tensor, NumPy array or CuPy array, any strides.
        errs: gradients of the loss with respect to the layer's outputs, of the same kind of array on the same device; [B, O] or
            [B, ..., O]; [B, O, Ho, Wo] or [B, K, O, Ho, Wo].
        factor_dims: (k_out, k_in), each 1 to 2^31 - 1; with "mask" at most O and I.
        kernel_size: of a convolution (nn.Conv2d), a number or a pair; None for a linear layer.
        stride, padding, dilation, groups: of the convolution, numbers or pairs; zeros pad the images. With groups, P_out acts
            on all O rows, and P_in, which all groups share, on the C / groups * kernel entries of a row.
        bias: whether the gradient of the layer's bias is one more column, after the weight's; it counts in I.
        kind: "rademacher", "gaussian" or "mask".
        sketch_dim: if given, Y_b as a vector goes on through `sparse_project` with one nonzero, the seed and the stream, to
            this width, 1 to 2^31. Expectations stay as they are.
        seed: word 0 of the Philox key, in [0, 2^32).
        stream: in [0, 2^31); give every layer its own.
        scale: multiplies the result; 0, or of a magnitude that float32 holds at full precision.
        backend: "reference", "cpu", "cuda", "triton", or None for the first usable.

    Returns:
        [B, k_out * k_in], row-major [k_out, k_in], or [B, sketch_dim]; float32 (float64 for float64 input), of the kind and on
        the device of ``acts``. All backends but the reference convert pieces of float16 and bfloat16 inputs to float32 and use
        the library's float32 products (TF32 and autocast turned off), then `sparse_project` of the same backend. The bits may
        therefore depend on the device, the thread count and the batch. Tested to ``2^-17 * |scale| * sum_t sum_o |errs| sum_i
        |acts|`` (times 40 for normal factors) against the float64 definition. A NaN or an infinity leaves no output of its
        sample finite (with "mask", none that keeps its row or column) and does not reach other samples.
        Differentiable with respect to both inputs, in both modes and any order.

    Raises:
        TypeError, ValueError: an argument is not as above.
        BackendError: the backend cannot take these inputs; the reasons are listed.

    Extra memory: both factors, ``4 (k_out O + k_in I)`` bytes and as much again for the library's own layout, 20 MB while they
    are made, and pieces of at most 24 MiB, or of one row of positions where that is more; with ``sketch_dim`` a piece has the
    samples' [k_out * k_in] besides. Reference: the gradient and the patches of one sample in float64. When the inputs require
    gradients, all pieces stay.

    Source: Choe et al., "What is Your Data Worth to GPT? LLM-Scale Data Valuation with Influence Functions", 2024 (LoGra,
    equation 5); Hu et al., "GraSS: Scalable Data Attribution with Gradient Sparsification and Sparse Projection", 2025
    (FactGraSS: "mask" with ``sketch_dim``). The form for convolutions is ours.
    """
    acts, errs, restore = _check_arrays(acts, errs)
    convolution = None
    if kernel_size is not None:
        convolution = check_convolution(OP, kernel_size, stride, padding, dilation, groups)
        acts, errs = _check_maps(acts, errs, convolution)
        width = acts.shape[2] // convolution.groups * convolution.kernel_size[0] * convolution.kernel_size[1]
    elif (stride, padding, dilation, groups) != (1, 0, 1, 1):
        raise ValueError(f"{OP}: kernel_size must be given with stride, padding, dilation or groups, got None")
    else:
        acts, errs = _check_tokens(acts, errs)
        width = acts.shape[2]
    if not isinstance(bias, bool):
        raise TypeError(f"{OP}: bias must be True or False, got {type(bias).__name__}")
    if kind not in KINDS:
        raise ValueError(f"{OP}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    factor_dims = _check_factor_dims(factor_dims, kind, errs.shape[2], width + bias)
    if sketch_dim is not None:
        sketch_dim = check_integer(OP, "sketch_dim", sketch_dim, 1, MAX_PROJ_DIM)
        if factor_dims[0] * factor_dims[1] > MAX_COLUMNS:
            raise ValueError(
                f"{OP}: factor_dims must have a product of at most 2^39 with sketch_dim, got {factor_dims}"
            )
    seed = check_integer(OP, "seed", seed, 0, 2**32 - 1)
    stream = check_integer(OP, "stream", stream, 0, 2**31 - 1)
    job = Job(factor_dims, convolution, bias, kind, sketch_dim, seed, stream, check_scale(OP, scale))
    return restore(backends.choose(OP, backend, acts, errs, job).run(acts, errs, job))


def _check_arrays(acts, errs):
    """Two dense tensors of floating-point numbers on one device, and what turns the result back into their kind of array."""
    kinds = [type(array).__module__.partition(".")[0] for array in (acts, errs)]
    acts, restore = arrays.to_torch(acts, OP, "acts")
    errs, _ = arrays.to_torch(errs, OP, "errs")
    if kinds[0] != kinds[1]:
        raise TypeError(f"{OP}: errs must be an array of the same library as acts ({kinds[0]}), got {kinds[1]}")
    for argument, tensor in (("acts", acts), ("errs", errs)):
        if tensor.layout != torch.strided or tensor.is_nested:
            layout = "nested" if tensor.is_nested else tensor.layout
            raise TypeError(f"{OP}: {argument} must be a dense (strided) tensor, got layout {layout}")
        if tensor.dtype not in DTYPES and tensor.dtype != torch.float64:
            raise TypeError(f"{OP}: {argument} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if errs.device != acts.device:
        raise ValueError(f"{OP}: errs must be on the device of acts, {acts.device}, got {errs.device}")
    return acts, errs, restore


def _check_maps(acts, errs, convolution):
    """[B, K, C, H, W] and [B, K, O, Ho, Wo] that belong to the convolution."""
    for argument, tensor, shape in (("acts", acts, "C, H, W]"), ("errs", errs, "O, Ho, Wo]")):
        if tensor.dim() not in (4, 5):
            raise ValueError(
                f"{OP}: {argument} must have shape [B, {shape} or [B, K, {shape}, got {list(tensor.shape)}"
            )
    if errs.shape[:-3] != acts.shape[:-3]:
        raise ValueError(
            f"{OP}: errs must have the leading dimensions of acts, {list(acts.shape[:-3])}, got {list(errs.shape[:-3])}"
        )
    if acts.dim() == 4:
        acts, errs = acts[:, None], errs[:, None]
    _check_channels(acts, errs)
    check_images(OP, convolution, acts, errs)
    return acts, errs


def _check_tokens(acts, errs):
    """[B, T, I] and [B, T, O]."""
    for argument, tensor, letter in (("acts", acts, "I"), ("errs", errs, "O")):
        if tensor.dim() < 2:
            raise ValueError(f"{OP}: {argument} must have shape [B, ..., {letter}], got {list(tensor.shape)}")
    if errs.shape[:-1] != acts.shape[:-1]:
        raise ValueError(
            f"{OP}: errs must have the leading dimensions of acts, {list(acts.shape[:-1])}, got {list(errs.shape[:-1])}"
        )
    acts, errs = (
        tensor[:, None] if tensor.dim() == 2 else tensor.flatten(1, -2) for tensor in (acts, errs)
    )  # [B, T, I], [B, T, O]
    _check_channels(acts, errs)
    return acts, errs


def _check_channels(acts, errs):
    for argument, tensor in (("acts", acts), ("errs", errs)):
        if tensor.shape[2] == 0:
            raise ValueError(f"{OP}: {argument} must have at least one channel, got none")


def _check_factor_dims(factor_dims, kind, height, width) -> tuple[int, int]:
    if not isinstance(factor_dims, (tuple, list)) or len(factor_dims) != 2:
        raise TypeError(f"{OP}: factor_dims must be a pair of integers (k_out, k_in), got {factor_dims!r}")
    found = []
    for name, value, limit in zip(("k_out", "k_in"), factor_dims, (height, width), strict=True):
        value = check_integer(OP, f"{name} of factor_dims", value, 1, 2**31 - 1)
        if kind == "mask" and value > limit:
            letter = "O" if name == "k_out" else "I"
            raise ValueError(f"{OP}: {name} of factor_dims must be at most {letter} = {limit} with a mask, got {value}")
        found.append(value)
    return tuple(found)


# Backends. All take (acts [B, T, I] or [B, K, C, H, W], errs [B, T, O] or [B, K, O, Ho, Wo], job).


def _run_reference(acts, errs, job):
    return reference.kron_grad_project(acts, errs, **vars(job))


def _composed(name):
    """Library products, and the sparse projection of backend ``name``."""

    def run(acts, errs, job):
        with full_float32(acts.device):
            sides = _sides(job)(job, acts, errs)
            found = [acts.new_zeros(0, job.sketch_dim or job.factor_dims[0] * job.factor_dims[1], dtype=torch.float32)]
            for samples, parts in _two_sided.pieces(acts.shape[0], sides.views, sides.rows, sides.row_bytes):
                found.append(
                    _finish(sum(sides.product(acts[samples], errs[samples], *part) for part in parts), job, name)
                )
            return torch.cat(found)

    return run


def _sides(job):
    if job.convolution is None:
        return _two_sided.MaskedLinear if job.kind == "mask" else _two_sided.DenseLinear
    return _two_sided.MaskedConvolution if job.kind == "mask" else _two_sided.DenseConvolution


def _finish(products, job, name):  # [n, k_out, k_in] -> [n, D]
    out = products.flatten(1)
    if job.sketch_dim is None:
        return out * job.scale
    return sparse_project(out, job.sketch_dim, seed=job.seed, stream=job.stream, scale=job.scale, backend=name)


def _unsupported(name):
    def reasons(acts, errs, job):
        device = "cpu" if name == "cpu" or (name == "triton" and backends.triton_interpreted()) else "cuda"
        found = [] if acts.device.type == device else [f"acts is on {acts.device}, this backend needs {device}"]
        for argument, tensor in (("acts", acts), ("errs", errs)):
            if tensor.dtype not in DTYPES:
                found.append(f"{argument} is {tensor.dtype}, this backend takes float16, bfloat16 and float32")
        if job.sketch_dim is not None:
            found += [f"sketch_dim: {reason}" for reason in backends.report()["sparse_project"][name]]
        return found + backends.capability_unsupported(acts.device)

    return reasons


def _no_cuda():
    return [] if torch.cuda.is_available() else ["torch sees no CUDA device"]


backends.register(
    OP,
    [
        Backend("reference", _run_reference, backends.always, lambda *args: []),
        Backend("cpu", _composed("cpu"), backends.always, _unsupported("cpu")),
        Backend("cuda", _composed("cuda"), _no_cuda, _unsupported("cuda")),
        Backend("triton", _composed("triton"), backends.triton_unavailable, _unsupported("triton")),
    ],
)
