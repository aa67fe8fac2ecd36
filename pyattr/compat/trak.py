"""TRAK's projector interface (traker 0.3) on our kernels: any number of parameters, any width, on any device.

    from trak import TRAKer
    from pyattr.compat.trak import Projector
    projector = Projector(sum(p.numel() for p in model.parameters()), 512, seed=0, proj_type="rademacher", device="cpu")
    traker = TRAKer(model, task="image_classification", train_set_size=len(data), projector=projector, device="cpu")
    traker.load_checkpoint(model.state_dict(), model_id=0)

TRAK itself need not be installed. Where it is, :class:`Projector` is a ``trak.projectors.AbstractProjector``.
"""

import enum

from ..ops._arguments import check_integer
from ._dense import kind_of, pieces_of, project_pieces, width

try:
    from trak.projectors import AbstractProjector, ProjectionType
except ModuleNotFoundError as absent:
    if absent.name.partition(".")[0] != "trak":
        raise
    AbstractProjector = object

    class ProjectionType(str, enum.Enum):
        """TRAK's two kinds of matrix; the names are the values."""

        normal = "normal"
        rademacher = "rademacher"


MAX_COLUMNS = {"normal": 2**34, "rademacher": 2**39}  # what the generators' counters reach


class Projector(AbstractProjector):
    """A projector for ``TRAKer(projector=...)``: ``Y = G M^T``, M [D, P] of +-1 or standard normal entries, unscaled.

    M belongs to (seed, model_id) alone, our Philox key: entry (j, p) is ``pyattr.ops.sign_matrix([j], [p], seed, model_id)``,
    or that of ``normal_matrix``, on every device. It is neither TRAK's matrix nor fast_jl's, whose entries depend on the
    device. Nothing of it is stored. Inner products grow by a factor D in expectation, ``E <Y, Y'> = D <g, g'>``, with the
    variance ``D (|g|^2 |g'|^2 + <g, g'>^2)``, less ``2 D sum_p g_p^2 g'_p^2`` for signs; TRAKer divides by sqrt(P) itself.

    Args:
        grad_dim: P, the length of a gradient, at most 2^39 ("rademacher") or 2^34 ("normal").
        proj_dim: D, 1 to 2^32.
        seed: in [0, 2^32).
        proj_type: "rademacher" or "normal", or the member of TRAK's ProjectionType; kept as a string, which JSON can hold.
        device: where to project; gradients elsewhere are moved there. None: where they are.
        without_effect, dtype, block_size, max_batch_size, model_id: taken, by position too, because TRAK's projectors take
            them. Without effect: any batch goes in one call, sums and results are float32, and every call names its checkpoint.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """

    def __init__(
        self, grad_dim, proj_dim, seed=0, proj_type="rademacher", device=None, *without_effect,
        dtype=None, block_size=None, max_batch_size=None, model_id=None,
    ):  # fmt: skip
        self.proj_type = kind_of("Projector", proj_type)
        self.grad_dim = check_integer("Projector", "grad_dim", grad_dim, 0, MAX_COLUMNS[self.proj_type])
        self.proj_dim = check_integer("Projector", "proj_dim", proj_dim, 1, 2**32)
        self.seed = check_integer("Projector", "seed", seed, 0, 2**32 - 1)
        self.device = device

    def project(self, grads, model_id):
        """Project a batch of gradients.

        Args:
            grads: [B, P] float16, bfloat16 or float32 tensor (float64 runs on the reference, slowly), or a dict of [B, ...]
                tensors in the order of the parameters. A dict is projected piece by piece, never joined; the result is that
                of the joined gradient to rounding.
            model_id: of the checkpoint, in [0, 2^32); checkpoints have independent matrices.

        Returns:
            [B, D] float32 (float64 where any of ``grads`` is), with no autograd history.

        Raises:
            TypeError, ValueError: an argument is not as above, or the columns are not ``grad_dim``.

        Extra memory: that of ``pyattr.ops.rademacher_project`` or ``gaussian_project``, and a second result for a dict.
        """
        model_id = check_integer("Projector.project", "model_id", model_id, 0, 2**32 - 1)
        pieces = pieces_of("Projector.project", grads)
        columns = sum(width(piece) for piece in pieces)
        if columns != self.grad_dim:
            raise ValueError(f"Projector.project: grads must have grad_dim = {self.grad_dim} columns, got {columns}")
        device = pieces[0].device if self.device is None else self.device
        return project_pieces(self.proj_type, pieces, self.proj_dim, device, seed=self.seed, stream=model_id)

    def free_memory(self):
        """Nothing is held between calls."""
