"""TRAK's tests of its projectors and of TRAKer, with pyattr.compat.trak.Projector."""

from ..peer import Adapted, Peer

ON_THE_CPU = ("cuda:0", "cpu")
# In place of torchvision's: what a ResNet-18's 11.7 million columns would add is time.
SMALL_NETWORK = """
from collections import OrderedDict


def resnet18():
    nn = ch.nn
    stem = [("conv", nn.Conv2d(3, 16, 3, stride=2)), ("norm", nn.BatchNorm2d(16)), ("relu", nn.ReLU())]
    head = [("pool", nn.AdaptiveAvgPool2d(2)), ("flat", nn.Flatten()), ("fc", nn.Linear(64, 10))]
    return nn.Sequential(OrderedDict(stem + head))
"""

# The first is of the list of shapes for every day, which a second one, of tensors of up to 23 GB, replaces.
EDITS_OF_TEST_JL = (
    ("PARAM = list(\n    product(\n        [123],", "GIANTS = list(\n    product(\n        [123],"),
    ("            (1, int(1e9)),\n", ""),
    # Several pieces from small inputs. Theirs is what 32 bits index, for which ChunkedCudaProjector takes 17 GB.
    ("np.iinfo(np.uint32).max", "2**17"),
    # A projected norm is sqrt(D) times the norm. Over sqrt(F) it is twice it at F = 1049, D = 4096: more than the tolerance.
    ("(p[i] - p[j]).norm() / np.sqrt(input_shape[-1])", "(p[i] - p[j]).norm() / np.sqrt(proj_dim)"),
    # isclose takes less than 1e-8 for 0. One normal number in 10^8 is, and the tests draw millions.
    ("(~ch.isclose(p, ch.zeros_like(p))).all()", "(p != 0).all()"),
)
# What it asks of 3.3 trials in 10 is the sign of a product whose mean is 0: one case in six fails, whoever projects.
A_COIN_TOSS = {"test_orthogonality": "fails by chance; tests/compat/test_trak.py bounds the product's size instead"}

PEER = Peer(
    distribution="traker==0.3.2",
    packages=("numpy<2", "tqdm", "assertpy"),
    tests=(
        Adapted(
            path="tests/test_jl.py",
            edits=(
                ("BasicProjector = CudaProjector", "from pyattr.compat.trak import Projector as BasicProjector"),
                ON_THE_CPU,
                *EDITS_OF_TEST_JL,
            ),
            left_out=A_COIN_TOSS,
        ),
        Adapted(
            path="tests/test_class.py",
            edits=(
                ("from torchvision.models import resnet18\n", ""),
                ("import torch as ch\n", "import torch as ch\n" + SMALL_NETWORK),
                ("grad_dim=11689512", "grad_dim=sum(p.numel() for p in resnet18().parameters())"),
                ("import BasicProjector, NoOpProjector", "import NoOpProjector"),
                ("BasicProjector(", "Projector("),
                ("import logging\n", "import logging\nfrom pyattr.compat.trak import Projector\n"),
                ON_THE_CPU,
                (".cuda()", ""),
            ),
        ),
    ),
)
