"""Per-sample gradients of U-Nets beside vmap(grad) and Opacus, in images per second, with the peak memory of each.

``python -m bench.bench_gradients ROW COLUMN`` runs one contender once and prints the MiB that it took at most.
"""

import copy
import functools
import sys
from dataclasses import dataclass

import diffusers
import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contenders import Here
from bench.figures import Goal, lead
from bench.memory import peak_mib, print_peak
from pyattr import ops
from pyattr.gradients import per_sample_gradients, project_gradients

SEED, PROJ_DIM = 5, 1024

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # Opacus's hooks on the first layer


@dataclass(frozen=True)
class Setting:
    """A U-Net and a batch: B images with T timesteps each."""

    channels: tuple[int, ...]
    size: int
    image_channels: int
    batch: int
    steps: int = 1
    layers: int = 1

    @functools.cached_property
    def unet(self):
        torch.manual_seed(SEED)
        levels = len(self.channels) - 1
        return diffusers.UNet2DModel(
            sample_size=self.size,
            in_channels=self.image_channels,
            out_channels=self.image_channels,
            layers_per_block=self.layers,
            block_out_channels=self.channels,
            down_block_types=("DownBlock2D",) * levels + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * levels,
            attention_head_dim=None,
            norm_num_groups=32,
        ).eval()

    @functools.cached_property
    def data(self) -> dict[str, torch.Tensor]:
        torch.manual_seed(SEED)
        shape = (self.image_channels, self.size, self.size)
        return {
            "images": torch.randn(self.batch, *shape),
            "noise": torch.randn(self.batch, self.steps, *shape),
            "times": torch.randint(0, 1000, (self.batch, self.steps)),
        }

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.unet.parameters())


SETTINGS = {
    "MNIST, B=16": Setting((32, 64, 64), 28, 1, 16),
    "MNIST, B=4, T=8": Setting((32, 64, 64), 28, 1, 4, steps=8),
    "latents, B=8": Setting((64, 128, 256, 256), 16, 4, 8, layers=2),
    "latents, B=4, T=4": Setting((64, 128, 256, 256), 16, 4, 4, steps=4, layers=2),
    "CIFAR, B=4": Setting((128, 256, 256, 256), 32, 3, 4, layers=2),
}


def denoising(unet, data):
    """The training loss of every image and timestep: [B, T] from one call of the network on B * T images."""
    noisy = (data["images"][:, None] + data["noise"]).flatten(0, 1)
    out = unet(noisy, data["times"].flatten()).sample.unflatten(0, data["times"].shape)
    return (out - data["noise"]).square().flatten(2).mean(2)


def ours(setting: Setting) -> dict[str, torch.Tensor]:
    return per_sample_gradients(setting.unet, denoising, setting.data)


def by_vmap(setting: Setting, data=None) -> dict[str, torch.Tensor]:
    """torch.func as its documentation writes it; attention in plain operations, the only way it runs."""
    unet = setting.unet
    parameters = {name: parameter.detach() for name, parameter in unet.named_parameters()}

    def loss(parameters, sample):
        sample = {name: tensor.unsqueeze(0) for name, tensor in sample.items()}
        return denoising(lambda *inputs: functional_call(unet, parameters, inputs), sample).mean()

    with sdpa_kernel(SDPBackend.MATH):
        return vmap(grad(loss), in_dims=(None, 0))(parameters, data or setting.data)


def by_vmap_in_a_loop(setting: Setting) -> dict[str, torch.Tensor]:
    """A timestep at a time, summed, as TRAK and D-TRAK are used on diffusion models."""
    total, data = {}, setting.data
    for t in range(setting.steps):
        step = {"images": data["images"], "noise": data["noise"][:, t : t + 1], "times": data["times"][:, t : t + 1]}
        for name, grads in by_vmap(setting, step).items():
            total[name] = total[name].add_(grads) if name in total else grads
    return {name: grads.div_(setting.steps) for name, grads in total.items()}


@functools.cache
def _opacus(setting: Setting):
    from opacus.grad_sample import GradSampleModule

    # It records nothing in evaluation mode; these networks drop nothing out, so training mode computes the same.
    module = copy.deepcopy(setting.unet).train()
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(lambda layer, inputs: (inputs[0].contiguous(),))
    return GradSampleModule(module, loss_reduction="sum")


def by_opacus(setting: Setting) -> dict[str, torch.Tensor]:
    module = _opacus(setting)
    for parameter in module.parameters():
        parameter.grad = parameter.grad_sample = None
    denoising(module, setting.data).mean(1).sum().backward()
    return {name.removeprefix("_module."): p.grad_sample for name, p in module.named_parameters()}


def of_the_sum(setting: Setting) -> torch.Tensor:
    """An ordinary training step's passes, whose gradient is the batch's alone: a yardstick that owes nobody a gradient for
    each sample."""
    loss = denoising(setting.unet, setting.data).mean(1).sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(setting.unet.parameters()))])


ORDINARY = "torch.autograd.grad, the batch's sum alone"
ROWS = {
    "pyattr per_sample_gradients": ours,
    "torch.func vmap(grad)": by_vmap,
    "torch.func vmap(grad), a timestep at a time": by_vmap_in_a_loop,
    "Opacus GradSampleModule": by_opacus,
    ORDINARY: of_the_sum,
}


def ours_projected(setting: Setting) -> torch.Tensor:
    return project_gradients(setting.unet, denoising, setting.data, PROJ_DIM)


def vmap_projected(setting: Setting) -> torch.Tensor:
    """The whole gradient first, then the same projection."""
    return ops.rademacher_project(torch.cat([g.flatten(1) for g in by_vmap(setting).values()], 1), PROJ_DIM)


PROJECTED_ROWS = {
    "pyattr project_gradients": ours_projected,
    "torch.func vmap(grad), then rademacher_project": vmap_projected,
}


@functools.cache
def expected(setting: Setting) -> torch.Tensor:
    """The flat gradients of the first and the last image by definition, and of the sum of all: [3, P]."""
    rows = []
    for part in (slice(0, 1), slice(-1, None), slice(None)):
        data = {name: tensor[part] for name, tensor in setting.data.items()}
        total = denoising(setting.unet, data).mean(1).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(total, list(setting.unet.parameters()))]))
    return torch.stack(rows)


def check_whole(setting: Setting):
    def check(answer: dict[str, torch.Tensor]):
        names = [name for name, _ in setting.unet.named_parameters()]
        got = torch.stack(
            [torch.cat([of(answer[name]).flatten() for name in names]) for of in (_first, _last, lambda g: g.sum(0))]
        )
        _close(got, expected(setting))

    return check


def check_sum(setting: Setting):
    def check(answer: torch.Tensor):
        _close(answer[None], expected(setting)[2:])

    return check


def check_projected(setting: Setting):
    def check(answer: torch.Tensor):
        got = torch.stack([answer[0], answer[-1], answer.sum(0)])
        _close(got, ops.rademacher_project(expected(setting), PROJ_DIM))

    return check


def _first(grads):
    return grads[0]


def _last(grads):
    return grads[-1]


def _close(got: torch.Tensor, wanted: torch.Tensor):
    error = ((got - wanted).norm(dim=1) / wanted.norm(dim=1)).max().item()
    assert error < 1e-4, f"differs from the definition by {error:.2g} of its norm"


def main(row: str, column: str):
    setting = SETTINGS[column]
    denoising(setting.unet, setting.data)  # what a first forward pass loads and keeps is no contender's
    print_peak(lambda: (ROWS | PROJECTED_ROWS)[row](setting))


GOALS = [
    Goal(
        "gradients",
        f"{column}: at least 2 times vmap(grad)",
        lead("pyattr per_sample_gradients", "torch.func vmap(grad)", column),
        2,
    )
    for column in SETTINGS
]


def _measure(measure, leave_out, table, rows, row, column, check, unit_bytes):
    setting = SETTINGS[column]
    if row.startswith("Opacus"):
        if setting.steps > 1:
            leave_out(table, row, column, "Opacus counts rows, and would take each timestep for a sample of its own")
        try:
            import opacus  # noqa: F401
        except ImportError:
            leave_out(table, row, column, "Opacus is not installed (pyattr[dev])")
    if "at a time" in row and setting.steps == 1:
        pytest.skip("one timestep: the same as vmap(grad)")
    call = rows[row]
    measure(
        Here(lambda: call(setting)),
        check=check(setting),
        table=table,
        row=row,
        column=column,
        ours=row.startswith("pyattr"),
        work=setting.batch * setting.steps,
        unit="images through the network",
        bytes=unit_bytes(setting),
        note="convolutions given contiguous inputs: it reads others wrongly" if row.startswith("Opacus") else "",
        rounds=7,
        extra=peak_mib("bench_gradients", row, column),
    )


@pytest.mark.parametrize("column", SETTINGS)
@pytest.mark.parametrize("row", ROWS)
def test_gradients(row, column, measure, leave_out):
    check = check_sum if row == ORDINARY else check_whole
    _measure(measure, leave_out, "gradients", ROWS, row, column, check, lambda s: 4 * s.batch * s.parameters)


@pytest.mark.parametrize("column", ["MNIST, B=16", "latents, B=8"])
@pytest.mark.parametrize("row", PROJECTED_ROWS)
def test_project_gradients(row, column, measure, leave_out):
    _measure(
        measure, leave_out, "project_gradients", PROJECTED_ROWS, row, column, check_projected,
        lambda s: 4 * s.parameters + 4 * s.batch * PROJ_DIM,
    )  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
