"""Whatever a model does around its layers: the gradients are right, or the model is refused, and it stays as it was."""

import copy
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from small_models import B, Model, data, network, squares
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyattr.gradients import FallbackWarning, per_sample_gradients

OUTSIDE = "used outside of its layer's call"


def state(module):
    """Everything about a module that gradients must not change."""
    return [
        (name, child.training, list(child.__dict__), list(child._forward_hooks), list(child._forward_pre_hooks))
        for name, child in module.named_modules()
    ] + [(name, id(p), p.requires_grad, p.grad, p._version, type(p)) for name, p in module.named_parameters()]


def test_the_module_stays_as_it_was(check):
    module = network()
    module[1].eval()
    module[0].bias.requires_grad_(False)
    module[4].weight.grad = kept = torch.ones_like(module[4].weight)
    before = state(module)
    grads = check(module, squares, data(2, 5, 5))
    assert state(module) == before
    assert module[4].weight.grad is kept and torch.equal(kept, torch.ones_like(kept))
    assert list(grads) == ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize("stage", ["forward", "in the layer", "backward"])
def test_an_exception_leaves_nothing_behind(stage):
    module = network()
    before = state(module)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ArithmeticError("backward")

    def loss(module, batch):
        if stage == "in the layer":
            module[4](batch)
        out = module(batch)
        if stage == "forward":
            raise ArithmeticError("forward")
        return Fails.apply(out).sum(1)

    with pytest.raises(RuntimeError if stage == "in the layer" else ArithmeticError):
        per_sample_gradients(module, loss, data(2, 5, 5))
    assert state(module) == before


def test_one_forward_and_one_backward_pass():
    module, passes = network(), []

    class Counts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            passes.append(("forward", len(x)))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            passes.append(("backward", len(grad)))
            return grad

    def loss(module, batch):
        return Counts.apply(module(batch)).sum(1)

    for _ in range(2):
        per_sample_gradients(module, loss, data(2, 5, 5))
    once = [("forward", B), ("backward", B)]
    assert passes == [("forward", 2), ("backward", 2), *once, *once]


def test_no_ordinary_weight_gradient_is_computed(check):
    """The backward pass asks a layer for the error of its input only."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = data(3)
    per_sample_gradients(module, squares, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        per_sample_gradients(module, squares, batch)
    products = [event for event in profile.events() if event.name in ("aten::mm", "aten::addmm", "aten::bmm")]
    assert sum(event.name != "aten::bmm" for event in products) == 2 + 1  # two forward, one error of an input


def test_shared_modules_and_tied_parameters(check):
    layer = nn.Linear(3, 3)
    tied = nn.Linear(3, 3)
    tied.weight = layer.weight
    module = nn.Sequential(layer, nn.Tanh(), layer, nn.Sigmoid(), tied, layer).double()
    assert list(check(module, squares, data(3))) == ["0.weight", "0.bias", "4.bias"]


def test_weights_tied_across_kinds_of_layers(check):
    embed, head = nn.Embedding(6, 3), nn.Linear(3, 6, bias=False)
    head.weight = embed.weight
    module = Model(lambda self, ids: self.head(torch.tanh(self.embed(ids))), embed=embed, head=head)
    check(module, squares, torch.randint(0, 6, (B, 5)))


def test_a_tied_weight_with_one_frozen_bias_and_an_unused_owner(check):
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    a.bias.requires_grad_(False)
    module = Model(lambda self, x: self.a(x), a=a, b=b)
    grads = check(module, squares, data(3))
    assert grads["b.bias"].shape == (B, 3) and not grads["b.bias"].any()


def test_unused_parameters_have_zero_gradients(check):
    module = Model(lambda self, x: self.used(x), used=nn.Linear(3, 2), unused=nn.Conv1d(1, 2, 3))
    grads = check(module, squares, data(3))
    assert grads["unused.weight"].shape == (B, 2, 1, 3)
    grads["unused.weight"][0] = 1  # memory of its own for each entry
    assert not grads["unused.weight"][1].any()


def test_an_output_that_the_loss_ignores(check):
    module = Model(lambda self, x: (self.a(x), self.b(x))[0], a=nn.Linear(3, 2), b=nn.Linear(3, 2))
    check(module, squares, data(3))


def test_in_place_changes_of_outputs(check):
    def forward(self, x):
        h = self.a(x)
        h[:, 1:] *= 2
        h = F.relu(h, inplace=True)
        h = self.b(h)
        h += 1
        return F.leaky_relu_(h)

    check(Model(forward, a=nn.Conv1d(2, 3, 3), b=nn.Conv1d(3, 2, 1)), squares, data(2, 6))


def test_an_input_changed_in_place_afterwards_is_an_error():
    def forward(self, x):
        x = x.clone()
        y = self.a(x)
        x += 1
        return y

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        per_sample_gradients(Model(forward, a=nn.Linear(3, 2)), squares, data(3))


def test_the_batch_may_be_nested(check):
    Pair = namedtuple("Pair", "x t")
    module = Model(lambda self, x, t: self.a(x) * self.b(t), a=nn.Linear(3, 2), b=nn.Embedding(9, 2))

    def loss(module, batch):
        pair, rest = batch["inputs"]
        out = module(pair.x, pair.t) - rest["target"]
        return out.square().sum(1) * (batch["weight"] if batch["mode"] == "weighted" else 0)

    times = torch.randint(0, 9, (B,))
    batch = {"inputs": [Pair(data(3), times), {"target": data(2)}], "weight": 3.0, "mode": "weighted", "none": None}
    check(module, loss, batch)


def test_a_batch_that_requires_a_gradient(check):
    batch = data(3).requires_grad_()
    check(nn.Sequential(nn.Linear(3, 2)).double(), squares, batch)
    assert batch.grad is None


def test_other_leaves_before_the_first_layer(check):
    """The way from the loss to the first layer's errors does not lead past something that is differentiated."""
    elsewhere = torch.randn(3, dtype=torch.float64, requires_grad=True)
    module = Model(lambda self, x: self.a(x * elsewhere), a=nn.Linear(3, 2))
    check(module, squares, data(3))
    assert elsewhere.grad is None


# Parameters used outside of their layer's call.


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.a(x) @ self.a.weight,
        lambda self, x: F.linear(x, self.a.weight, self.a.bias),
        lambda self, x: self.a.forward(x),
        lambda self, x: self.a(x) + self.a.bias,
    ],
)
def test_a_parameter_used_directly(forward, check):
    with pytest.warns(FallbackWarning, match=OUTSIDE):
        check(Model(forward, a=nn.Linear(3, 3), b=nn.Linear(3, 3)), squares, data(3))


def test_a_parameter_used_directly_later_on(check):
    """A use that the first call did not show still counts in the second."""
    direct = []
    module = Model(lambda self, x: self.a(x) + (self.a.weight.sum() if direct else 0), a=nn.Linear(3, 3))

    def loss(module, x):
        return module(x).square().sum(1)

    check(module, loss, data(3))
    direct.append(True)
    with pytest.warns(FallbackWarning, match=OUTSIDE):
        check(module, loss, data(3))


def test_a_parameter_of_the_model_itself(check):
    module = Model(lambda self, x: self.a(x) * self.scale, a=nn.Linear(3, 3))
    module.scale = nn.Parameter(data(3)[0])
    with pytest.warns(FallbackWarning, match=r"Model \(no rule\).*scale"):
        check(module, squares, data(3))


def test_a_subclass_with_another_forward_has_no_rule(check):
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Standardised(nn.Conv1d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight - weight.mean(), bias)

    class Named(nn.Linear):
        pass

    module = nn.Sequential(Named(3, 3), Scaled(3, 6), nn.Unflatten(1, (2, 3)), Standardised(2, 2, 2)).double()
    with pytest.warns(FallbackWarning) as caught:
        check(module, squares, data(3))
    assert [str(w.message).split()[3] for w in caught] == ["Scaled", "Standardised"]


def test_an_instance_with_another_forward_has_no_rule(check):
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: F.linear(x, layer.weight) + 2 * layer.bias
    with pytest.warns(FallbackWarning, match="no rule"):
        check(nn.Sequential(layer).double(), squares, data(3))


def test_parametrized_weights(check):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    with pytest.warns(FallbackWarning, match=r"original0 and|original0"):
        check(nn.Sequential(layer, nn.Tanh(), nn.Linear(2, 2)).double(), squares, data(3))


def test_attention_that_uses_its_projections_directly(check):
    module = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).double()
    with pytest.warns(FallbackWarning) as caught:
        check(module, squares, data(5, 4), 1e-9)
    assert len(caught) == 2  # the input projection has no rule, the output projection is used outside of its call


# Other hooks, modes, layouts and passes.


def test_biases_alone(check):
    module = network()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    assert list(check(module, squares, data(2, 5, 5))) == ["0.bias", "1.bias", "4.bias"]


def test_channels_last(check):
    module = network().to(memory_format=torch.channels_last)
    check(module, squares, data(2, 5, 5).contiguous(memory_format=torch.channels_last))


def test_autocast(definition):
    """Errors in bfloat16, activations in float32: the gradient is as good as bfloat16 makes it, and float32."""
    module, batch = network().float(), data(2, 5, 5).float()

    def loss(module, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return module(batch).float().square().sum(1)

    got = per_sample_gradients(module, loss, batch)
    expected = definition(module, squares, batch)
    for name in expected:
        assert got[name].dtype == torch.float32
        assert (got[name] - expected[name]).norm() < 0.03 * expected[name].norm()


def test_hooks_of_others(check):
    module = network()
    module[0].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    module[0].register_forward_hook(lambda layer, args, out: out * 3 + args[0].mean())
    module[4].register_forward_pre_hook(lambda layer, args, kwargs: (args, kwargs), with_kwargs=True)
    check(module, squares, data(2, 5, 5))


def test_an_input_by_keyword(check):
    check(Model(lambda self, x: self.a(input=x), a=nn.Linear(3, 2)), squares, data(3))


def test_checkpointing(check):
    module = network()

    def loss(module, x):
        return module[4](module[3](checkpoint(module[:3], x, use_reentrant=False))).square().sum(1)

    check(module, loss, data(2, 5, 5))


def test_a_pass_without_gradient_before(check):
    module = nn.Sequential(nn.Linear(3, 3)).double()

    def loss(module, x):
        with torch.no_grad():
            guess = module(x)
        return (module(x + guess) - guess).square().sum(1)

    check(module, loss, data(3))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_the_callers_gradient_mode(context, definition):
    module, batch = network(), data(2, 5, 5)
    expected = definition(module, squares, batch)
    with context():
        got = per_sample_gradients(module, squares, batch)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
        assert not got[name].requires_grad


def test_a_loss_that_differentiates_the_model(check):
    """Score matching: the loss holds a derivative of the network."""

    def loss(module, x):
        def potential(x):
            return module(x).square().sum()

        score = torch.func.grad(potential)(x)
        return score.square().flatten(1).sum(1)

    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with pytest.warns(FallbackWarning, match="torch.func transforms"):
        check(module, loss, data(3))


def test_a_loss_that_runs_a_backward_pass():
    """torch.func cannot run autograd.grad either: an error, and not a wrong gradient."""

    def loss(module, x):
        x = x.clone().requires_grad_()
        (score,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return score.square().flatten(1).sum(1)

    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    with pytest.raises(RuntimeError, match=r"torch\.func cannot differentiate"), pytest.warns(FallbackWarning):
        per_sample_gradients(module, loss, data(3))


def test_dropout_with_rules_only():
    module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2)).double()
    batch = data(3)

    def loss(module, batch):
        return module(batch).square().sum(1)

    per_sample_gradients(module, loss, batch)
    torch.manual_seed(5)
    grads = per_sample_gradients(module, loss, batch)
    torch.manual_seed(5)
    total = torch.autograd.grad(loss(module, batch).sum(), list(module.parameters()))
    for got, expected in zip(grads.values(), total, strict=True):
        torch.testing.assert_close(got.sum(0), expected)


def test_the_look_at_two_samples_leaves_the_random_state_alone():
    module, batch = nn.Linear(3, 2).double(), data(3)

    def loss(module, batch):
        return module(batch + torch.randn_like(batch)).square().sum(1)

    results = []
    for _ in range(2):  # the first call looks, the second does not
        torch.manual_seed(1)
        results.append(per_sample_gradients(module, loss, batch)["weight"])
    assert torch.equal(*results)


# Refusals.


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False).eval()])
def test_batch_normalisation_is_refused(norm):
    module = nn.Sequential(nn.Conv2d(2, 4, 3), norm).double()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="BatchNorm2d '1' that normalises with the statistics of the batch"):
        per_sample_gradients(module, squares, data(2, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_batch_normalisation_with_fixed_statistics(check):
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)).double().eval()
    with pytest.warns(FallbackWarning, match="BatchNorm2d"):
        check(module, squares, data(2, 5, 5))


def test_a_model_that_mixes_samples_is_refused():
    module = Model(lambda self, x: (lambda h: h - h.mean(0))(self.a(x)), a=nn.Linear(3, 2))
    with pytest.raises(ValueError, match="loss must treat every sample alone"), pytest.warns(FallbackWarning):
        per_sample_gradients(module, squares, data(3))


@pytest.mark.parametrize(
    ("loss", "batch", "error", "message"),
    [
        (squares, [], ValueError, "batch must hold at least one tensor"),
        (squares, [torch.ones(2, 3), torch.ones(3, 3)], ValueError, r"got shapes \[\[2, 3\], \[3, 3\]\]"),
        (squares, [torch.ones(2, 3), torch.tensor(1.0)], ValueError, "one common leading dimension"),
        (squares, torch.ones(0, 3), ValueError, "one common leading dimension"),
        (squares, [torch.ones(2, 3), object()], TypeError, "got object"),
        (
            lambda m, x: m(x).sum(),
            torch.ones(2, 3),
            ValueError,
            r"loss must return \[B\] or \[B, T\] with B = 2, got \[\]",
        ),
        (lambda m, x: m(x)[:1, 0], torch.ones(2, 3), ValueError, r"got \[1\]"),
        (lambda m, x: m(x)[:, :0], torch.ones(2, 3), ValueError, r"got \[2, 0\]"),
        (lambda m, x: m(x)[:, 0].long(), torch.ones(2, 3), TypeError, r"got torch\.int64"),
        (lambda m, x: 1.0, torch.ones(2, 3), TypeError, "got float"),
        (lambda m, x: m(x).detach()[:, 0], torch.ones(2, 3), ValueError, "must depend on the module's parameters"),
    ],
)
def test_bad_input(loss, batch, error, message):
    with pytest.raises(error, match=message):
        per_sample_gradients(nn.Linear(3, 2), loss, batch)


def test_a_module_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="must have parameters that require a gradient"):
        per_sample_gradients(nn.Linear(3, 2).requires_grad_(False), squares, torch.ones(2, 3))


def test_inference_tensors_are_refused():
    with torch.inference_mode():
        batch = torch.ones(2, 3)
    with pytest.raises(ValueError, match="inference mode"):
        per_sample_gradients(nn.Linear(3, 2), squares, batch)


def test_each_kind_of_module_is_announced_once(recwarn):
    module = nn.Sequential(nn.PReLU(), nn.Linear(3, 3), nn.PReLU()).double()
    for _ in range(2):
        per_sample_gradients(module, squares, data(3))
    per_sample_gradients(nn.Sequential(nn.Linear(3, 3), nn.PReLU()).double(), squares, data(3))
    assert [warning.category for warning in recwarn] == [FallbackWarning]
    assert "PReLU (no rule)" in str(recwarn[0].message) and recwarn[0].filename == __file__
