"""Which row of a layer's input belongs to which sample: found out, or refused."""

from contextlib import nullcontext

import pytest
import torch
from small_models import B, Model, data, network, squares
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyattr.gradients import FallbackWarning, per_sample_gradients

T = 3
ROWS = "its rows are not the samples in order"


# Timesteps.


def test_timesteps_are_averaged(check):
    module, batch = network(), (data(2, 5, 5), data(T))

    def loss(module, batch):
        return module(batch[0]).square().sum(1)[:, None] * batch[1]

    check(module, loss, batch)


def fold(order):
    def loss(module, batch):
        noisy = batch["x"][:, None] + batch["noise"]  # [B, T, 2, 5, 5]
        if order == "sample":
            out = module(noisy.flatten(0, 1)).unflatten(0, noisy.shape[:2])
        else:
            out = module(noisy.transpose(0, 1).flatten(0, 1)).unflatten(0, (T, -1)).transpose(0, 1)
        return out.square().sum(2)

    return loss


def test_timesteps_folded_into_the_batch(check):
    check(network(), fold("sample"), {"x": data(2, 5, 5), "noise": data(T, 2, 5, 5)})


def test_timesteps_folded_the_other_way_round_are_noticed(check):
    with pytest.warns(FallbackWarning, match=ROWS):
        check(network(), fold("time"), {"x": data(2, 5, 5), "noise": data(T, 2, 5, 5)})


def test_a_loop_over_timesteps(check):
    def loss(module, batch):
        return torch.stack([module(batch["x"] + noise).sum(1) ** 2 for noise in batch["noise"].unbind(1)], 1)

    check(network(), loss, {"x": data(2, 5, 5), "noise": data(T, 2, 5, 5)})


@pytest.mark.parametrize("first", [1, 4])
def test_another_number_of_timesteps_with_the_same_loss(first, check):
    """What was learnt about one call is not forced upon the next."""
    module, steps = network(), []

    def loss(module, x):
        return module(x.repeat_interleave(steps[-1], 0)).unflatten(0, (-1, steps[-1])).square().sum(2)

    for count in (first, 3, first):
        steps.append(count)
        check(module, loss, data(2, 5, 5))


# Layouts that shapes do not reveal.


@pytest.mark.parametrize("length", [B, 2 * B, 5])
def test_sequences_in_front(length, check):
    """[S, B, E] looks like S / B rows per sample where S is a multiple of B."""
    module = Model(lambda self, x: self.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(3, 2))
    with pytest.warns(FallbackWarning, match=ROWS):
        check(module, squares, data(length, 3))


@pytest.mark.parametrize("length", [B, 2 * B, 5])
def test_position_embeddings(length, check):
    """A layer that runs once for all samples has no rows of theirs."""

    def forward(self, x):
        return self.mix(x + self.positions(torch.arange(x.shape[1])))

    module = Model(forward, positions=nn.Embedding(length, 3), mix=nn.Linear(3, 2))
    with pytest.warns(FallbackWarning, match=ROWS) as caught:
        check(module, squares, data(length, 3))
    assert ["Embedding" in str(warning.message) for warning in caught] == [True]


def test_an_input_without_a_batch_dimension(check):
    module = Model(lambda self, x: x * self.a(torch.ones(B, dtype=torch.float64)), a=nn.Linear(B, 3))
    with pytest.warns(FallbackWarning, match=ROWS):
        check(module, squares, data(3))


def test_a_batch_of_one(check):
    check(network(), squares, data(2, 5, 5)[:1])
    module = Model(lambda self, x: self.a(x.transpose(0, 1)).transpose(0, 1), a=nn.Linear(3, 2))
    check(module, squares, data(5, 3)[:1])


# Errors that are zero when the rows are told apart.


@pytest.mark.parametrize("order", ["sample", "time"])
def test_an_output_layer_that_starts_at_zero_hides_the_order_of_rows(order, check):
    module, loss = network(), fold(order)
    batch = {"x": data(2, 5, 5), "noise": data(T, 2, 5, 5)}
    nn.init.zeros_(module[4].weight)
    with pytest.warns(FallbackWarning, match=ROWS) if order == "time" else nullcontext():
        check(module, loss, batch)
    nn.init.normal_(module[4].weight)
    with pytest.warns(FallbackWarning, match=ROWS) if order == "time" else nullcontext():
        check(module, loss, batch)


@pytest.mark.parametrize("order", ["sample", "time"])
@pytest.mark.parametrize("weights", [(0, 1, 2, 3), (0, 0, 0, 1)])
def test_samples_without_a_loss_hide_the_order_of_rows(order, weights, check):
    def loss(module, batch):
        return fold(order)(module, batch) * batch["weight"][:, None]

    weight = torch.tensor(weights, dtype=torch.float64)
    batch = {"x": data(2, 5, 5), "noise": data(T, 2, 5, 5), "weight": weight}
    with pytest.warns(FallbackWarning, match=ROWS) if order == "time" else nullcontext():
        check(network(), loss, batch)


def test_a_layer_that_only_some_samples_switch_on(check):
    """Each gated layer sees errors of other samples: one look after another, and no way around the rules."""
    module = Model(
        lambda self, x: self.a(x) * (x[:, :1] > 1) + self.b(x) * (x[:, :1] < 0),
        a=nn.Linear(3, 2),
        b=nn.Linear(3, 2),
    )
    batch = data(3)
    batch[:, 0] = torch.tensor([0.5, 0.5, 2, -1])
    check(module, squares, batch)
    batch[:, 0] = torch.tensor([0.5, 2, 0.5, -1])
    check(module, squares, batch)


# Rows whose number depends on values.


def by_mask(x, lengths):
    return x[torch.arange(x.shape[1]) < lengths[:, None]]


def by_list(x, lengths):
    return torch.cat([row[:length] for row, length in zip(x, lengths.tolist(), strict=True)])


def by_packing(x, lengths):
    return nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False).data


def ragged(rows):
    """A layer that sees ``lengths`` rows of each sample."""

    def forward(self, x, lengths):
        h = torch.tanh(self.first(rows(x, lengths)))
        owner = (torch.arange(len(h)) >= lengths.cumsum(0)[:, None]).sum(0)  # reads no values
        if rows is by_packing:
            owner = by_packing(torch.arange(len(x))[:, None].expand(x.shape[:2]), lengths)
        return torch.zeros(len(x), 2, dtype=x.dtype).index_add(0, owner, self.second(h))

    def loss(module, batch):
        return module(*batch).square().sum(1)

    return Model(forward, first=nn.Linear(3, 4), second=nn.Linear(4, 2)), loss


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("rows", [by_mask, by_list])
def test_rows_that_are_picked_by_values(rows, check):
    (module, loss), x = ragged(rows), data(6, 3)
    for lengths in ([3, 3, 3, 3], [2, 2, 2, 2]):
        check(module, loss, (x, torch.tensor(lengths)))
    with (
        pytest.raises(RuntimeError, match=r"parameters .*first\.weight.*torch\.func cannot differentiate"),
        pytest.warns(FallbackWarning, match=ROWS),
    ):
        per_sample_gradients(module, loss, (x, torch.tensor([3, 3, 5, 1])))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("rows", [by_mask, by_list, by_packing])
@pytest.mark.parametrize("lengths", [[3, 3, 5, 1], [3, 3, 1, 5], [3, 3, 3, 7]])
def test_a_multiple_of_the_samples_is_not_their_order(rows, lengths):
    module, loss = ragged(rows)
    with (
        pytest.raises(RuntimeError, match=r"parameters .*first\.weight.*torch\.func cannot differentiate"),
        pytest.warns(FallbackWarning, match=ROWS),
    ):
        per_sample_gradients(module, loss, (data(7, 3), torch.tensor(lengths)))


def test_a_test_of_every_batch_leaves_right_models_alone(check):
    """Values decide about something, but not about the rows."""

    def forward(self, x):
        if x.abs().max() > 0.1:
            x = torch.tanh(self.a(x))
        x = x.index_put((x > 0.5,), x[x > 0.5] * 2)
        return checkpoint(self.b, x, use_reentrant=False)

    module = Model(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2))
    for _ in range(2):
        check(module, squares, data(5, 3))
    check(module.float(), squares, data(5, 3).float(), 1e-5)
