"""Per-sample weight gradients of linear and convolution layers: formed a few rows at a time, or projected without forming them.

A linear layer is a convolution with 1 x 1 kernels. The gradient of a sample correlates its input (the activations) with the
gradient of the loss with respect to the output (the errors). Rows are formed in one of these ways, chosen by where and on what:

- *pointwise*: where patches are pixels, one matrix product per sample.
- *grouped*: a library call, the weight gradient of a convolution that has the samples as its groups. Returns a gradient
  that must be copied: costs with the size of the weight. Used on the CPU in float32 for maps with more positions than
  the layer has output channels, which is where it was measured to be faster.
- *tiled*: our own kernel, which gathers patches into panels in the cache. On the CPU in float32, for other maps.
- *unfolded*: patches, copied, times errors, one matrix product per sample. On other devices and in other dtypes.

The second and the last take a few samples at a time (``WORKSPACE_BYTES``).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, threads

WORKSPACE_BYTES = 8 << 20  # more is slower: fresh memory has to be mapped, and leaves the cache


class Layer(NamedTuple):
    """A weight [O, C / groups, *kernel_size]; its gradient is the sum over views and positions of err (x) patch."""

    acts: Tensor  # [B, K, C, *size], what the kernel slides over; K views (timesteps) of each sample
    errs: Tensor  # [B, K, O, *positions], one value per kernel placement
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]  # zeros on each side
    dilation: tuple[int, ...]
    groups: int = 1

    @classmethod
    def linear(cls, acts: Tensor, errs: Tensor) -> "Layer":
        """The layer for acts [B, M, I] and errs [B, M, O], M positions of each sample."""
        one = (1,)
        return cls(acts.mT.unsqueeze(1), errs.mT.unsqueeze(1), one, one, (0,), one)

    @property
    def taps(self) -> int:
        """Entries of a kernel."""
        return torch.Size(self.kernel_size).numel()

    @property
    def width(self) -> int:
        """Entries of a row of the weight."""
        return self.acts.shape[2] // self.groups * self.taps

    @classmethod
    def bias(cls, errs: Tensor) -> "Layer":
        """The bias [O, 1] of a layer with errors [B, K, O, *positions], as a weight whose input is one everywhere."""
        spatial = errs.dim() - 3
        ones = errs.new_ones(()).expand(errs.shape[0], errs.shape[1], 1, *errs.shape[3:])
        return cls(ones, errs, (1,) * spatial, (1,) * spatial, (0,) * spatial, (1,) * spatial)

    def put(self, rows: slice, out: Tensor, add: bool):
        """Write rows of the gradient to ``out [B, R, C / groups, *kernel_size]``, or add them to it."""
        grouped = self._suits_grouped()
        if self.groups == 1:
            self._replace(errs=self.errs[:, :, rows])._put_groups(out, add, grouped)
            return
        channels, width = self.acts.shape[2] // self.groups, self.errs.shape[2] // self.groups
        for start, stop in _group_pieces(rows, width):
            groups = range(start // width, (stop - 1) // width + 1)
            used = self._replace(
                acts=self.acts[:, :, groups.start * channels : groups.stop * channels],
                errs=self.errs[:, :, start:stop],
                groups=len(groups),
            )
            piece = out[:, start - rows.start : stop - rows.start]
            if piece.is_contiguous():
                used._put_groups(piece, add, grouped)
            else:
                part = torch.empty_like(piece, memory_format=torch.contiguous_format)
                used._put_groups(part, False, grouped)
                put(part, piece, add)

    def _suits_grouped(self) -> bool:
        """Whether the library's weight gradient of all samples as groups is the fastest way, or the only one."""
        wide = self.errs.shape[3:].numel() > self.errs.shape[2] // self.groups
        return self.acts.dim() > 5 or (wide and self.acts.device.type == "cpu" and self.acts.dtype == torch.float32)

    def _put_groups(self, out: Tensor, add: bool, grouped: bool):
        """Every row of the gradient, of whole groups."""
        settings = zip(self.kernel_size, self.stride, self.padding, strict=True)
        if all(k == s == 1 and p == 0 for k, s, p in settings) and self.acts.shape[3:] == self.errs.shape[3:]:
            _put_patch_product(self.acts.flatten(3), self.errs, self.groups, out, add)
            return
        if not grouped and not self.unfit():
            self._run("layer_gradient_cpu", out.data_ptr(), out.stride(0), add)
            return
        if grouped:
            # The library reorders what goes in and what comes out, in copies of its own.
            method, sample_bytes = _put_grouped, 2 * (out[0].nbytes + self.acts[0].nbytes + self.errs[0].nbytes)
        else:
            method, sample_bytes = _put_unfolded, self.acts[0].numel() * self.taps * self.acts.element_size()
        step = max(1, WORKSPACE_BYTES // max(1, sample_bytes))
        for start in range(0, len(out), step):
            part = slice(start, start + step)
            method(self._replace(acts=self.acts[part], errs=self.errs[part]), out[part], add)

    def unfit(self) -> list[str]:
        """Why our own kernels for the CPU cannot take this layer; empty when they can."""
        reasons = backends.cpu_unavailable("layer_sketch_cpu")()
        for argument, tensor in (("acts", self.acts), ("errs", self.errs)):
            if tensor.device.type != "cpu":
                reasons.append(f"{argument} is on {tensor.device}, this kernel needs cpu")
            if tensor.dtype != torch.float32:
                reasons.append(f"{argument} is {tensor.dtype}, this kernel takes float32")
        if len(self.kernel_size) > 2:
            reasons.append(f"a kernel of {len(self.kernel_size)} dimensions, this kernel takes up to 2")
        return reasons

    def sketch(self, out: Tensor, seed: int, stream: int, column_offset: int, nonzeros: int):
        """Add the sparse projection of the whole gradient to ``out [B, D]``, without writing the gradient to memory."""
        if not takes_sketches(out):
            raise ValueError(f"out must be contiguous float32 on the CPU, got {out.dtype} on {out.device}")
        self._run("layer_sketch_cpu", out.data_ptr(), out.shape[1], seed, stream, column_offset, nonzeros)

    def _run(self, kernel: str, *arguments):
        acts, errs = written_out(self.acts), written_out(self.errs)
        settings = [self.kernel_size, self.stride, self.padding, self.dilation]
        if len(self.kernel_size) == 1:  # a map one pixel high
            acts, errs = acts.unsqueeze(3), errs.unsqueeze(3)
            settings = [(rest, *values) for rest, values in zip((1, 1, 0, 1), settings, strict=True)]
        shapes = (acts.data_ptr(), acts.shape, acts.stride(), errs.data_ptr(), errs.shape, errs.stride())
        run = getattr(backends.extension(), kernel)
        run(*shapes, *settings, self.groups, *arguments, threads.usable(torch.get_num_threads()))


def takes_sketches(out: Tensor) -> bool:
    """Whether `Layer.sketch` can add to these sums."""
    return out.device.type == "cpu" and out.dtype == torch.float32 and out.is_contiguous()


def written_out(tensor: Tensor) -> Tensor:
    """The tensor with its values in memory: some are negated, or zero, only in name."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return tensor.resolve_conj().resolve_neg()


def put(values: Tensor, out: Tensor, add: bool):
    """Write to ``out`` or add to it."""
    values = values.view(out.shape)
    if add:
        out += values
    else:
        out.copy_(values)


def put_product(left: Tensor, right: Tensor, out: Tensor, add: bool):
    """``out (+)= left @ right`` for [N, R, M], [N, M, C], into memory of N * R * C contiguous numbers."""
    out.view(left.shape[0], left.shape[1], right.shape[2]).baddbmm_(left, right, beta=1 if add else 0)


def _group_pieces(rows: slice, width: int) -> Iterator[tuple[int, int]]:
    """Cut a range of output channels into at most three: the end of a group, whole groups, the start of a group."""
    first, last = -(-rows.start // width) * width, rows.stop // width * width
    cuts = [rows.start, rows.stop] if first > last else sorted({rows.start, first, last, rows.stop})
    return pairwise(cuts)


def _put_grouped(layer: Layer, out: Tensor, add: bool):
    batch_size, views = layer.acts.shape[:2]
    acts, errs = layer.acts.transpose(0, 1), layer.errs.transpose(0, 1)
    channels = (errs.shape[2], acts.shape[2] // layer.groups)
    # Only the shape of the weight counts.
    weight = acts.new_empty(()).expand(batch_size * channels[0], channels[1], *layer.kernel_size)
    _, grads, _ = torch.ops.aten.convolution_backward(
        errs.reshape(views, batch_size * channels[0], *errs.shape[3:]),
        acts.reshape(views, -1, *acts.shape[3:]),
        weight,
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        False,
        [0] * len(layer.padding),
        batch_size * layer.groups,
        [False, True, False],
    )
    put(grads, out, add)


def _put_unfolded(layer: Layer, out: Tensor, add: bool):
    acts, errs, kernel, stride = layer.acts, layer.errs, layer.kernel_size, layer.stride
    padding, dilation = layer.padding, layer.dilation
    if acts.dim() == 4:  # one spatial dimension: a map one pixel high
        kernel, stride, padding, dilation = (1, *kernel), (1, *stride), (0, *padding), (1, *dilation)
        acts, errs = acts.unsqueeze(3), errs.unsqueeze(3)
    patches = F.unfold(acts.flatten(0, 1), kernel, dilation, padding, stride)  # [B*K, C*k*k, L]
    _put_patch_product(patches.unflatten(0, acts.shape[:2]), errs, layer.groups, out, add)


def _put_patch_product(patches: Tensor, errs: Tensor, groups: int, out: Tensor, add: bool):
    """patches [B, K, C*k, L], errs [B, K, O, ...] -> [B, O, C*k/groups]."""
    patches = patches.unflatten(2, (groups, -1)).permute(0, 2, 1, 4, 3).flatten(2, 3)  # [B, g, K*L, C*k/g]
    errs = errs.flatten(3).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(3)  # [B, g, O/g, K*L]
    put_product(errs.flatten(0, 1), patches.flatten(0, 1), out, add)
