"""Recurrent networks, step by step."""

import copy
import warnings

import pytest
import torch
from torch import nn

from pyattr.jvp import dual_forward

NETWORKS = {
    "rnn": lambda: nn.RNN(3, 4, bidirectional=True),
    "rnn_relu": lambda: nn.RNN(3, 4, 2, nonlinearity="relu", batch_first=True, bias=False),
    "gru": lambda: nn.GRU(3, 4, 2, bidirectional=True, batch_first=True),
    "gru_without_bias": lambda: nn.GRU(3, 4, bias=False),
    "lstm": lambda: nn.LSTM(3, 4, 2, batch_first=True),
    "lstm_both_ways": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "lstm_projected": lambda: nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True),
    "lstm_projected_without_bias": lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
}
CELLS = {
    "rnn": lambda: nn.RNNCell(3, 4),
    "rnn_relu": lambda: nn.RNNCell(3, 4, bias=False, nonlinearity="relu"),
    "gru": lambda: nn.GRUCell(3, 4),
    "lstm": lambda: nn.LSTMCell(3, 4),
}
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def everything(result):
    """All that a network returns, in one tensor."""
    y, ends = result
    return torch.cat([part.flatten() for part in (y, *(ends if isinstance(ends, tuple) else [ends]))])


def in_float64(model):
    """torch has no forward derivative of an LSTM in float32 on the CPU."""
    return copy.deepcopy(model).double()


@both_types
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(2, 5, 3), (1, 1, 3), (6, 3)], ids=str)
def test_network(name, shape, dtype, agrees):
    model = NETWORKS[name]().to(dtype)
    exact = in_float64(model)
    agrees(
        lambda x: everything(model(x.sin())),
        torch.randn(shape, dtype=dtype),
        plain=lambda x: everything(exact(x.sin())),
    )


@both_types
@pytest.mark.parametrize("given", [False, True], ids=["from zeros", "from a state"])
@pytest.mark.parametrize("name", CELLS)
def test_cell(name, given, dtype, agrees):
    cell = CELLS[name]().to(dtype)
    exact = in_float64(cell)

    def function(cell, x):
        state = None
        if given:
            state = torch.cat([x, x[:, :1]], 1)
            state = (state, state.sin()) if name == "lstm" else state
        for _ in range(2):
            state = cell(x, state)
        return torch.cat(state) if isinstance(state, tuple) else state

    agrees(lambda x: function(cell, x), torch.randn(2, 3, dtype=dtype), plain=lambda x: function(exact, x))


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_first_states_that_depend_on_x(name, agrees):
    model = NETWORKS[name]().double()
    layers = model.num_layers * (2 if model.bidirectional else 1)
    given = torch.randn(2, 5, 3, dtype=torch.float64)

    def function(x):
        start = x.expand(layers, 2, 4)
        return everything(model(given, (start, start.cos()) if name == "lstm" else start))

    agrees(function, torch.randn(2, 4, dtype=torch.float64))


def test_dropout_between_layers_draws_one_mask():
    model = nn.RNN(3, 4, 2, dropout=0.5, nonlinearity="relu").double().train()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    tangents = torch.stack([x, -2 * x])
    for part in (model.bias_ih_l0, model.bias_hh_l0, model.bias_ih_l1, model.bias_hh_l1):
        nn.init.zeros_(part)  # so that y is linear along x: its derivative is y itself
    y, y_dot = dual_forward(lambda x: model(x)[0], x, tangents)
    assert torch.count_nonzero(y) > 0
    assert torch.allclose(y_dot[0], y) and torch.allclose(y_dot[1], -2 * y)
    other, _ = dual_forward(lambda x: model(x)[0], x, tangents)
    assert not torch.equal(y, other)


def test_packed_sequences_are_refused():
    packed = nn.utils.rnn.pack_padded_sequence
    with pytest.raises(NotImplementedError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dual_forward(lambda x: packed(x, torch.tensor([4, 2])).data, torch.randn(4, 2, 3), torch.randn(1, 4, 2, 3))
    assert str(error.value).startswith(
        "dual_forward: aten::_pack_padded_sequence has no rule, and torch cannot differentiate it: "
    )
