"""What is learnt from two samples, and how a budget is split."""

import pytest
import torch
from small_models import squares
from torch import nn

from pyattr.gradients.batch import Batch
from pyattr.gradients.blocks import COPIES
from pyattr.gradients.plan import Planner, make_plan
from pyattr.gradients.project import TRANSIENTS, split


def test_the_memory_of_both_passes_is_measured():
    module = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1))
    whole = torch.randn(100, 10)
    planner = Planner(module, squares, Batch.of(whole[40:44]))  # a view: the rest of the storage is not the batch's
    peak, largest = planner.memory(Batch.of(whole[40:44]))
    assert largest == 4 * 20
    kept = 20 + 20 + 1 + 1 + 1  # before and after tanh (taps hold no copies), the output, its square, the loss
    assert 4 * kept <= peak <= 4 * (kept + 3 * 20)  # and errors on their way
    assert planner.memory(Batch.of(torch.randn(9, 10))) == (peak, largest)


def test_errors_that_wait_for_each_other_are_counted():
    def peak(*layers):
        batch = Batch.of(torch.randn(4, 100))
        return Planner(nn.Sequential(*layers), squares, batch).memory(batch)[0]

    layers = [nn.Linear(100, 100) for _ in range(10)]
    apart = peak(*layers)
    waiting = 6 * 4 * 100  # ten errors in place of at most three, and one input less
    assert peak(*[layers[0]] * 10) >= apart + waiting
    for layer in layers:
        layer.weight = layers[0].weight
    assert peak(*layers) >= apart + waiting


def test_a_plan_is_kept_for_the_same_model_loss_and_shape():
    module, count = nn.Linear(3, 2), []

    def loss(module, batch):
        count.append(len(batch))
        return module(batch).square().flatten(1).sum(1)

    for batch in (torch.randn(4, 3), torch.randn(9, 3)):
        Planner(module, loss, Batch.of(batch))
    assert count == [2]
    Planner(module, loss, Batch.of(torch.randn(4, 5, 3)))  # another shape
    Planner(nn.Linear(3, 2), loss, Batch.of(torch.randn(4, 3)))  # another model
    Planner(module, lambda *args: loss(*args), Batch.of(torch.randn(4, 3)))  # another loss
    module.bias.requires_grad_(False)
    Planner(module, loss, Batch.of(torch.randn(4, 3)))  # other parameters
    assert count == [2] * 5


@pytest.mark.parametrize("memory", [2_000, 5_000, 12_345, 10**6])
def test_the_parts_of_a_budget_fit(memory):
    parameters = {"a": torch.empty(8, 10), "b": torch.empty(3)}
    activations, batch_size = (400, 100), 13
    size, block = split([], activations, parameters, batch_size, memory)
    per_sample = 400 + TRANSIENTS * 100
    assert 1 <= size <= batch_size
    assert size * per_sample + block == memory
    assert block >= COPIES * size * 4 * 10  # a row of every sample


def test_a_budget_for_one_sample_is_the_least():
    parameters = {"a": torch.empty(8, 10)}
    least = 400 + TRANSIENTS * 100 + COPIES * 4 * 10
    assert split([], (400, 100), parameters, 5, least)[0] == 1
    with pytest.raises(ValueError, match=f"at least {least} bytes for one sample, got {least - 1}"):
        split([], (400, 100), parameters, 5, least - 1)


def test_gradients_without_a_rule_count_whole():
    parameters = {"a": torch.empty(8, 10), "b": torch.empty(100)}
    least = 2 * 400 + 2 * 400 + COPIES * 4 * 10
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        split(["b"], (400, 100), parameters, 5, 0)


def test_a_layer_whose_rows_are_mixed_is_never_taken_for_told_apart():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 2)

        def forward(self, x):  # [B, 4, 3]
            return self.inner(x.transpose(0, 1)).transpose(0, 1)

    module = SequenceFirst()
    plan = make_plan(module, dict(module.named_parameters()), squares, Batch.of(torch.randn(2, 4, 3)))
    assert set(plan.slow) == {"inner.weight", "inner.bias"}
    assert plan.seen == set()
