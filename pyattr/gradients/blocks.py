"""A parameter's per-sample gradients, some rows at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .per_sample import Sources, put_sources, result_dtype

COPIES = 3  # of a block of gradients: itself, and one by a library in another layout and order
BLOCK_BYTES = 16 << 20  # of a block of gradients at most: more gains nothing, and this stays in the cache longer


class Blocks:
    """Forms gradients in memory that is used again.

    Args:
        memory: bytes that a block and its copies may take.
    """

    def __init__(self, memory: int):
        self._bytes = min(memory // COPIES, BLOCK_BYTES)
        self._buffer = torch.empty(0)

    def of(self, parameter: Tensor, sources: Sources, batch_size: int) -> Iterator[tuple[int, Tensor]]:
        """The gradients of a parameter that is not empty, in order.

        Yields:
            Where a block begins in the flat parameter, and the block, [B, R, ...]; good until the next one is asked for.
        """
        count, dtype = parameter.shape[0], result_dtype(parameter)
        width = parameter.numel() // count
        step = min(count, max(1, self._bytes // (batch_size * width * dtype.itemsize)))
        if self._buffer.numel() < batch_size * step * width or self._buffer.dtype != dtype:
            self._buffer = parameter.new_empty(batch_size * step * width, dtype=dtype)
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            size = rows.stop - rows.start
            grads = self._buffer[: batch_size * size * width].view(batch_size, size, *parameter.shape[1:])
            put_sources(sources, rows, grads)
            yield start * width, grads
