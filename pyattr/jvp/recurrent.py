"""Rules of recurrent networks: step by step in plain operators, each on the primal and all tangents."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .dual import Run
from .rule import NoRule, function_rule

# One step: (what the input gives [B, G H], state, what the weights make of the hidden part [B, G H]) -> state; the state is
# (h [B, H],), of an LSTM (h, c).


def _lstm_step(given, state: tuple, recurrent) -> tuple:
    enter, forget, new, leave = (given + recurrent).chunk(4, 1)
    cell = forget.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cell.tanh(), cell


def _gru_step(given, state: tuple, recurrent) -> tuple:
    (reset, update, new), (reset_h, update_h, new_h) = given.chunk(3, 1), recurrent.chunk(3, 1)
    new = (new + (reset + reset_h).sigmoid() * new_h).tanh()
    return (new + (update + update_h).sigmoid() * (state[0] - new),)


def _rnn_step(activation, given, state: tuple, recurrent) -> tuple:
    return (activation(given + recurrent),)


_STEPS = {
    "lstm": _lstm_step,
    "gru": _gru_step,
    "rnn_tanh": functools.partial(_rnn_step, torch.tanh),
    "rnn_relu": functools.partial(_rnn_step, torch.relu),
}


def _recurrent_network(
    step, run: Run, x, start, weights, biases, layers, dropout, train, bidirectional, batch_first=None
):
    """x [T, B, I] or, batch_first, [B, T, I]; start [layers * directions, B, H], of an LSTM two of them.

    Returns:
        y [T, B, directions * H] or [B, T, ...], and each part of the last states [layers * directions, B, H].
    """
    if batch_first is None or (isinstance(start, Tensor) and not start.is_floating_point()):
        raise NoRule  # a packed sequence
    starts = start if isinstance(start, (tuple, list)) else (start,)
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)  # weights of one layer in one direction
    steps = (x.transpose(0, 1) if batch_first else x).unbind(0)
    if not steps:
        raise NoRule  # torch says what is wrong
    ends = []
    for layer in range(layers):
        if layer and dropout and train:
            steps = [F.dropout(one, dropout) for one in steps]
        outputs = []
        for direction in range(directions):
            which = layer * directions + direction
            own = weights[which * each : (which + 1) * each]
            state = tuple(part[which] for part in starts)
            shown = []
            for one in reversed(steps) if direction else steps:
                state = _one_step(step, one, state, own, biases)
                shown.append(state[0])
            outputs.append(shown[::-1] if direction else shown)
            ends.append(state)
        steps = [torch.cat(both, -1) for both in zip(*outputs, strict=True)] if bidirectional else outputs[0]
    return torch.stack(steps, 1 if batch_first else 0), *(torch.stack(part) for part in zip(*ends, strict=True))


def _one_step(step, x, state: tuple, weights, biases: bool) -> tuple:
    """weights: for the input, for the hidden part, their biases, and the projection of an LSTM's output, if any."""
    for_x, for_h = weights[2:4] if biases else (None, None)
    state = step(F.linear(x, weights[0], for_x), state, F.linear(state[0], weights[1], for_h))
    projection = weights[4:] if biases else weights[2:]
    return (F.linear(state[0], projection[0]), *state[1:]) if len(projection) else state


def _recurrent_cell(step, run: Run, x, state, for_x, for_h, bias_x=None, bias_h=None):
    several = isinstance(state, (tuple, list))
    weights = [for_x, for_h] if bias_x is None else [for_x, for_h, bias_x, bias_h]
    result = _one_step(step, x, tuple(state) if several else (state,), weights, bias_x is not None)
    return result if several else result[0]


for _name, _step in _STEPS.items():
    function_rule(getattr(torch, _name))(functools.partial(_recurrent_network, _step))
    function_rule(getattr(torch, f"{_name}_cell"))(functools.partial(_recurrent_cell, _step))
