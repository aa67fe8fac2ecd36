"""dual_forward on a real GPU."""

import copy

import pytest
import torch
from torch import nn

from pyattr.jvp import dual_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.fixture
def unet(monkeypatch) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        resnet_time_scale_shift="scale_shift",
    ).eval()


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-9)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values(unet, dtype, bound, layout):
    x, x_dot = torch.randn(2, 3, 16, 16).to(dtype), torch.randn(20, 2, 3, 16, 16).to(dtype)
    exact = dual_forward(copy.deepcopy(unet).to(dtype).double(), x.double(), x_dot.double(), 5)
    model = copy.deepcopy(unet).to("cuda", dtype, memory_format=layout)
    got = dual_forward(model, x.cuda().to(memory_format=layout), x_dot.cuda(), 5)
    for found, wanted in zip(got, exact, strict=True):
        assert found.dtype == dtype and found.is_cuda
        assert (found.cpu() - wanted).norm() <= bound * wanted.norm()


def test_graph_capture(unet):
    """No operator waits for the device, so that a call can be captured and repeated with other numbers."""
    model, timesteps = unet.cuda(), torch.tensor([5, 5], device="cuda")
    x, x_dot = torch.randn(2, 3, 16, 16, device="cuda"), torch.randn(4, 2, 3, 16, 16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        dual_forward(model, x, x_dot, timesteps)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, y_dot = dual_forward(model, x, x_dot, timesteps)
    x.normal_()
    x_dot.normal_()
    graph.replay()
    wanted, wanted_dot = dual_forward(model, x, x_dot, timesteps)
    assert (y - wanted).norm() <= 1e-6 * wanted.norm()
    assert (y_dot - wanted_dot).norm() <= 1e-6 * wanted_dot.norm()
