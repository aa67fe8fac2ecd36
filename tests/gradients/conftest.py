"""The definition of a per-sample gradient: differentiate the loss of each sample alone, one after the other."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from pyattr.gradients import fallback, per_sample_gradients, plan


def by_definition(module, loss, batch):
    """name -> [B, ...], by a loop over samples."""
    size = next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)).shape[0]
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    rows = []
    for b in range(size):
        sample = tree_map(lambda leaf, b=b: leaf[b : b + 1] if isinstance(leaf, torch.Tensor) else leaf, batch)
        grads = torch.autograd.grad(loss(module, sample).mean(), list(parameters.values()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), grads, strict=True)])
    return {name: torch.stack(column) for name, column in zip(parameters, zip(*rows, strict=True), strict=True)}


def assert_same(got, expected, tolerance):
    """Every parameter's gradient, to a tolerance relative to the largest entry of all."""
    assert list(got) == list(expected)
    scale = max(grad.abs().max().item() for grad in expected.values())
    assert scale > 0
    for name in got:
        assert got[name].dtype == expected[name].dtype, name
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=tolerance * scale, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.fixture
def definition():
    return by_definition


@pytest.fixture
def check():
    """Compare per_sample_gradients with the definition; returns the gradients."""

    def run(module, loss, batch, tolerance=1e-10):
        got = per_sample_gradients(module, loss, batch)
        assert_same(got, by_definition(module, loss, batch), tolerance)
        return got

    return run


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing learnt or announced by the test before.

    One thread: these problems are tiny, and threads that wait for each other on a busy machine take most of the time.
    """
    torch.set_num_threads(1)
    monkeypatch.setattr(fallback, "_announced", set())
    monkeypatch.setattr(plan, "_plans", type(plan._plans)())
