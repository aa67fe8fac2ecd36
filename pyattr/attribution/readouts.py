"""What is read out of a matrix of scores: itself, its squares, or its largest entries alone."""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from .. import arrays

READOUTS = ("signed", "squared", "signed_squared", "head")


@dataclass(frozen=True)
class Readout:
    """A function of scores t, [Q, N]; to be applied to any method.

    ==================  =================================================
    ``signed``          t
    ``squared``         t^2
    ``signed_squared``  sign(t) t^2
    ``head``            t where abs t is among the query's largest, else 0
    ==================  =================================================

    Squares weigh the many small scores of a query less against the few large ones. ``squared`` loses the sign: it may predict
    the loss of models trained on subsets better, yet ranks an opponent beside a proponent.

    Args:
        name: one of the above.
        percent: of the training images that ``head`` keeps for each query, rounded up; in (0, 100], for ``head`` alone.

    Raises:
        ValueError: an argument is not as above.

    Source: Lin, Tao, Dong, Xu, "Diffusion Attribution Score", ICLR 2025, whose score is a square.
    """

    name: str
    percent: float | None = None

    def __post_init__(self):
        if self.name not in READOUTS:
            raise ValueError(f"Readout: name must be one of {', '.join(READOUTS)}, got {self.name!r}")
        if (self.name == "head") != (self.percent is not None):
            raise ValueError(
                f"Readout: percent goes with head and with nothing else, got {self.name!r}, percent={self.percent}"
            )
        if self.percent is not None and not 0 < self.percent <= 100:
            raise ValueError(f"Readout: percent must lie in (0, 100], got {self.percent}")

    @property
    def signed(self) -> bool:
        """Whether the sign of a score survives, so that a method that has opponents still does."""
        return self.name != "squared"

    def __call__(self, scores):
        """The readout of scores.

        Args:
            scores: [Q, N] floating point; torch, NumPy or CuPy.

        Returns:
            [Q, N] of the same kind and dtype. NaN stays NaN, also outside the head. Of equal sizes at the edge of the head
            those of the lowest index are kept.

        Raises:
            TypeError, ValueError: the scores are not as above.

        Extra memory: the scores once, and for ``head`` the scores with int64 indices of them.
        """
        tensor, back = arrays.to_torch(scores, "Readout", "scores")
        if tensor.dim() != 2:
            raise ValueError(f"Readout: scores must have shape [Q, N], got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"Readout: scores must be floating point, got {tensor.dtype}")
        if self.name == "signed":
            return scores
        if self.name == "squared":
            return back(tensor.square())
        if self.name == "signed_squared":
            return back(tensor * tensor.abs())
        return back(_head(tensor, self.percent))


def readout(scores, kind: "Readout | str"):
    """``kind`` of scores; see :class:`Readout`, which a name stands for."""
    return (kind if isinstance(kind, Readout) else Readout(kind))(scores)


def _head(scores: Tensor, percent: float) -> Tensor:  # [Q, N] -> [Q, N]
    count = math.ceil(Fraction(str(percent)) * scores.shape[1] / 100)
    order = torch.sort(scores.abs(), dim=1, descending=True, stable=True).indices[:, :count]
    out = torch.where(scores.isnan(), scores, torch.zeros_like(scores))
    return out.scatter_(1, order, scores.gather(1, order))
