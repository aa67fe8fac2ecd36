"""A batch: any nesting of dicts, lists, tuples and named tuples whose tensors all have the samples in front."""

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

CONSTANTS = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))


class Batch:
    """The tensors of a batch, cut loose from any gradient history, and what is needed to put it together again."""

    def __init__(self, leaves: list, structure: TreeSpec):
        self._leaves, self._structure = leaves, structure

    @classmethod
    def of(cls, tree) -> "Batch":
        """Check and flatten what the user gave.

        Raises:
            TypeError: for a leaf that is neither a tensor nor a constant.
            ValueError: without a tensor, without samples, or where leading dimensions differ.
        """
        leaves, structure = tree_flatten(tree)
        for leaf in leaves:
            if not isinstance(leaf, (Tensor, *CONSTANTS)):
                raise TypeError(f"gradients: batch must hold tensors and plain constants, got {type(leaf).__name__}")
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise ValueError("gradients: batch must hold at least one tensor [B, ...], got none")
        sizes = sorted({leaf.shape[0] if leaf.dim() else 0 for leaf in tensors})
        if len(sizes) > 1 or sizes[0] == 0:
            raise ValueError(
                "gradients: batch must hold tensors with one common leading dimension B >= 1 (what the samples share "
                f"belongs into the loss), got shapes {[list(leaf.shape) for leaf in tensors]}"
            )
        if any(leaf.is_inference() for leaf in tensors):
            raise ValueError("gradients: batch must not hold tensors made in inference mode, got one (clone it first)")
        return cls([leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    @property
    def size(self) -> int:
        """B."""
        return self.tensors[0].shape[0]

    @property
    def signature(self) -> tuple:
        """Shapes and dtypes of one sample."""
        return tuple((leaf.shape[1:], leaf.dtype) for leaf in self.tensors)

    def tree(self):
        """The batch as the user's loss expects it."""
        return tree_unflatten(self._leaves, self._structure)

    def __getitem__(self, samples: slice | list[int]) -> "Batch":
        return self.with_tensors([leaf[samples] for leaf in self.tensors])

    def copy(self) -> "Batch":
        """The same batch in memory of its own."""
        return self.with_tensors([tensor.clone() for tensor in self.tensors])

    def with_tensors(self, tensors: list[Tensor]) -> "Batch":
        """The same structure around other tensors."""
        tensors = iter(tensors)
        leaves = [next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return Batch(leaves, self._structure)
