"""Group normalisation and SiLU with their derivatives along K directions, by definition, in float64.

With s = x + residual, v = var(s) + eps over a group (biased), xhat = (s - mean(s)) / sqrt(v) and z = weight * xhat + bias:

    y = z * sigmoid(z)
    y_dot = silu'(z) * weight / sqrt(v) * (s_dot - mean(s_dot) - xhat * mean(xhat * s_dot)),

silu'(z) = sigmoid(z) * (1 + z * (1 - sigmoid(z))); without SiLU y = z and the first factor is 1.
"""

import torch


def group_norm_silu_jvp(x, x_dot, num_groups, weight, bias, eps, silu, residual, residual_dot):
    """See :func:`pyattr.ops.group_norm_silu_jvp`, but here the spatial part is one axis.

    x and residual [B, C, L], x_dot and residual_dot [K, B, C, L], weight and bias [C]. Returns y [B, C, L], y_dot [K, B, C, L],
    s and s_dot, all float64.
    """
    s, s_dot = _add(x, residual), _add(x_dot, residual_dot)
    grouped = (num_groups, s.shape[1] // num_groups)
    t, t_dot = s.unflatten(1, grouped), s_dot.unflatten(2, grouped)  # [B, G, C / G, L], [K, B, G, C / G, L]
    within = (-2, -1)
    centred = t - t.mean(within, keepdim=True)
    inverse = (centred.square().mean(within, keepdim=True) + eps).rsqrt()  # 1 / sqrt(v), [B, G, 1, 1]
    xhat = centred * inverse
    along = (xhat * t_dot).mean(within, keepdim=True)
    xhat_dot = inverse * (t_dot - t_dot.mean(within, keepdim=True) - xhat * along)
    z, z_dot = xhat.flatten(1, 2), xhat_dot.flatten(2, 3)
    if weight is not None:
        z, z_dot = z * weight.double()[:, None], z_dot * weight.double()[:, None]
    if bias is not None:
        z = z + bias.double()[:, None]
    if silu:
        share = torch.sigmoid(z)
        z, z_dot = z * share, z_dot * (share * (1 + z * (1 - share)))
    return z, z_dot, s, s_dot


def _add(a, b):
    return a.double() if b is None else a.double() + b.double()
