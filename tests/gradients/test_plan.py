"""What is learnt from two samples, and how a budget is split."""

import pytest
import torch
from torch import nn

from pyattr.gradients.batch import Batch
from pyattr.gradients.plan import Plan, Planner
from pyattr.gradients.project import COPIES, TRANSIENTS, split


def squares(module, batch):
    return module(batch).square().flatten(1).sum(1)


def test_activations_are_counted():
    module = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 1))
    whole = torch.randn(100, 10)
    planner = Planner(module, squares, Batch.of(whole[40:44]))  # a view: the rest of the storage is not the model's
    saved, largest = planner.activations(Batch.of(whole[40:44]))
    assert largest == 4 * 20
    assert saved == 4 * (10 + 20 + 1)  # the input, the result of tanh, the output that is squared


def test_errors_of_layers_that_run_twice_are_counted():
    layer = nn.Linear(10, 10)
    batch = Batch.of(torch.randn(4, 10))
    assert Planner(nn.Sequential(layer, nn.Tanh()), squares, batch).plan.held == 0
    assert Planner(nn.Sequential(layer, nn.Tanh(), layer), squares, batch).plan.held == 2 * 4 * 10


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
    size, block = split(Plan(), activations, parameters, batch_size, memory)
    per_sample = 400 + TRANSIENTS * 100
    assert 1 <= size <= batch_size
    assert size * per_sample + block == memory
    assert block >= COPIES * size * 4 * 10  # a row of every sample


def test_a_budget_for_one_sample_is_the_least():
    parameters = {"a": torch.empty(8, 10)}
    least = 400 + TRANSIENTS * 100 + COPIES * 4 * 10
    assert split(Plan(), (400, 100), parameters, 5, least)[0] == 1
    with pytest.raises(ValueError, match=f"at least {least} bytes for one sample, got {least - 1}"):
        split(Plan(), (400, 100), parameters, 5, least - 1)


def test_gradients_without_a_rule_count_whole():
    parameters = {"a": torch.empty(8, 10), "b": torch.empty(100)}
    plan = Plan(slow={"b": "no rule"})
    least = 2 * 400 + TRANSIENTS * 100 + 2 * 400 + COPIES * 4 * 10
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        split(plan, (400, 100), parameters, 5, 0)
