"""The stand-ins for sjlt and dattri on a real GPU, against the CPU: sjlt adds in another order there, by another road."""

import pytest
import torch

from pyattr.compat.dattri import random_project
from pyattr.compat.sjlt import SJLTProjection

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
WIDTH = 600_000  # more than one piece of columns


@pytest.mark.parametrize("c, dtype", [(1, torch.float16), (3, torch.bfloat16), (3, torch.float32), (1, torch.float64)])
def test_sjlt_values_and_bits(c, dtype):
    sketch = SJLTProjection(WIDTH, 1000, c)
    x = torch.randn(70, WIDTH, device="cuda", dtype=dtype)
    y = sketch(x)
    on_cpu = SJLTProjection(WIDTH, 1000, c, device="cpu")
    on_cpu.load_state_dict(sketch.state_dict())
    expected = on_cpu(x.cpu().double())
    rounding = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 2**-52}[dtype]
    sums = 2**-20 if dtype != torch.float64 else 2**-48
    bound = rounding * expected.abs() + sums * x.cpu().double().abs().sum(1, keepdim=True) * c**0.5 / 1000
    assert y.dtype == dtype and ((y.cpu().double() - expected).abs() <= bound * 4).all()
    assert torch.equal(sketch(x), y)
    assert torch.equal(torch.cat([sketch(rows) for rows in x.split([1, 64, 5])]), y)
    back = sketch.transpose(y)
    torch.testing.assert_close(back.cpu().double(), on_cpu.transpose(y.cpu().double()), rtol=0, atol=400 * rounding)


def test_sjlt_derivatives():
    sketch = SJLTProjection(30, 8, 2)
    for function, width in ((sketch, 30), (sketch.transpose, 8)):
        x = torch.randn(3, width, dtype=torch.float64, device="cuda", requires_grad=True)
        assert torch.autograd.gradcheck(function, (x,), check_forward_ad=True)


@pytest.mark.parametrize("proj_type", ["identity", "normal", "rademacher", "random_mask", "sjlt", "grass"])
def test_dattri_projects_by_the_matrix_of_the_cpu(proj_type):
    gradients = {"weight": torch.randn(5, 300, 20), "bias": torch.randn(5, 300)}
    options = {"proj_dim": 256, "proj_max_batch_size": 8, "proj_seed": 3, "proj_type": proj_type}
    expected = random_project(gradients, 5, **options)(gradients, 1)
    found = random_project(gradients, 5, device="cuda", **options)(gradients, 1)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-3)
