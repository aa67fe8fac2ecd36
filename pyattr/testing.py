"""Inputs and comparisons that tests and benchmarks share."""

import torch

from . import backends

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def usable_backends(op: str) -> list[str]:
    """The backends of an op that can run on this machine, the interpreter of Triton left out."""
    usable = [name for name, reasons in backends.report()[op].items() if not reasons]
    return [name for name in usable if not (name == "triton" and backends.triton_interpreted())]


def device_of(backend: str) -> str:
    """The device on which a backend's inputs live."""
    return "cuda" if backend in ("cuda", "triton") else "cpu"


def make_gradients(num_samples: int, num_columns: int, dtype=torch.float32, device="cpu", seed=0) -> torch.Tensor:
    """[B, P] gradients as networks have them: every column its own magnitude, over three decades."""
    generator = torch.Generator().manual_seed(seed)
    magnitudes = 10 ** (-3 * torch.rand(num_columns, generator=generator))
    return (torch.randn(num_samples, num_columns, generator=generator) * magnitudes).to(dtype).to(device)


def projection_bound(grads: torch.Tensor, scale: float, relative: float) -> torch.Tensor:
    """[B, 1] bound on each entry of a projection: ``relative * |scale| * sum_p |grads[b, p]|``."""
    return relative * abs(scale) * grads.to(torch.float64).abs().sum(1, keepdim=True)
