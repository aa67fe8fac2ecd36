"""What the dense stand-ins share: the two kinds of matrix under the peers' names, and gradients that come in pieces."""

from collections.abc import Mapping

import torch

from ..ops import gaussian_project, rademacher_project

OPS = {"normal": gaussian_project, "rademacher": rademacher_project}


def kind_of(where: str, proj_type) -> str:
    """The name of a kind given as a string or as a member of the peer's Enum."""
    kind = getattr(proj_type, "value", proj_type)
    if not isinstance(kind, str) or kind not in OPS:
        raise ValueError(f"{where}: proj_type must be one of {sorted(OPS)}, got {kind!r}")
    return kind


def pieces_of(where: str, grads) -> list[torch.Tensor]:
    """The [B, ...] tensors of a gradient, one or a dict of them in its order, without autograd history."""
    named = grads if isinstance(grads, Mapping) else {"grads": grads}
    if not named:
        raise ValueError(f"{where}: grads must hold at least one tensor, got an empty dict")
    for name, piece in named.items():
        if not isinstance(piece, torch.Tensor):
            raise TypeError(
                f"{where}: grads must be a tensor or a dict of tensors, got {type(piece).__name__} for {name}"
            )
        if piece.layout != torch.strided or piece.is_nested:
            raise TypeError(f"{where}: grads must be dense (strided) tensors, got another layout for {name}")
        if piece.dim() == 0:
            raise ValueError(f"{where}: grads must have a batch dimension, got a scalar for {name}")
    batches = sorted({piece.shape[0] for piece in named.values()})
    if len(batches) > 1:
        raise ValueError(f"{where}: grads must agree in their first dimension, got {batches}")
    return [piece.detach() for piece in named.values()]


def width(piece: torch.Tensor) -> int:
    """The columns that a [B, ...] tensor has as a matrix."""
    return piece.shape[1:].numel()


def project_pieces(kind: str, pieces, proj_dim: int, device=None, **matrix) -> torch.Tensor:
    """[B, D] ``sum_i pieces[i] M_i^T``, M_i the columns of one matrix that follow those of the pieces before.

    Nothing is joined: one piece at a time is projected, at its column offset. The result is that of the joined pieces, to
    rounding.
    """
    out, column = None, 0
    for piece in pieces:
        flat = piece.reshape(piece.shape[0], width(piece)).to(device)
        part = OPS[kind](flat, proj_dim, column_offset=column, **matrix)
        column += flat.shape[1]
        wide = part.dtype == torch.float64  # in whichever piece, it is the result's
        out = part if out is None else part.add_(out) if wide else out.add_(part)
    return out
