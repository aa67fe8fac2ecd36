"""Library products in full float32, whatever the process allows elsewhere."""

import contextlib

import torch


@contextlib.contextmanager
def full_float32(device: torch.device):
    """Neither autocast nor TF32 nor bfloat16 in matmuls and convolutions on this device; on a GPU TF32 is the default.

    Torch keeps these switches for the whole process: they are put back at the end, and touched only where they would round.
    """
    library = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    switches = library if device.type == "cuda" else (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)
    before = [(switch, switch.fp32_precision) for switch in switches if switch.fp32_precision not in ("none", "ieee")]
    for switch, _ in before:
        switch.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in before:
            switch.fp32_precision = precision
