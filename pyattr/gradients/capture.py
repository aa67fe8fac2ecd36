"""One forward and one backward pass that hand every layer's (activations, errors) to a receiver.

While a ruled layer runs, its parameters do not require a gradient, so the backward pass computes no weight gradient at
all: it only carries errors from layer to layer. A tap behind each layer keeps the layer's input and, when the error
arrives, passes both on. Parameters do require a gradient between the layers, so that a use outside of a layer's call is
seen instead of lost.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import conv, embedding, linear, norm
from .batch import Batch
from .rule import Rule

RULES = (linear.RULE, conv.CONV, conv.CONV_TRANSPOSE, norm.GROUP_NORM, norm.LAYER_NORM, embedding.RULE)

Loss = Callable[[nn.Module, Any], Tensor]


@dataclass(eq=False)
class Site:
    """A layer with a rule: where the gradient of some parameters comes from."""

    name: str
    module: nn.Module
    rule: Rule
    parameters: dict[str, str] = field(default_factory=dict)  # the layer's own name -> the model's name

    @property
    def needs_acts(self) -> bool:
        return any(name in self.rule.needs_acts for name in self.parameters)


class NotSeparable(Exception):
    """The rules do not hold for some parameters (for all of them if ``names`` is None)."""

    def __init__(self, names: Iterable[str] | None, reason: str):
        super().__init__(reason)
        self.names, self.reason = names, reason


class NotSeen(Exception):
    """Errors reach a layer where they were zero when its rows were told apart; ``sample`` is one of those they reach."""

    def __init__(self, site: Site, rows: int, sample: int):
        super().__init__(site.name)
        self.site, self.rows, self.sample = site, rows, sample


def find_sites(module: nn.Module, parameters: dict[str, nn.Parameter]) -> list[Site]:
    """The layers of a model that have a rule and at least one of the given parameters.

    Raises:
        ValueError: if a layer has no per-sample gradient at all.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    sites = []
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNorm) and (layer.training or layer.running_mean is None):
            raise ValueError(
                f"gradients: module must treat every sample alone, got {type(layer).__name__} {name!r} that normalises "
                "with the statistics of the batch (call module.eval())"
            )
        rule = next((rule for rule in RULES if rule.covers(layer)), None) if layer._parameters else None
        if rule is None:
            continue
        own = {
            local: names[id(parameter)]
            for local, parameter in layer._parameters.items()
            if local in rule.gradients and id(parameter) in names
        }
        if own and rule.refuse(layer):
            raise ValueError(
                f"gradients: module must have per-sample gradients, got {type(layer).__name__} {name!r}: "
                f"{rule.refuse(layer)}"
            )
        if own:
            sites.append(Site(name, layer, rule, own))
    return sites


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, each once, in ``named_parameters()`` order."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


class _Tap(torch.autograd.Function):
    """The identity behind a layer; its backward pass sees the layer's errors."""

    @staticmethod
    def forward(ctx, output, anchor, acts, receive):
        ctx.set_materialize_grads(False)
        ctx.receive = receive
        # Saved through autograd: a later in-place change of the input is an error, and checkpointing still frees it.
        ctx.save_for_backward(acts)
        # Not the output itself (autograd would hand it back unchanged), nor a view of it (no in-place change allowed).
        return output.detach()

    @staticmethod
    def backward(ctx, errs):
        if errs is not None:
            ctx.receive(ctx.saved_tensors[0], errs.detach())
        return (errs if ctx.needs_input_grad[0] else None), None, None, None


class Pass:
    """One forward and one backward pass with taps in place.

    Args:
        sites: the layers to tap.
        batch_size: B.
        admit: ``(site, rows per sample)``, called for each call of a layer (0 rows: not a multiple of B); raises
            NotSeparable, or returns whether to receive it.
        receive: ``(site, acts [B, K, ...] or None, errs [B, K, ...])``, called during the backward pass.
    """

    def __init__(self, sites: Iterable[Site], batch_size: int, admit, receive):
        self.sites, self.batch_size, self.admit, self.receive = list(sites), batch_size, admit, receive
        self.calls = {site: 0 for site in self.sites}  # tapped calls of the forward pass
        self._backward = False

    def run(self, module: nn.Module, loss: Loss, batch: Batch, watch: list[Tensor], only_first=False, order=None):
        """Run the loss and its backward pass.

        Args:
            module: the model.
            loss: ``(module, batch) -> [B]`` or ``[B, T]``.
            batch: B samples.
            watch: parameters to look for outside of the tapped calls.
            only_first: whether to differentiate the loss of the first sample alone.
            order: an Order that first gets the errors of its weighted losses.

        Returns:
            The loss of each sample, [B] (the mean over T), and for each watched parameter its gradient, or None.
        """
        with torch.enable_grad(), self._hooks():
            values = check_values(loss(module, batch.tree()), self.batch_size)
            if not values.requires_grad:
                raise ValueError("gradients: loss must depend on the module's parameters, got a value without gradient")
            total = values[0] if only_first else values.sum()
            self._backward = True
            if order is not None:
                receive, self.receive = self.receive, order.note
                weighted = (values * order.weights.to(values)).sum()
                torch.autograd.grad(weighted, [self._anchor], allow_unused=True, retain_graph=True)
                self.receive = receive
            # Autograd computes only what leads to these inputs: errors, and the watched parameters where they are used.
            _, *found = torch.autograd.grad(total, [self._anchor, *watch], allow_unused=True)
        return values.detach(), found

    @contextmanager
    def _hooks(self):
        self._anchor = torch.zeros((), requires_grad=True)  # every tap leads here, so every tap runs
        owned = {id(p): p for site in self.sites for p in _own(site)}
        handles = []
        try:
            for site in self.sites:
                handles += self._hook(site)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for parameter in owned.values():
                parameter.requires_grad_(True)

    def _hook(self, site: Site):
        inputs = []

        def before(module, args, kwargs):
            if torch._C._are_functorch_transforms_active():
                raise NotSeparable(None, "the loss uses torch.func transforms")
            inputs.append(args[0] if args else kwargs.get("input"))
            for parameter in _own(site):
                parameter.requires_grad_(False)

        def after(module, args, output):
            if not inputs:  # the call failed before it came to us
                return None
            for parameter in _own(site):
                parameter.requires_grad_(True)
            given = inputs.pop()
            # The call failed (or a checkpoint stopped it early), or nothing is differentiated here.
            if not isinstance(output, Tensor) or not torch.is_grad_enabled():
                return None
            return self._tap(site, given, output)

        # The last of the hooks before the layer and the first behind it: what other hooks change is not the layer's
        # doing. A forward pass that fails restores the parameters too.
        return (
            site.module.register_forward_pre_hook(before, with_kwargs=True),
            site.module.register_forward_hook(after, prepend=True, always_call=True),
        )

    def _tap(self, site: Site, inputs: Tensor, output: Tensor) -> Tensor | None:
        rows = 0
        if isinstance(inputs, Tensor) and site.rule.has_batch(site.module, inputs):
            rows, rest = divmod(inputs.shape[0], self.batch_size)
            rows = 0 if rest else rows
        if not self.admit(site, rows):
            return _Tap.apply(output, self._anchor, None, lambda acts, errs: None)
        if not self._backward:  # not a checkpoint's recomputation, whose taps only bring the activations back
            self.calls[site] += 1
        acts = inputs.detach() if site.needs_acts else None
        return _Tap.apply(output, self._anchor, acts, lambda acts, errs: self._receive(site, rows, acts, errs))

    def _receive(self, site: Site, rows: int, acts: Tensor | None, errs: Tensor):
        if not self._backward:
            raise NotSeparable(None, "the loss differentiates through the module")
        shape = (self.batch_size, rows)
        dtype = torch.promote_types(errs.dtype, torch.float32)
        if acts is not None:
            acts = acts.unflatten(0, shape)
            acts = acts.to(dtype) if acts.is_floating_point() else acts
        with torch.autocast(errs.device.type, enabled=False):
            self.receive(site, acts, errs.to(dtype).unflatten(0, shape))


def _own(site: Site) -> list[nn.Parameter]:
    return [site.module._parameters[local] for local in site.parameters]


def check_values(values, batch_size: int) -> Tensor:
    """The loss of each sample, [B], from what the user's loss returned, [B] or [B, T]."""
    if not isinstance(values, Tensor):
        raise TypeError(f"gradients: loss must return a tensor [B] or [B, T], got {type(values).__name__}")
    if values.dim() not in (1, 2) or values.shape[0] != batch_size or values.shape[-1] == 0:
        raise ValueError(f"gradients: loss must return [B] or [B, T] with B = {batch_size}, got {list(values.shape)}")
    if not values.is_floating_point():
        raise TypeError(f"gradients: loss must return real floating-point values, got {values.dtype}")
    return values.mean(1) if values.dim() == 2 else values


class Gatherer:
    """Holds the (activations, errors) of a layer's calls until those of all calls that share a parameter are there.

    Args:
        sites: the layers.
        calls: site -> number of calls, filled in by the forward pass.
        finish: ``(name, [(site, local name, [(acts, errs), ...]), ...])``, called once for each parameter.
    """

    def __init__(self, sites: Iterable[Site], calls: dict[Site, int], finish):
        self.calls, self.finish = calls, finish
        self.pairs: dict[Site, list[tuple[Tensor | None, Tensor]]] = {}
        self.sources: dict[str, list[tuple[Site, str]]] = {}
        for site in sites:
            for local, name in site.parameters.items():
                self.sources.setdefault(name, []).append((site, local))

    def receive(self, site: Site, acts: Tensor | None, errs: Tensor):
        self.pairs.setdefault(site, []).append((acts, errs))
        if len(self.pairs[site]) == self.calls[site]:
            complete = [
                name
                for name in site.parameters.values()
                if name in self.sources and all(self._complete(other) for other, _ in self.sources[name])
            ]
            self._finish(complete)

    def flush(self):
        """Finish what was called but never reached by the backward pass."""
        self._finish([name for name, sources in self.sources.items() if any(self.pairs.get(s) for s, _ in sources)])

    def _complete(self, site: Site) -> bool:
        return len(self.pairs.get(site, ())) == self.calls[site]

    def _finish(self, names: list[str]):
        for name in names:
            sources = self.sources.pop(name)
            self.finish(name, [(site, local, self.pairs.get(site, [])) for site, local in sources])
            for site, _ in sources:
                if not any(left in self.sources for left in site.parameters.values()):
                    self.pairs.pop(site, None)
