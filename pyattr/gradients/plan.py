"""What two samples tell about a model and its loss: where the rules hold, and how much memory a sample takes.

A rule needs to know which rows of a layer's input belong to which sample. Shapes do not say it: [B * T, ...] may run
through the samples first or last, and a sequence-first layer has the samples in its second dimension. So the first two
samples of a batch are run once, and only the first one's loss is differentiated: a layer is trusted if the second half
of its rows gets exactly zero errors. Parameters of all other layers go through torch.func.

Two things two samples may not tell. Where the first sample's errors are zero as well (below an output layer that starts
at zero) nothing has been told apart: errors that come later make us look again, at a sample that they reach. And where
shapes follow from values (``x[mask]``), other samples may be laid out otherwise: every batch is tested by itself.
"""

from dataclasses import dataclass, field
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .batch import Batch
from .capture import Gatherer, Loss, NotSeen, NotSeparable, Pass, Site, check_values, find_sites, trainable
from .fallback import announce, vmap_gradients
from .look import LiveBytes, Order, ValueReads

NO_RULE = "no rule"
OUTSIDE = "used outside of its layer's call"
ROWS = "its rows are not the samples in order"


@dataclass
class Plan:
    """How to differentiate one model and loss."""

    rows: dict[str, set[int]] = field(default_factory=dict)  # site -> rows per sample, as seen; 0 where they are mixed
    slow: dict[str, str] = field(default_factory=dict)  # parameters for torch.func -> why
    seen: set[tuple[str, int]] = field(default_factory=set)  # (site, rows) told apart by errors that are not zero
    by_values: bool = False  # whether shapes or control flow may follow from the samples' values
    whole: str = ""  # why the rules hold for no layer at all
    memory: tuple[int, int] | None = None  # bytes per sample, see Planner.memory

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
            kept[key] = make_plan(module, self.parameters, loss, batch[:2])
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
            except (NotSeparable, NotSeen) as error:
                refusal = error.with_traceback(None)  # lets go of the tensors of this attempt
            del receiver
            if isinstance(refusal, NotSeen):
                self._look_again(batch[[refusal.sample, (refusal.sample + 1) % batch.size]])
                if (refusal.site.name, refusal.rows) not in self.plan.seen:
                    self._give_up(refusal.site.parameters.values(), ROWS)
            elif self._new:
                self._give_up(refusal.names or self.parameters, refusal.reason)
            else:  # the model or the loss has changed: look again before giving a layer up
                self._look_again(batch[:2])

    def memory(self, batch: Batch) -> tuple[int, int]:
        """Bytes per sample that the two passes take at their peak, and those of a layer's largest input or error.

        Measured with two samples: activations, errors on their way and those that wait for another use of their
        parameter, what a checkpoint computes again. Not known (zero) for a loss that uses torch.func itself, which
        allows no look inside.
        """
        if self.plan.memory is None and self.plan.whole:
            self.plan.memory = (0, 0)
        elif self.plan.memory is None:
            sample, sites = batch[:2].copy(), self._sites()
            largest = 0

            def receive(site: Site, acts: Tensor | None, errs: Tensor):
                nonlocal largest
                largest = max(largest, errs.nbytes, 0 if acts is None else acts.nbytes)
                gatherer.receive(site, acts, errs)

            one_run = Pass(sites, sample.size, lambda site, rows: rows > 0, receive)
            gatherer = Gatherer(sites, one_run.calls, lambda name, sources: None)
            order = self._order(sample)
            live = LiveBytes(self.module, sample.tensors)
            with _same_random_numbers(sample, self.parameters), live:
                one_run.run(self.module, self.loss, sample, [], order=order)
            self.plan.memory = (live.peak // sample.size, largest // sample.size)
        return self.plan.memory

    def _sites(self) -> list[Site]:
        """The layers whose rules are used."""
        sites = find_sites(self.module, self.parameters)
        for site in sites:
            site.parameters = {local: name for local, name in site.parameters.items() if name not in self.plan.slow}
        return [site for site in sites if site.parameters]

    def _order(self, batch: Batch) -> Order | None:
        return Order(batch.size, batch.tensors[0].device) if self.plan.by_values and batch.size > 1 else None

    def _give_up(self, names, reason: str):
        self.plan.exclude(names, reason)
        self.plan.memory = None

    def _look_again(self, sample: Batch):
        found = make_plan(self.module, self.parameters, self.loss, sample)
        if self._new:  # what this batch has shown stays
            for name, reason in self.plan.slow.items():
                found.exclude([name], reason)
        self._new = True
        for site, rows in self.plan.rows.items():
            if 0 not in rows:
                found.rows.setdefault(site, set()).update(rows)
        found.seen |= self.plan.seen
        found.by_values |= self.plan.by_values
        vars(self.plan).update(vars(found))

    def _attempt(self, batch: Batch, receiver):
        sites = self._sites()
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
        order = self._order(batch)

        def admit(site: Site, rows: int) -> bool:
            if rows == 0 or (batch.size > 1 and rows not in self.plan.rows.get(site.name, ())):
                raise NotSeparable(list(site.parameters.values()), ROWS)
            return True

        def receive(site: Site, acts: Tensor | None, errs: Tensor):  # [B, K, ...] both
            if batch.size > 1 and (site.name, errs.shape[1]) not in self.plan.seen:
                reached = errs.nan_to_num().flatten(1).any(1)  # [B]
                if reached.any():
                    raise NotSeen(site, errs.shape[1], int(reached.nonzero()[0]))
            if order is not None and not order.holds(site, errs):
                raise NotSeparable(list(site.parameters.values()), ROWS)
            gatherer.receive(site, acts, errs)

        one_run = Pass(sites, batch.size, admit, receive)
        gatherer = Gatherer(sites, one_run.calls, receiver.from_rules)
        watch = sorted({name for site in sites for name in site.parameters.values()})
        values, found = one_run.run(
            self.module, self.loss, batch, [self.parameters[name] for name in watch], order=order
        )
        outside = [name for name, grad in zip(watch, found, strict=True) if grad is not None]
        if outside:
            raise NotSeparable(outside, OUTSIDE)
        gatherer.flush()
        return values


def make_plan(module: nn.Module, parameters: dict[str, nn.Parameter], loss: Loss, sample: Batch) -> Plan:
    """Run one or two samples and look."""
    sites = find_sites(module, parameters)
    ruled = sorted({name for site in sites for name in site.parameters.values()})
    plan = Plan()
    plan.exclude([name for name in parameters if name not in ruled], NO_RULE)
    sample, reads = sample.copy(), ValueReads()
    silent: set[tuple[str, int]] = set()

    def watched(module, tree):
        with reads:
            return loss(module, tree)

    def admit(site: Site, rows: int) -> bool:
        plan.rows.setdefault(site.name, set()).add(rows)
        return rows > 0

    def receive(site: Site, acts: Tensor | None, errs: Tensor):
        if errs[1:].nan_to_num().any():
            plan.rows[site.name].add(0)
        if sample.size > 1:  # one sample alone has nothing that it could be mixed up with
            (plan.seen if errs[0].nan_to_num().any() else silent).add((site.name, errs.shape[1]))

    one_run = Pass(sites, sample.size, admit, receive)
    with _same_random_numbers(sample, parameters):
        try:
            _, found = one_run.run(module, watched, sample, [parameters[name] for name in ruled], only_first=True)
        except NotSeparable as refusal:
            plan.whole = refusal.reason
            plan.exclude(parameters, refusal.reason)
            found = [None] * len(ruled)
    plan.seen -= silent  # of the calls of a layer, each must have been told apart
    plan.by_values = reads.found
    plan.exclude([name for name, grad in zip(ruled, found, strict=True) if grad is not None], OUTSIDE)
    mixed = [site for site in sites if 0 in plan.rows.get(site.name, ())]
    plan.exclude([name for site in mixed for name in site.parameters.values()], ROWS)
    # A later look that sees no errors of these must not find them told apart.
    plan.seen -= {(site.name, rows) for site in mixed for rows in plan.rows[site.name]}
    return plan


def _same_random_numbers(sample: Batch, parameters: dict[str, nn.Parameter]):
    """A context that leaves the random state as it found it."""
    devices = {tensor.device for tensor in (*sample.tensors, *parameters.values()) if tensor.device.type == "cuda"}
    return torch.random.fork_rng(sorted(devices, key=str))
