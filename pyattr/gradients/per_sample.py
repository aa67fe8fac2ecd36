"""Per-sample gradients of any module, kept whole."""

import torch
from torch import Tensor, nn

from .batch import Batch
from .capture import Loss, Site
from .plan import Planner

Sources = list[tuple[Site, str, list[tuple[Tensor | None, Tensor]]]]


def per_sample_gradients(module: nn.Module, loss: Loss, batch) -> dict[str, Tensor]:
    """The gradient of each sample's loss with respect to each trainable parameter.

    ``g_b = d loss(module, batch)_b / d theta``, with the mean over T where the loss is [B, T].

    One forward and one backward pass for the batch, and another backward pass for models whose number of rows follows from
    values. Linear, Conv1d to 3d (transposed too), GroupNorm, LayerNorm and
    Embedding layers have rules; parameters of anything else go through ``torch.func`` with a `FallbackWarning`, once
    for each kind of module. The model may fold T rows of each sample into the leading dimension, sample by sample:
    ``x.repeat_interleave(T, 0)``, ``x.flatten(0, 1)``. Whether it does is tested, not assumed: the first call for a
    model and a loss runs two samples beforehand.

    Args:
        module: any module; its mode, hooks, parameters and their ``.grad`` stay as they are. Only parameters that
            require a gradient take part.
        loss: ``(module, batch) -> [B]`` or ``[B, T]``, one value per sample (and timestep), a function of that sample
            alone.
        batch: any nesting of dicts, lists and tuples of tensors [B, ...] and constants.

    Returns:
        name -> [B, *shape of the parameter], in ``named_parameters()`` order, float32 (float64 for float64 layers);
        zeros for a parameter that the loss does not use.

    Raises:
        TypeError, ValueError: for a batch or loss of another form, and for a module that mixes samples (batch
            normalisation in training mode) so that per-sample gradients are undefined.

    Extra memory: what the forward pass keeps for the backward pass, without weight gradients, beside the result. With a
    second backward pass it is kept through the first.

    Source: Goodfellow, "Efficient Per-Example Gradient Computations" (2015), equation 5, for fully connected layers;
    Rochette, Manoel, Tramel, "Efficient Per-Example Gradient Computations in Convolutional Neural Networks" (2019).
    """
    batch = Batch.of(batch)
    planner = Planner(module, loss, batch)
    whole = planner.run(batch, lambda: _Whole(planner.parameters, batch.size))
    return {
        name: whole.grads[name]
        if name in whole.grads
        else parameter.new_zeros(batch.size, *parameter.shape, dtype=result_dtype(parameter))
        for name, parameter in planner.parameters.items()
    }


class _Whole:
    """Keeps every gradient."""

    def __init__(self, parameters: dict[str, nn.Parameter], batch_size: int):
        self.parameters, self.batch_size = parameters, batch_size
        self.grads: dict[str, Tensor] = {}

    def from_rules(self, name: str, sources: Sources):
        parameter = self.parameters[name]
        if any(pairs for _, _, pairs in sources) and parameter.numel():
            grads = parameter.new_empty(self.batch_size, *parameter.shape, dtype=result_dtype(parameter))
            put_sources(sources, slice(0, parameter.shape[0]), grads)
            self.grads[name] = grads

    def from_tensor(self, name: str, grads: Tensor):
        self.grads[name] = grads.to(result_dtype(grads))


def result_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype of a parameter's per-sample gradient."""
    return torch.promote_types(parameter.dtype, torch.float32)


def put_sources(sources: Sources, rows: slice, out: Tensor):
    """Rows of a parameter's gradient, summed over its layers and their calls, to ``out [B, R, ...]``."""
    add = False
    for site, local, pairs in sources:
        for acts, errs in pairs:
            site.rule.gradients[local](site.module, acts, errs, rows, out, add)
            add = True
