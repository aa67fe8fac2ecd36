"""Layers, their gradients and projections written out, which the tests of kron_grad_project share."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from pyattr.ops import normal_matrix, sign_matrix
from pyattr.ops._convolution import check_convolution
from pyattr.reference.layer_gradients import conv2d_gradients, linear_gradients
from pyattr.reference.mask_project import mask_indices


def matrices(kind, factor_dims, height, width, seed=0, stream=0):
    """P_out and P_in written out in float64."""
    keys = (seed, 2 * stream), (seed, 2 * stream + 1)
    sizes = tuple(zip(factor_dims, (height, width), keys, strict=True))
    if kind == "mask":
        return [torch.eye(n, dtype=torch.float64)[mask_indices(n, k, *key)] for k, n, key in sizes]
    matrix = {"rademacher": sign_matrix, "gaussian": normal_matrix}[kind]
    return [matrix(range(k), range(n), *key).to(torch.float64) for k, n, key in sizes]


def layer_gradients(layer, acts, errs, bias):
    """[B, O, I] of <layer(acts_b), errs_b> by torch.func, in float64; the bias's as a last column."""
    layer = layer.double()
    parameters = dict(layer.named_parameters())
    rows = 3 if isinstance(layer, nn.Conv2d) else 1  # dimensions of one output

    def value(parameters, sample, err):
        out = functional_call(layer, parameters, sample.reshape(-1, *sample.shape[sample.dim() - rows :]))
        return (out * err.reshape(out.shape)).sum()

    grads = vmap(grad(value), (None, 0, 0))(parameters, acts.double(), errs.double())
    weight = grads["weight"].flatten(2)
    return torch.cat([weight, grads["bias"][:, :, None]], 2) if bias else weight


def close(out, expected, acts, errs, convolution=None, kind="rademacher", scale=1.0):
    """Within the documented bound."""
    sizes = acts.abs(), errs.abs()
    if convolution is None:
        total = linear_gradients(*(t.reshape(t.shape[0], -1 if t.numel() else 0, t.shape[-1]) for t in sizes), True)
    else:
        full = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | convolution
        sizes = (t if t.dim() == 5 else t[:, None] for t in sizes)
        total = conv2d_gradients(*sizes, check_convolution("test", **full), True)
    bound = 2.0**-17 * (40 if kind == "gaussian" else 1) * scale * total.sum((1, 2))[:, None]
    assert ((out.double() - expected).abs() <= bound).all()


def images_and_errors(convolution, leading, size=(7, 6), channels=4, out_channels=8, dtype=torch.float32):
    layer = nn.Conv2d(channels, out_channels, **convolution)
    acts = torch.randn(*leading, channels, *size)
    shape = layer(acts.reshape(-1, channels, *size)).shape[1:]
    return layer, acts.to(dtype), torch.randn(*leading, *shape).to(dtype)
