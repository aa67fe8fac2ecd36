"""Philox4x32-10 in torch integer arithmetic, on any device.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
"""

import torch

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF


def philox4x32_10(counter, key):
    """Four 32-bit words of Philox4x32-10 for each counter.

    Args:
        counter: four int64 tensors (or ints), broadcastable, each word in [0, 2^32).
        key: two ints in [0, 2^32).

    Returns:
        Four int64 tensors of the broadcast shape, each word in [0, 2^32).
    """
    device = next((c.device for c in counter if isinstance(c, torch.Tensor)), None)
    x0, x1, x2, x3 = torch.broadcast_tensors(*(torch.as_tensor(c, dtype=torch.int64, device=device) for c in counter))
    k0, k1 = key
    for _ in range(10):
        # The product wraps as a signed number; the mask after the arithmetic shift restores its high word.
        p0, p1 = x0 * M0, x2 * M1
        x0, x1, x2, x3 = (p1 >> 32 & MASK) ^ x1 ^ k0, p1 & MASK, (p0 >> 32 & MASK) ^ x3 ^ k1, p0 & MASK
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return x0, x1, x2, x3
