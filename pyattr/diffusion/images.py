"""What images and models look like to the rest of the package."""

import contextlib

import torch
from torch import Tensor, nn

from .. import arrays


def as_images(images, op: str, argument: str) -> Tensor:
    """Check images and make them a tensor, without converting a single pixel.

    Args:
        images: [N, C, H, W] uint8, or floating point with values in [-1, 1]; torch, NumPy or CuPy.
        op, argument: for the error message.

    Returns:
        [N, C, H, W] tensor of the same dtype; uint8 and floating point stay what they are.

    Raises:
        TypeError, ValueError: not as above.
    """
    tensor, _ = arrays.to_torch(images, op, argument)
    if tensor.dim() != 4:
        raise ValueError(f"{op}: {argument} must have shape [N, C, H, W], got {list(tensor.shape)}")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise TypeError(f"{op}: {argument} must be uint8 or floating point, got {tensor.dtype}")
    if tensor.is_floating_point() and tensor.numel():
        low, high = (float(v) for v in tensor.detach().aminmax())
        # Rounding in a resize or a network may overshoot the range a little; [0, 255] is what this is to catch.
        if not (-1.001 <= low and high <= 1.001):
            raise ValueError(f"{op}: {argument} must lie in [-1, 1] when floating point, got {low:.4g}..{high:.4g}")
    return tensor


def to_unit(images: Tensor, like: Tensor) -> Tensor:
    """Pixels in [-1, 1] on the device and in the dtype of ``like``: uint8 v becomes v / 127.5 - 1."""
    if images.dtype == torch.uint8:
        return images.to(like.device, like.dtype).div_(127.5).sub_(1)
    return images.to(like.device, like.dtype)


def to_bytes(images: Tensor) -> Tensor:
    """uint8 pixels of images in [-1, 1]: clamped, and rounded to the nearest level as for an 8-bit file."""
    return (images.clamp(-1, 1).add(1).mul(127.5)).round().to(torch.uint8)


def predict_noise(model: nn.Module, images: Tensor, timesteps: Tensor, conditions: Tensor | None = None) -> Tensor:
    """``model(x_t, t)``, or ``model(x_t, t, c)``, whether it returns the prediction itself or a record with a ``sample``."""
    out = model(images, timesteps) if conditions is None else model(images, timesteps, conditions)
    return out if isinstance(out, Tensor) else out.sample


def reference_parameter(model: nn.Module, op: str) -> Tensor:
    """The first floating-point parameter, whose device and dtype the inputs take."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter
    raise ValueError(f"{op}: model must have floating-point parameters")


@contextlib.contextmanager
def evaluating(model: nn.Module):
    """The model in eval mode, each of its modules back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
