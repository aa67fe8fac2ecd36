"""What two samples tell about a model and its loss: where the rules hold, and how much memory a sample takes.

A rule needs to know which rows of a layer's input belong to which sample. Shapes do not say it: [B * T, ...] may run
through the samples first or last, and a sequence-first layer has the samples in its second dimension. So the first two
samples of a batch are run once, and only the first one's loss is differentiated: a layer is trusted if the second half
of its rows gets exactly zero errors. Parameters of all other layers go through torch.func.
"""

from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .batch import Batch
from .capture import Gatherer, Loss, NotSeparable, Pass, Site, check_values, find_sites, trainable
from .fallback import announce, vmap_gradients

NO_RULE = "no rule"
OUTSIDE = "used outside of its layer's call"
ROWS = "its rows are not the samples in order"


@dataclass
class Plan:
    """How to differentiate one model and loss."""

    rows: dict[str, set[int]] = field(default_factory=dict)  # site -> rows per sample, as seen; 0 where they are mixed
    slow: dict[str, str] = field(default_factory=dict)  # parameters for torch.func -> why
    held: int = 0  # bytes per sample of the errors of layers that are called more than once
    whole: str = ""  # why the rules hold for no layer at all
    activations: tuple[int, int] | None = None  # bytes per sample, see Planner.activations

    def exclude(self, names, reason: str):
        for name in names:
            self.slow.setdefault(name, reason)


_plans: WeakKeyDictionary[nn.Module, dict[tuple, Plan]] = WeakKeyDictionary()


class Planner:
    """Differentiates batches of one kind through one model and loss.

    The plan is made at the first call and kept with the model, for a loss (its code) and a kind of sample (its shapes).
    """

    def __init__(self, module: nn.Module, loss: Loss, batch: Batch):
        self.module, self.loss = module, loss
        function = loss.func if isinstance(loss, partial) else loss
        code = getattr(function, "__code__", None)
        self.parameters = trainable(module)
        if not self.parameters:
            raise ValueError("gradients: module must have parameters that require a gradient, got none")
        kept = _plans.setdefault(module, {}) if code is not None else {}  # a callable object may change between calls
        shapes = tuple((name, parameter.shape) for name, parameter in self.parameters.items())
        key = (code, batch.signature, min(batch.size, 2), shapes)
        self._new = key not in kept
        if self._new:
            kept[key] = make_plan(module, self.parameters, loss, batch)
        self.plan = kept[key]

    def run(self, batch: Batch, make_receiver):
        """Per-sample gradients of a batch, handed over parameter by parameter.

        Args:
            batch: B samples.
            make_receiver: makes the object that takes the gradients, a fresh one for each attempt:
                ``from_rules(name, sources)`` with sources ``[(site, local name, [(acts, errs), ...]), ...]``, and
                ``from_tensor(name, grads [B, ...])``.

        Returns:
            The receiver.
        """
        while True:
            receiver = make_receiver()
            try:
                self._attempt(batch, receiver)
                return receiver
            except NotSeparable as refusal:
                if self._new:
                    self.plan.exclude(refusal.names or self.parameters, refusal.reason)
                else:  # the model or the loss has changed: look again before giving a layer up
                    self._look_again(batch)

    def activations(self, batch: Batch) -> tuple[int, int]:
        """Memory that the forward pass keeps for the backward pass: bytes per sample, of all and of the largest tensor.

        Measured with two samples. Not known (zero) for a loss that uses torch.func itself, which allows no look inside.
        """
        if self.plan.activations is None and self.plan.whole:
            self.plan.activations = (0, 0)
        elif self.plan.activations is None:
            sample = batch[:2].copy()
            saved, sites = _SavedBytes(self.module), find_sites(self.module, self.parameters)
            with _same_random_numbers(sample, self.parameters), saved:
                Pass(sites, sample.size, lambda site, rows: True, None).forward(self.module, self.loss, sample)
            self.plan.activations = (saved.total // sample.size, saved.largest // sample.size)
        return self.plan.activations

    def _look_again(self, batch: Batch):
        self._new, found = True, make_plan(self.module, self.parameters, self.loss, batch)
        for site, rows in self.plan.rows.items():
            if 0 not in rows:
                found.rows.setdefault(site, set()).update(rows)
        vars(self.plan).update(vars(found))

    def _attempt(self, batch: Batch, receiver):
        sites = find_sites(self.module, self.parameters)
        for site in sites:
            site.parameters = {local: name for local, name in site.parameters.items() if name not in self.plan.slow}
        sites = [site for site in sites if site.parameters]
        if self.plan.slow:
            announce(self.module, self.plan.slow)
        if sites:
            values = self._from_rules(sites, batch, receiver)
        else:
            values = check_values(self.loss(self.module, batch.tree()), batch.size).detach()
        if self.plan.slow:
            grads = vmap_gradients(self.module, self.loss, batch, list(self.plan.slow), values)
            for name in self.plan.slow:
                receiver.from_tensor(name, grads.pop(name))

    def _from_rules(self, sites: list[Site], batch: Batch, receiver) -> Tensor:
        def admit(site: Site, rows: int) -> bool:
            if rows == 0 or rows not in self.plan.rows.get(site.name, ()):
                raise NotSeparable(list(site.parameters.values()), ROWS)
            return True

        one_run = Pass(sites, batch.size, admit, lambda *pair: gatherer.receive(*pair))
        gatherer = Gatherer(sites, one_run.calls, receiver.from_rules)
        watch = sorted({name for site in sites for name in site.parameters.values()})
        values, found = one_run.run(self.module, self.loss, batch, [self.parameters[name] for name in watch])
        outside = [name for name, grad in zip(watch, found, strict=True) if grad is not None]
        if outside:
            raise NotSeparable(outside, OUTSIDE)
        gatherer.flush()
        return values


def make_plan(module: nn.Module, parameters: dict[str, nn.Parameter], loss: Loss, batch: Batch) -> Plan:
    """Run one or two samples and look."""
    sites = find_sites(module, parameters)
    ruled = sorted({name for site in sites for name in site.parameters.values()})
    plan = Plan()
    plan.exclude([name for name in parameters if name not in ruled], NO_RULE)
    sample = batch[:2].copy()
    errors: dict[Site, int] = {}

    def admit(site: Site, rows: int) -> bool:
        plan.rows.setdefault(site.name, set()).add(rows)
        return rows > 0

    def receive(site: Site, acts: Tensor | None, errs: Tensor):
        if errs[1:].nan_to_num().any():
            plan.rows[site.name].add(0)
        errors[site] = errors.get(site, 0) + errs.nbytes // sample.size

    one_run = Pass(sites, sample.size, admit, receive)
    with _same_random_numbers(sample, parameters):
        try:
            _, found = one_run.run(module, loss, sample, [parameters[name] for name in ruled], only_first=True)
        except NotSeparable as refusal:
            plan.whole = refusal.reason
            plan.exclude(parameters, refusal.reason)
            found = [None] * len(ruled)
    plan.exclude([name for name, grad in zip(ruled, found, strict=True) if grad is not None], OUTSIDE)
    mixed = [site for site in sites if 0 in plan.rows.get(site.name, ())]
    plan.exclude([name for site in mixed for name in site.parameters.values()], ROWS)
    plan.held = sum(size for site, size in errors.items() if one_run.calls[site] > 1)
    return plan


def _same_random_numbers(sample: Batch, parameters: dict[str, nn.Parameter]):
    """A context that leaves the random state as it found it."""
    devices = {tensor.device for tensor in (*sample.tensors, *parameters.values()) if tensor.device.type == "cuda"}
    return torch.random.fork_rng(sorted(devices, key=str))


class _SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the memory that autograd keeps: of each storage what is used of it, of the model's own tensors nothing."""

    def __init__(self, module: nn.Module):
        own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
        self._used: dict[int, tuple[int, set]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                _, views = self._used.setdefault(storage.data_ptr(), (storage.nbytes(), set()))
                views.add((tensor.storage_offset(), tensor.nbytes))
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def _sizes(self) -> list[int]:
        return [min(size, sum(nbytes for _, nbytes in views)) for size, views in self._used.values()]

    @property
    def total(self) -> int:
        return sum(self._sizes)

    @property
    def largest(self) -> int:
        return max(self._sizes, default=0)
