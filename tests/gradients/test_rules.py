"""Each kind of layer against the definition, in float64, over the settings that change its formula."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from pyattr.gradients import per_sample_gradients
from pyattr.gradients.capture import RULES

B = 3

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch's own


def weighted(module, batch):
    """A loss that gives every output element another error, which itself depends on the output."""
    out = module(batch)
    weights = torch.linspace(-1, 2, out[0].numel(), dtype=torch.float64).view(out.shape[1:])
    return (weights * out + out**2 / 7).flatten(1).sum(1)


def test_linear_by_hand():
    layer = nn.Linear(2, 1).double()
    batch = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
    factor = torch.tensor([2.0, -3.0], dtype=torch.float64)
    grads = per_sample_gradients(layer, lambda module, batch: module(batch[0])[:, 0] * batch[1], (batch, factor))
    assert grads["weight"].tolist() == [[[2.0, 4.0]], [[-9.0, 3.0]]]
    assert grads["bias"].tolist() == [[2.0], [-3.0]]


def test_conv_by_hand():
    layer = nn.Conv1d(1, 1, 2).double()
    batch = torch.tensor([[[1.0, 2.0, 4.0]], [[0.0, 5.0, 7.0]]], dtype=torch.float64)
    errors = torch.tensor([10.0, 100.0], dtype=torch.float64)  # of the two output positions
    grads = per_sample_gradients(layer, lambda module, batch: (module(batch)[:, 0] * errors).sum(1), batch)
    assert grads["weight"].tolist() == [[[[210.0, 420.0]]], [[[500.0, 750.0]]]]
    assert grads["bias"].tolist() == [[110.0], [110.0]]


def test_embedding_by_hand():
    layer = nn.Embedding(4, 1, padding_idx=2).double()
    ids = torch.tensor([[0, 3, 3], [2, 1, 0]])
    errors = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    grads = per_sample_gradients(layer, lambda module, ids: (module(ids)[..., 0] * errors).sum(1), ids)
    assert grads["weight"][..., 0].tolist() == [[1.0, 0.0, 0.0, 110.0], [100.0, 10.0, 0.0, 0.0]]


LINEAR = [
    (nn.Linear(5, 4), (B, 5)),
    (nn.Linear(5, 4, bias=False), (B, 6, 5)),
    (nn.Linear(5, 4), (B, 2, 3, 5)),
    (nn.Linear(1, 1), (B, 1)),
]
NORMS = [
    (nn.GroupNorm(2, 6), (B, 6, 4, 5)),
    (nn.GroupNorm(3, 6), (B, 6, 7)),
    (nn.GroupNorm(2, 6), (B, 6)),
    (nn.LayerNorm(5), (B, 5)),
    (nn.LayerNorm(5), (B, 4, 3, 5)),
    (nn.LayerNorm((3, 5)), (B, 4, 3, 5)),
    (nn.LayerNorm((4, 3, 5), eps=0.1), (B, 4, 3, 5)),
    (nn.LayerNorm(5, bias=False), (B, 2, 5)),
]
CONVS = [
    (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (B, 4, 11)),
    (nn.Conv1d(4, 6, 4, padding="same", dilation=3, groups=2), (B, 4, 9)),
    (nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), (B, 2, 8)),
    (nn.Conv2d(2, 3, 1), (B, 2, 4, 5)),
    (nn.Conv2d(2, 3, 1, stride=2, padding=1), (B, 2, 5, 5)),
    (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), bias=False), (B, 3, 8, 7)),
    (nn.Conv2d(3, 4, 4, padding="same"), (B, 3, 6, 7)),
    (nn.Conv2d(3, 4, (2, 3), padding="valid", dilation=(1, 2)), (B, 3, 6, 7)),
    (nn.Conv2d(2, 4, 3, padding=(2, 1), padding_mode="reflect", stride=2), (B, 2, 6, 7)),
    (nn.Conv2d(2, 4, 4, padding="same", padding_mode="replicate"), (B, 2, 6, 7)),
    (nn.Conv2d(4, 8, 3, padding=1, groups=4), (B, 4, 5, 5)),
    (nn.Conv2d(6, 6, 3, padding=1, groups=6), (B, 6, 5, 5)),
    (nn.Conv2d(2, 2, 5, padding=3), (B, 2, 1, 2)),
    (nn.Conv3d(2, 4, 2, stride=2, padding=1, groups=2), (B, 2, 4, 5, 3)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1, groups=2), (B, 4, 5)),
    (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (B, 3, 5, 4)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(1, 3), dilation=2, groups=2, bias=False), (B, 4, 5, 4)),
    (nn.ConvTranspose2d(2, 3, 1, stride=1, output_padding=1, dilation=2), (B, 2, 4, 4)),
    (nn.ConvTranspose2d(2, 3, 1), (B, 2, 4, 4)),
    (nn.ConvTranspose2d(2, 3, 2, stride=1, padding=2, output_padding=2, dilation=3), (B, 2, 4, 4)),
    (nn.ConvTranspose3d(2, 3, 2, stride=2), (B, 2, 2, 3, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), [*LINEAR, *NORMS, *CONVS], ids=str)
def test_layer(layer, shape, check):
    check(layer.double(), weighted, torch.randn(shape, dtype=torch.float64))


@pytest.mark.parametrize(("layer", "shape"), CONVS, ids=str)
def test_convolution_in_float32(layer, shape, check):
    """Float32 on the CPU takes another way than float64 where the map is large; the map here is large."""
    layer.float()
    batch = torch.randn(shape[:2] + tuple(19 + i for i in range(len(shape) - 2)))
    check(layer, lambda module, batch: module(batch).square().flatten(1).mean(1), batch, 2e-5)


@pytest.mark.parametrize(("layer", "shape"), [*LINEAR, *NORMS, *CONVS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_of_a_parameter(layer, shape, dtype, data):
    """A block of rows is what the whole gradient has there, whether written or added."""
    layer.to(dtype)
    rule = next(rule for rule in RULES if rule.covers(layer))
    acts = torch.randn(B, 1, *shape[1:], dtype=dtype)
    errs = torch.randn_like(layer(acts.flatten(0, 1))).unflatten(0, (B, 1))
    name = data.draw(st.sampled_from([name for name, _ in layer.named_parameters()]))
    parameter = layer.get_parameter(name)
    start = data.draw(st.integers(0, parameter.shape[0] - 1))
    rows = slice(start, data.draw(st.integers(start + 1, parameter.shape[0])))
    whole = torch.empty(B, *parameter.shape, dtype=dtype)
    rule.gradients[name](layer, acts, errs, slice(0, parameter.shape[0]), whole, False)
    part = torch.empty(B, rows.stop - rows.start, *parameter.shape[1:], dtype=dtype)
    rule.gradients[name](layer, acts, errs, rows, part, False)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4}[dtype] * whole.abs().max().item()
    torch.testing.assert_close(part, whole[:, rows], rtol=0, atol=tolerance)
    rule.gradients[name](layer, acts, errs, rows, part, True)
    torch.testing.assert_close(part, 2 * whole[:, rows], rtol=0, atol=2 * tolerance)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 2)),
    padding=st.one_of(st.just("same"), st.tuples(st.integers(0, 2), st.integers(0, 2))),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    size=st.tuples(st.integers(7, 20), st.integers(5, 18)),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_convolution(groups, kernel, stride, padding, dilation, mode, size, dtype, check):
    stride = 1 if padding == "same" else stride
    layer = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, padding_mode=mode).to(dtype)
    batch = torch.randn(B, 4, *size, dtype=dtype)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    check(layer, lambda module, batch: module(batch).square().flatten(1).sum(1), batch, tolerance)


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, 2, 4)])
def test_embedding(shape, check):
    layer = nn.Embedding(7, 3, padding_idx=1).double()
    check(layer, weighted, torch.randint(0, 7, shape))
    check(nn.Embedding(7, 3).double(), weighted, torch.randint(0, 7, shape, dtype=torch.int32))


def test_embedding_rows():
    layer = nn.Embedding(7, 3, padding_idx=1).double()
    rule = next(rule for rule in RULES if rule.covers(layer))
    ids, errs = torch.randint(0, 7, (B, 1, 5)), torch.randn(B, 1, 5, 3, dtype=torch.float64)
    whole, part = (torch.empty(B, rows, 3, dtype=torch.float64) for rows in (7, 4))
    rule.gradients["weight"](layer, ids, errs, slice(0, 7), whole, False)
    rule.gradients["weight"](layer, ids, errs, slice(1, 5), part, False)
    assert torch.equal(part, whole[:, 1:5])


@pytest.mark.parametrize("setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_embedding_without_a_gradient_of_its_own_is_refused(setting):
    layer = nn.Sequential(nn.Embedding(7, 3, **setting))
    with pytest.raises(ValueError, match=f"Embedding '0': {next(iter(setting))}"):
        per_sample_gradients(layer, lambda module, ids: module(ids).sum(-1), torch.tensor([1, 2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_sums_in_float32(dtype):
    """The errors come in half precision; their sum over 4096 positions does not stay there."""
    layer = nn.Linear(1, 1, bias=False).to(dtype)
    batch = torch.ones(1, 4096, 1, dtype=dtype)
    grads = per_sample_gradients(layer, lambda module, batch: (module(batch) * 1.0).float().sum((1, 2)), batch)
    assert grads["weight"].dtype == torch.float32
    assert grads["weight"].tolist() == [[[4096.0]]]
