"""Per-sample gradients without a rule: ``vmap(grad)`` of the loss of one sample, for some parameters only."""

import warnings

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .batch import Batch
from .capture import Loss, check_values


class FallbackWarning(UserWarning):
    """Some gradients come from torch.func: right, but slower and with more memory."""


_announced: set[tuple[str, str]] = set()  # (module type, reason) told about in this process


def announce(module: nn.Module, reasons: dict[str, str]):
    """Warn, once for each kind of module and reason, about parameters that take the slow way.

    Args:
        module: the model.
        reasons: parameter name -> why.
    """
    news: dict[tuple[str, str], list[str]] = {}
    for name, reason in reasons.items():
        owner = type(module.get_submodule(name.rpartition(".")[0])).__name__
        if (owner, reason) not in _announced:
            news.setdefault((owner, reason), []).append(name)
    for (owner, reason), names in news.items():
        _announced.add((owner, reason))
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"per-sample gradients of {owner} ({reason}) come from torch.func: slower, more memory; parameters {shown}",
            FallbackWarning,
            stacklevel=5,
        )


class _LossOf(nn.Module):
    """The loss as a module, so that functional_call reaches the model's parameters."""

    def __init__(self, module: nn.Module, loss: Loss):
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch):
        return self.loss(self.module, batch)


def vmap_gradients(
    module: nn.Module, loss: Loss, batch: Batch, names: list[str], values: Tensor | None
) -> dict[str, Tensor]:
    """Per-sample gradients through torch.func.

    Args:
        module: the model.
        loss: ``(module, batch) -> [B]`` or ``[B, T]``.
        batch: B samples.
        names: the parameters wanted.
        values: [B], the losses of the whole batch at once, compared with those of the samples by themselves; None if
            they are not known.

    Returns:
        name -> [B, *shape of the parameter].

    Raises:
        ValueError: if a sample's loss is another when the sample is alone: then it has no gradient of its own.
        RuntimeError: if torch.func cannot run the model.
    """
    prefix = "module."
    wanted = dict(module.named_parameters())
    parameters = {prefix + name: wanted[name].detach() for name in names}
    wrapped = _LossOf(module, loss)

    def loss_of_one(parameters, tensors):
        sample = batch.with_tensors([tensor.unsqueeze(0) for tensor in tensors])
        returned = functional_call(wrapped, parameters, (sample.tree(),))
        return check_values(returned, 1)[0]

    try:
        # The fused attention kernels have no rule for vmap over their backward pass.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # no graph for the other parameters; grad builds its own
            grads, alone = vmap(grad_and_value(loss_of_one), in_dims=(None, 0))(parameters, batch.tensors)
    except RuntimeError as error:
        raise RuntimeError(
            f"gradients: the parameters {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} need another "
            f"way than the rules, and torch.func cannot differentiate the model: {error}"
        ) from error
    if values is not None:
        _check_alone(values, alone)
    return {name: grads[prefix + name] for name in names}


def _check_alone(together: Tensor, alone: Tensor):
    relative = {torch.float64: 1e-7, torch.float32: 1e-3}.get(together.dtype, 5e-2)
    scale = together.abs().nan_to_num().max().item()
    if not torch.allclose(together, alone.to(together.dtype), rtol=0, atol=relative * scale, equal_nan=True):
        raise ValueError(
            "gradients: loss must treat every sample alone, got other values for single samples than in the batch, "
            f"up to {(together - alone).abs().max().item():.3g} apart: per-sample gradients are undefined"
        )
