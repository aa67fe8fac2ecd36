"""What is watched while a model runs: reads of the samples' values, the order of its rows, and the memory it takes."""

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .capture import Site

_VALUE_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
_INDEX = torch.ops.aten.index.Tensor  # tagged, but only a mask's values decide the shape
_PACK = torch.ops.aten._pack_padded_sequence.default  # not tagged
_TO_PYTHON = (Tensor.tolist, Tensor.numpy, Tensor.__array__)  # no operators, so not seen as such


class ValueReads:
    """A context that notes whether shapes or control flow may have followed from values of tensors (``found``).

    Boolean masks, ``nonzero``, ``item`` and the like: with other samples the same code may then lay out its rows
    otherwise.
    """

    def __init__(self):
        self.found = False
        watch = self

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is _INDEX:
                    watch.found |= any(index is not None and not _is_index(index) for index in args[1])
                else:
                    watch.found |= func is _PACK or not _VALUE_TAGS.isdisjoint(func.tags)
                return func(*args, **(kwargs or {}))

        class Functions(TorchFunctionMode):
            def __torch_function__(self, func, types, args=(), kwargs=None):
                watch.found |= func in _TO_PYTHON
                return func(*args, **(kwargs or {}))

        self._modes = Operators(), Functions()

    def __enter__(self) -> "ValueReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)


def _is_index(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


class Order:
    """Tests on a batch that the rows of each layer are those of the samples in order, by one more backward pass.

    The errors of ``sum_b w_b loss_b`` must be w_b times those of ``sum_b loss_b`` in the rows of sample b. Weights are
    powers of two, so that they are, to the last digit; five neighbours have different ones, so that a row that is
    counted to the wrong one of them is off by a factor of two at least.
    """

    def __init__(self, batch_size: int, device: torch.device):
        self.weights = 2.0 ** (2 * torch.arange(batch_size, device=device) % 5 - 2)  # [B]
        self._norms: dict[Site, list[Tensor]] = {}  # of the rows of the weighted errors, [B, K] for each call

    def note(self, site: Site, acts: Tensor | None, errs: Tensor):
        """Take the errors [B, K, ...] of the weighted losses."""
        self._norms.setdefault(site, []).append(_row_norms(errs))

    def holds(self, site: Site, errs: Tensor) -> bool:
        """Whether the errors of the plain sum agree; they come in the same order."""
        weighted, expected = self._norms[site].pop(0), _row_norms(errs) * self.weights.to(errs.device)[:, None]
        rounding = 1e-6 * expected.nan_to_num(0, 0, 0).max()
        return bool(((weighted - expected).abs().nan_to_num() <= 0.05 * expected.nan_to_num() + rounding).all())


def _row_norms(errs: Tensor) -> Tensor:  # [B, K, ...] -> [B, K]
    return errs.flatten(2).norm(dim=2) if errs.dim() > 2 else errs.abs()


class LiveBytes(TorchDispatchMode):
    """Follows the memory of the tensors that are made, the model's own and those given left out.

    Attributes:
        peak: the most bytes at one time.
    """

    def __init__(self, module: nn.Module, given: list[Tensor]):
        super().__init__()
        known = (*module.parameters(), *module.buffers(), *given)
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bound = self.peak = 0  # what lives takes at most _bound

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage):
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._known or (key in self._live and self._live[key][1] == nbytes):
            return
        self._live[key] = (StorageWeakRef(storage), nbytes)
        self._bound += nbytes
        if self._bound > self.peak:  # only now does it matter what is gone
            self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
            self._bound = sum(nbytes for _, nbytes in self._live.values())
            self.peak = max(self.peak, self._bound)
