"""An unmodified diffusers U-Net with attention, beside ``vmap(grad)``."""

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from pyattr import ops
from pyattr.gradients import per_sample_gradients, project_gradients

diffusers = pytest.importorskip("diffusers")


def make(dtype, batch_size=3):
    torch.manual_seed(3)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=5,
    ).eval()
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)
    batch = {
        "images": torch.randn(batch_size, 1, 16, 16, dtype=dtype),
        "noise": torch.randn(batch_size, 2, 1, 16, 16, dtype=dtype),
        "times": torch.randint(0, 1000, (batch_size, 2)),
        "labels": torch.randint(0, 5, (batch_size,)),
    }
    return unet, batch


def denoising(unet, batch):
    """[B, T]: both timesteps of every sample in one call of the network."""
    size, steps = batch["times"].shape
    noisy = batch["images"][:, None] + batch["noise"]
    labels = batch["labels"].repeat_interleave(steps, 0)
    out = unet(noisy.flatten(0, 1), batch["times"].flatten(), labels).sample
    return (out.unflatten(0, (size, steps)) - batch["noise"]).square().flatten(2).mean(2)


def by_vmap(unet, batch):
    parameters = {name: parameter.detach() for name, parameter in unet.named_parameters()}

    def loss(parameters, sample):
        noisy = sample["images"] + sample["noise"]
        out = functional_call(unet, parameters, (noisy, sample["times"], sample["labels"].expand(2))).sample
        return (out - sample["noise"]).square().flatten(1).mean(1).mean()

    with sdpa_kernel(SDPBackend.MATH):
        return vmap(grad(loss), in_dims=(None, 0))(parameters, batch)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_vmap(dtype, tolerance):
    unet, batch = make(dtype)
    expected = by_vmap(unet, batch)
    got = per_sample_gradients(unet, denoising, batch)
    assert list(got) == [name for name, _ in unet.named_parameters()]
    norm = torch.cat([grads.flatten(1) for grads in expected.values()], 1).norm().item()
    for name, grads in expected.items():
        error = (got[name] - grads).norm().item()
        if name.endswith("to_k.bias"):  # zero but for rounding: a softmax does not see a constant added to its scores
            assert grads.norm().item() < 1e-6 * norm and error < tolerance * norm
        else:
            assert error < tolerance * grads.norm().item(), name


def test_streams_into_a_projection():
    unet, batch = make(torch.float32)
    grads = per_sample_gradients(unet, denoising, batch)
    expected = ops.rademacher_project(torch.cat([g.flatten(1) for g in grads.values()], 1), 64, seed=7)
    for memory in (2 << 30, 3 << 20):
        got = project_gradients(unet, denoising, batch, 64, seed=7, memory=memory)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_frozen_parameters_are_left_out():
    unet, batch = make(torch.float64)
    expected = per_sample_gradients(unet, denoising, batch)
    unet.requires_grad_(False)
    unet.mid_block.requires_grad_(True)
    got = per_sample_gradients(unet, denoising, batch)
    assert list(got) == [name for name in expected if name.startswith("mid_block.")]
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("use_checkpoints", [False, True])
def test_training_mode_with_gradient_checkpointing(use_checkpoints):
    unet, batch = make(torch.float64)
    expected = per_sample_gradients(unet, denoising, batch)
    unet.train()
    if use_checkpoints:
        unet.enable_gradient_checkpointing()
    got = per_sample_gradients(unet, denoising, batch)
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-10, atol=1e-12)
