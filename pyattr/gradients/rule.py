"""What a rule is: how one kind of layer turns (activations, errors) into per-sample parameter gradients."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..ops._layers import Layer, put


@dataclass(frozen=True)
class Rule:
    """The per-sample gradient of one kind of layer.

    A call of the layer on B samples leaves its input (the activations) and the gradient of the loss with respect to its
    output (the errors). Both reach a rule with the samples in front, ``acts [B, K, ...]`` and ``errs [B, K, ...]``,
    where K rows (timesteps, views) belong to each sample and the gradient is their sum.

    Attributes:
        layers: the module types, subclasses included as long as they keep ``methods``.
        methods: the methods that the rule stands for; a class or an instance that overrides one has no rule.
        has_batch: ``(module, inputs) -> bool``, whether the input has a batch dimension in front.
        gradients: by parameter name, ``(module, acts, errs, rows, out, add)``: writes the rows ``rows`` (a slice with
            both ends) of the parameter's first dimension to ``out [B, R, ...]``, contiguous, in the dtype of the errors;
            adds to what is there if ``add``.
        as_layer: ``(module, acts, errs)``, the weight's gradient as a `Layer`, which can be projected without being formed;
            None where it is no linear map of patches.
        needs_acts: the parameters whose gradient reads the activations.
        refuse: ``(module) -> str``, why the module has no per-sample gradient at all, or an empty string.
    """

    layers: tuple[type[nn.Module], ...]
    methods: tuple[str, ...]
    has_batch: Callable[[nn.Module, Tensor], bool]
    gradients: dict[str, Callable[[nn.Module, Tensor, Tensor, slice, Tensor, bool], None]]
    as_layer: Callable[[nn.Module, Tensor, Tensor], Layer] | None = None
    needs_acts: tuple[str, ...] = ("weight",)
    refuse: Callable[[nn.Module], str] = lambda module: ""

    def covers(self, module: nn.Module) -> bool:
        """Whether this rule describes what the module computes."""
        layer = next((layer for layer in self.layers if isinstance(module, layer)), None)
        return layer is not None and all(
            name not in vars(module) and getattr(type(module), name) is getattr(layer, name) for name in self.methods
        )


def from_layer(as_layer: Callable[[nn.Module, Tensor, Tensor], Layer]):
    """The rule for a weight whose gradient is that of a `Layer`."""

    def weight_gradient(module: nn.Module, acts: Tensor, errs: Tensor, rows: slice, out: Tensor, add: bool):
        as_layer(module, acts, errs).put(rows, out, add)

    return weight_gradient


def put_sums(errs: Tensor, channels: int, rows: slice, out: Tensor, add: bool):
    """The gradient of a bias: errors [B, K, ...] summed over all but the samples and the dimension of the bias."""
    errs = errs.narrow(channels, rows.start, rows.stop - rows.start)
    put(errs.sum([axis for axis in range(1, errs.dim()) if axis != channels]), out, add)
