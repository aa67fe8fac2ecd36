"""Two-dimensional convolutions as arguments of an op."""

from typing import NamedTuple

from ._arguments import check_integer

LARGEST = 2**31 - 1


class Convolution(NamedTuple):
    """What an nn.Conv2d is, beside its weight; zeros pad the image."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def positions(self, size) -> tuple[int, int]:
        """Height and width of the output for images of ``size`` (H, W); less than 1 where the kernel does not fit."""
        reach = (d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel_size, strict=True))
        added = zip(size, self.padding, reach, self.stride, strict=True)
        return tuple((length + 2 * pad - end) // stride + 1 for length, pad, end, stride in added)


def check_convolution(op: str, kernel_size, stride, padding, dilation, groups) -> Convolution:
    """Numbers or pairs of them, as nn.Conv2d takes them."""
    return Convolution(
        _pair(op, "kernel_size", kernel_size, 1),
        _pair(op, "stride", stride, 1),
        _pair(op, "padding", padding, 0),
        _pair(op, "dilation", dilation, 1),
        check_integer(op, "groups", groups, 1, LARGEST),
    )


def check_images(op: str, convolution: Convolution, acts, errs) -> None:
    """acts [B, K, C, H, W] and errs [B, K, O, Ho, Wo] belong to this convolution."""
    groups, positions = convolution.groups, convolution.positions(acts.shape[3:])
    for argument, name, channels in (("acts", "C", acts.shape[2]), ("errs", "O", errs.shape[2])):
        if channels % groups:
            raise ValueError(
                f"{op}: {argument} must have {name} divisible by groups = {groups}, got {name} = {channels}"
            )
    if min(positions) < 1:
        raise ValueError(f"{op}: acts must have images that the kernel fits into, got {list(acts.shape[3:])}")
    if tuple(errs.shape[3:]) != positions:
        raise ValueError(f"{op}: errs must have maps of {list(positions)} for these images, got {list(errs.shape[3:])}")


def _pair(op: str, argument: str, value, low: int) -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) != 2:
            raise ValueError(f"{op}: {argument} must be an integer or a pair of them, got {len(value)} numbers")
        return tuple(check_integer(op, argument, part, low, LARGEST) for part in value)
    return (check_integer(op, argument, value, low, LARGEST),) * 2
