"""dual_forward on whole models, and its contract."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyattr.diffusion import presets
from pyattr.jvp import dual_forward

pytest.importorskip("diffusers")
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor


def spread(model: nn.Module) -> nn.Module:
    """Weights of norms and biases that are not ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def small_unet(**settings):
    options = dict(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return spread(UNet2DModel(**options | settings))


def conditional_unet(**settings):
    options = dict(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return spread(UNet2DConditionModel(**options | settings))


UNETS = {
    "default": {},
    "scale_shift": {"resnet_time_scale_shift": "scale_shift"},
    "asymmetric_padding": {"downsample_padding": 0, "attention_head_dim": None},
    "resnet_samplers": {"downsample_type": "resnet", "upsample_type": "resnet"},
    "skip_blocks": {
        "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        "norm_num_groups": None,
        "time_embedding_type": "fourier",
        "block_out_channels": (32, 32),
    },
    "fir_blocks": {"act_fn": "gelu", "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
                   "up_block_types": ("UpBlock2D", "ResnetUpsampleBlock2D")},
    "class_labels": {"num_class_embeds": 5, "center_input_sample": True},
}  # fmt: skip


@pytest.mark.parametrize("name", UNETS)
def test_unet(name, agrees, plain):
    model = small_unet(**UNETS[name])
    more = {"class_labels": torch.tensor([1, 4])} if name == "class_labels" else {}
    agrees(model, torch.randn(2, 3, 8, 8), torch.tensor([3, 700]), plain=plain.copy(model), count=2, **more)


def test_the_older_attention_processor(agrees, plain):
    model = small_unet()
    for part in model.modules():
        if hasattr(part, "set_processor"):
            part.set_processor(AttnProcessor())
    agrees(model, torch.randn(2, 3, 8, 8), 5, plain=plain.copy(model), count=2)


@pytest.mark.parametrize("settings", [{}, {"use_linear_projection": True, "mid_block_type": None}], ids=str)
def test_unet_with_text(settings, agrees, plain):
    model = conditional_unet(**settings)
    text, mask = torch.randn(2, 5, 12), torch.tensor([[True, True, False, True, False], [True] * 5])
    agrees(
        model,
        torch.randn(2, 4, 8, 8),
        torch.tensor([3, 700]),
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        plain=plain.copy(model),
        count=2,
    )


def test_network_on_patches(agrees, plain):
    model = spread(presets.unet("mnist-small", size=8))
    agrees(model, torch.randn(2, 1, 8, 8), torch.tensor([3, 700]), plain=plain.copy(model), count=2)


def test_float64(agrees, plain):
    model = small_unet().double()
    agrees(model, torch.randn(2, 3, 8, 8, dtype=torch.float64), 5, plain=plain.copy(model), count=2)


def test_channels_last(agrees, plain):
    model = small_unet().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    agrees(model, x, 5, plain=plain.copy(model), count=2)


def test_transformer(agrees):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval().double()

    def plainly(x):
        def attend(x):
            weight, bias = layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias
            query, key, value = (
                part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (x @ weight.T + bias).chunk(3, -1)
            )
            y = (query @ key.mT / 2).softmax(-1) @ value
            return layer.self_attn.out_proj(y.transpose(1, 2).flatten(2))

        x = layer.norm1(x + attend(x))
        return layer.norm2(x + layer.linear2(layer.linear1(x).relu()))

    agrees(layer, torch.randn(2, 5, 8, dtype=torch.float64), plain=plainly)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(1)
    return small_unet()


@pytest.fixture
def x():
    return torch.randn(1, 3, 8, 8)


def test_one_tangent_is_a_slice_of_many(unet, x):
    x_dot = torch.randn(24, *x.shape)
    y, y_dot = dual_forward(unet, x, x_dot, 5)
    for k in (0, 7, 23):
        one, one_dot = dual_forward(unet, x, x_dot[k : k + 1], 5)
        assert (one - y).norm() <= 1e-6 * y.norm()
        assert (one_dot[0] - y_dot[k]).norm() <= 1e-6 * y_dot[k].norm()


def test_linear_in_the_tangents(unet, x):
    x_dot = torch.randn(2, *x.shape)
    x_dot = torch.cat([x_dot, (2 * x_dot[0] - 3 * x_dot[1])[None]])
    _, y_dot = dual_forward(unet, x, x_dot, 5)
    assert (2 * y_dot[0] - 3 * y_dot[1] - y_dot[2]).norm() <= 1e-5 * y_dot[2].norm()


def test_zero_tangents_give_exact_zeros(unet, x):
    x_dot = torch.randn(3, *x.shape)
    x_dot[1] = 0
    y, y_dot = dual_forward(unet, x, x_dot, 5)
    assert torch.count_nonzero(y_dot[1]) == 0 and torch.count_nonzero(y_dot[[0, 2]]) == 2 * y.numel()
    with torch.no_grad():
        assert (y - unet(x, 5).sample).norm() <= 1e-6 * y.norm()


def test_no_tangents(unet, x):
    y, y_dot = dual_forward(unet, x, torch.empty(0, *x.shape), 5)
    assert y_dot.shape == (0, 1, 3, 8, 8)
    with torch.no_grad():
        assert (y - unet(x, 5).sample).norm() <= 1e-6 * y.norm()


def test_no_images():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 2)
    )
    y, y_dot = dual_forward(model, torch.empty(0, 3, 8, 8), torch.empty(4, 0, 3, 8, 8))
    assert y.shape == (0, 2) and y_dot.shape == (4, 0, 2)


def test_tangents_of_any_strides(unet, x):
    x_dot = torch.randn(3, 2, *x.shape)
    y, y_dot = dual_forward(unet, x, x_dot[:, 1].contiguous(), 5)
    other, other_dot = dual_forward(unet, x, x_dot[:, 1], 5)
    assert torch.equal(y, other) and torch.equal(y_dot, other_dot)
    _, same_dot = dual_forward(unet, x, x_dot[:1, 1].expand(3, *x.shape), 5)
    assert (same_dot - y_dot[0]).norm() <= 1e-6 * same_dot.norm()


def test_nothing_is_kept_or_changed(x):
    model = small_unet()
    before = copy.deepcopy(model.state_dict())
    y, y_dot = dual_forward(model, x.requires_grad_(), torch.randn(2, *x.shape).requires_grad_(), 5)
    assert not y.requires_grad and not y_dot.requires_grad and y.grad_fn is None
    assert type(y) is torch.Tensor and type(y_dot) is torch.Tensor
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_hooks_run(x, unet):
    seen, model = [], copy.deepcopy(unet)
    model.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape)))
    model.conv_out.register_forward_hook(lambda module, inputs, output: output * 2)
    x_dot = torch.randn(2, *x.shape)
    y, y_dot = dual_forward(model, x, x_dot, 5)
    plainly, plainly_dot = dual_forward(unet, x, x_dot, 5)
    assert seen == [(1, 3, 8, 8)]
    assert torch.equal(y, 2 * plainly) and torch.equal(y_dot, 2 * plainly_dot)


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y,), lambda y: [y]], ids=["tensor", "tuple", "list"])
def test_outputs(wrap):
    y, y_dot = dual_forward(lambda x: wrap(x * 2), torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.5, -1.0]]))
    assert y.tolist() == [2.0, 4.0] and y_dot.tolist() == [[2.0, 0.0], [1.0, -2.0]]


def test_an_output_that_does_not_depend_on_x():
    y, y_dot = dual_forward(lambda x: torch.ones(2) + x.detach(), torch.zeros(2), torch.ones(3, 2))
    assert y.tolist() == [1.0, 1.0] and y_dot.tolist() == [[0.0, 0.0]] * 3


def test_decisions_see_the_primal():
    def function(x):
        return x * 2 if x[0] > 0 and float(x.sum()) > 0 and bool((x > -1).all()) else x * 3

    assert dual_forward(function, torch.ones(2), torch.ones(1, 2))[1].tolist() == [[2.0, 2.0]]
    assert dual_forward(function, -torch.ones(2), torch.ones(1, 2))[1].tolist() == [[3.0, 3.0]]


def test_dropout_draws_one_mask():
    model = nn.Dropout(0.5).train()
    y, y_dot = dual_forward(model, torch.ones(64), torch.tensor([[1.0], [3.0]]).expand(2, 64))
    assert set(y.tolist()) == {0.0, 2.0}
    assert torch.equal(y_dot[0], y) and torch.equal(y_dot[1], 3 * y)


def test_scripted_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of TorchScript
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.LazyLinear(2)).eval()
        model(torch.zeros(1, 3, 5, 5))
        scripted = torch.jit.script(model)
    x, x_dot = torch.randn(2, 3, 5, 5), torch.randn(3, 2, 3, 5, 5)
    y, y_dot = dual_forward(model, x, x_dot)
    other, other_dot = dual_forward(scripted, x, x_dot)
    assert torch.equal(y, other) and torch.equal(y_dot, other_dot)


def test_compiled_module():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's compiler
        compiled = torch.compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), backend="eager")
        x = torch.randn(2, 3)
        compiled(x)
        y, y_dot = dual_forward(compiled, x, x[None])
        other, other_dot = dual_forward(compiled._orig_mod, x, x[None])
    assert torch.equal(y, other) and torch.equal(y_dot, other_dot)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_in_any_mode(mode):
    with mode():
        y, y_dot = dual_forward(lambda x: x.sinh() * x, torch.tensor([2.0]), torch.tensor([[1.0], [0.5]]))
    slope = math.sinh(2) + 2 * math.cosh(2)
    assert y.tolist() == pytest.approx([2 * math.sinh(2)]) and y_dot[:, 0].tolist() == pytest.approx([slope, slope / 2])


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x**3

    @staticmethod
    def backward(ctx, grad):
        raise AssertionError("not asked")


def test_autograd_function_is_differentiated_through_its_forward():
    y, y_dot = dual_forward(Cube.apply, torch.tensor([2.0]), torch.tensor([[1.0], [0.5]]))
    assert y.tolist() == [8.0] and y_dot.tolist() == [[12.0], [6.0]]


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.blocks[1].forward = lambda x: function(x)
        self.last = Apply(function)

    def forward(self, x):
        return self.last(x)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_an_operator_without_a_rule_says_so_once():
    model = Block(lambda x: F.glu(x, 0) + F.glu(x * 2, 0))
    x, x_dot = torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    with pytest.warns(UserWarning) as said:
        _, y_dot = dual_forward(model, x, x_dot)
        dual_forward(model, x, x_dot)
    assert [str(one.message) for one in said] == [
        "dual_forward: aten::glu in last (Apply) has no rule of its own; torch.func.jvp does it, slower"
    ]

    def slopes(a, b):
        gate = b.sigmoid()
        return torch.stack([gate, a * gate * (1 - gate)])

    assert torch.allclose(y_dot[:, 0], slopes(x[0], x[1]) + 2 * slopes(2 * x[0], 2 * x[1]))


def test_an_operator_without_any_derivative_is_an_error():
    model = Block(lambda x: torch.cdist(x, x, p=3.0))
    with pytest.raises(NotImplementedError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dual_forward(model, torch.randn(4, 3), torch.randn(2, 4, 3))
    assert str(error.value).startswith(
        "dual_forward: aten::_cdist_forward in last (Apply) has no rule, and torch cannot differentiate it: "
    )


def test_an_operator_that_torch_takes_for_a_constant_is_an_error():
    library = torch.library.Library("pyattr_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CPU")
    with pytest.raises(NotImplementedError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dual_forward(torch.ops.pyattr_test.twice, torch.randn(3), torch.randn(2, 3))
    assert str(error.value).startswith(
        "dual_forward: pyattr_test::twice has no rule, and torch cannot differentiate it: "
    )


def test_batch_norm_in_training_is_an_error():
    with pytest.raises(NotImplementedError) as error:
        dual_forward(nn.BatchNorm2d(3), torch.randn(2, 3, 4, 4), torch.randn(1, 2, 3, 4, 4))
    assert str(error.value) == (
        "dual_forward: batch normalisation in training mode would change its running statistics; call module.eval()"
    )


def test_a_value_kept_from_an_earlier_call_is_an_error():
    kept = []

    def function(x):
        kept.append(x)
        return kept[0] * 2

    dual_forward(function, torch.ones(2), torch.ones(1, 2))
    with pytest.raises(RuntimeError) as error:
        dual_forward(function, torch.ones(2), torch.ones(1, 2))
    assert str(error.value) == (
        "dual_forward: aten.mul.Tensor got a value of an earlier call, which the module has kept; have it keep none"
    )


@pytest.mark.parametrize(("groups", "weight"), [(2, torch.ones(2)), (2, torch.ones(1, 4)), (3, None)], ids=str)
def test_a_group_norm_that_is_none_is_torchs_own_error(groups, weight):
    with pytest.raises(RuntimeError, match=r"Expected (weight|number of channels)"):
        dual_forward(lambda x: F.silu(F.group_norm(x, groups, weight)), torch.randn(1, 4, 3), torch.randn(2, 1, 4, 3))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("norm", [F.group_norm, torch.native_group_norm], ids=["function", "operator"])
def test_a_group_norm_on_another_device_is_an_error(norm, name):
    parts = {"weight": torch.ones(4), "bias": torch.ones(4)}
    parts[name] = parts[name].to("meta")

    def function(x):
        if norm is F.group_norm:
            return F.silu(norm(x, 2, **parts))
        return norm(x, *parts.values(), 1, 4, 3, 2, 1e-5)[0]

    with pytest.raises(ValueError) as error:
        dual_forward(Apply(function), torch.randn(1, 4, 3), torch.randn(2, 1, 4, 3))
    assert str(error.value) == (
        f"dual_forward: {name} of the group normalisation in the module (Apply) must be on cpu as its input is, got meta"
    )


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3, X, X[None]), TypeError, "dual_forward: module must be a torch module or another callable, got int"),
        ((torch.sin, 1.0, X[None]), TypeError, "dual_forward: x must be a torch tensor, got float"),
        ((torch.sin, X.to_sparse(), X[None]), TypeError, "dual_forward: x must be a dense (strided) tensor"),
        ((torch.sin, X, X[None].to_sparse()), TypeError, "dual_forward: x_dot must be a dense (strided) tensor"),
        ((torch.sin, X, [1.0]), TypeError, "dual_forward: x_dot must be a torch tensor, got list"),
        ((torch.sin, X.long(), X[None]), TypeError, "dual_forward: x must be floating point, got torch.int64"),
        ((torch.sin, X, X), ValueError, "dual_forward: x_dot must have shape [K, 2, 3], got [2, 3]"),
        ((torch.sin, X, X[None, :, :2]), ValueError, "dual_forward: x_dot must have shape [K, 2, 3], got [1, 2, 2]"),
        ((torch.sin, X, X[None].double()), TypeError, "dual_forward: x_dot must be torch.float32 as x is, got torch.float64"),
        ((torch.sin, X, X[None].to("meta")), ValueError, "dual_forward: x_dot must be on cpu as x is, got meta"),
        (
            (lambda x: (x, x), X, X[None]),
            TypeError,
            "dual_forward: module must return a tensor, a model output with a sample, or one tensor in a tuple, got tuple",
        ),
    ],
)  # fmt: skip
def test_errors(arguments, kind, message):
    with pytest.raises(kind) as error:
        dual_forward(*arguments)
    assert str(error.value) == message
