"""The products of kron_grad_project: each side is projected before the sides meet, a bounded piece at a time.

``P_out (sum_t e_t a_t^T) P_in^T = sum_t (P_out e_t) (P_in a_t)^T``: positions t are tokens, or places of
a convolution's kernel.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.kron_grad_project import factor
from ..reference.mask_project import mask_indices

WORKSPACE_BYTES = 24 << 20


def pieces(batch: int, views: int, rows: int, row_bytes: int) -> Iterator[tuple[slice, list[tuple[slice, slice]]]]:
    """Samples to take together, and for them the (views, rows) to take together: whole samples, else whole views, else rows."""
    fit = max(1, WORKSPACE_BYTES // max(1, row_bytes))  # rows
    samples = max(1, fit // max(1, views * rows))
    if fit >= views * rows:
        parts = [(slice(0, views), slice(0, rows))]
    elif fit >= rows:
        step = fit // rows
        parts = [(slice(view, min(view + step, views)), slice(0, rows)) for view in range(0, views, step)]
    else:
        parts = [
            (slice(view, view + 1), slice(row, min(row + fit, rows)))
            for view in range(views)
            for row in range(0, rows, fit)
        ]
    for start in range(0, batch, samples):
        yield slice(start, min(start + samples, batch)), parts


class DenseLinear:
    """Factors P_out [k_out, O] and P_in [k_in, I (+ 1)] of a linear layer."""

    def __init__(self, job, acts: Tensor, errs: Tensor):
        self.p_out, self.p_in, self.p_bias = _factors(job, errs.shape[2], acts.shape[2], acts.device)
        self.views, self.rows = 1, acts.shape[1]
        self.row_bytes = 4 * (acts.shape[2] + errs.shape[2] + sum(job.factor_dims))

    def product(self, acts: Tensor, errs: Tensor, views: slice, rows: slice) -> Tensor:  # -> [B, k_out, k_in]
        left = errs[:, rows].float() @ self.p_out.T  # [B, T, k_out]
        return left.mT @ F.linear(acts[:, rows].float(), self.p_in, self.p_bias)


class MaskedLinear:
    """Chosen rows and columns of a linear layer's gradient."""

    def __init__(self, job, acts: Tensor, errs: Tensor):
        width = acts.shape[2]
        out_rows, columns = _chosen(job, errs.shape[2], width)
        self.is_bias = (columns == width).to(acts.device)
        self.out_rows, self.columns = out_rows.to(acts.device), columns.clamp(max=width - 1).to(acts.device)
        self.views, self.rows = 1, acts.shape[1]
        self.row_bytes = 12 * sum(job.factor_dims)

    def product(self, acts: Tensor, errs: Tensor, views: slice, rows: slice) -> Tensor:  # -> [B, k_out, k_in]
        right = acts[:, rows].index_select(2, self.columns).float().masked_fill_(self.is_bias, 1)
        return errs[:, rows].index_select(2, self.out_rows).float().mT @ right


class DenseConvolution:
    """Factors of a convolution: P_in is a convolution itself, P_out one of kernel size 1. A group is a further set of positions
    with its own columns of P_out."""

    def __init__(self, job, acts: Tensor, errs: Tensor):
        self.convolution = convolution = job.convolution
        channels, groups = acts.shape[2] // convolution.groups, convolution.groups
        width = channels * convolution.kernel_size[0] * convolution.kernel_size[1]
        p_out, p_in, self.p_bias = _factors(job, errs.shape[2], width, acts.device)
        self.p_in = p_in.reshape(-1, channels, *convolution.kernel_size)
        self.p_out = (
            p_out.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)[..., None, None]
        )  # [g k_out, O / g, 1, 1]
        self.views, self.rows = errs.shape[1], errs.shape[3]
        self.row_bytes = 4 * (
            3 * convolution.stride[0] * acts.shape[2] * acts.shape[4]
            + 2 * errs.shape[2] * errs.shape[4]
            + 3 * groups * sum(job.factor_dims) * errs.shape[4]
        )

    def product(self, acts: Tensor, errs: Tensor, views: slice, rows: slice) -> Tensor:  # -> [B, k_out, k_in]
        _, stride, padding, dilation, groups = self.convolution
        batch, errs = errs.shape[0], errs[:, views, :, rows].float()
        images, (top, bottom) = _strip(acts[:, views], self.convolution, rows)
        blocks, positions = (batch, errs.shape[1] * groups), errs.shape[3:].numel()
        images = images.float().reshape(blocks[0] * blocks[1], images.shape[2] // groups, *images.shape[3:])
        if top != bottom:
            images, top = F.pad(images, (0, 0, top, bottom)), 0
        right = F.conv2d(images, self.p_in, self.p_bias, stride, (top, padding[1]), dilation)  # [B K g, k_in, R, Wo]
        left = F.conv2d(errs.flatten(0, 1), self.p_out, groups=groups)  # [B K, g k_out, R, Wo]
        left = left.reshape(*blocks, self.p_out.shape[0] // groups, positions)
        right = right.reshape(*blocks, self.p_in.shape[0], positions)
        return _by_position(left) @ _by_position(right).mT


class MaskedConvolution:
    """Chosen rows (output channels) and columns (an input channel at a place of the kernel) of a convolution's gradient."""

    def __init__(self, job, acts: Tensor, errs: Tensor):
        self.convolution = convolution = job.convolution
        groups, (height, width) = convolution.groups, convolution.kernel_size
        self.group_channels = acts.shape[2] // groups
        out_rows, columns = _chosen(job, errs.shape[2], self.group_channels * height * width)
        self.is_bias = (columns == self.group_channels * height * width).to(acts.device)[:, None]
        columns = columns.clamp(max=self.group_channels * height * width - 1)
        # Only the input channels that some column reads are touched.
        channels, self.channel = torch.unique(columns // (height * width), return_inverse=True)
        self.channels, self.place = channels.to(acts.device), (columns // width % height, columns % width)
        group = out_rows // (errs.shape[2] // groups)
        order = group.argsort(stable=True)
        self.out_rows, self.back = out_rows[order].to(acts.device), order.argsort().to(acts.device)
        self.members = [(int(g), int(count)) for g, count in zip(*torch.unique(group, return_counts=True), strict=True)]
        self.views, self.rows = errs.shape[1], errs.shape[3]
        self.row_bytes = (
            12 * convolution.stride[0] * len(channels) * acts.shape[4] + 20 * sum(job.factor_dims) * errs.shape[4]
        )

    def product(self, acts: Tensor, errs: Tensor, views: slice, rows: slice) -> Tensor:  # -> [B, k_out, k_in]
        images, sides = _strip(acts[:, views], self.convolution, rows)
        columns = self._columns(images.shape[3] + sum(sides), images.shape[4], errs.shape[3:], rows).to(acts.device)
        errs = errs[:, views, :, rows].index_select(2, self.out_rows).float().flatten(3)  # [B, K, k_out, R Wo]
        parts = []
        for (group, _), left in zip(self.members, errs.split([count for _, count in self.members], 2), strict=True):
            used = images.index_select(2, self.channels + group * self.group_channels).float()
            used = F.pad(used.flatten(0, 1), (*(self.convolution.padding[1],) * 2, *sides))  # [B K, channels, H', W']
            right = used.flatten(1)[:, columns].masked_fill_(self.is_bias, 1).unflatten(0, left.shape[:2])
            parts.append(_by_position(left) @ _by_position(right).mT)
        return torch.cat(parts, 1).index_select(1, self.back)

    def _columns(self, height: int, width: int, positions, rows: slice) -> Tensor:
        """Where the padded images, flattened, hold the chosen columns of the patches."""
        _, stride, padding, dilation, _ = self.convolution
        width += 2 * padding[1]
        base = (self.channel * height + self.place[0] * dilation[0]) * width + self.place[1] * dilation[1]  # [k_in]
        down = torch.arange(rows.stop - rows.start)[:, None] * (stride[0] * width)
        across = torch.arange(positions[1]) * stride[1]
        return base[:, None] + (down + across).flatten()  # [k_in, R Wo]


def _factors(job, height: int, width: int, device):
    """P_out [k_out, O], P_in [k_in, I] and its column for the bias [k_in] or None, float32."""
    (k_out, k_in), key = job.factor_dims, (job.seed, 2 * job.stream)
    p_out = factor(job.kind, k_out, height, *key, device, torch.float32)
    p_in = factor(job.kind, k_in, width + job.bias, job.seed, 2 * job.stream + 1, device, torch.float32)
    return p_out, p_in[:, :width], p_in[:, width].contiguous() if job.bias else None


def _chosen(job, height: int, width: int) -> tuple[Tensor, Tensor]:
    k_out, k_in = job.factor_dims
    return (
        mask_indices(height, k_out, job.seed, 2 * job.stream),
        mask_indices(width + job.bias, k_in, job.seed, 2 * job.stream + 1),
    )


def _strip(images: Tensor, convolution, rows: slice) -> tuple[Tensor, tuple[int, int]]:
    """The part of the images [B, K, C, H, W] that output rows see, and the rows of zeros above and below it."""
    size, stride, pad = images.shape[3], convolution.stride[0], convolution.padding[0]
    start = rows.start * stride - pad
    stop = (rows.stop - 1) * stride + (convolution.kernel_size[0] - 1) * convolution.dilation[0] + 1 - pad
    low = min(max(start, 0), size)
    high = max(min(stop, size), low)
    top = min(max(-start, 0), stop - start)
    return images[:, :, :, low:high], (top, stop - start - top - (high - low))


def _by_position(maps: Tensor) -> Tensor:  # [B, blocks, k, L] -> [B, k, blocks L]
    return maps.transpose(1, 2).flatten(2)
